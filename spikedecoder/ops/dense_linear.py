"""Linear layer on any numbers, such as the integers of I-LIF neurons, which are too dense to gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikedecoder.ops._direct import direct, unwatched
from spikedecoder.ops._dispatch import module, requested_backend, resolve
from spikedecoder.ops.spike_linear import autocast_is_on, check_linear
from spikedecoder.reference.dense_linear import linear

_FEW_ROWS = 128  # up to which a backend's preparations take longer than the product


def _backend(s: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """A backend with its own product or, even if another was requested, "reference" for torch's product."""
    few = s.numel() <= _FEW_ROWS * s.shape[-1] or not weight.numel()
    if few or s.device.type != "cpu" or requested_backend() not in ("auto", "cpu"):
        return "reference"
    if any(x is not None and (x.dtype != s.dtype or not _lies_well(x)) for x in (s, weight, bias)):
        return "reference"
    if torch.is_autocast_enabled("cpu"):
        return "reference"
    return resolve("dense_linear", "cpu", s.dtype, "auto")


def _lies_well(x: Tensor) -> bool:
    """Whether it has memory of its own that is aligned to the size of its numbers."""
    try:
        address = x.data_ptr()
    except RuntimeError:  # batched by vmap
        return False
    return address != 0 and address % x.element_size() == 0


def _forward(s: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return module(backend, "dense_linear").forward(s, weight, bias)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    s, weight, _, ctx.backend = inputs
    of_s, of_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(s if of_weight else None, weight if of_s else None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    s, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    plain = unwatched() and unwatched(grad) and _lies_well(grad)
    if torch.is_grad_enabled() or not plain:  # such as for a second derivative
        return *_by_torch(grad, s, weight, wanted), None
    return *module(ctx.backend, "dense_linear").backward(grad, s, weight, wanted), None


def _by_torch(
    grad: Tensor, s: Tensor | None, weight: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    rows = grad.reshape(-1, grad.shape[-1])
    grad_s = None if weight is None else grad @ weight
    grad_weight = None if s is None else rows.t() @ s.reshape(-1, s.shape[-1])
    return grad_s, grad_weight, rows.sum(0) if wanted[2] else None


_direct = direct(_forward, _setup_context, _gradients, twice=True)


def dense_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = s W^T + b for any numbers: torch's product, or our own on CPUs where that is faster.

    torch's product is used when a call is traced (torch.compile, torch.export), transformed, or intercepted
    by one of torch's modes.

    Args:
        s: numbers [..., K], float. weight: [N, K]; bias: [N] or None; of s's dtype, unless autocast is on.

    Returns:
        y [..., N]. Gradients to s, weight and bias can be differentiated again. Kept for backward: s, if the
        weight gets a gradient.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_linear(s, weight, bias)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != s.dtype and not autocast_is_on(s.device.type):
            raise TypeError(f"{name}: got dtype {x.dtype}, takes that of s, {s.dtype}")
    # the first is False under forward-mode differentiation, where the second would raise
    if unwatched() and unwatched(s, weight, bias):
        backend = _backend(s, weight, bias)
        if backend != "reference":
            return _direct(s, weight, bias, backend)
    return linear(s, weight, bias)
