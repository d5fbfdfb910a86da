"""What the controls of the page do."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from spikedecoder import viz
from spikedecoder.app.models import TOKENS, Found, Library
from spikedecoder.app.training import train_small
from spikedecoder.app.writing import (
    Observation,
    Settings,
    cards,
    energy_of,
    layer_figure,
    observe,
    picture,
    predictions_figure,
    run_of,
    table,
    write,
)
from spikedecoder.energy.units import si
from spikedecoder.kinds import KINDS
from spikedecoder.ops import BackendError
from spikedecoder.training import TrainingError

MOST_COMPARED = 4
_REFRESH = 0.06  # seconds between two updates of a growing text
_COLUMNS = ("model", "kind", "spike rate", "energy a token", "energy a character", "tokens/s")
_NO_SPIKES = "This model has no spiking neurons, so there are no spikes to show."
_PROGRESS = gr.Progress()  # Gradio finds it as a default argument, and passes one that the page shows


@dataclass
class Session:
    """The state of one browser tab: nothing here is shared with another."""

    observation: Observation | None = None
    ledgers: dict[str, Any] = field(default_factory=dict)  # of the models compared
    stop: bool = False  # set by the button


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors that the user can fix into messages on the page."""
    faults = (ValueError, TypeError, OSError, TrainingError, BackendError, MemoryError)

    def message(error: BaseException) -> gr.Error:
        return gr.Error(" ".join(str(error).split()) or type(error).__name__, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except faults as error:
                raise message(error) from error

        return generator

    @functools.wraps(function)
    def plain(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except faults as error:
            raise message(error) from error

    return plain


class Handlers:
    """What the controls do. Each takes the values of controls and returns updates for others."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def choices(self, tokens: str, kind: str, current: str | None = None) -> tuple[Any, ...]:
        """(checkpoint list, offer to train, the text above it) for the models that are on disk now."""
        found = self.library.find(kind, tokens)
        paths = [m.path for m in found]
        value = current if current in paths else (paths[0] if paths else None)
        anything = bool(found) or bool(self.library.find())
        where = ", ".join(map(str, self.library.roots))
        if found:
            offer = f"Another {kind} model of {tokens}:"
        elif anything:
            offer = f"No {kind} model of {tokens} in {where} yet. Train a small one first:"
        else:
            offer = f"No trained model in {where} yet. Train the small default first, which takes minutes:"
        box = gr.Dropdown(choices=[(m.label, m.path) for m in found], value=value)
        return box, gr.skip() if found else gr.Accordion(open=True), offer

    def begin(self) -> tuple[Any, ...]:
        """The state of the controls for a new tab: the first model found is chosen."""
        models = self.library.find()
        first = models[0] if models else Found("", "", next(iter(KINDS)), TOKENS[0])
        found = self.choices(first.tokens, first.kind)
        return first.tokens, first.kind, *found, self.comparable()

    def comparable(self) -> Any:
        models = self.library.find()
        return gr.Dropdown(choices=[(f"{m.label} ({m.kind}, {m.tokens})", m.path) for m in models])

    @staticmethod
    def settings(
        tokens: float, temperature: float | None, top_k: float | None, seed: float | None, drop: bool
    ) -> Settings:
        if temperature is None:
            raise ValueError("temperature: got nothing, takes a number >= 0")
        return Settings(
            _whole("tokens", tokens) or 0,
            float(temperature),
            _whole("top k", top_k) or 0,
            _whole("seed", seed),
            drop,
        )

    def about(self, path: str | None) -> str:
        return self.library.get(path).about if path else ""

    def write(
        self, session: Session, path: str | None, prompt: str, memory: bool, view: str, *how: Any
    ) -> Iterator[tuple[Any, ...]]:
        """The text as it is generated; then heat map, spikes and energy."""
        session.stop, session.observation = False, None
        loaded, written, last = self.library.get(path), None, 0.0
        same = gr.skip()
        for written in write(loaded, prompt or "", self.settings(*how)):
            if session.stop:
                break
            if time.monotonic() - last > _REFRESH:
                last = time.monotonic()
                yield session, written.text, f"{len(written.tokens)} tokens …", *(same,) * 7
        assert written is not None
        yield session, written.text, f"{len(written.tokens)} tokens; looking at the spikes …", *(same,) * 7
        seen = session.observation = observe(loaded, written)
        layer = seen.layers[0] if seen.layers else None
        yield (
            session,
            written.text,
            seen.summary,
            picture(predictions_figure, loaded, written),
            gr.Dropdown(choices=seen.layers, value=layer, visible=bool(seen.layers)),
            self.layer(session, view, layer),
            gr.Image(picture(viz.spike_rates, seen.activity), visible=True)
            if seen.activity is not None
            else gr.Image(visible=False),
            "" if seen.layers else _NO_SPIKES,
            self.energy(session, memory),
            self.energy_note(session, memory),
        )

    @staticmethod
    def layer(session: Session, view: str, layer: str | None) -> Any:
        seen = session.observation
        if seen is None or seen.activity is None or layer not in seen.layers:
            return gr.Image(visible=False)
        return gr.Image(picture(layer_figure, seen, view, layer), visible=True)

    @staticmethod
    def curves(path: str | None) -> tuple[Any, str]:
        """The loss curves of the model's training, if its run's metrics are beside it."""
        run = run_of(path) if path else None
        if run is None:
            return gr.Image(visible=False), "No record of its training lies beside this model."
        return gr.Image(picture(viz.loss_curves, [run]), visible=True), ""

    @staticmethod
    def energy(session: Session, memory: bool) -> Any:
        seen = session.observation
        if seen is None:
            return None
        return picture(viz.energy_bars, energy_of({seen.name: seen.cost.ledger}, memory))

    @staticmethod
    def energy_note(session: Session, memory: bool) -> str:
        seen = session.observation
        if seen is None:
            return ""
        comparison = energy_of({seen.name: seen.cost.ledger}, memory)
        lines = [
            f"From the spikes of the {seen.cost.tokens} tokens that were read to write this text. "
            "Every figure is an estimate; it rests on this:"
        ]
        return "\n".join([*lines, "", *(f"- {line}" for line in comparison.assumptions)])

    def compare(
        self, session: Session, paths: list[str] | None, prompt: str, memory: bool, *how: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Give the same prompt to several models, one after another."""
        session.stop = False
        if not paths:
            raise ValueError("models: got none, takes one to four from the list")
        if len(paths) > MOST_COMPARED:
            raise ValueError(f"models: got {len(paths)}, takes up to {MOST_COMPARED}")
        settings = self.settings(*how)
        texts: list[tuple[str, str, str]] = []
        rows: list[list[str]] = []
        ledgers: dict[str, Any] = {}
        for path in paths:
            loaded, written, last = self.library.get(path), None, 0.0
            for written in write(loaded, prompt or "", settings):
                if session.stop:
                    break
                if time.monotonic() - last > 3 * _REFRESH:
                    last = time.monotonic()
                    growing = (loaded.label, written.text, f"{len(written.tokens)} tokens …")
                    yield session, cards([*texts, growing]), gr.skip()
            assert written is not None
            seen = observe(loaded, written)
            texts.append((loaded.label, written.text, seen.summary))
            ledgers[loaded.label] = seen.cost.ledger
            joules = seen.cost.ledger.joules(memory=memory)
            characters = max(1, len(written.text)) / (len(written.prompt) + len(written.tokens))
            rate = seen.cost.spike_rate
            rows.append(
                [
                    loaded.label,
                    loaded.about.partition(",")[0],
                    "-" if rate is None else f"{rate:.1%}",
                    si(joules.per_token),
                    si(joules.per_token / characters),
                    f"{written.speed:,.0f}",
                ]
            )
            if session.stop:
                break
        session.ledgers = ledgers
        bars = picture(viz.energy_bars, energy_of(ledgers, memory))
        yield session, cards(texts) + table(_COLUMNS, rows), bars

    @staticmethod
    def stop(session: Session) -> Session:
        session.stop = True
        return session

    def train(self, tokens: str, kind: str, steps: float, progress: Any = _PROGRESS) -> tuple[Any, ...]:
        result = train_small(
            kind,
            tokens,
            _whole("steps", steps) or 0,
            self.library.roots[0],
            lambda share, said: progress(share, desc=said),
        )
        if result is None:
            return *self.choices(tokens, kind), self.comparable(), "Stopped before the first step."
        said = f"Trained: {result.out}"
        if result.interrupted:
            said = f"Stopped at step {result.step} of {result.steps}, and saved: {result.out}"
        gr.Info(said)
        return *self.choices(tokens, kind, str(result.out)), self.comparable(), said


def _whole(name: str, value: float | None) -> int | None:
    """A number box's value as an integer; None if it is empty."""
    if value is None:
        return None
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{name}: got {value}, takes a whole number")
    return int(value)


def told_with_progress(train: Callable[..., Any]) -> Callable[..., Any]:
    """`told`, with the default argument through which Gradio passes a progress bar."""
    inner = told(train)

    def run(tokens: str, kind: str, steps: float, progress: Any = _PROGRESS) -> Any:
        return inner(tokens, kind, steps, progress)

    return run
