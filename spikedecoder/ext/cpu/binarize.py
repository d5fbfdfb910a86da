"""Binarisation in C++ (csrc/binarize.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import address, dense, floats_on_cpu
from spikedecoder.ext.cpu._memory import empty_like

why_not = floats_on_cpu


def forward(x: Tensor, alpha: float) -> Tensor:
    """1 where x >= 0, else 0, in x's dtype."""
    dtype = x.dtype
    x = dense(x)
    spikes = empty_like(x)
    native.binarize(address(x), 0, address(spikes), alpha, x.numel(), torch.get_num_threads())
    return spikes.to(dtype)


def backward(grad: Tensor, x: Tensor, alpha: float) -> Tensor:
    """dL/dx in x's dtype, by the surrogate's derivative at x."""
    dtype = x.dtype
    x, grad = dense(x), dense(grad)
    grad_x = empty_like(x)
    if x.numel():
        native.binarize(address(x), address(grad), address(grad_x), alpha, x.numel(), torch.get_num_threads())
    return grad_x.to(dtype)
