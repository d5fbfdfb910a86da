"""What the neurons of a model do on a text, as tensors: spikes and membrane potentials by layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.fields import at_least
from spikedecoder.model import SpikeDecoder, check_model
from spikedecoder.nn.attention import AttentionLIF, SoftmaxAttention
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.nn.finite import check_finite
from spikedecoder.nn.linear import LinearNormLIF
from spikedecoder.nn.neuron import ILIF, LIF
from spikedecoder.nn.watching import watching
from spikedecoder.reference.lif import after, charge, compute_dtype
from spikedecoder.spike_stats import neurons_of, spiking_layers


@dataclass
class Activity:
    """What `record` keeps of a model's neurons, on the CPU.

    spikes: by layer, [T, B, S, N], bool. potentials: by layer, membrane potentials h before the reset, same
        shapes. For I-LIF neurons, those of the binary timesteps that their integers stand for.
    scores: by attention layer, [B, H, S, S]: the lower triangle of q k^T before scaling, summed over T (with
        I-LIF neurons, of their integers), or the weights of softmax attention. score: what to call them.
    thresholds: by layer, a float.
    levels: by layer of I-LIF neurons, their largest integer.
    note: a second line for the titles of plots.
    """

    spikes: dict[str, Tensor]
    potentials: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    score: str = "spikes that coincide"
    thresholds: dict[str, float] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def layer(self, name: str | None) -> str:
        """`name`, or the first layer if it is None; ValueError listing the layers if there is no such one."""
        if not self.spikes:
            raise ValueError("activity: holds no spikes, as its model has no spiking layer")
        return choose("layer", name, self.spikes)

    def last(self, tokens: int) -> Activity:
        """The activity at the last `tokens` tokens only."""
        at_least("tokens", tokens, 0)
        end = slice(-tokens, None) if tokens else slice(0)  # -0 would be the beginning
        return replace(
            self,
            spikes={name: s[:, :, end] for name, s in self.spikes.items()},
            potentials={name: h[:, :, end] for name, h in self.potentials.items()},
            scores={name: s[..., end, end] for name, s in self.scores.items()},
        )

    def rates(self) -> dict[str, Tensor]:
        """By layer, spikes per neuron and token at each timestep, [T]."""
        return {name: s.float().mean((1, 2, 3)) for name, s in self.spikes.items()}

    def dead(self) -> dict[str, float]:
        """By layer, the share of neurons that never fired."""
        return {name: float((s.sum((0, 1, 2)) == 0).float().mean()) for name, s in self.spikes.items()}

    def saturated(self) -> dict[str, float]:
        """By layer, the share of neurons that fired at every timestep of every token; of I-LIF neurons, those
        whose integer was `levels` at every token."""
        return {
            name: float((s == self._most(name)).all((0, 1, 2)).mean(dtype=torch.float32))
            for name, s in self.spikes.items()
        }

    def full(self) -> dict[str, float]:
        """By layer, the share of outputs at their largest value: of spikes, those that are 1; of I-LIF
        neurons' integers, those equal to `levels`."""
        shares = {}
        for name, s in self.spikes.items():
            at = s == self._most(name)
            shares[name] = float((at.all(0) if name in self.levels else at).mean(dtype=torch.float32))
        return shares

    def _most(self, name: str) -> Tensor:
        """The spikes of a neuron that fires as much as it can, [T, 1, 1, 1]."""
        s = self.spikes[name]
        if name not in self.levels:
            return torch.ones(len(s), 1, 1, 1, dtype=torch.bool)
        digits = ops.spike_planes(torch.tensor(float(self.levels[name])), self.levels[name])
        return digits.bool().view(-1, 1, 1, 1)


@torch.no_grad()
def record(
    model: SpikeDecoder,
    tokens: Tensor,
    *,
    potentials: bool = False,
    scores: bool = False,
    check: bool = True,
) -> Activity:
    """Run the model on tokens [B, S] in evaluation mode and keep what its neurons did, on the CPU.

    potentials, scores: keep these too. Raises ValueError if the model has no spiking layer (and no softmax
    attention whose scores are wanted) and, unless `check` is off, if a parameter or anything kept is NaN or
    infinite: a neuron that receives NaN never fires, so its spikes alone would not show it.
    """
    model = check_model(model)
    if check:
        check_finite(model)
    layers = list(spiking_layers(model))
    softmax = [(n, m) for n, m in model.named_modules() if scores and isinstance(m, SoftmaxAttention)]
    if not layers and not softmax:
        raise ValueError("model: has no spiking layer, so there are no spikes to show")
    activity = Activity({})
    linears: dict[nn.Module, Tensor] = {}  # the output of each Linear that is followed by neurons
    hooks: list[tuple[nn.Module, Any]] = [
        (m, _hook(activity, n, linears, potentials, scores, check)) for n, m in layers
    ]
    hooks += [(m, _softmax_hook(activity, n)) for n, m in softmax]
    if potentials:
        fused = [m.linear for _, m in layers if isinstance(m, LinearNormLIF)]
        hooks += [(m, lambda m, _, y: linears.update({m: y})) for m in fused]
    with evaluating(model), watching(model, hooks):
        model(tokens.to(model.device) if isinstance(tokens, Tensor) else tokens)
    if check:
        for what, kept in (("potentials", activity.potentials), ("scores", activity.scores)):
            for name, values in kept.items():
                _check_finite(what, name, values)
    return activity


def _check_finite(what: str, name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{what} of {name}: NaN or infinite values, so there is nothing to show")


def _hook(
    activity: Activity,
    name: str,
    linears: dict[nn.Module, Tensor],
    potentials: bool,
    scores: bool,
    check: bool,
) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], spikes: Tensor) -> None:
        if not check:
            spikes = spikes.nan_to_num(0.0)
        _check_finite("spikes", name, spikes)
        lif = neurons_of(module)
        if lif.levels > 1:
            spikes = ops.spike_planes(spikes, lif.levels).flatten(0, 1)
            activity.levels[name] = lif.levels
        activity.spikes[name] = spikes.to("cpu", torch.bool)
        threshold = lif.params.v_threshold if lif.v_threshold is None else float(lif.v_threshold)
        activity.thresholds[name] = threshold
        if scores and isinstance(module, AttentionLIF):
            q, k = (x.unflatten(-1, (module.heads, -1)).transpose(2, 3) for x in inputs[:2])
            with torch.autocast(q.device.type, enabled=False):  # sums of integers, exact in float32
                q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
                activity.scores[name] = (q @ k.transpose(-1, -2)).tril().sum(0).cpu()
            if lif.levels > 1:
                activity.score = "q k of integers"
        if potentials:
            activity.potentials[name] = _potentials(_current(module, inputs, linears), lif, threshold).cpu()

    return hook


def _softmax_hook(activity: Activity, name: str) -> Any:
    def hook(module: SoftmaxAttention, inputs: tuple[Any, ...], _output: Tensor) -> None:
        activity.scores[name] = module.weights(inputs[0]).cpu()
        activity.score = "attention weight"

    return hook


def _current(module: nn.Module, inputs: tuple[Any, ...], linears: dict[nn.Module, Tensor]) -> Tensor:
    """What flows into the layer's neurons, [T, B, S, N]."""
    if isinstance(module, LinearNormLIF):
        return ops.norm(linears.pop(module.linear), module.norm.params())
    if isinstance(module, AttentionLIF):
        q, k, v = (x.unflatten(-1, (module.heads, -1)).transpose(2, 3) for x in inputs[:3])
        current = module.current(q, k, v).transpose(2, 3).flatten(-2)
        return current if module.norm is None else ops.norm(current, module.norm.params())
    current = inputs[0]
    assert isinstance(current, Tensor)
    return current


def _potentials(x: Tensor, lif: LIF, threshold: float) -> Tensor:
    """h [T, ...] of the neurons' equation, before firing."""
    x = x.to(compute_dtype(x.dtype))
    if isinstance(lif, ILIF):
        return _integer_potentials(x, lif)
    p = lif.params
    v, kept = torch.zeros_like(x[0]), []
    for current in x:
        h = charge(current, v, p)
        fired = h - threshold >= 0
        v = after(h, fired, threshold, p)
        kept.append(h)
    return torch.stack(kept)


def _integer_potentials(x: Tensor, neurons: ILIF) -> Tensor:
    """h [B, ...] over the binary timesteps of x [1, ...], divided by the worth of a spike at each timestep.

    The threshold is thus v_threshold at all of them. A potential beyond the levels is seen at the first only.
    """
    unit, worths = neurons.params.v_threshold, ops.spike_worths(neurons.levels)
    h = x + unit / 2
    kept = [h / worths[0]]
    h = h.clamp(max=(neurons.levels + 0.5) * unit)
    for now, soon in itertools.pairwise(worths):
        h = h - (h >= now * unit) * now * unit
        kept.append(h / soon)
    return torch.cat(kept)


def choose(argument: str, name: str | None, known: dict[str, Any]) -> str:
    """`name`, or the first of `known` if it is None; ValueError listing `known` if it is none of them."""
    if name is None:
        return next(iter(known))
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{argument}: got {name!r}, takes one of {', '.join(known)}")
    return name
