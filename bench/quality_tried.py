"""Neurons that were tried but are not in the package, as prototypes with which their figures can be repeated.

Each function changes a built `SpikeDecoder` in place, for training only, in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder import SpikeDecoder, ops
from spikedecoder.nn.attention import AttentionLIF
from spikedecoder.nn.linear import LinearNormLIF
from spikedecoder.nn.neuron import ILIF, LIF
from spikedecoder.params import ILIFParams
from spikedecoder.surrogate import get_surrogate

Neuron = Callable[[Tensor, LIF], Tensor]


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.derivative = lambda x: get_surrogate(surrogate).derivative(x, alpha)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.derivative(*ctx.saved_tensors), None, None


def learned_tau(model: SpikeDecoder) -> None:
    """PLIF (Fang et al., 2021): 1 / tau = sigmoid(w), w learned per layer, from tau = 2."""

    def neuron(x: Tensor, lif: LIF) -> Tensor:
        p, v, spikes = lif.params, torch.zeros_like(x[0]), []
        for current in x:
            h = v + (current - v) * torch.sigmoid(lif.w)
            s = _Fire.apply(h - p.v_threshold, p.surrogate, p.alpha)
            v = h - s.detach() * p.v_threshold
            spikes.append(s)
        return torch.stack(spikes)

    for module in model.modules():
        if isinstance(module, LIF):
            assert module.params.v_reset is None and module.params.decay_input
            module.w = nn.Parameter(torch.zeros(()))
    _replace(model, neuron)


def channel_thresholds(model: SpikeDecoder) -> None:
    """A learned threshold for every neuron behind a Linear, instead of none."""
    for module in model.modules():
        if isinstance(module, LinearNormLIF):
            start = torch.full((module.linear.out_features,), module.lif.params.v_threshold)
            module.lif.v_threshold = nn.Parameter(start)


class _Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(u)
        ctx.levels = levels
        return u.round().clamp(-levels, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad * (u.abs() <= ctx.levels + 0.5), None


def ternary_spikes(model: SpikeDecoder) -> None:
    """I-LIF neurons of either sign, -D to D: binary digits that are -1, 0 or 1."""
    for module in model.modules():
        if isinstance(module, ILIF):
            p = module.params
            module.forward = lambda x, p=p: _Signed.apply(x / p.v_threshold, p.levels)  # type: ignore[method-assign]


class _Wide(ILIFParams):
    WINDOW = 1.5


def wide_window(model: SpikeDecoder) -> None:
    """The gradient of I-LIF neurons passes up to one level farther outside their range."""
    for module in model.modules():
        if isinstance(module, ILIF):
            p = module.params
            low, high = _Wide(p.levels, p.v_threshold).window

            def forward(x: Tensor, p: ILIFParams = p, low: float = low, high: float = high) -> Tensor:
                through = (x / p.v_threshold).clamp(low, high)
                return through + (ops.ilif_params(x.detach(), p) - through).detach()

            module.forward = forward  # type: ignore[method-assign]


def _replace(model: SpikeDecoder, neuron: Neuron) -> None:
    """Make every layer of neurons compute `neuron` of its current."""
    for module in model.modules():
        if isinstance(module, AttentionLIF):
            module.forward = _attention(module, neuron)  # type: ignore[method-assign]
        elif isinstance(module, LinearNormLIF):
            module.forward = lambda s, m=module: neuron(  # type: ignore[method-assign]
                ops.norm(m.linear(s), m.norm.params()), m.lif
            )
        elif isinstance(module, LIF):
            module.forward = lambda x, m=module: neuron(x, m)  # type: ignore[method-assign]


def _attention(module: AttentionLIF, neuron: Neuron) -> Callable[..., Tensor]:
    def forward(q: Tensor, k: Tensor, v: Tensor, _layer: Any = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (module.heads, -1)).transpose(2, 3) for x in (q, k, v))
        current = ops.spike_attention(q, k, v, module.scale, module.decay)
        assert isinstance(current, Tensor)
        current = current.transpose(2, 3).flatten(-2)
        if module.norm is not None:
            current = ops.norm(current, module.norm.params())
        return neuron(current, module.lif)

    return forward


TRIED: dict[str, Callable[[SpikeDecoder], None]] = {
    "learned tau": learned_tau,
    "channel thresholds": channel_thresholds,
    "ternary": ternary_spikes,
    "wide window": wide_window,
}
