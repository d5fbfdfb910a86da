"""From the residual stream to logits."""

from __future__ import annotations

from torch import Tensor, nn

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.nn.neuron import neurons


class Head(nn.Module):
    """x [T, B, S, E] -> logits [B, S, V]: LIF (if the head spikes), join the timesteps, Linear.

    `float_reunite`: join first, then one LIF step. Without timesteps, x [B, S, E] only passes the Linear.
    No norm follows, so the scale of the input matters: a unit of I-LIF neurons' integers counts v_threshold.
    """

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.reunite, self.float_reunite = c.reunite, c.float_reunite
        self.lif = neurons(c) if c.head_spikes else None
        joined = c.spiking_attention and c.reunite == "concatenate"
        # joining several timesteps by "average" or "accumulate" leaves counts, not spikes
        kept = c.float_reunite or c.timesteps == 1 or c.reunite in ("concatenate", "final")
        width = c.embed_dim * (c.timesteps if joined else 1)
        if c.head_spikes and kept:
            self.linear: nn.Linear = SpikeLinear(
                width, c.vocab_size, levels=c.spike_levels, unit=c.spike_worth
            )
        else:
            self.linear = nn.Linear(width, c.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.lif is not None and not self.float_reunite:
            x = self.lif(x)
        if x.dim() == 4:
            x = self._join(x)
        if self.lif is not None and self.float_reunite:
            x = self.lif(x.unsqueeze(0)).squeeze(0)
        return self.linear(x)

    def _join(self, x: Tensor) -> Tensor:
        if self.reunite == "average":
            return x.mean(0) if len(x) > 1 else x.squeeze(0)
        if self.reunite == "accumulate":
            return x.sum(0)
        if self.reunite == "final":
            return x[-1]
        return x.movedim(0, -2).flatten(-2)  # concatenate: [B, S, T * E], timestep by timestep
