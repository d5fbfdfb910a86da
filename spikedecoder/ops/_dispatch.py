"""Which backend computes an operator.

A backend is a folder of modules, one per operator and named after it: `reference/lif.py`,
`kernels/lif.py`, ... A module may offer ``why_not(call) -> str | None``: the reason why it cannot run this
call, None if it can. ``auto`` first tries the backend that was measured to be the fastest for the shape
(`_crossover`), then the others in the device's order of preference, and takes the first that can run the
call. A backend requested by name runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

from spikedecoder.ops import _crossover

BACKENDS: dict[str, str] = {
    "reference": "spikedecoder.reference",
    "triton": "spikedecoder.kernels",
    "cpu": "spikedecoder.ext.cpu",
    "cuda": "spikedecoder.ext.cuda",
}
OPERATORS = (
    "lif",
    "ilif",
    "norm",
    "norm_lif",
    "spike_attention",
    "spike_attention_lif",
    "spike_linear",
    "linear_norm_lif",
    "dense_linear",
    "token_shift",
    "binarize",
    "pack_spikes",
)
# what computes an operator where no backend has it
PARTS = {"linear_norm_lif": "spike_linear, then norm_lif"}
_PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_ENV = "SPIKEDECODER_BACKEND"
_P = ParamSpec("_P")
_R = TypeVar("_R")

# Process-wide on purpose: autograd runs CUDA backward passes on threads of its own.
_forced: str | None = None


class BackendError(RuntimeError):
    """The backend that was requested by name cannot run the operator, or with "auto" none can."""


@dataclass(frozen=True)
class Call:
    """What a backend may look at to decide whether it can run a call: no values. An empty shape means any.

    Two options select the measurements that apply (`_crossover`): "part", for an operator of several parts,
    and "outputs", the output channels of a product, whose shape ends in its input channels.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def constant(function: Any) -> Any:
    """`torch.compiler.assume_constant_result` without importing the compiler, a second of every start."""
    function._dynamo_marked_constant = True
    return function


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}, takes auto or one of {', '.join(BACKENDS)}")
    return name


def requested_backend() -> str:
    """The backend in force: that of `use_backend`, else of SPIKEDECODER_BACKEND (read once, at first use),
    else "auto"."""
    return _forced if _forced is not None else _from_environment()


@constant
def _from_environment() -> str:
    return _read_environment()


@functools.cache
def _read_environment() -> str:
    return _check_name(os.environ.get(_ENV) or "auto", f"environment variable {_ENV}")


class use_backend:
    """Force a backend for every operator: ``use_backend("reference")``, a ``with`` block or a decorator.

    Takes "auto", "reference", "triton", "cpu" or "cuda", else raises ValueError. Applies to the whole
    process, all threads: from the call on, until the end of the ``with`` block, or while the decorated
    function runs. An operator that the forced backend cannot run raises `BackendError` with the reason.
    Exceptions are `norm`, `dense_linear` and `token_shift`, which use torch's own operations where the
    backend has none.
    """

    def __init__(self, name: str) -> None:
        global _forced
        self._previous = _forced
        self._name = _forced = _check_name(name, "use_backend")

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        self.__exit__()
        name = self._name

        @functools.wraps(function)
        def forced(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with use_backend(name):
                return function(*args, **kwargs)

        return forced

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous


@functools.cache
def _load(backend: str, operator: str) -> ModuleType | str:
    """The backend's module for this operator, or the reason why it has none."""
    package = BACKENDS[backend]
    name = f"{package}.{operator}"
    try:
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(name) is None:
            return f"it has no {operator}"
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a missing dependency is a reason; an error inside the backend is raised
        if error.name is None or error.name.split(".")[0] == "spikedecoder":
            raise
        return f"{error.name} is not installed"


def why_not(backend: str, operator: str, call: Call) -> str | None:
    """The reason why `backend` cannot run this call of `operator`; None if it can."""
    module = _load(backend, operator)
    if isinstance(module, str):
        return module
    check = getattr(module, "why_not", None)
    return check(call) if check is not None else None


def candidates(device: torch.device) -> tuple[str, ...]:
    """Backends in the order in which ``auto`` tries them on this device."""
    return _PREFERENCE.get(device.type, ("reference",))


def _order(operator: str, call: Call) -> tuple[str, ...]:
    """`candidates`, beginning with the one that was measured to be the fastest for this call, if any."""
    order = candidates(call.device)
    if not call.shape or not _crossover.entries():
        return order
    *rows, channels = call.shape
    outputs = [call.options["outputs"]] if "outputs" in call.options else []
    part = call.options.get("part", operator)
    first = _crossover.fastest(part, call.device, call.dtype, math.prod(rows), channels, *outputs)
    return order if first is None else (first, *(backend for backend in order if backend != first))


def select(operator: str, call: Call, requested: str | None = None) -> ModuleType:
    """The module that runs this call. Raises BackendError if the requested one cannot or, with auto, none."""
    requested = requested or requested_backend()
    if requested != "auto":
        reason = why_not(requested, operator, call)
        if reason is not None:
            raise BackendError(
                f"{operator}: backend {requested!r} was asked for and cannot run it: {reason}. "
                f"Others: use_backend('auto'), or one of {', '.join(b for b in BACKENDS if b != requested)}"
            )
        return module(requested, operator)
    for backend in _order(operator, call):
        if why_not(backend, operator, call) is None:
            return module(backend, operator)
    raise BackendError(f"{operator}: no backend can run it on {call.device} in {call.dtype}")


def module(backend: str, operator: str) -> ModuleType:
    """The module of a backend that `resolve` or `select` has found to exist."""
    found = _load(backend, operator)
    assert not isinstance(found, str)
    return found


@constant
def resolve(operator: str, device: str, dtype: torch.dtype, requested: str) -> str:
    """One backend for all shapes, for operators where the backend decides what is kept for backward.

    Called while tracing, so it looks at no shape.
    """
    return _resolve(operator, device, dtype, requested)


@functools.cache
def _resolve(operator: str, device: str, dtype: torch.dtype, requested: str) -> str:
    call = Call(torch.device(device), dtype, ())
    if requested != "auto":
        select(operator, call, requested)
        return requested
    return next(b for b in candidates(call.device) if why_not(b, operator, call) is None)


@constant
def goes_by_shape(operator: str, device: str) -> bool:
    """Whether ``auto`` looks at shapes when a call of `operator` runs. Called while tracing."""
    return _crossover.is_measured(operator, torch.device(device))


@constant
def offers(backend: str, operator: str) -> bool:
    """Whether this backend has a module of its own for `operator` that loads here. Called while tracing.

    False for "auto" (a choice by shape): a module that does the whole would leave no choice for its parts.
    """
    return backend in BACKENDS and not isinstance(_load(backend, operator), str)


def own_or_reference(operator: str) -> str:
    """The backend in force or, if it has no module of its own for `operator`, "reference" for torch's."""
    requested = requested_backend()
    return requested if requested == "auto" or offers(requested, operator) else "reference"


def explain(operator: str, call: Call) -> list[tuple[str, str]]:
    """(backend, "chosen" | "possible" | reason) in order of preference: what `doctor` prints.

    The last row of an operator that needs no backend of its own names its `PARTS`.
    """
    rows, chosen = [], False
    for backend in _order(operator, call):
        reason = why_not(backend, operator, call)
        if reason is None:
            reason = "possible" if chosen else "chosen"
            chosen = True
        rows.append((backend, reason))
    if operator in PARTS:
        rows.append((PARTS[operator], "possible" if chosen else "chosen"))
    return rows
