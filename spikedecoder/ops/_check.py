"""Checks of the operators' arguments; an error says what an argument got and what it takes."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def floating(name: str, x: object, *, dims: int | None = None, min_dims: int = 1) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, takes float32, float64, float16 or bfloat16")
    dense(name, x)
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes {dims} dimensions")
    if x.dim() < min_dims:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes at least {min_dims} dimensions")
    return x


def dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got layout {x.layout}, takes torch.strided, a dense tensor")


def of_type(name: str, value: object, takes: type) -> None:
    if not isinstance(value, takes):
        raise TypeError(f"{name}: got {type(value).__name__}, takes {takes.__name__}")


def integer(name: str, value: object) -> None:
    if not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}, takes an integer")


def timesteps(name: str, x: Tensor) -> None:
    if x.shape[0] < 1:
        raise ValueError(f"{name}: got T = 0 timesteps (shape {tuple(x.shape)}), takes T >= 1")


def same_device(**tensors: Tensor | None) -> None:
    devices = [t.device for t in tensors.values() if t is not None]
    if any(device != devices[0] for device in devices):
        where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"got tensors on different devices: {where}")


def same_shape(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{b_name}: got shape {tuple(b.shape)}, takes that of {a_name}, {tuple(a.shape)}")


def broadcasts(name: str, x: Tensor, shape: torch.Size) -> None:
    """`x` must broadcast to `shape` without enlarging it."""
    try:
        ok = torch.broadcast_shapes(x.shape, shape) == shape
    except RuntimeError:
        ok = False
    if not ok:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes one that broadcasts to {tuple(shape)}")


def no_gradient(option: str, **tensors: Tensor | None) -> None:
    """Raise if a gradient would be recorded: `option`'s result carries none, so it would be lost silently."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{option}: its result carries no gradient and {name} requires one; "
                f"call it under torch.no_grad(), or with {name}.detach()"
            )
