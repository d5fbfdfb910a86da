"""What a text cost: spikes and operations per token, counted, not estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder.generation.window import Context, evaluating
from spikedecoder.model import SpikeDecoder
from spikedecoder.nn.attention import AttentionLIF, SoftmaxAttention
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.nn.state import DecoderState
from spikedecoder.spike_stats import SpikeCounter


@dataclass(frozen=True)
class TextCost:
    """Means over the tokens of texts, prompts included.

    spike_rates: by layer, spikes per neuron and timestep, 0 to 1.
    accumulates: additions per token that a spike caused: a spike into a Linear of N outputs is N, a pair of a
        key's and a value's spike 1, a query's spike d (the recurrent form).
    multiply_accumulates: per token, where real numbers meet weights: a head that averages timesteps, the
        parts of a model that do not spike, the decay of the attention's state.

    Norms and neurons are in neither.
    """

    tokens: int
    spike_rates: dict[str, float]
    accumulates: float
    multiply_accumulates: float

    @property
    def spike_rate(self) -> float | None:
        """The mean over the layers; None where none spikes."""
        rates = list(self.spike_rates.values())
        return sum(rates) / len(rates) if rates else None


class OperationCounter:
    """Counts the operations of `model` while it is open, at the positions `mask` [B, S]; None: all."""

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        self.accumulates = self.multiply_accumulates = 0
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> OperationCounter:
        for module in self._model.modules():
            for kind, count in _COUNTS:
                if isinstance(module, kind):
                    self._handles.append(module.register_forward_pre_hook(self._hook(count)))
                    break
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, count: Any) -> Any:
        def add(module: Any, inputs: Any) -> None:
            accumulates, multiplies = count(module, *inputs[:3])  # each [B, S], or a number per position
            positions = inputs[0].shape[-3:-1]
            self.accumulates += self._sum(accumulates, positions)
            self.multiply_accumulates += self._sum(multiplies, positions)

        return add

    def _sum(self, per_position: Tensor | int, positions: Any) -> int:
        if isinstance(per_position, int):
            counted = positions.numel() if self.mask is None else int(self.mask.sum())
            return per_position * counted
        return int((per_position if self.mask is None else per_position[self.mask]).sum())


def _spike_linear(m: SpikeLinear, s: Tensor) -> tuple[Tensor, int]:
    spikes = s.sum(-1, dtype=torch.int64)
    return (spikes.sum(0) if spikes.dim() == 3 else spikes) * m.out_features, 0


def _dense_linear(m: nn.Linear, x: Tensor) -> tuple[int, int]:
    return 0, (x.shape[0] if x.dim() == 4 else 1) * m.in_features * m.out_features


def _spiking_attention(m: AttentionLIF, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    # [T, B, S, E] -> [T, B, S, H]
    nq, nk, nv = (x.unflatten(-1, (m.heads, -1)).sum(-1, dtype=torch.int64) for x in (q, k, v))
    timesteps, size = q.shape[0], q.shape[-1] // m.heads
    decay = 0 if m.decay is None else timesteps * m.heads * size * size
    return (nk * nv + nq * size).sum((0, -1)), decay


def _softmax_attention(m: SoftmaxAttention, x: Tensor, layer: Any = None, position: Any = None) -> Any:
    b, s, e = x.shape
    start = 0 if position is None else position[:, None]
    seen = start + torch.arange(1, s + 1, device=x.device)
    return 0, (2 * e * seen).expand(b, s)


_COUNTS: tuple[tuple[type[nn.Module], Any], ...] = (
    (SpikeLinear, _spike_linear),  # before nn.Linear, whose kind it is
    (nn.Linear, _dense_linear),
    (AttentionLIF, _spiking_attention),
    (SoftmaxAttention, _softmax_attention),
)


@torch.no_grad()
def text_cost(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    keep: int | None = None,
    past: str = "slide",
) -> TextCost:
    """The cost of texts generated with these arguments, from reading them once more.

    The recurrent and the parallel form spike alike, so this counts what the generation did, however it was
    computed, without slowing it down. Each token counts once, where it first stood; reading the last `keep`
    tokens anew, where the text outgrew the context, is left out. The last token was never read.
    """
    context, count = Context.of(model, keep, past), 0
    with SpikeCounter(model) as spikes, OperationCounter(model) as operations, evaluating(model):
        for prompt, new in zip(prompts, tokens, strict=True):
            state: DecoderState | None = None
            for window, known in _windows(list(prompt), list(new)[:-1], context):
                state = state if past == "continue" else None
                fresh = torch.arange(len(window), device=model.device)[None] >= known
                spikes.mask = operations.mask = fresh
                _, state = model.prefill(torch.tensor([window], device=model.device), state)
                count += len(window) - known
    return TextCost(
        tokens=count,
        spike_rates=spikes.rates(),
        accumulates=operations.accumulates / max(1, count),
        multiply_accumulates=operations.multiply_accumulates / max(1, count),
    )


def _windows(prompt: list[int], new: list[int], context: Context) -> Iterator[tuple[list[int], int]]:
    """What is read in one piece, and how many tokens of its beginning were read before."""
    if context.past == "continue":
        text = prompt + new
        for i in range(0, len(text), context.longest):
            yield text[i : i + context.longest], 0
        return
    window, known = context.cut(prompt), 0
    while window:
        room = context.longest - len(window)
        window, new = window + new[:room], new[room:]
        yield window, known
        if not new:
            return
        window, new = context.cut([*window, new[0]]), new[1:]
        known = len(window) - 1
