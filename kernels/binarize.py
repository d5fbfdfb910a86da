"""s = 1 where x >= 0, else 0; backward by the ATan surrogate, ds/dx = (alpha / 2) / (1 + (pi/2 alpha x)^2).

Any shape, seen as N elements; a program takes BLOCK of them, two 128-bit accesses per thread and tensor.
Bytes per element (b = bytes of x's dtype), the minimum possible: forward 2 b, backward 3 b. Bound by memory
bandwidth.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import element_grid, element_sizes, kernel, launch, why_not
from spikedecoder.kernels._neuron import as_spikes
from spikedecoder.kernels._surrogate import height, shape
from spikedecoder.surrogate import SURROGATES

__all__ = ["backward", "forward", "why_not"]


@kernel
def binarize_forward(x_ptr, spikes_ptr, n, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    n = n.to(tl.int64) * ALIGN
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(spikes_ptr + i, as_spikes(x >= 0, spikes_ptr.dtype.element_ty), mask=i < n)


@kernel
def binarize_backward(
    grad_ptr, x_ptr, grad_x_ptr, n, alpha, SURROGATE: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    n = n.to(tl.int64) * ALIGN
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    grad_x = grad * (height(alpha, SURROGATE) * shape(x, 0.0, alpha, SURROGATE))
    tl.store(grad_x_ptr + i, grad_x.to(grad_x_ptr.dtype.element_ty), mask=i < n)


def forward(x: Tensor, alpha: float) -> Tensor:
    """Spikes in x's dtype."""
    x = x.contiguous()
    spikes = torch.empty_like(x)
    if x.numel():
        launch(binarize_forward, element_grid(x), x_ptr=x, spikes_ptr=spikes, **element_sizes(x))
    return spikes


def backward(grad: Tensor, x: Tensor, alpha: float) -> Tensor:
    """Gradient of x."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel():
        kind = SURROGATES["atan"].kernel_id
        launch(
            binarize_backward, element_grid(x), grad_ptr=grad, x_ptr=x, grad_x_ptr=grad_x, alpha=alpha,
            SURROGATE=kind,
            **element_sizes(x),
        )  # fmt: skip
    return grad_x
