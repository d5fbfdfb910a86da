"""Normalisation followed by I-LIF, as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors, direct, unwatched
from spikedecoder.ops._dispatch import requested_backend
from spikedecoder.ops.norm import check_norm, statistics
from spikedecoder.ops.norm_lif import flat, forward, forward_fake, gradients, keep, move_ema
from spikedecoder.params import ILIFParams, NormParams


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    rows: Tensor | None,
    eps: float,
    batch_gradient: bool,
    group: str | None,
    levels: int,
    v_threshold: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    p = ILIFParams(levels, v_threshold)
    return as_tensors(x, *forward(x, weight, bias, mean, rstd, None, eps, p, backend))


_norm_ilif = torch.library.custom_op("spikedecoder::norm_ilif", _forward, mutates_args=())
_norm_ilif.register_fake(forward_fake)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    rows: Tensor | None,
    channel: bool,
    batch_gradient: bool,
    group: str | None,
    levels: int,
    v_threshold: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (channel, batch_gradient, group, ILIFParams(levels, v_threshold), backend)
    return _run_back(grad, x, weight, bias, mean, rstd, rstd_batch, ema_gz, rows, *settings)


def _run_back(grad, x, weight, bias, mean, rstd, rstd_batch, ema_gz, rows, *settings):
    return gradients(grad, x, weight, bias, mean, rstd, None, rstd_batch, ema_gz, rows, *settings)[:3]


_norm_ilif_backward = torch.library.custom_op("spikedecoder::norm_ilif_backward", _backward, mutates_args=())


@_norm_ilif_backward.register_fake
def _(grad, x, weight, bias, *_):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, mean, rstd, *rest = inputs
    keep(ctx, output, x, weight, bias, mean, rstd, None, *rest)


def _gradients(ctx, grad, backward):
    """Gradients of the tensors, in order."""
    x, weight, bias, mean, rstd, _, rstd_batch, rows = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = backward(
        grad, x, weight, bias, mean, rstd, rstd_batch, ctx.ema_gz, rows, ctx.channel, *ctx.rest
    )
    if ctx.ema_gz is not None:
        _, group, *_ = ctx.rest
        move_ema(ctx.ema_gz, x, weight, rstd, rstd_batch, rows, ctx.eps, grad_weight, group)
    return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _autograd(ctx, grad, _grad_mean, _grad_rstd):
    return *_gradients(ctx, grad, _norm_ilif_backward), None, *(None,) * len(ctx.rest)


_norm_ilif.register_autograd(_autograd, setup_context=_setup_context)


def _run(x, weight, bias, mean, rstd, rstd_batch, ema_gz, rows, eps, batch_gradient, group, p, backend):
    return forward(x, weight, bias, mean, rstd, None, eps, p, backend)


_direct = direct(_run, _setup_context, lambda ctx, grad, *_: _gradients(ctx, grad, _run_back), tensors=8)


def norm_ilif(x: Tensor, n: NormParams, p: ILIFParams) -> Tensor:
    """Integers of I-LIF(norm(x)), without writing norm(x) to memory.

        y = (x - mean) * rstd * weight + bias;   s = clip(floor(y / v_threshold + 1/2), 0, levels)

    In backward, dL/dy is dL/ds / v_threshold inside the I-LIF's window and 0 outside. y is computed in
    float32 (float64 for float64) and not rounded before s is taken from it. Calling `norm` and then `ilif`
    gives integers that differ by one where y / v_threshold + 1/2 is within rounding error of a whole number.

    Args:
        x: currents [..., C], float, two dimensions or more. Timesteps, if any, are rows like all others.
        n: LayerNorm, BatchNorm or PowerNorm; its running statistics are updated in training.
        p: the neurons.

    Returns:
        s [..., C] in x's dtype, NaN where y is. Kept for backward: x and the statistics; y and the window are
        recomputed.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Ba et al., 2016; Ioffe & Szegedy, 2015; Shen et al., 2020; and the I-LIF's.
    """
    _check.of_type("p", p, ILIFParams)
    check_norm(x, n)
    mean, rstd, _, *rest = flat(statistics(x, n), n, None)
    tensors = (x, n.weight, n.bias, mean, rstd)
    if unwatched(*tensors):
        return _direct(*tensors, *rest, p, requested_backend())[0]
    return _norm_ilif(*tensors, *rest, *p.flat(), requested_backend())[0]
