"""How often each layer of neurons fires."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.nn.attention import AttentionLIF
from spikedecoder.nn.linear import LinearNormLIF
from spikedecoder.nn.neuron import LIF
from spikedecoder.nn.watching import watching
from spikedecoder.params import binary_timesteps

SPIKING = (LIF, LinearNormLIF, AttentionLIF)  # modules whose output is spikes


def spiking_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the layers that fire; a LIF inside a fused layer goes by that layer's name."""
    inside = ""
    for name, module in model.named_modules():
        if isinstance(module, SPIKING) and not (inside and name.startswith(inside)):
            yield name, module
            inside = f"{name}."


def neurons_of(layer: nn.Module) -> LIF:
    """The neurons of a layer from `spiking_layers`."""
    neurons = layer if isinstance(layer, LIF) else layer.lif
    assert isinstance(neurons, LIF)
    return neurons


class SpikeCounter:
    """Counts the spikes of every layer of `model` while it is open.

        with SpikeCounter(model) as counter:
            counter.mask = targets >= 0     # [B, S], which positions count; None: all
            model(tokens)
        counter.rates()                     # spikes per neuron and timestep, 0 to 1, by layer

    Integers of I-LIF neurons count as the spikes of their binary timesteps (`ops.spike_planes`).
    Costs one pass over each layer's output. Counts are exact.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        self._layers = list(spiking_layers(model))
        self._totals: dict[str, Tensor] = {}  # by layer, as in `counts`
        self._model = model
        self._open = ExitStack()

    def __enter__(self) -> SpikeCounter:
        hooks = [(module, self._hook(name, neurons_of(module).levels)) for name, module in self._layers]
        self._open.enter_context(watching(self._model, hooks))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _hook(self, name: str, levels: int) -> Any:
        def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output = output.detach()  # [T, B, S, E]: per position at most 4 * T * E spikes, exact in float32
            spikes = ops.spike_counts(output, levels).sum((0, -1), dtype=torch.float32)
            timesteps = binary_timesteps(levels)
            full = spikes
            if levels > 1:  # 1 where the output is at its largest; several times faster than a comparison
                full = timesteps * (output / levels).floor_().sum((0, -1), dtype=torch.float32)
            mask = torch.ones_like(spikes, dtype=torch.bool) if self.mask is None else self.mask
            if mask.shape != spikes.shape:
                takes = f"that of the positions, {tuple(spikes.shape)}"
                raise ValueError(f"mask: got shape {tuple(mask.shape)}, takes {takes}")
            # not x[mask], for which a GPU would be waited for
            counted = [torch.where(mask, x, 0).to(torch.int64).sum() for x in (spikes, full)]
            slots = mask.sum() * (timesteps * output.shape[0] * output.shape[-1])
            total = torch.stack([*counted, slots])
            self._totals[name] = self._totals[name] + total if name in self._totals else total

        return count

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """By layer: (spikes, timesteps at the largest output, neurons * timesteps * positions).

        For I-LIF neurons an integer equal to `levels` counts with all of its binary timesteps as the second.
        The third is how many spikes there could have been.
        """
        return {name: tuple(total.tolist()) for name, total in self._totals.items()}

    def rates(self) -> dict[str, float]:
        """By layer, in the order in which they ran: spikes per neuron, timestep and position, 0 to 1."""
        return {name: spikes / slots if slots else 0.0 for name, (spikes, _, slots) in self.counts().items()}
