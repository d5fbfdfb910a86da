"""Linear on spikes with the norm, and the neurons, that follow it."""

from __future__ import annotations

from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.nn.neuron import LIF
from spikedecoder.nn.norm import Norm
from spikedecoder.params import LIFParams


class LinearNorm(nn.Module):
    """Norm(Linear(s)): spikes (or real numbers) [..., K] in, currents [..., N] out."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = Norm(norm, outputs)

    def forward(self, s: Tensor) -> Tensor:
        return self.norm(ops.spike_linear(s, self.linear.weight, self.linear.bias))


class LinearNormLIF(nn.Module):
    """LIF(Norm(Linear(s))): spikes [T, ..., K] in, spikes [T, ..., N] out."""

    def __init__(self, inputs: int, outputs: int, norm: str, lif: LIFParams, learn_threshold: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = Norm(norm, outputs)
        self.lif = LIF(lif, learn_threshold)

    def forward(self, s: Tensor) -> Tensor:
        current = ops.spike_linear(s, self.linear.weight, self.linear.bias)
        return ops.norm_lif(current, self.norm.params(), self.lif.params, threshold=self.lif.v_threshold)
