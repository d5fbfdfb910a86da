"""Logits for the next token from the whole context, read anew for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder


class LogitSource(Protocol):
    """What generation asks of a model: logits for the next token of each of B sequences."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts (none empty); logits [B, V]."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; logits [B, V]."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""


class Window:
    """A `LogitSource` that runs the model's parallel forward over each sequence's window.

    Sequences of unequal length are padded on the right: the model is causal, so what stands behind a
    sequence's last token cannot reach it, and each sequence gets the logits it would get alone (to the
    rounding of matrix products of another size). A sequence that has outgrown the context, of max_len
    tokens, is cut to its last `keep`; positions start again from 0 there.
    """

    def __init__(self, model: SpikeDecoder, keep: int | None = None) -> None:
        self.model, self.keep = model, kept(model, keep)
        self.windows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.windows = [self._cut(list(prompt)) for prompt in prompts]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        self.windows = [self._cut([*w, token]) for w, token in zip(self.windows, tokens, strict=True)]
        return self._logits()

    def select(self, rows: Sequence[int]) -> None:
        self.windows = [self.windows[i] for i in rows]

    def _cut(self, window: list[int]) -> list[int]:
        return cut(window, self.model.config.max_len, self.keep)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        lengths = [len(w) for w in self.windows]
        padded = [w + [0] * (max(lengths) - len(w)) for w in self.windows]
        tokens = torch.tensor(padded, device=self.model.device)
        with evaluating(self.model):
            logits = self.model(tokens)
        return logits[torch.arange(len(lengths)), torch.tensor(lengths) - 1]


def kept(model: SpikeDecoder, keep: int | None) -> int:
    """How many tokens stay of a sequence that has outgrown the context; half of it if None."""
    longest = model.config.max_len
    keep = max(1, longest // 2) if keep is None else keep
    if not isinstance(keep, int) or not 1 <= keep <= longest:
        raise ValueError(f"keep: got {keep!r}, takes an integer from 1 to max_len = {longest}")
    return keep


def cut(window: list[int], longest: int, keep: int) -> list[int]:
    """The last `keep` tokens of a window that is longer than `longest`, else all of it."""
    return window if len(window) <= longest else window[-keep:]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode behind."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
