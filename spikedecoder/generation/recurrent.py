"""Logits for the next token from the model's recurrent state: the cost of a token does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikedecoder.generation.window import cut, evaluating, kept
from spikedecoder.nn.state import DecoderState

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder


class Recurrent:
    """A `LogitSource` over `SpikeDecoder.prefill` and `step`.

    The logits are those of `Window`, which runs the parallel forward over the same tokens. A sequence that
    outgrows the context is cut in the same way: its last `keep` tokens are read anew.
    """

    def __init__(self, model: SpikeDecoder, keep: int | None = None) -> None:
        self.model, self.keep = model, kept(model, keep)
        self.windows: list[list[int]] = []
        self.state: DecoderState | None = None

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.windows = [cut(list(prompt), self.model.config.max_len, self.keep) for prompt in prompts]
        read = [self._read(window) for window in self.windows]
        self.state = DecoderState.stack([state for _, state in read])
        return torch.cat([logits for logits, _ in read])

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert self.state is not None
        longest = self.model.config.max_len
        full = [i for i, window in enumerate(self.windows) if len(window) >= longest]
        rest = [i for i in range(len(tokens)) if i not in full]
        self.windows = [cut([*w, t], longest, self.keep) for w, t in zip(self.windows, tokens, strict=True)]
        parts: dict[int, tuple[Tensor, DecoderState]] = {i: self._read(self.windows[i]) for i in full}
        if rest:
            state = self.state if not full else self.state.select(rest)
            ids = torch.tensor([tokens[i] for i in rest], device=self.model.device)
            with evaluating(self.model):
                logits, state = self.model.step(ids, state)
            if not full:
                self.state = state
                return logits
            parts |= {row: (logits[n : n + 1], state.select([n])) for n, row in enumerate(rest)}
        ordered = [parts[i] for i in range(len(tokens))]
        self.state = DecoderState.stack([state for _, state in ordered])
        return torch.cat([logits for logits, _ in ordered])

    def select(self, rows: Sequence[int]) -> None:
        assert self.state is not None
        self.windows = [self.windows[i] for i in rows]
        self.state = self.state.select(rows)

    def _read(self, window: list[int]) -> tuple[Tensor, DecoderState]:
        """Logits [1, V] behind the window, and the state there."""
        with evaluating(self.model):
            logits, state = self.model.prefill(torch.tensor([window], device=self.model.device))
        return logits[:, -1], state
