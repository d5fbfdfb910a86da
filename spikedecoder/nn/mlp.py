"""Feed-forward part of a block: spiking, and the one of the baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.linear import LinearNorm, LinearNormLIF
from spikedecoder.nn.neuron import neurons
from spikedecoder.nn.shift import token_shift
from spikedecoder.nn.state import LayerState


class SpikingMLP(nn.Module):
    """x [T, B, S, E] -> [T, B, S, E]: Norm(Linear(LIF(Norm(Linear(LIF(x), token-shifted))))), dropout.

    With `residual_spikes` x is spikes already: there is no LIF at the input, but one at the output.
    """

    def __init__(self, c: SpikeDecoderConfig, residual_spikes: bool) -> None:
        super().__init__()
        self.shift = c.mlp_token_shift
        self.input_lif = None if residual_spikes else neurons(c)
        self.fc1 = LinearNormLIF(c.embed_dim, c.hidden_dim, c)
        self.fc2 = LinearNorm(c.hidden_dim, c.embed_dim, c.norm, levels=c.spike_levels, gain=c.residual_init)
        self.dropout = nn.Dropout(c.mlp_dropout)
        self.output_lif = neurons(c) if residual_spikes else None

    def forward(self, x: Tensor, layer: LayerState | None = None) -> Tensor:
        s = x if self.input_lif is None else self.input_lif(x)
        out = self.dropout(self.fc2(self.fc1(token_shift(s, self.shift, layer, "mlp.shift"))))
        return out if self.output_lif is None else self.output_lif(out)


class MLP(nn.Module):
    """The MLP of the baseline, x [..., S, E] -> [..., S, E]: Linear(GELU(Linear(x))), tanh GELU, dropout."""

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.shift = c.mlp_token_shift
        self.fc1 = nn.Linear(c.embed_dim, c.hidden_dim)
        self.fc2 = nn.Linear(c.hidden_dim, c.embed_dim)
        self.dropout = nn.Dropout(c.mlp_dropout)

    def forward(self, x: Tensor, layer: LayerState | None = None) -> Tensor:
        shifted = token_shift(x, self.shift, layer, "mlp.shift")
        hidden = F.gelu(self.fc1(shifted), approximate="tanh")
        return self.dropout(self.fc2(hidden))
