"""What the app does with a model, without the page around it: write a text, then find what it cost."""

from __future__ import annotations

import html
import io
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikedecoder import viz
from spikedecoder.app.models import Loaded
from spikedecoder.energy import Comparison, Ledger, compare
from spikedecoder.energy.units import si
from spikedecoder.generation import Prediction, SamplingParams, encode_prompt, start_token, stream_tokens
from spikedecoder.generation.sampling import fresh_seed
from spikedecoder.generation.stats import TextCost, text_cost, windows
from spikedecoder.generation.window import Context
from spikedecoder.spike_stats import spiking_layers
from spikedecoder.viz import Activity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TOKENS = 1000
_CANDIDATES = 12  # for each token, in the heat map
_SHOWN = 40  # the last tokens, shown in heat map and raster: more would be illegible
VIEWS = ("raster", "attention", "membrane potentials")
_DRAWING = threading.Lock()  # one figure at a time: matplotlib's settings belong to the process


@dataclass(frozen=True)
class Settings:
    """How to write. top_k 0: all tokens; seed None: a fresh one. drop: leave out unknown characters."""

    tokens: int = 120
    temperature: float = 0.8
    top_k: int = 0
    seed: int | None = None
    drop: bool = False

    def sampling(self) -> SamplingParams:
        seed = fresh_seed() if self.seed is None else self.seed
        return SamplingParams(self.temperature, self.top_k or None, seed=seed)


@dataclass
class Written:
    """A growing text.

    prompt, tokens: ids of the prompt and of what was written. before, after: their text. predictions: the
    most probable candidates for each of `tokens`. seconds: the time that writing took so far.
    """

    prompt: list[int]
    before: str
    tokens: list[int] = field(default_factory=list)
    predictions: list[list[Prediction]] = field(default_factory=list)
    after: str = ""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.before + self.after

    @property
    def speed(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def write(loaded: Loaded, prompt: str, settings: Settings) -> Iterator[Written]:
    """Yield the text after each new token, always the same object.

    Raises ValueError for a number of tokens out of range and for a prompt that the model cannot read.
    """
    if not isinstance(settings.tokens, int) or not 1 <= settings.tokens <= MOST_TOKENS:
        raise ValueError(f"tokens: got {settings.tokens!r}, takes 1 to {MOST_TOKENS}")
    model, tokenizer = loaded.model, loaded.model.tokenizer
    ids = encode_prompt(
        tokenizer, prompt, "drop" if settings.drop else "strict", way_out="a box under More leaves them out"
    )
    written = Written(ids or [start_token(model)], tokenizer.decode(ids) if ids else "")
    begin = time.perf_counter()
    for new in stream_tokens(model, tokenizer, ids, settings.tokens, settings.sampling(), top=_CANDIDATES):
        written.tokens.append(new.token)
        written.predictions.append(new.predictions)
        written.after += new.text
        written.seconds = time.perf_counter() - begin
        yield written


@dataclass
class Observation:
    """What the neurons did while a text was read and written.

    activity: on the last window that was read, which is the whole text if it fits the context; None if no
    neuron spikes. labels: the last tokens of that window, for the pictures that show single tokens.
    """

    written: Written
    cost: TextCost
    activity: Activity | None
    labels: list[str]
    name: str

    @property
    def layers(self) -> list[str]:
        return list(self.activity.spikes) if self.activity is not None else []

    @property
    def summary(self) -> str:
        """One line of figures."""
        w, estimate = self.written, self.cost.ledger.joules()
        rate = self.cost.spike_rate
        fired = "no spikes" if rate is None else f"mean spike rate {rate:.1%}"
        return (
            f"{len(w.tokens)} tokens in {w.seconds:.2f} s ({w.speed:,.0f} tokens/s) · {fired} · "
            f"{si(estimate.per_token)} a token read, estimated ({estimate.table}, fp32, arithmetic alone)"
        )


def observe(loaded: Loaded, written: Written) -> Observation:
    """Read the text once more and record the neurons. Exact: both forms of the model spike alike."""
    model = loaded.watched
    names = model.tokenizer.tokens
    *_, (window, _known) = windows(written.prompt, written.tokens, Context.of(model, None, "slide"))
    with loaded.lock:
        cost = text_cost(model, [written.prompt], [written.tokens])
        spikes = any(spiking_layers(model))
        read = torch.tensor([window])
        activity = viz.record(model, read, potentials=True, scores=True) if spikes else None
    return Observation(written, cost, activity, [names[i] for i in window[-_SHOWN:]], loaded.label)


def predictions_figure(loaded: Loaded, written: Written) -> Figure:
    names = loaded.model.tokenizer.tokens
    tokens, predictions = written.tokens[-_SHOWN:], written.predictions[-_SHOWN:]
    return viz.predictions(tokens, predictions, names, rows=_CANDIDATES)


def layer_figure(seen: Observation, view: str, layer: str) -> Figure:
    """The raster of a layer, or the attention scores or membrane potentials of the layer's block."""
    assert seen.activity is not None
    labels = seen.labels
    activity = seen.activity.last(len(labels))
    if view == VIEWS[0]:
        return viz.raster(activity, layer, labels=labels, columns=2)
    block = ".".join(layer.split(".")[:2])
    if view == VIEWS[1]:
        near = [name for name in activity.scores if _is_within(name, block)]
        return viz.attention_map(activity, next(iter([*near, *activity.scores])), labels=labels)
    return viz.potentials(seen.activity, [name for name in activity.potentials if _is_within(name, block)])


def _is_within(layer: str, block: str) -> bool:
    return f"{layer}.".startswith(f"{block}.")


def run_of(path: str) -> Path | None:
    """The training run that a model's folder belongs to, if its metrics are there."""
    folder = Path(path)
    return next((f for f in (folder, folder.parent) if (f / "metrics.jsonl").is_file()), None)


def energy_of(ledgers: Mapping[str, Ledger], memory: bool) -> Comparison:
    return compare(ledgers, memory=memory)


def picture(make: Any, *arguments: Any, **options: Any) -> Any:
    """The figure that `make(...)` draws, as an image; one at a time."""
    from PIL import Image

    with _DRAWING:
        image = Image.open(io.BytesIO(viz.render(make(*arguments, **options))))
        image.load()
        return image


def cards(texts: Sequence[tuple[str, str, str]]) -> str:
    """Texts side by side as HTML: (title, text, a line of figures) each."""
    parts = []
    for title, text, figures in texts:
        title, text, figures = (html.escape(part) for part in (title, text, figures))
        parts.append(
            f'<div class="card"><h4>{title}</h4><p class="written">{text}</p>'
            f'<p class="figures">{figures}</p></div>'
        )
    return f'<div class="cards">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Figures as an HTML table."""
    lines = [(head, "th"), *((row, "td") for row in rows)]
    cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for row, tag in lines]
    return f'<div class="figures-table"><table>{"".join(f"<tr>{line}</tr>" for line in cells)}</table></div>'
