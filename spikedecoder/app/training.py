"""Training a small model from the app, for those who have none yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.data import prepare_corpus
from spikedecoder.kinds import KINDS
from spikedecoder.training import Evaluation, Reporter, TrainConfig, TrainResult, free_folder, train

_ONE = threading.Lock()  # one training at a time: it sets the threads of the whole process
_STOP = threading.Event()  # set from any tab
_SECONDS = 0.25  # between two updates of the progress

Tell = Callable[[float, str], None]  # (share done, what to say)


def stop_training() -> None:
    """End the training in progress, if there is one, and save what it has."""
    _STOP.set()


def finish_training(seconds: float) -> None:
    """`stop_training`, and wait up to so many seconds until that is done."""
    stop_training()
    if _ONE.acquire(timeout=seconds):
        _ONE.release()


def train_small(kind: str, tokens: str, steps: int, parent: Path, tell: Tell) -> TrainResult | None:
    """Train the small default model of a kind on the built-in text, into a new folder in `parent`.

    tokens: "characters" or "words". `stop_training` ends it early; returns None if it was called before the
    first step.

    Raises ValueError (bad arguments, another training in progress), and what `spikedecoder.training.train`
    raises.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {', '.join(KINDS)}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, takes an integer >= 1")
    words = tokens == "words"
    if not _ONE.acquire(blocking=False):
        raise ValueError("a model is being trained already, perhaps from another tab; wait, or stop it")
    try:
        _STOP.clear()
        settings = TrainConfig(
            steps=steps,
            lr=2e-3 if kind == "non-spiking" else 4e-3,
            eval_every=max(1, steps // 4),
            eval_tokens=5000,
            tokenizer="word" if words else "char",
            min_count=3 if words else 1,
        )
        tell(0.0, "reading the text")
        corpus = prepare_corpus(tokenizer=settings.tokenizer, min_count=settings.min_count)
        if _STOP.is_set():
            return None
        vocabulary = {"vocab_size": corpus.tokenizer.vocab_size, "pad_id": corpus.tokenizer.pad_id}
        shape = {"max_len": 64} if words else {}
        config = SpikeDecoderConfig.preset("default-lif", **vocabulary, **shape, **KINDS[kind])
        out = free_folder(f"{kind}-{tokens}".replace(" ", "-"), corpus.name, parent)
        return train(config, corpus, settings, out=out, reporter=_Progress(tell))
    finally:
        _ONE.release()


class _Progress(Reporter):
    def __init__(self, tell: Tell) -> None:
        self.tell, self.last, self.bits = tell, 0.0, ""

    def asks_to_stop(self) -> bool:
        return _STOP.is_set()

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        self.steps, self.begin = steps, time.monotonic()

    def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        now = time.monotonic()
        if now - self.last < _SECONDS and step < self.steps:
            return
        self.last = now
        left = (now - self.begin) / step * (self.steps - step)
        said = f"step {step} of {self.steps}, {left:.0f} s left" + self.bits
        if loss is not None:
            said += f", loss {loss:.2f}"
        self.tell(step / self.steps, said)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.bits = f", held-out {evaluation.bits:.2f} bits"
