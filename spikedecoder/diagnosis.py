"""What ails a spiking model: dead and saturated layers, gradients that vanish, thresholds that drift."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spikedecoder import ops
from spikedecoder.activity import record
from spikedecoder.model import IGNORE, SpikeDecoder
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.nn.watching import watching
from spikedecoder.params import ILIFParams
from spikedecoder.spike_stats import spiking_layers
from spikedecoder.surrogate import get_surrogate

MOST = 0.5  # share of a layer's neurons from which the layer is named
FULL_RATE = 0.9  # spikes per neuron and timestep
FLAT_SLOPE = 0.01  # of the surrogate's largest derivative
FLAT_SHARE = 0.95  # of potentials in the flat part
SMALL_GRADIENT = 1e-3  # of the largest layer's, root mean square per spike
DRIFT = 2.0  # factor between a learned threshold and where it started


@dataclass(frozen=True)
class LayerHealth:
    """One layer of neurons on the text that was read.

    rate: spikes per neuron and timestep. dead, saturated: shares of neurons that never fired, and that fired
    at every timestep of every token (of I-LIF neurons, that were at their largest integer at each). flat:
    share of membrane potentials at which the surrogate's derivative is below 1 % of its largest, or of I-LIF
    neurons' currents through which no gradient passes. gradient: root mean square of dL/ds over the layer's
    spikes, L the summed loss; None where no targets were given or none arrives. threshold: now; v_threshold:
    the configuration's, where training started.
    """

    name: str
    rate: float
    dead: float
    saturated: float
    flat: float
    gradient: float | None
    threshold: float
    v_threshold: float


@dataclass(frozen=True)
class Diagnosis:
    """layers: in the model's order. findings: what is wrong and what to change, in words; none if healthy."""

    layers: list[LayerHealth]
    findings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(model: SpikeDecoder, tokens: Tensor, targets: Tensor | None = None) -> Diagnosis:
    """Watch every neuron of `model` while it reads tokens [B, S]; with targets [B, S], its gradients too.

    The model is left as it was: its mode, its gradients. Raises ValueError for a model without a spiking
    layer, and for spikes that are NaN.
    """
    activity = record(model, tokens, potentials=True)
    gradients = {} if targets is None else _gradients(model, tokens, targets)
    c = model.config
    surrogate = get_surrogate(c.surrogate)
    steepest = float(surrogate.derivative(torch.zeros(()), c.surrogate_alpha))
    dead, saturated = activity.dead(), activity.saturated()
    layers = []
    for name, spikes in activity.spikes.items():
        threshold = activity.thresholds[name]
        potentials = activity.potentials[name].float()
        if isinstance(c.neurons, ILIFParams):
            low, high = c.neurons.window
            # the potential of the first timestep is the current and half a unit
            u = potentials[0] * ops.spike_worths(c.neurons.levels)[0] / threshold - 0.5
            flat = (u < low) | (u > high)
        else:
            flat = surrogate.derivative(potentials - threshold, c.surrogate_alpha) < FLAT_SLOPE * steepest
        layers.append(
            LayerHealth(
                name=name,
                rate=float(spikes.float().mean()),
                dead=dead[name],
                saturated=saturated[name],
                flat=float(flat.float().mean()),
                gradient=gradients.get(name),
                threshold=threshold,
                v_threshold=c.v_threshold,
            )
        )
    return Diagnosis(layers, _findings(layers, c.neuron == "ilif"))


def _gradients(model: SpikeDecoder, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    """By layer, the root mean square of dL/ds over its spikes s, L the loss summed over targets."""
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, spikes: Tensor) -> None:
            if spikes.requires_grad:
                spikes.register_hook(lambda g: found.update({name: float(g.float().square().mean().sqrt())}))

        return hook

    read: list[Tensor] = []

    def start(_module: Any, _inputs: Any, x: Tensor) -> Tensor:
        read.append(x if x.requires_grad else x.detach().requires_grad_())
        return read[0]

    hooks = [(model.embedding, start), *((module, watch(name)) for name, module in spiking_layers(model))]
    with evaluating(model), watching(model, hooks), torch.enable_grad():
        loss = model.loss(tokens.to(model.device), targets.to(model.device))
        counted = targets != IGNORE
        if model.config.pad_id is not None:
            counted &= targets != model.config.pad_id
        if not counted.any():
            raise ValueError(f"targets: got none that counts, takes some besides {IGNORE} and pad_id")
        # to what the blocks read, and to no parameter, so that it does not matter which of them learn
        torch.autograd.grad(loss * int(counted.sum()), read, allow_unused=True)
    return found


def dead_layers(names: list[str]) -> str:
    """What to say of layers of which no neuron fires."""
    return (
        f"dead: no neuron of {_list(names)} fires, so nothing passes there. Try --set embedding_gain=2 "
        "(where the first block is silent), a larger attention_scale (where an attention_lif is), a lower "
        "v_threshold, more timesteps (or levels), or a lower lr"
    )


def saturated_layers(names: list[str]) -> str:
    """What to say of layers that fire nearly always."""
    return (
        f"saturated: {_list(names)} fire at nearly every timestep, and tell little. Try a decay or "
        "attention_norm=true (where an attention_lif is: its sum grows with the context), a higher "
        "v_threshold, a smaller embedding_gain, or a lower lr"
    )


def _findings(layers: list[LayerHealth], integers: bool) -> list[str]:
    found = []
    dead = [x.name for x in layers if x.rate == 0]
    if dead:
        found.append(dead_layers(dead))
    dying = [x.name for x in layers if x.rate > 0 and x.dead > MOST]
    if dying:
        found.append(
            f"dying: more than half of the neurons of {_list(dying)} never fired. Try a lower v_threshold, "
            + ("" if integers else "a wider surrogate (smaller surrogate_alpha), ")
            + "or a lower lr"
        )
    full = [x.name for x in layers if x.saturated > MOST or x.rate > FULL_RATE]
    if full:
        found.append(saturated_layers(full))
    flat = [x.name for x in layers if x.flat > FLAT_SHARE]
    if flat and integers:
        found.append(
            f"flat: nearly all currents of {_list(flat)} lie beyond the levels, where no gradient passes. "
            "Try a lower v_threshold where they lie below, a higher one or more levels where above"
        )
    elif flat:
        found.append(
            f"flat: nearly all membrane potentials of {_list(flat)} lie where the surrogate's derivative is "
            "below 1 % of its largest, so their inputs hardly learn. Try a smaller surrogate_alpha, or the "
            "atan surrogate, whose tails are longer"
        )
    largest = max((x.gradient for x in layers if x.gradient is not None), default=0.0)
    vanishing = [x.name for x in layers if x.gradient is not None and x.gradient < SMALL_GRADIENT * largest]
    if vanishing:
        found.append(
            f"vanishing gradient: what reaches the spikes of {_list(vanishing)} is below a thousandth of the "
            "largest layer's. Try "
            + ("more levels" if integers else "a smaller surrogate_alpha")
            + ", fewer blocks, or spiking_residuals=0"
        )
    drifted = [x for x in layers if not x.v_threshold / DRIFT <= x.threshold <= x.v_threshold * DRIFT]
    if drifted:
        said = ", ".join(f"{x.name} ({x.threshold:.3g})" for x in drifted[:4])
        found.append(
            f"drifting thresholds: {said}{' and more' if len(drifted) > 4 else ''}, from "
            f"{drifted[0].v_threshold:.3g} at the start. Try learn_threshold=false, or a lower lr"
        )
    return found


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more layers" if len(names) > 4 else "")
