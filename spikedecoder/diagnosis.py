"""Find what is wrong with a spiking model: values that are not finite, dead and saturated layers, vanishing
gradients, drifting thresholds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spikedecoder import ops
from spikedecoder.activity import record
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.model import IGNORE, SpikeDecoder, check_model
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.nn.finite import not_finite
from spikedecoder.nn.watching import watching
from spikedecoder.params import MAX_LEVELS, ILIFParams
from spikedecoder.spike_stats import spiking_layers
from spikedecoder.surrogate import get_surrogate

# A finding names the layers that are beyond these limits.
MOST = 0.5  # share of neurons that are dead, or saturated
ENOUGH = 16  # tokens in which a healthy neuron would fire
FULL = 0.9  # share of outputs at their largest value
FLAT_SLOPE = 0.01  # of the surrogate's largest derivative: potentials with less count as flat
FLAT_SHARE = 0.95  # share of flat potentials
SMALL_GRADIENT = 1e-3  # root mean square per spike, relative to the layer where it is largest
DRIFT = 2.0  # factor between a learned threshold and its initial value, from the reset potential


@dataclass(frozen=True)
class LayerHealth:
    """One layer of neurons on the text that was read.

    rate: spikes per neuron and timestep.
    full: share of outputs at their largest value: the rate or, for I-LIF neurons, the share of integers
        equal to `levels`.
    dead, saturated: shares of neurons that never fired, and that fired at every timestep of every token (for
        I-LIF neurons, whose integer was `levels` at every token).
    flat: share of membrane potentials at which the surrogate's derivative is below 1 % of its maximum or,
        for I-LIF neurons, of currents through which no gradient passes.
    gradient: root mean square of dL/ds over the layer's spikes s, L the summed loss; None without targets,
        and if no gradient arrives.
    threshold, v_threshold: the present one, and the configuration's, at which training started.
    """

    name: str
    rate: float
    full: float
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
        """The diagnosis as plain dicts and lists."""
        return asdict(self)


def diagnose(model: SpikeDecoder, tokens: Tensor, targets: Tensor | None = None) -> Diagnosis:
    """Watch every neuron of `model` while it reads tokens [B, S]; with targets [B, S], also the gradients.

    The model's mode and gradients are left as they were. Raises TypeError for anything but a SpikeDecoder,
    and ValueError for a model without a spiking layer, for targets of which none counts, and for spikes or
    potentials that are not finite although all parameters are.
    """
    broken = not_finite(check_model(model))
    activity = record(model, tokens, potentials=True, check=not broken)
    loss, gradients = (None, {}) if targets is None else _gradients(model, tokens, targets)
    c = model.config
    surrogate = get_surrogate(c.surrogate)
    steepest = float(surrogate.derivative(torch.zeros(()), c.surrogate_alpha))
    full, dead, saturated = activity.full(), activity.dead(), activity.saturated()
    layers = []
    for name, spikes in activity.spikes.items():
        threshold = activity.thresholds[name]
        potentials = activity.potentials[name].float()
        if isinstance(c.neurons, ILIFParams):
            low, high = c.neurons.window
            # the first timestep's potential is the current plus half a unit
            u = potentials[0] * ops.spike_worths(c.neurons.levels)[0] / threshold - 0.5
            flat = (u < low) | (u > high)
        else:
            flat = surrogate.derivative(potentials - threshold, c.surrogate_alpha) < FLAT_SLOPE * steepest
        layers.append(
            LayerHealth(
                name=name,
                rate=float(spikes.float().mean()),
                full=full[name],
                dead=dead[name],
                saturated=saturated[name],
                flat=float(flat.float().mean()),
                gradient=gradients.get(name),
                threshold=threshold,
                v_threshold=c.v_threshold,
            )
        )
    findings = _not_finite(broken, loss, layers)
    if not broken:  # otherwise what the neurons do is a consequence of that
        findings += _findings(layers, c, loss is not None, tokens.numel())
    return Diagnosis(layers, findings)


def _gradients(model: SpikeDecoder, tokens: Tensor, targets: Tensor) -> tuple[float, dict[str, float]]:
    """(loss, root mean square of dL/ds over the spikes s of each layer), L the loss summed over targets."""
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
        wanted = targets.to(model.device) if isinstance(targets, Tensor) else targets
        loss = model.loss(tokens.to(model.device), wanted)
        counted = targets != IGNORE
        if model.config.pad_id is not None:
            counted &= targets != model.config.pad_id
        if not counted.any():
            raise ValueError(f"targets: got none that counts, takes some besides {IGNORE} and pad_id")
        # with respect to what the blocks read, so that it does not matter which parameters are trained
        torch.autograd.grad(loss * int(counted.sum()), read, allow_unused=True)
    return loss.item(), found


def dead_layers(names: list[str], c: SpikeDecoderConfig) -> str:
    """The finding for layers in which no neuron fires."""
    return f"dead: no neuron of {_list(names)} fires, so nothing passes there" + _try(
        "--set embedding_gain=2 (where the first block is silent)" * (c.embedding_gain < 2),
        "a larger attention_scale (where an attention_lif is)",
        "a lower v_threshold",
        _finer(c),
        "a lower lr",
    )


def saturated_layers(names: list[str], c: SpikeDecoderConfig) -> str:
    """The finding for layers that fire nearly always."""
    often = (
        "fire at nearly every timestep" if c.levels is None else "are nearly always at their largest integer"
    )
    return f"saturated: {_list(names)} {often}, and tell little" + _try(
        "a decay (where an attention_lif is: its sum grows with the context)" * (c.decays is None),
        "attention_norm=true (where an attention_lif is)" * (not c.attention_norm),
        "a higher v_threshold",
        "a smaller embedding_gain",
        "a lower lr",
    )


def _not_finite(broken: list[str], loss: float | None, layers: list[LayerHealth]) -> list[str]:
    """The finding for `broken` parameters and buffers, and for a loss or gradients that are not finite."""
    parts = [f"values of {_list(broken)}"] if broken else []
    if loss is not None and not math.isfinite(loss):
        parts.append(f"the loss ({loss})")
    gradients = [x.name for x in layers if x.gradient is not None and not math.isfinite(x.gradient)]
    if gradients:
        parts.append(f"the gradient that reaches the spikes of {_list(gradients)}")
    way_out = "Go on from an earlier checkpoint, with a lower lr or a smaller clip"
    return [f"not finite: {'; '.join(parts)}. {way_out}"] if parts else []


def _findings(layers: list[LayerHealth], c: SpikeDecoderConfig, gradients: bool, tokens: int) -> list[str]:
    """The findings for finite values. gradients: whether they were computed; tokens: how many were read."""
    integers, found = c.levels is not None, []
    dead = [x.name for x in layers if x.rate == 0]
    if dead:
        found.append(dead_layers(dead, c))
    dying = [x.name for x in layers if x.rate > 0 and x.dead > MOST and tokens >= ENOUGH]
    if dying:
        found.append(
            f"dying: more than half of the neurons of {_list(dying)} never fired"
            + _try(
                "a lower v_threshold",
                "a wider surrogate (smaller surrogate_alpha)" * (not integers),
                "a lower lr",
            )
        )
    full = [x.name for x in layers if x.saturated > MOST or x.full > FULL]
    if full:
        found.append(saturated_layers(full, c))
    flat = [x.name for x in layers if x.flat > FLAT_SHARE]
    if flat and integers:
        higher = "a higher one" + " or more levels" * (c.spike_levels < MAX_LEVELS)
        found.append(
            f"flat: nearly all currents of {_list(flat)} lie beyond the levels, where no gradient passes. "
            f"Try a lower v_threshold where they lie below, {higher} where above"
        )
    elif flat:
        found.append(
            f"flat: nearly all membrane potentials of {_list(flat)} lie where the surrogate's derivative is "
            "below 1 % of its largest, so their inputs hardly learn"
            + _try(
                "a smaller surrogate_alpha",
                "the atan surrogate, whose tails are longer" * (c.surrogate != "atan"),
            )
        )
    received = [x.gradient for x in layers if x.gradient is not None and math.isfinite(x.gradient)]
    largest = max(received, default=0.0)
    vanishing = [x.name for x in layers if not x.gradient or x.gradient < SMALL_GRADIENT * largest]
    if gradients and vanishing and largest == 0:
        found.append(
            f"vanishing gradient: none reaches the spikes of {_list(vanishing)}"
            + _try("a head whose weights are not 0")
        )
    elif gradients and vanishing:
        found.append(
            f"vanishing gradient: what reaches the spikes of {_list(vanishing)} is below a thousandth of the "
            "largest layer's"
            + _try(
                _finer(c) if integers else "a smaller surrogate_alpha",
                "fewer blocks" * (c.blocks > 1),
                "spiking_residuals=0" * (c.spiking_residuals > 0),
            )
        )
    rest = c.v_reset or 0.0
    start = c.v_threshold - rest
    drifted = [
        x
        for x in layers
        if math.isfinite(x.threshold) and not start / DRIFT <= x.threshold - rest <= start * DRIFT
    ]
    if drifted:
        said = ", ".join(f"{x.name} ({x.threshold:.3g})" for x in drifted[:4])
        found.append(
            f"drifting thresholds: {said}{' and more' if len(drifted) > 4 else ''}, from "
            f"{c.v_threshold:.3g} at the start"
            + _try("learn_threshold=false" * c.learn_threshold, "a lower lr")
        )
    return found


def _finer(c: SpikeDecoderConfig) -> str:
    """The advice to give neurons more possible values; "" if the configuration allows no more."""
    if c.levels is None:
        return "more timesteps"
    return "more levels" * (c.levels < MAX_LEVELS)


def _try(*ways: str) -> str:
    """The end of a finding: the remedies that apply (empty ones do not)."""
    kept = [way for way in ways if way]
    if len(kept) > 1:
        kept[-1] = f"or {kept[-1]}"
    return f". Try {', '.join(kept)}" if kept else ""


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
