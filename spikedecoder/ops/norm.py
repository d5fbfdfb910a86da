"""Normalisation over channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spikedecoder import sync
from spikedecoder.ops import _check
from spikedecoder.ops._direct import direct, unwatched
from spikedecoder.ops._dispatch import Call, own_or_reference, requested_backend, resolve, select
from spikedecoder.params import RUNNING, NormParams, repeats_a_pass
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.norm import (
    layer_dtype,
    mean_so_far,
    move_running,
    power_scale,
    traced_power_scale,
)
from spikedecoder.reference.norm import norm as _reference


def _of_backend(x: Tensor, backend: str) -> Any:
    """The module that computes channel statistics."""
    return select("norm_lif", Call(x.device, x.dtype, tuple(x.shape), {"rows": False}), backend)


def _moments_of(x: Tensor, center: bool, backend: str) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:  # such as on a process without rows
        nothing = x.new_zeros(x.shape[-1], dtype=compute_dtype(x.dtype))
        return nothing, nothing.clone()
    return _of_backend(x, backend).moments(x, center)


_moments = torch.library.custom_op("spikedecoder::moments", _moments_of, mutates_args=())


@_moments.register_fake
def _(x, center, backend):
    mean = x.new_empty(x.shape[-1], dtype=compute_dtype(x.dtype))
    return mean, torch.empty_like(mean)


@dataclass(frozen=True)
class Statistics:
    """Channel statistics of one pass: y = (x - mean) rstd weight + bias.

    rstd_batch, ema_gz: for PowerNorm in training, see `reference.norm`. rows: number of rows that the
    statistics are taken over, if processes share them.
    """

    mean: Tensor
    rstd: Tensor
    rstd_batch: Tensor | None = None
    ema_gz: Tensor | None = None
    rows: Tensor | None = None


def statistics(x: Tensor, n: NormParams) -> Statistics | None:
    """Channel statistics, in training updating the running ones; None for LayerNorm, whose are per row."""
    return None if n.kind == "layer" else _of_channels(x, _moving_once(n))


def _moving_once(n: NormParams) -> NormParams:
    """n; in a repeated pass with copies of the running statistics, which the first pass has updated."""
    if n.training and n.running and repeats_a_pass():
        return replace(n, running=tuple(x.clone() for x in n.running))
    return n


@torch.no_grad()
def _of_channels(x: Tensor, n: NormParams) -> Statistics:
    if not n.training:
        dtype = compute_dtype(n.running[0].dtype)  # the neurons that follow compute in it
        if n.kind == "power":
            phi = n.running[0].to(dtype)
            return Statistics(torch.zeros_like(phi), (phi + n.eps).rsqrt())
        mean, var = n.running
        return Statistics(mean.to(dtype, copy=True), (var.to(dtype) + n.eps).rsqrt())
    plain = unwatched(x, *n.running)
    if n.kind == "batch" and n.synced is None and plain and x.numel():
        impl = _of_backend(x, requested_backend())
        found = impl.batch_statistics(x, n) if hasattr(impl, "batch_statistics") else None
        if found is not None:
            return Statistics(*found)
    moments = _moments_of if plain else _moments
    mean, var = moments(x.detach(), n.kind == "batch", requested_backend())
    rows, count = None, x.numel() // x.shape[-1]
    if n.synced is not None:
        mean, var, rows = sync.moments_over(mean, var, count, n.synced)
    if n.kind == "batch":
        move_running(n, mean, var, count if rows is None else rows)
        return Statistics(mean, (var + n.eps).rsqrt(), rows=rows)
    phi, ema_gz, iters = n.running
    iters += 1
    scale = (power_scale if plain else traced_power_scale)(var, phi, iters, n.eps, n.warmup)
    phi.copy_(torch.lerp(torch.where(iters < n.warmup, mean_so_far(phi, var, iters), phi), var, n.momentum))
    return Statistics(mean, scale, (var + n.eps).rsqrt(), ema_gz, rows)


def check_norm(x: Tensor, n: NormParams) -> None:
    """Check x [..., C] and the tensors of a norm of C channels."""
    _check.of_type("n", n, NormParams)
    _check.floating("x", x, min_dims=2)
    _check.floating("weight", n.weight, dims=1)
    if n.weight.shape != x.shape[-1:]:
        raise ValueError(f"x: got {x.shape[-1]} channels (shape {tuple(x.shape)}), takes {n.weight.shape[0]}")
    if n.kind != "layer" and not n.weight.numel():
        raise ValueError(
            f"x: got no channels (shape {tuple(x.shape)}), takes at least 1 for {n.kind} statistics"
        )
    names = RUNNING[n.kind]
    if not isinstance(n.running, (tuple, list)):
        raise TypeError(f"running: got {type(n.running).__name__}, takes a tuple ({', '.join(names)})")
    if len(n.running) != len(names):
        raise ValueError(f"running: got {len(n.running)} tensors, takes ({', '.join(names)})")
    of_channels = dict(zip(("bias", *names), (n.bias, *n.running), strict=True))
    if "iters" in of_channels:
        _check.of_type("iters", of_channels.pop("iters"), Tensor)
    for name, tensor in of_channels.items():
        _check.floating(name, tensor)
        _check.same_shape("weight", n.weight, name, tensor)
    _check.same_device(x=x, weight=n.weight, **of_channels)
    least = {"layer": 0, "batch": 2, "power": 1}[n.kind]
    if n.training and n.synced is None and x.numel() < least * x.shape[-1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, takes at least {least} rows for {n.kind} statistics in training"
        )


def _layer_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, mean, rstd)."""
    call = Call(x.device, x.dtype, tuple(x.shape))
    return select("norm", call, backend).forward(x, weight, bias, eps, dtype)


def layer_fake(x, dtype):
    """The outputs of `layer_norm`, without values."""
    rows = x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(dtype))
    return x.new_empty(x.shape, dtype=dtype), rows, torch.empty_like(rows)


layer_norm = torch.library.custom_op("spikedecoder::layer_norm", _layer_forward, mutates_args=())
layer_norm.register_fake(lambda x, weight, bias, eps, dtype, backend: layer_fake(x, dtype))


def _layer_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    impl = select("norm", Call(x.device, x.dtype, tuple(x.shape)), backend)
    grad_x, grad_weight, grad_bias = impl.backward(grad, x, mean, rstd, weight)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


layer_norm_backward = torch.library.custom_op(
    "spikedecoder::layer_norm_backward", _layer_backward, mutates_args=()
)


@layer_norm_backward.register_fake
def _(grad, x, mean, rstd, weight, bias, backend):
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradients(ctx, grad, backward):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    return *backward(grad, x, mean, rstd, weight, bias, ctx.backend), None, None, None


def _autograd(ctx, grad, _grad_mean, _grad_rstd):
    return _gradients(ctx, grad, layer_norm_backward)


layer_norm.register_autograd(_autograd, setup_context=_setup_context)


_direct = direct(_layer_forward, _setup_context, lambda ctx, grad, *_: _gradients(ctx, grad, _layer_backward))


def norm(x: Tensor, n: NormParams) -> Tensor:
    """LayerNorm, BatchNorm or PowerNorm of x [..., C]; equations: `spikedecoder.params.NormParams`.

    In training, updates the running statistics in ``n.running``. Batch and power statistics are taken over
    all of T, B and S (and, with ``n.group``, over all processes), so in training the output at one position
    depends on later positions: choose "layer" where a strictly causal training loss matters. In evaluation
    all three are causal.

    Args:
        x: [..., C], float, two dimensions or more; in training at least 2 rows for "batch" and 1 for "power".
        n: the norm of C channels.

    Returns:
        y in x's shape. Kept for backward: x and the statistics.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: PowerNorm in training, under activation checkpointing (`torch.utils.checkpoint`).

    Source: Ba et al., 2016; Ioffe & Szegedy, 2015; Shen et al., 2020.
    """
    check_norm(x, n)
    if n.kind == "batch":  # which is torch's
        takes = dict.fromkeys((x.dtype, compute_dtype(x.dtype)))
        for name, running in zip(RUNNING["batch"], n.running, strict=True):
            if running.dtype not in takes:
                takes_of_x = " or ".join(map(str, takes))
                raise TypeError(f"{name}: got dtype {running.dtype}, takes {takes_of_x} for x of {x.dtype}")
    backend = own_or_reference("norm")
    found = resolve("norm", x.device.type, x.dtype, backend)
    if n.kind != "layer" or found == "reference":
        return _reference(x, _moving_once(n))
    call = _direct if unwatched(x, n.weight, n.bias) else layer_norm
    return call(x, n.weight, n.bias, n.eps, layer_dtype(x), backend)[0]
