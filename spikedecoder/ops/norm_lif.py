"""Normalisation followed by LIF, as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.ops.norm import batch_statistics, check_norm, power_statistics
from spikedecoder.params import LIFParams, NormParams
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.norm import ALPHA_BACKWARD


@torch.library.custom_op("spikedecoder::norm_lif", mutates_args=())
def _norm_lif(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    threshold: Tensor | None,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    eps: float,
    batch_gradient: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    p = LIFParams(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    impl = select("norm_lif", _call(x, mean), backend)
    limit = p.v_threshold if threshold is None else threshold
    spikes, row_mean, row_rstd = impl.forward(x, weight, bias, mean, rstd, eps, limit, p)
    if mean is None:
        return spikes, row_mean, row_rstd
    return spikes, x.new_empty(0), x.new_empty(0)


def _call(x: Tensor, mean: Tensor | None) -> Call:
    return Call(x.device, x.dtype, tuple(x.shape), {"rows": mean is None})


@_norm_lif.register_fake
def _(x, weight, bias, mean, *_):
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    if mean is not None:
        return spikes, x.new_empty(0), x.new_empty(0)
    rows = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return spikes, rows, torch.empty_like(rows)


@torch.library.custom_op("spikedecoder::norm_lif_backward", mutates_args=())
def _norm_lif_backward(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | None,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    channel: bool,
    batch_gradient: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = LIFParams(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    impl = select("norm_lif", _call(x, mean if channel else None), backend)
    limit = p.v_threshold if threshold is None else threshold
    args = (grad_spikes, x, weight, bias, mean, rstd, limit, p)
    if channel:
        grad_weight, grad_bias, grad_threshold = impl.backward_reduce(*args)
        nothing = torch.zeros_like(rstd)
        a, b, c = weight * rstd, nothing, nothing
        if ema_gz is not None and rstd_batch is not None:  # PowerNorm in training
            a, b = weight * rstd_batch, (ALPHA_BACKWARD - 1) * ema_gz * rstd_batch
        elif batch_gradient:  # BatchNorm in training: the statistics are functions of x
            rows = x.numel() // x.shape[-1]
            b, c = -a * grad_weight / rows, -a * grad_bias / rows
        grad_x = impl.backward_apply(*args, a, b, c)
    else:
        grad_x, grad_weight, grad_bias, grad_threshold = impl.backward_layer(*args)
    grad_threshold = grad_threshold.sum_to_size(() if threshold is None else threshold.shape)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_threshold


@_norm_lif_backward.register_fake
def _(grad_spikes, x, weight, bias, mean, rstd, threshold, *_):
    grad_threshold = mean.new_empty(()) if threshold is None else mean.new_empty(threshold.shape)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias), grad_threshold


def _setup_context(ctx, inputs, output):
    x, weight, bias, mean, rstd, threshold, rstd_batch, ema_gz, eps, *rest = inputs
    _, row_mean, row_rstd = output
    ctx.channel = mean is not None
    if mean is None:
        mean, rstd = row_mean, row_rstd
    # the running ema_gz is read, and moved on, when the gradient arrives
    ctx.ema_gz, ctx.eps = ema_gz, eps
    ctx.save_for_backward(x, weight, bias, mean, rstd, threshold, rstd_batch)
    ctx.rest = tuple(rest)
    ctx.mark_non_differentiable(row_mean, row_rstd)


def _autograd(ctx, grad_spikes, _grad_mean, _grad_rstd):
    x, weight, bias, mean, rstd, threshold, rstd_batch = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_threshold = _norm_lif_backward(
        grad_spikes, x, weight, bias, mean, rstd, threshold, rstd_batch, ctx.ema_gz, ctx.channel, *ctx.rest
    )
    if ctx.ema_gz is not None:
        # mean over rows of ga z, from what is known: ga = g weight - (1 - alpha) ema_gz z
        rows = x.numel() // x.shape[-1]
        second = rstd.square() * (rstd_batch**-2 - ctx.eps)
        ctx.ema_gz += weight * grad_weight / rows - (1 - ALPHA_BACKWARD) * ctx.ema_gz * second
    threshold_grad = None if threshold is None else grad_threshold.to(threshold.dtype)
    return (
        grad_x,
        grad_weight,
        grad_bias,
        None,
        None,
        threshold_grad,
        None,
        None,
        None,
        *(None,) * len(ctx.rest),
    )


_norm_lif.register_autograd(_autograd, setup_context=_setup_context)


def norm_lif(x: Tensor, n: NormParams, p: LIFParams, *, threshold: Tensor | None = None) -> Tensor:
    """Spikes of LIF(norm(x)) with nothing written between.

        y = (x - mean) * rstd * weight + bias;   spikes = LIF(y)

    Args:
        x: currents [T, ..., C], float.
        n: LayerNorm, BatchNorm or PowerNorm; its running statistics are updated in training. As in
            `spikedecoder.ops.norm`, statistics run over T too for the last two.
        p, threshold: the neurons, as in `spikedecoder.ops.lif`; a threshold tensor gets a gradient.

    Returns:
        spikes [T, ..., C] in x's dtype. Kept for backward: x and the statistics.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Ba et al., 2016; Ioffe & Szegedy, 2015; Shen et al., 2020; and the LIF's.
    """
    check_norm(x, n)
    _check.timesteps("x", x)
    _check.same_device(x=x, weight=n.weight, v_threshold=threshold)
    if threshold is not None:
        _check.broadcasts("v_threshold", threshold, x.shape[1:])
    mean = rstd = rstd_batch = ema_gz = None
    if n.kind == "batch":
        mean, rstd = batch_statistics(x, n)
    elif n.kind == "power":
        rstd, rstd_batch = power_statistics(x, n)
        mean = torch.zeros_like(rstd)
        ema_gz = n.running[1] if n.training else None
    spikes, _, _ = _norm_lif(
        x,
        n.weight,
        n.bias,
        mean,
        rstd,
        threshold,
        rstd_batch,
        ema_gz,
        n.eps,
        n.training,
        *p.flat(),
        requested_backend(),
    )
    return spikes
