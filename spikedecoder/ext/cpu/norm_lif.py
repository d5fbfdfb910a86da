"""Normalisation and LIF in C++ (csrc/norm_lif.cpp, csrc/moments.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import (
    address,
    dense,
    float32_on_cpu,
    grad_threshold_like,
    neuron,
    threshold_of,
)
from spikedecoder.params import LIFParams

why_not = float32_on_cpu

_ROW, _CHANNEL = 0, 1
_WHOLE, _REDUCE, _APPLY = 0, 1, 2


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """T, rows of a timestep, channels."""
    channels = x.shape[-1]
    return x.shape[0], x[0].numel() // channels if channels else 0, channels


def moments(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over all rows of x [..., C]; without `center`, 0 and E[x^2]."""
    x = dense(x)
    channels = x.shape[-1]
    mean, var = torch.empty(channels), torch.empty(channels)
    rows = x.numel() // channels
    native.moments(address(x), center, address(mean), address(var), rows, channels, torch.get_num_threads())
    return mean, var


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    threshold: Tensor | float,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, mean, rstd): row statistics [T, ...] where none are given, else the channels' own."""
    x, weight, bias = dense(x), dense(weight), dense(bias)
    if mean is None or rstd is None:
        kind, mean, rstd = _ROW, torch.empty(x.shape[:-1]), torch.empty(x.shape[:-1])
    else:
        kind, mean, rstd = _CHANNEL, dense(mean), dense(rstd)
    t = threshold_of(threshold, x.shape[1:])
    spikes = torch.empty_like(x)
    native.norm_lif_forward(
        *(neuron(p), t.native, kind, address(x), address(weight), address(bias), eps),
        *(address(mean), address(rstd), address(spikes), *_sizes(x), torch.get_num_threads()),
    )
    return spikes, mean, rstd


def backward_layer(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | float,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias, grad_threshold) for row statistics."""
    grad_x = torch.empty(x.shape)
    sums = _backward(_ROW, _WHOLE, grad_spikes, x, weight, bias, mean, rstd, threshold, p, grad_x)
    return grad_x, *sums


def backward_reduce(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | float,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of g z, sum of g, grad_threshold) for channel statistics; g = dL/dy, z the normalised x."""
    return _backward(_CHANNEL, _REDUCE, grad_spikes, x, weight, bias, mean, rstd, threshold, p, None)


def backward_apply(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Tensor | float,
    p: LIFParams,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> Tensor:
    """grad_x = a g + b z + c, with a, b, c [C]."""
    grad_x = torch.empty(x.shape)
    _backward(_CHANNEL, _APPLY, grad_spikes, x, weight, bias, mean, rstd, threshold, p, grad_x, (a, b, c))
    return grad_x


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
    p: LIFParams,
    grad_x: Tensor | None,
    coefficients: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills grad_x where it is given; returns the sums, which `_APPLY` leaves uninitialised."""
    inputs = [dense(i) for i in (grad_spikes, x, weight, bias, mean, rstd, *coefficients)]
    addresses = [address(i) for i in inputs] + [0] * (9 - len(inputs))
    timestep = x.shape[1:]
    t = threshold_of(threshold, timestep)
    grad_weight, grad_bias = torch.empty(x.shape[-1]), torch.empty(x.shape[-1])
    grad_threshold = grad_threshold_like(threshold, t, timestep)
    native.norm_lif_backward(
        *(neuron(p), t.native, kind, part, *addresses, address(grad_x)),
        *(address(grad_weight), address(grad_bias), address(grad_threshold)),
        *(*_sizes(x), torch.get_num_threads()),
    )
    return grad_weight, grad_bias, torch.zeros(()) if grad_threshold is None else grad_threshold
