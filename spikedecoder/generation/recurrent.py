"""Logits for the next token from the model's recurrent state: earlier tokens are not read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikedecoder.generation.window import Context
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.nn.state import DecoderState

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder


class Recurrent:
    """A `LogitSource` over `SpikeDecoder.prefill` and `step`.

    The logits are those of `Window`, which runs the parallel forward over the same tokens. With `past`
    "slide", a sequence that outgrows the context is cut in the same way: its last `keep` tokens are read
    again, so up to max_len tokens of it are remembered. With "continue" none are.
    """

    def __init__(self, model: SpikeDecoder, keep: int | None = None, past: str = "slide") -> None:
        self.model, self.context = model, Context.of(model, keep, past)
        self.modules = list(model.modules())  # walking the tree for each token would be slow
        self.windows: list[list[int]] = []
        self.state: DecoderState | None = None

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        windows = [self.context.cut(list(prompt)) for prompt in prompts]
        known: dict[tuple[int, ...], tuple[Tensor, DecoderState]] = {}
        for window in map(tuple, windows):  # a prompt with several continuations is read once
            if window not in known:
                known[window] = self._read(list(window))
        read = [known[tuple(window)] for window in windows]
        before = [] if self.state is None else [self.state]
        self.state = DecoderState.stack([*before, *(state for _, state in read)])
        self.windows = self.windows + [self._remembered(window) for window in windows]
        return torch.cat([logits for logits, _ in read])

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert self.state is not None
        windows = [self.context.cut([*w, t]) for w, t in zip(self.windows, tokens, strict=True)]
        slid = [i for i, w in enumerate(windows) if len(w) <= len(self.windows[i])]
        rest = [i for i in range(len(tokens)) if i not in slid]
        self.windows = [self._remembered(window) for window in windows]
        if not slid:
            logits, self.state = self._advance(tokens, self.state)
            return logits
        parts: dict[int, tuple[Tensor, DecoderState]] = {i: self._read(windows[i]) for i in slid}
        if rest:
            logits, state = self._advance([tokens[i] for i in rest], self.state.select(rest))
            parts |= {row: (logits[n : n + 1], state.select([n])) for n, row in enumerate(rest)}
        ordered = [parts[i] for i in range(len(tokens))]
        self.state = DecoderState.stack([state for _, state in ordered])
        return torch.cat([logits for logits, _ in ordered])

    def select(self, rows: Sequence[int]) -> None:
        assert self.state is not None
        self.windows = [self.windows[i] for i in rows]
        self.state = self.state.select(rows) if rows else None

    def _remembered(self, window: list[int]) -> list[int]:
        return window if self.context.past == "slide" else []

    def _advance(self, tokens: Sequence[int], state: DecoderState) -> tuple[Tensor, DecoderState]:
        with evaluating(self.modules):
            return self.model.step(torch.tensor(tokens, device=self.model.device), state)

    def _read(self, window: list[int]) -> tuple[Tensor, DecoderState]:
        """Logits [1, V] after the window, and the state there."""
        tokens = torch.tensor([window], device=self.model.device)
        state = None
        # in parts, so that the memory needed does not grow with the prompt
        for part in tokens.split(max(self.context.longest, 256), dim=1):
            logits, state = self._read_part(part, state)
        assert state is not None
        return logits, state

    def _read_part(self, part: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """Logits [1, V] after tokens [1, S], and the state there."""
        with evaluating(self.modules):
            logits, state = self.model.prefill(part, state)
        return logits[:, -1], state
