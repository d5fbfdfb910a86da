"""Integer leaky integrate-and-fire neurons: counts of spikes in one step."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.params import ILIFParams


def _impl(x: Tensor, backend: str):
    return select("ilif", Call(x.device, x.dtype, tuple(x.shape)), backend)


@torch.library.custom_op("spikedecoder::ilif", mutates_args=())
def _ilif(x: Tensor, levels: int, v_threshold: float, want_mask: bool, backend: str) -> tuple[Tensor, Tensor]:
    counts, mask = _impl(x, backend).forward(x.contiguous(), ILIFParams(levels, v_threshold), want_mask)
    return counts, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


@_ilif.register_fake
def _(x, levels, v_threshold, want_mask, backend):
    counts = torch.empty_like(x, memory_format=torch.contiguous_format)
    return counts, x.new_empty(x.shape if want_mask else (0,), dtype=torch.uint8)


@torch.library.custom_op("spikedecoder::ilif_backward", mutates_args=())
def _ilif_backward(grad: Tensor, mask: Tensor, levels: int, v_threshold: float, backend: str) -> Tensor:
    return _impl(grad, backend).backward(grad.contiguous(), mask, ILIFParams(levels, v_threshold))


@_ilif_backward.register_fake
def _(grad, mask, levels, v_threshold, backend):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, *ctx.rest, _, ctx.backend = inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _grad_mask):
    (mask,) = ctx.saved_tensors
    return _ilif_backward(grad, mask, *ctx.rest, ctx.backend), None, None, None, None


_ilif.register_autograd(_autograd, setup_context=_setup_context)


def ilif(x: Tensor, *, levels: int, v_threshold: float = 1.0) -> Tensor:
    """s = clip(floor(x / v_threshold + 1/2), 0, levels): integers, the sums of `levels` binary timesteps.

    Equations and gradient: `spikedecoder.params.ILIFParams`, with its source.

    Args:
        x: current, any shape, float.
        levels: the largest integer D, 1 to 15.
        v_threshold: current of one spike, > 0.

    Returns:
        s in x's dtype, NaN where x is. Kept for backward: one byte an element.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return ilif_params(x, ILIFParams(levels, v_threshold))


def ilif_params(x: Tensor, p: ILIFParams) -> Tensor:
    """`ilif` with its parameters in one object."""
    _check.of_type("p", p, ILIFParams)
    _check.floating("x", x, min_dims=0)
    want_mask = torch.is_grad_enabled() and x.requires_grad
    return _ilif(x, p.levels, p.v_threshold, want_mask, requested_backend())[0]
