"""Integer leaky integrate-and-fire neurons (I-LIF)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors, direct, unwatched
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.params import ILIFParams


def _impl(x: Tensor, backend: str):
    return select("ilif", Call(x.device, x.dtype, tuple(x.shape)), backend)


def _run(x: Tensor, p: ILIFParams, want_mask: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    return _impl(x, backend).forward(x.contiguous(), p, want_mask)


@torch.library.custom_op("spikedecoder::ilif", mutates_args=())
def _ilif(x: Tensor, levels: int, v_threshold: float, want_mask: bool, backend: str) -> tuple[Tensor, Tensor]:
    return as_tensors(x, *_run(x, ILIFParams(levels, v_threshold), want_mask, backend), dtype=torch.uint8)


@_ilif.register_fake
def _(x, levels, v_threshold, want_mask, backend):
    counts = torch.empty_like(x, memory_format=torch.contiguous_format)
    return counts, x.new_empty(x.shape if want_mask else (0,), dtype=torch.uint8)


def _run_back(grad: Tensor, mask: Tensor, p: ILIFParams, backend: str) -> Tensor:
    return _impl(grad, backend).backward(grad.contiguous(), mask, p)


@torch.library.custom_op("spikedecoder::ilif_backward", mutates_args=())
def _ilif_backward(grad: Tensor, mask: Tensor, levels: int, v_threshold: float, backend: str) -> Tensor:
    return _run_back(grad, mask, ILIFParams(levels, v_threshold), backend)


@_ilif_backward.register_fake
def _(grad, mask, levels, v_threshold, backend):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, *neuron, _, backend = inputs
    ctx.rest = (*neuron, backend)
    ctx.save_for_backward(output[1])
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, backward):
    (mask,) = ctx.saved_tensors
    return backward(grad, mask, *ctx.rest)


_ilif.register_autograd(
    lambda ctx, grad, _: (_gradient(ctx, grad, _ilif_backward), None, None, None, None),
    setup_context=_setup_context,
)
_direct = direct(_run, _setup_context, lambda ctx, grad, *_: (_gradient(ctx, grad, _run_back),), tensors=1)


def ilif(x: Tensor, *, levels: int, v_threshold: float = 1.0) -> Tensor:
    """Integers of I-LIF neurons: s = clip(floor(x / v_threshold + 1/2), 0, levels).

    Each stands for spikes at B binary timesteps, its binary digits, 2^B > levels, that count 2^(B-1), ..., 2,
    1 (`spikedecoder.ops.spike_worths`). Equations, gradient and source: `spikedecoder.params.ILIFParams`.

    Args:
        x: input current, any shape, float.
        levels: the largest integer D, 1 to 15.
        v_threshold: the current that one unit of s stands for, > 0.

    Returns:
        s in x's shape and dtype, NaN where x is. Kept for backward: one byte per element.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return ilif_params(x, ILIFParams(levels, v_threshold))


def ilif_params(x: Tensor, p: ILIFParams) -> Tensor:
    """`ilif` with its parameters in one object; same errors."""
    _check.of_type("p", p, ILIFParams)
    _check.floating("x", x, min_dims=0)
    want_mask = torch.is_grad_enabled() and x.requires_grad
    if unwatched(x):
        return _direct(x, p, want_mask, requested_backend())[0]
    return _ilif(x, *p.flat(), want_mask, requested_backend())[0]
