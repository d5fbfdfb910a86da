"""Linear with the norm, and the neurons, that follow it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.nn.neuron import LIF
from spikedecoder.nn.norm import Norm
from spikedecoder.params import LIFParams


class SpikeLinear(nn.Linear):
    """Linear whose input is exactly 0 and 1: accumulates, multiplies nothing."""

    def forward(self, s: Tensor) -> Tensor:
        return ops.spike_linear(s, self.weight, self.bias)


class LinearNorm(nn.Module):
    """Norm(Linear(x)), x [..., K] -> [..., N]; `spikes`: x is exactly 0 and 1.

    gain: the norm's weight before training.
    """

    def __init__(self, inputs: int, outputs: int, norm: str, spikes: bool, gain: float = 1.0) -> None:
        super().__init__()
        self.linear = SpikeLinear(inputs, outputs) if spikes else nn.Linear(inputs, outputs)
        self.norm = Norm(norm, outputs)
        nn.init.constant_(self.norm.weight, gain)
        self.recompute = False  # see SpikeDecoder.recompute_activations

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and isinstance(self.linear, SpikeLinear) and torch.is_grad_enabled():
            return ops.linear_norm(x, self.linear.weight, self.linear.bias, self.norm.params())
        return self.norm(self.linear(x))


class LinearNormLIF(nn.Module):
    """LIF(Norm(Linear(s))): spikes [T, ..., K] in, spikes [T, ..., N] out."""

    def __init__(self, inputs: int, outputs: int, norm: str, lif: LIFParams, learn_threshold: bool) -> None:
        super().__init__()
        self.linear = SpikeLinear(inputs, outputs)
        self.norm = Norm(norm, outputs)
        self.lif = LIF(lif, learn_threshold)
        self.recompute = False  # see SpikeDecoder.recompute_activations

    def forward(self, s: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            n, threshold = self.norm.params(), self.lif.v_threshold
            return ops.linear_norm_lif(
                s, self.linear.weight, self.linear.bias, n, self.lif.params, threshold=threshold
            )
        current = self.linear(s)
        return ops.norm_lif(current, self.norm.params(), self.lif.params, threshold=self.lif.v_threshold)
