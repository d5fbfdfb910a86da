"""Our LIF operator inside other libraries' models: same outputs, gradients and state_dict keys.

    report = accelerate(model)

Replaced in place: SpikingJelly's multi-step LIF neurons (MultiStepLIFNode of `clock_driven` in 0.0.0.0.14,
LIFNode of `activation_based` in multi-step mode, in 2.0 and earlier). A replaced neuron stays an instance of
its class and keeps its attributes, its membrane potential ``v`` and its ``reset``; only its multi-step
forward pass is ours. Later changes to the neuron take effect: a call in which our operator would give another
result (another surrogate, ``store_v_seq``, a ``v`` of another shape) is left to the neuron's own method.

Not replaced: neurons with other semantics (see `Replacement.reason`). An example is snnTorch's Leaky. It
fires strictly above the threshold, where SpikingJelly and this package fire at it, and it sees one timestep
per call, so there is no loop over time to fuse.

A replaced neuron differs from the library's own in that

- with 16-bit input, potentials stay in float32 between timesteps. SpikingJelly rounds them at each timestep,
  so a few spikes in ten thousand differ;
- with ``decay_input=False``, potentials are summed in another order, so that one at the threshold may be
  rounded to its other side;
- MultiStepLIFNode's ``v_seq``, the potential of each timestep, is None;
- gradients cannot be differentiated again;
- the input is kept for the backward pass and must not be changed in place before it;
- an infinite input resets the neuron. SpikingJelly's is NaN from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.params import LIFParams

# SpikingJelly's surrogates, and ours with the same derivative and the same meaning of alpha
_SURROGATES = {"Sigmoid": "sigmoid", "ATan": "atan", "PiecewiseQuadratic": "triangle", "Rect": "rectangular"}
_LIBRARIES = ("spikingjelly.", "snntorch.")
# the methods that make up their forward pass, which an instance may override
_METHODS = ("neuronal_charge", "neuronal_fire", "neuronal_reset", "single_step_forward", "multi_step_forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MULTI_STEP = {
    ("spikingjelly.clock_driven", "MultiStepLIFNode"): "forward",
    ("spikingjelly.activation_based", "LIFNode"): "multi_step_forward",
}


@dataclass(frozen=True)
class Replacement:
    """The outcome for one neuron. reason: None if it was replaced, else why it was not."""

    name: str
    kind: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason or 'replaced'}"


def accelerate(model: nn.Module) -> list[Replacement]:
    """Replace the multi-step LIF neurons of `model`, in place; returns one `Replacement` per neuron found.

    Raises ValueError if the model has no neuron of a known library, rather than silently do nothing;
    TypeError if it is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    report = []
    for name, module in model.named_modules():
        kind = next((c for c in type(module).__mro__ if c.__module__.startswith(_LIBRARIES)), None)
        if kind is None:
            continue
        if hasattr(module, "surrogate_function") and hasattr(module, "v_threshold"):
            reason = _why_not(module)
            if reason is None and not isinstance(module, _Fused):
                _replace(module)
        elif hasattr(module, "spike_grad"):
            reason = _why_not_snntorch(module, kind)
        else:
            continue
        report.append(Replacement(name or "(the model itself)", kind.__name__, reason))
    if not report:
        raise ValueError(
            "model: holds no neuron of SpikingJelly's or snnTorch's; takes a model with SpikingJelly's "
            "MultiStepLIFNode (0.0.0.0.14) or LIFNode in multi-step mode (2.0)"
        )
    return report


def _entry(cls: type) -> str | None:
    """The method of exactly this class that loops over the timesteps; None for an unknown class."""
    for (package, name), method in _MULTI_STEP.items():
        if cls.__name__ == name and cls.__module__.startswith(package):
            return method
    return None


def _theirs(module: Any) -> Any:
    """The library's class of a neuron, replaced or not."""
    return type(module).__bases__[1] if isinstance(module, _Fused) else type(module)


def _why_not(module: Any) -> str | None:
    cls = _theirs(module)
    if _entry(cls) is None:
        if any(_entry(base) for base in cls.__mro__):
            return f"{cls.__name__} is a class derived from a multi-step LIF neuron, and may change it"
        return f"{cls.__name__} is not a multi-step LIF neuron"
    if getattr(module, "step_mode", "m") != "m":
        return "it is in single-step mode: functional.set_step_mode(model, 'm') first"
    if getattr(module, "store_v_seq", False):
        return "store_v_seq=True asks for every timestep's potential, which is not kept"
    own = [name for name in _METHODS if name in vars(module)]
    if own:
        return f"{own[0]} is this neuron's own, not its class's"
    if getattr(module, "_neuron_precision", None) is not None:
        return "it has a precision of its own"
    if getattr(module, "backend", "torch") not in ("torch", "cupy", "triton", "inductor"):
        return f"backend {module.backend!r} is not a floating-point LIF"
    surrogate = module.surrogate_function
    if not type(surrogate).__module__.startswith("spikingjelly."):
        return f"surrogate {getattr(surrogate, '__name__', type(surrogate).__name__)} is not SpikingJelly's"
    if type(surrogate).__name__ not in _SURROGATES:
        return f"surrogate {type(surrogate).__name__} is none of {', '.join(_SURROGATES)}"
    if any(getattr(surrogate, hooks) for hooks in _HOOKS):
        return "its surrogate has hooks, which would not be called"
    if not getattr(surrogate, "spiking", True):
        return "its surrogate is set to spiking=False: it emits real numbers"
    for name in ("tau", "v_reset"):
        if isinstance(getattr(module, name), Tensor):
            return f"{name} is a tensor, where this package takes a number and gives no gradient"
    if isinstance(module.v_threshold, Tensor) and _entry(cls) != "forward":
        return "v_threshold is a tensor, which LIFNode takes as a number, without a gradient"
    try:
        _params(module)
    except ValueError as error:
        return str(error)
    return None


def _why_not_snntorch(module: Any, kind: type) -> str:
    if kind.__name__ not in ("Leaky", "Lapicque"):
        return f"{kind.__name__} is not a leaky integrate-and-fire neuron of this package's kind"
    differs = ["it fires strictly above the threshold, where this package fires at it"]
    if getattr(module, "reset_delay", True) and getattr(module, "reset_mechanism", "subtract") != "none":
        differs.append("it resets one timestep after the spike")
    differs.append("it sees one timestep a call, so there is no loop over time to fuse")
    return "; ".join(differs)


def _params(module: Any) -> LIFParams:
    threshold = module.v_threshold
    return LIFParams.of(
        float(module.tau),
        1.0 if isinstance(threshold, Tensor) else float(threshold),
        None if module.v_reset is None else float(module.v_reset),
        bool(getattr(module, "decay_input", True)),
        _SURROGATES[type(module.surrogate_function).__name__],
        float(module.surrogate_function.alpha),
        bool(module.detach_reset),
    )


def _takes(module: Any, x_seq: Tensor) -> bool:
    """Whether our operator gives the result of the neuron's own method for this call."""
    v = module.v
    if not x_seq.is_floating_point() or x_seq.dim() < 2 or not len(x_seq):
        return False
    if not module.training and torch.is_grad_enabled() and hasattr(module, "jit_hard_reset"):
        return False  # activation_based of 0.0.0.0.14: a spike in evaluation has no gradient
    return not isinstance(v, Tensor) or (
        v.shape == x_seq.shape[1:]
        and v.dtype == x_seq.dtype
        and v.device == x_seq.device
        and (torch.compiler.is_compiling() or not torch.is_grad_enabled() or not v.is_inference())
    )


class _Fused:
    """Mix-in, placed before the neuron's own class."""

    def _all_timesteps(self: Any, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _takes(self, x_seq) or _why_not(self) is not None:  # changed since it was replaced
            cls = _theirs(self)
            return getattr(cls, str(_entry(cls)))(self, x_seq, *args, **kwargs)
        v = self.v if isinstance(self.v, Tensor) else torch.full_like(x_seq[0], float(self.v))
        threshold = self.v_threshold if isinstance(self.v_threshold, Tensor) else None
        spikes, v = ops.lif_params(x_seq, _params(self), threshold=threshold, v_init=v, return_state=True)
        self.v = v.to(x_seq.dtype)
        if "v_seq" in self._memories:
            self.v_seq = None  # not kept; that of an earlier pass would be mistaken for it
        return spikes

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds a class by its name, under which only the library's own class exists
        made: Any = super().__reduce_ex__(protocol)
        return _unpickled, (_theirs(self),), *made[2:]


@cache
def _fused(cls: Any) -> Any:
    method = _entry(cls)
    assert method is not None
    return type(
        f"Fused{cls.__name__}", (_Fused, cls), {method: _Fused._all_timesteps, "__module__": __name__}
    )


def _unpickled(cls: type) -> Any:
    fused = _fused(cls)
    return fused.__new__(fused)


def _replace(module: Any) -> None:
    cls: Any = type(module)
    module.__class__ = _fused(cls)
