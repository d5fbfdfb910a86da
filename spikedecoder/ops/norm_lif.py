"""Normalisation followed by LIF, as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikedecoder import sync
from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors, direct, unwatched
from spikedecoder.ops._dispatch import Call, requested_backend, resolve, select
from spikedecoder.ops.norm import Statistics, check_norm, statistics
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.norm import alpha_backward


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    threshold: Tensor | None,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    rows: Tensor | None,
    eps: float,
    batch_gradient: bool,
    group: str | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    return as_tensors(x, *forward(x, weight, bias, mean, rstd, threshold, eps, p, backend))


_norm_lif = torch.library.custom_op("spikedecoder::norm_lif", _forward, mutates_args=())


def forward(x, weight, bias, mean, rstd, threshold, eps, p, backend):
    """(spikes, row mean, row rstd), the last two None if channel statistics were passed in."""
    impl = select("norm_lif", _call(x, mean), backend)
    limit = p.v_threshold if threshold is None else threshold
    spikes, row_mean, row_rstd = impl.forward(x, weight, bias, mean, rstd, eps, limit, p)
    return spikes.contiguous(), *((row_mean, row_rstd) if mean is None else (None, None))


def _call(x: Tensor, mean: Tensor | None) -> Call:
    return Call(x.device, x.dtype, tuple(x.shape), {"rows": mean is None})


@_norm_lif.register_fake
def forward_fake(x, weight, bias, mean, *_):
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    if mean is not None:
        return spikes, x.new_empty(0), x.new_empty(0)
    rows = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return spikes, rows, torch.empty_like(rows)


def _backward(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | None,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    rows: Tensor | None,
    channel: bool,
    batch_gradient: bool,
    group: str | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    known = (weight, bias, mean, rstd, threshold, rstd_batch, ema_gz, rows)
    return as_tensors(mean, *gradients(grad_spikes, x, *known, channel, batch_gradient, group, p, backend))


_norm_lif_backward = torch.library.custom_op("spikedecoder::norm_lif_backward", _backward, mutates_args=())


def gradients(
    grad_spikes, x, weight, bias, mean, rstd, threshold, rstd_batch, ema_gz, rows,
    channel: bool, batch_gradient: bool, group: str | None, p: LIFParams | ILIFParams, backend: str,
    over: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias and threshold (None without one); `over`: see `backward_over`."""
    impl = select("norm_lif", _call(x, mean if channel else None), backend)
    limit = p.v_threshold if threshold is None else threshold
    args = (grad_spikes, x, weight, bias, mean, rstd, limit, p)
    if channel and batch_gradient and ema_gz is None and group is None and hasattr(impl, "backward_batch"):
        grad_x, grad_weight, grad_bias, grad_threshold = impl.backward_batch(*args)
    elif channel:
        a = weight * rstd
        if ema_gz is not None and rstd_batch is not None:  # PowerNorm in training
            a, c = weight * rstd_batch, torch.zeros_like(rstd)
            b = (alpha_backward() - 1) * ema_gz * rstd_batch
            batch_gradient = False
        elif not batch_gradient:
            b = c = torch.zeros_like(rstd)
        if batch_gradient or not hasattr(impl, "backward_known"):
            grad_weight, grad_bias, grad_threshold = impl.backward_reduce(*args)
            if batch_gradient:  # BatchNorm in training: the statistics are functions of x
                sum_gz, sum_g = grad_weight, grad_bias
                if group is not None:
                    sum_gz, sum_g = sync.sum_over(torch.stack([grad_weight, grad_bias]), group)
                count = x.numel() // x.shape[-1] if rows is None else rows
                share = a / -count
                b, c = share * sum_gz, share * sum_g
            grad_x = impl.backward_apply(*args, a, b, c)
        else:
            grad_x, grad_weight, grad_bias, grad_threshold = impl.backward_known(*args, a, b, c)
    else:
        options = {"over": True} if over else {}
        grad_x, grad_weight, grad_bias, grad_threshold = impl.backward_layer(*args, **options)
    grad_threshold = None if threshold is None else grad_threshold.sum_to_size(threshold.shape)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_threshold


def _parameters_fake(grad_spikes, x, weight, bias, mean, rstd, threshold, *_):
    """Gradients of weight, bias and threshold, without values."""
    grad_threshold = mean.new_empty(0 if threshold is None else threshold.shape)
    return torch.empty_like(weight), torch.empty_like(bias), grad_threshold


@_norm_lif_backward.register_fake
def _(grad_spikes, x, *rest):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, *_parameters_fake(grad_spikes, x, *rest)


@torch.library.custom_op("spikedecoder::norm_lif_backward_over", mutates_args=("x",))
def _norm_lif_backward_over(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_backward` for row statistics; the gradient of x overwrites x."""
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    known = (weight, bias, mean, rstd, threshold, None, None, None)
    return as_tensors(
        mean, *gradients(grad_spikes, x, *known, False, False, None, p, "triton", over=True)[1:]
    )


_norm_lif_backward_over.register_fake(_parameters_fake)


def backward_over(grad_spikes, x, saved, channel, rest):
    """`backward` for a contiguous x that is no longer needed: its gradient overwrites it, which saves as much
    memory. None if the backend, or the kind of norm, has no such pass."""
    weight, bias, mean, rstd, threshold, *_ = saved
    _, _, *neuron, backend = rest
    if channel or resolve("norm_lif", x.device.type, x.dtype, backend) != "triton":
        return None
    *grads, grad_threshold = _norm_lif_backward_over(
        grad_spikes, x, weight, bias, mean, rstd, threshold, *neuron
    )
    return x, *grads, None if threshold is None else grad_threshold.to(threshold.dtype)


def _setup_context(ctx, inputs, output):
    keep(ctx, output, *inputs)


def keep(ctx, output, x, weight, bias, mean, rstd, threshold, rstd_batch, ema_gz, rows, eps, *rest):
    """Store in ctx what the backward pass needs."""
    _, row_mean, row_rstd = output
    ctx.channel = mean is not None
    if mean is None:
        mean, rstd = row_mean, row_rstd
    # the running ema_gz is read and updated when the gradient arrives
    ctx.ema_gz, ctx.eps = ema_gz, eps
    ctx.save_for_backward(x, weight, bias, mean, rstd, threshold, rstd_batch, rows)
    ctx.rest = rest
    ctx.mark_non_differentiable(*(x for x in (row_mean, row_rstd) if x is not None))


def backward(grad_spikes, saved, ema_gz, eps, channel, rest, operator=_norm_lif_backward):
    """(grad_x, grad_weight, grad_bias, grad_threshold | None) from what forward kept; updates ema_gz."""
    x, weight, bias, mean, rstd, threshold, rstd_batch, rows = saved
    grad_x, grad_weight, grad_bias, grad_threshold = operator(
        grad_spikes, x, weight, bias, mean, rstd, threshold, rstd_batch, ema_gz, rows, channel, *rest
    )
    if ema_gz is not None:
        _, group, *_ = rest
        move_ema(ema_gz, x, weight, rstd, rstd_batch, rows, eps, grad_weight, group)
    return grad_x, grad_weight, grad_bias, None if threshold is None else grad_threshold.to(threshold.dtype)


def move_ema(ema_gz, x, weight, rstd, rstd_batch, rows, eps, grad_weight, group: str | None) -> None:
    """Update PowerNorm's running ema_gz after a backward pass."""
    # add the mean over rows of ga z, from the sums at hand: ga = g weight - (1 - alpha) ema_gz z
    sum_gz = grad_weight if group is None else sync.sum_over(grad_weight, group)
    count = x.numel() // x.shape[-1] if rows is None else rows
    second = rstd.square() * (rstd_batch**-2 - eps)
    ema_gz += weight * sum_gz / count - (1 - alpha_backward()) * ema_gz * second


def _gradients(ctx, grad_spikes, operator):
    """Gradients of the tensors, in order."""
    grad_x, grad_weight, grad_bias, grad_threshold = backward(
        grad_spikes, ctx.saved_tensors, ctx.ema_gz, ctx.eps, ctx.channel, ctx.rest, operator
    )
    return grad_x, grad_weight, grad_bias, None, None, grad_threshold, None, None, None


def _autograd(ctx, grad_spikes, _grad_mean, _grad_rstd):
    return *_gradients(ctx, grad_spikes, _norm_lif_backward), None, *(None,) * len(ctx.rest)


_norm_lif.register_autograd(_autograd, setup_context=_setup_context)


def _run(
    x, weight, bias, mean, rstd, threshold, rstd_batch, ema_gz, rows, eps, batch_gradient, group, p, backend
):
    return forward(x, weight, bias, mean, rstd, threshold, eps, p, backend)


_direct = direct(_run, _setup_context, lambda ctx, grad, *_: _gradients(ctx, grad, gradients), tensors=9)


def norm_lif(x: Tensor, n: NormParams, p: LIFParams, *, threshold: Tensor | None = None) -> Tensor:
    """Spikes of LIF(norm(x)), without writing norm(x) to memory.

        y = (x - mean) * rstd * weight + bias;   spikes = LIF(y)

    Args:
        x: currents [T, ..., C], float.
        n: LayerNorm, BatchNorm or PowerNorm; its running statistics are updated in training. As in
            `spikedecoder.ops.norm`, the last two take statistics over T too.
        p, threshold: the neurons, as in `spikedecoder.ops.lif`; a threshold tensor gets a gradient.

    Returns:
        spikes [T, ..., C] in x's dtype. Kept for backward: x and the statistics; norm(x) and the potentials
        are recomputed.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Ba et al., 2016; Ioffe & Szegedy, 2015; Shen et al., 2020; and the LIF's.
    """
    _check.of_type("p", p, LIFParams)
    check_norm_lif(x, n, threshold)
    settings = flat(statistics(x, n), n, threshold)
    if unwatched(x, n.weight, n.bias, threshold):
        return _direct(x, n.weight, n.bias, *settings, p, requested_backend())[0]
    return _norm_lif(x, n.weight, n.bias, *settings, *p.flat(), requested_backend())[0]


def check_norm_lif(x: Tensor, n: NormParams, threshold: Tensor | None) -> None:
    check_norm(x, n)
    _check.timesteps("x", x)
    if threshold is not None:
        _check.floating("v_threshold", threshold, min_dims=0)
    _check.same_device(x=x, v_threshold=threshold)
    if threshold is not None:
        _check.broadcasts("v_threshold", threshold, x.shape[1:])


def flat(found: Statistics | None, n: NormParams, threshold: Tensor | None) -> tuple[Any, ...]:
    """The operators' arguments after `bias` and before those of the neurons, in order."""
    mean = rstd = rstd_batch = ema_gz = rows = None
    if found is not None:
        mean, rstd, rstd_batch, ema_gz = found.mean, found.rstd, found.rstd_batch, found.ema_gz
        rows = found.rows
    return (mean, rstd, threshold, rstd_batch, ema_gz, rows, n.eps, n.training, n.synced)
