"""Spikes from real numbers: 1 where x >= 0."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.fields import LEAST, number
from spikedecoder.ops import _check
from spikedecoder.ops._direct import direct, unwatched
from spikedecoder.ops._dispatch import Call, requested_backend, select


def _run(x: Tensor, alpha: float, backend: str) -> Tensor:
    return select("binarize", Call(x.device, x.dtype, tuple(x.shape)), backend).forward(x, alpha).contiguous()


_binarize = torch.library.custom_op("spikedecoder::binarize", _run, mutates_args=())


@_binarize.register_fake
def _(x, alpha, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run_back(grad: Tensor, x: Tensor, alpha: float, backend: str) -> Tensor:
    impl = select("binarize", Call(x.device, x.dtype, tuple(x.shape)), backend)
    return impl.backward(grad, x, alpha).contiguous()


_binarize_backward = torch.library.custom_op("spikedecoder::binarize_backward", _run_back, mutates_args=())


@_binarize_backward.register_fake
def _(grad, x, alpha, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, ctx.alpha, ctx.backend = inputs
    ctx.save_for_backward(x)


def _gradients(ctx, grad, backward):
    (x,) = ctx.saved_tensors
    return backward(grad, x, ctx.alpha, ctx.backend), None, None


_binarize.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, _binarize_backward), setup_context=_setup_context
)
_direct = direct(_run, _setup_context, lambda ctx, grad: _gradients(ctx, grad, _run_back))


def binarize(x: Tensor, alpha: float = 2.0) -> Tensor:
    """s = 1 where x >= 0, else 0; backward: the ATan surrogate, ds/dx = (alpha/2) / (1 + (pi/2 alpha x)^2).

    Args:
        x: any shape, float.
        alpha: sharpness of the surrogate, > 0.

    Returns:
        spikes in x's shape and dtype. Kept for backward: x.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.floating("x", x, min_dims=0)
    number("alpha", alpha, "a finite number > 0", LEAST)
    operator = _direct if unwatched(x) else _binarize
    return operator(x, float(alpha), requested_backend())
