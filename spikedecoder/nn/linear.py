"""Linear layers, with the norm and the neurons that follow them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.neuron import fire, neurons, watched
from spikedecoder.nn.norm import Norm


class SpikeLinear(nn.Linear):
    """Linear whose input is exactly 0 and 1: it adds weights and multiplies nothing.

    With `levels` > 1 the input is integers from 0 to `levels`, each standing for spikes of several binary
    timesteps. They are multiplied in one dense product or, if `unrolled` is set (`SpikeDecoder.unroll`), as
    those spikes.

    unit: value of a spike, y = s (unit W)^T + b; the weights can absorb it.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, levels: int = 1, unit: float = 1.0
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.levels, self.unit, self.unrolled = levels, unit, False

    def forward(self, s: Tensor) -> Tensor:
        weight = self.weight if self.unit == 1 else self.unit * self.weight
        if self.levels == 1:
            return ops.spike_linear(s, weight, self.bias)
        if self.unrolled:
            return ops.unrolled_linear(s, weight, self.bias, levels=self.levels)
        return ops.dense_linear(s, weight, self.bias)


class LinearNorm(nn.Module):
    """Norm(Linear(x)), x [..., K] -> [..., N].

    levels: the largest value of the spikes x; None if x is real numbers. gain: the norm's initial weight.
    """

    def __init__(self, inputs: int, outputs: int, norm: str, levels: int | None, gain: float = 1.0) -> None:
        super().__init__()
        self.linear = SpikeLinear(inputs, outputs, levels=levels) if levels else nn.Linear(inputs, outputs)
        self.norm = Norm(norm, outputs)
        nn.init.constant_(self.norm.weight, gain)
        self.recompute = False  # see SpikeDecoder.recompute_activations

    def forward(self, x: Tensor) -> Tensor:
        parts = not isinstance(self.linear, SpikeLinear) or watched(self.linear, self.norm)
        if self.recompute and not parts and torch.is_grad_enabled():
            return ops.linear_norm(x, self.linear.weight, self.linear.bias, self.norm.params())
        return self.norm(self.linear(x))


class LinearNormLIF(nn.Module):
    """LIF(Norm(Linear(s))): spikes [T, ..., K] in, spikes [T, ..., N] out."""

    def __init__(self, inputs: int, outputs: int, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.linear = SpikeLinear(inputs, outputs, levels=c.spike_levels)
        self.norm = Norm(c.norm, outputs)
        self.lif = neurons(c)
        self.recompute = False  # see SpikeDecoder.recompute_activations

    def forward(self, s: Tensor) -> Tensor:
        learns = torch.is_grad_enabled()
        parts = watched(self.linear, self.norm, self.lif) or not self.lif.fused
        if not parts and (self.recompute or not learns):
            return ops.linear_norm_lif(
                s, self.linear.weight, self.linear.bias, self.norm.params(), self.lif.params,
                threshold=self.lif.v_threshold, recompute=learns,
            )  # fmt: skip
        return fire(self.lif, self.norm, self.linear(s))
