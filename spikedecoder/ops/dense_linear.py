"""Linear layer whose input is any numbers: the counts of I-LIF neurons, which are too dense to gather."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ops._direct import direct, unwatched
from spikedecoder.ops._dispatch import module, requested_backend, resolve
from spikedecoder.ops.spike_linear import check_linear

_FEW_ROWS = 128  # for which a backend's preparations take longer than the product


def _backend(s: Tensor, weight: Tensor) -> str:
    """One with a product of its own, or "reference", which is torch's, also where others were asked for."""
    few = s.numel() <= _FEW_ROWS * s.shape[-1] or not weight.numel()
    if few or s.dtype != weight.dtype or requested_backend() not in ("auto", "cpu"):
        return "reference"
    if s.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return "reference"
    return resolve("dense_linear", "cpu", s.dtype, "auto")


def _forward(s: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return module(backend, "dense_linear").forward(s, weight, bias)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    s, weight, _, ctx.backend = inputs
    ctx.save_for_backward(s, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    s, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    return *module(ctx.backend, "dense_linear").backward(grad, s, weight, wanted), None


_direct = direct(_forward, _setup_context, _gradients)


def dense_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = s W^T + b for numbers of any kind: torch's product, or ours on CPUs where that is faster.

    A trace (torch.compile, torch.export), a transform or a mode of torch's sees torch's product.

    Args:
        s: numbers [..., K]. weight: [N, K]; bias: [N] or None.

    Returns:
        y [..., N]. Gradients to s, weight and bias. Kept for backward: s.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_linear(s, weight, bias)
    if unwatched(s, weight, bias) and (backend := _backend(s, weight)) != "reference":
        return _direct(s, weight, bias, backend)
    return F.linear(s, weight, bias)
