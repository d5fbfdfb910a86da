"""Logits for the next token from the whole context, read anew for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from spikedecoder.nn.evaluating import evaluating

if TYPE_CHECKING:
    from spikedecoder.config import SpikeDecoderConfig
    from spikedecoder.model import SpikeDecoder

PAST = ("slide", "continue")


class LogitSource(Protocol):
    """What generation asks of a model: logits for the next token of each of B sequences, at first none."""

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read more sequences (none empty), which come after those there are; their logits [n, V]."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; logits [B, V]."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, perhaps none."""


def endless(config: SpikeDecoderConfig) -> bool:
    """Whether positions beyond max_len exist and cost no more memory: static ones, spiking attention."""
    one_hot = config.token_encoding == "one-hot" and not config.ann_embedding
    return config.spiking_attention and config.position_encoding == "static" and not one_hot


@dataclass(frozen=True)
class Context:
    """What becomes of a sequence of more than `longest` tokens; see `generate`'s `past` and `keep`."""

    longest: int
    keep: int
    past: str

    @classmethod
    def of(cls, model: SpikeDecoder, keep: int | None, past: str) -> Context:
        longest = model.config.max_len
        if past not in PAST:
            raise ValueError(f"past: got {past!r}, takes one of {', '.join(PAST)}")
        if past == "continue" and not endless(model.config):
            raise ValueError(
                "past: got 'continue', takes 'slide' with this model: only spiking attention with static "
                f"positions goes on in constant memory (this one: spike_degree {model.config.spike_degree}, "
                f"{model.config.token_encoding} tokens, {model.config.position_encoding} positions)"
            )
        if past == "continue" and keep is not None:
            raise ValueError(f"keep: got {keep!r}, takes None where past is 'continue': nothing is cut")
        keep = max(1, longest // 2) if keep is None else keep
        if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= longest:
            raise ValueError(f"keep: got {keep!r}, takes an integer from 1 to max_len = {longest}")
        return cls(longest, keep, past)

    def cut(self, window: list[int]) -> list[int]:
        """The last `keep` tokens of a window that is too long, else all of it."""
        slides = self.past == "slide" and len(window) > self.longest
        return window[-self.keep :] if slides else window


class Window:
    """A `LogitSource` that runs the model's parallel forward over each sequence's window.

    The definition that `Recurrent` is tested against. Sequences of unequal length are padded on the right:
    the model is causal, so what stands behind a sequence's last token cannot reach it, and each sequence gets
    the logits it would get alone (to the rounding of matrix products of another size). A sequence that has
    outgrown the context is cut as `Context` says; positions start again from 0 there.
    """

    def __init__(self, model: SpikeDecoder, keep: int | None = None, past: str = "slide") -> None:
        self.model, self.context = model, Context.of(model, keep, past)
        self.modules = list(model.modules())
        self.windows: list[list[int]] = []

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        new = [self.context.cut(list(prompt)) for prompt in prompts]
        self.windows = self.windows + new
        return self._logits(new)

    def step(self, tokens: Sequence[int]) -> Tensor:
        self.windows = [self.context.cut([*w, token]) for w, token in zip(self.windows, tokens, strict=True)]
        return self._logits(self.windows)

    def select(self, rows: Sequence[int]) -> None:
        self.windows = [self.windows[i] for i in rows]

    @torch.no_grad()
    def _logits(self, windows: list[list[int]]) -> Tensor:
        lengths = [len(w) for w in windows]
        padded = [w + [0] * (max(lengths) - len(w)) for w in windows]
        tokens = torch.tensor(padded, device=self.model.device)
        with evaluating(self.modules):
            logits = self.model(tokens)
        last = torch.tensor(lengths, device=logits.device) - 1
        return logits[torch.arange(len(lengths), device=logits.device), last]
