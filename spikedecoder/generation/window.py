"""Logits for the next token from the whole context, read again for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from spikedecoder.fields import is_integer
from spikedecoder.nn.evaluating import evaluating

if TYPE_CHECKING:
    from spikedecoder.config import SpikeDecoderConfig
    from spikedecoder.model import SpikeDecoder

PAST = ("slide", "continue")


class LogitSource(Protocol):
    """What generation needs of a model: next-token logits for each of B sequences; B is 0 at first."""

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read n more sequences (none empty) and put them after the others; returns their logits [n, V]."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; returns logits [B, V]."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order; there may be none."""


def endless(config: SpikeDecoderConfig) -> bool:
    """Whether the model can read beyond max_len tokens in constant memory.

    It can with spiking attention and static positions, unless its tokens are one-hot with the position.
    """
    one_hot = config.token_encoding == "one-hot" and not config.ann_embedding
    return config.spiking_attention and config.position_encoding == "static" and not one_hot


@dataclass(frozen=True)
class Context:
    """What to do with a sequence of more than `longest` tokens; see `generate`'s `past` and `keep`."""

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
        if not is_integer(keep) or not 1 <= keep <= longest:
            raise ValueError(f"keep: got {keep!r}, takes an integer from 1 to max_len = {longest}")
        return cls(longest, int(keep), past)

    def cut(self, window: list[int]) -> list[int]:
        """The last `keep` tokens of a window that is too long, otherwise all of it."""
        slides = self.past == "slide" and len(window) > self.longest
        return window[-self.keep :] if slides else window


class Window:
    """A `LogitSource` that runs the model's parallel forward over each sequence's window.

    The reference for `Recurrent`. Sequences of unequal length are padded on the right: the model is causal,
    so padding after a sequence's last token cannot affect it, and each sequence gets the logits it would get
    alone (up to the rounding of matrix products, which varies with their size). A sequence that has outgrown
    the context is cut as `Context` says; its positions then start from 0 again.
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
