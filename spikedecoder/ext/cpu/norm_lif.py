"""Normalisation and LIF or I-LIF in C++ (csrc/norm_lif.cpp, csrc/moments.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import (
    ELEMENTS,
    address,
    dense,
    floats_on_cpu,
    grad_threshold_like,
    neuron,
    same,
    threshold_of,
)
from spikedecoder.ext.cpu._memory import empty, empty_like, hand_over
from spikedecoder.params import ILIFParams, LIFParams, NormParams

why_not = floats_on_cpu

_ROW, _CHANNEL = 0, 1
_WHOLE, _REDUCE, _APPLY, _KNOWN, _BATCH = 0, 1, 2, 3, 4


def _sizes(x: Tensor, p: LIFParams | ILIFParams) -> tuple[int, int, int]:
    """(T, rows of a timestep, channels)."""
    shape = x.shape
    steps, channels = 1 if isinstance(p, ILIFParams) else shape[0], shape[-1]
    return steps, x.numel() // (steps * channels) if steps and channels else 0, channels


def moments(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over all rows of x [..., C]; without `center`, 0 and E[x^2]."""
    x = same(x)
    channels = x.shape[-1]
    mean, var = empty((channels,)), empty((channels,))
    native.moments(
        *(ELEMENTS[x.dtype], address(x), center, address(mean), address(var)),
        *(x.numel() // channels, channels, torch.get_num_threads()),
    )
    return mean, var


def batch_statistics(x: Tensor, n: NormParams) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / sqrt(variance + eps) [C] of x for BatchNorm in training; updates n's running statistics.

    None if the running statistics are not contiguous float32, which the kernel needs.
    """
    statistics = hand_over(native.statistics_of_batch, x, *n.running, n.momentum, n.eps)
    if statistics is None:
        if any(r.dtype != torch.float32 or not r.is_contiguous() for r in n.running):
            return None
        x = same(x)
        channels = x.shape[-1]
        statistics = mean, rstd = empty((channels,)), empty((channels,))
        native.batch_statistics(
            *(ELEMENTS[x.dtype], address(x), *map(address, n.running), n.momentum, n.eps),
            *(address(mean), address(rstd), x.numel() // channels, channels, torch.get_num_threads()),
        )
    for running in n.running:  # tell autograd that they changed
        torch.autograd.graph.increment_version(running)
    return statistics


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    threshold: Tensor | float,
    p: LIFParams | ILIFParams,
    spikes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, mean, rstd): the row statistics [T, ...] if none are given, else those of channels, as given.

    p: for LIF, x is [T, ..., C]; I-LIF has no timesteps and takes any [..., C]. threshold: used by LIF.
    spikes: the tensor to write to, like x or some rows [T, begin:end, C] of a larger one; None makes one.
    """
    if spikes is None:
        tensors = (x, weight, bias, mean, rstd)
        if (done := hand_over(native.norm_lif, neuron(p), threshold, *tensors, eps)) is not None:
            return done
    x, weight, bias = same(x), dense(weight), dense(bias)
    if mean is None or rstd is None:
        rows_of_x = x.shape[:-1]
        kind, mean, rstd = _ROW, empty(rows_of_x), empty(rows_of_x)
    else:
        kind, mean, rstd = _CHANNEL, dense(mean), dense(rstd)
    t = threshold_of(threshold, x)
    steps, rows, channels = _sizes(x, p)
    apart = rows if spikes is None else spikes.stride(0) // max(1, channels)
    spikes = empty_like(x) if spikes is None else spikes
    native.norm_lif_forward(
        *(neuron(p), t.native, kind, ELEMENTS[x.dtype], address(x), address(weight), address(bias), eps),
        *(address(mean), address(rstd), address(spikes)),
        *(steps, rows, channels, apart, torch.get_num_threads()),
    )
    return spikes, mean, rstd


def backward_layer(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias, grad_threshold) for row statistics; inputs as in `_backward`."""
    return _backward(_ROW, _WHOLE, *inputs)


def backward_reduce(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of g z, sum of g, grad_threshold) for channel statistics; g = dL/dy, z the normalised x."""
    return _backward(_CHANNEL, _REDUCE, *inputs)[1:]


def backward_apply(*inputs: Any) -> Tensor:
    """grad_x = a g + b z + c; a, b, c [C] follow the other inputs."""
    return _backward(_CHANNEL, _APPLY, *inputs)[0]


def backward_known(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward_reduce` and `backward_apply` at once: (grad_x, sum of g z, sum of g, grad_threshold)."""
    return _backward(_CHANNEL, _KNOWN, *inputs)


def backward_batch(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward_reduce`, then `backward_apply` for statistics that are those of x's own rows."""
    return _backward(_CHANNEL, _BATCH, *inputs)


def _backward(
    kind: int,
    part: int,
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | float,
    p: LIFParams | ILIFParams,
    *coefficients: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias, grad_threshold); `part` decides which of them are computed."""
    tensors = (grad_spikes, x, weight, bias, mean, rstd)
    done = hand_over(native.norm_lif_gradients, neuron(p), threshold, kind, part, *tensors, coefficients)
    if done is not None:
        return done
    x, grad_spikes = same(x), same(grad_spikes, x.dtype)
    values = [dense(i) for i in (weight, bias, mean, rstd, *coefficients)]
    addresses = [address(i) for i in (grad_spikes, x, *values)] + [0] * (7 - len(values))
    sizes = _sizes(x, p)
    channels = sizes[-1]
    t = threshold_of(threshold, x)
    grad_x = empty((0,), x.dtype) if part == _REDUCE else empty_like(x)
    grad_weight, grad_bias = empty((channels,)), empty((channels,))
    grad_threshold = grad_threshold_like(threshold, t)
    native.norm_lif_backward(
        *(neuron(p), t.native, kind, part, ELEMENTS[x.dtype], *addresses, address(grad_x)),
        *(address(grad_weight), address(grad_bias), address(grad_threshold)),
        *(*sizes, torch.get_num_threads()),
    )
    return grad_x, grad_weight, grad_bias, empty((0,)) if grad_threshold is None else grad_threshold
