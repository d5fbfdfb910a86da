"""I-LIF neurons (`ILIFParams`): s = clip(floor(x / v_threshold + 1/2), 0, D), and its gradient.

In training, forward also writes a mask with one byte per element that says where the gradient passes;
backward reads the mask and not x: dL/dx = dL/ds / v_threshold where it is 1, else 0.

Any shape, seen as N elements; a program takes BLOCK of them, two 128-bit accesses per thread. Bytes per
element (b = bytes of x's dtype): forward 2 b, in training 2 b + 1; backward 2 b + 1. Bound by memory
bandwidth.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import element_grid, element_sizes, kernel, launch, why_not
from spikedecoder.kernels._neuron import count
from spikedecoder.params import ILIFParams

__all__ = ["backward", "forward", "why_not"]


@kernel
def ilif_forward(
    x_ptr, out_ptr, mask_ptr, n, scale, levels, low, high, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    n = n.to(tl.int64) * ALIGN
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + i, count(u, levels).to(out_ptr.dtype.element_ty), mask=i < n)
    if mask_ptr is not None:
        tl.store(mask_ptr + i, ((u >= low) & (u <= high)).to(tl.uint8), mask=i < n)


@kernel
def ilif_backward(grad_ptr, mask_ptr, grad_x_ptr, n, scale, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    n = n.to(tl.int64) * ALIGN
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    passes = tl.load(mask_ptr + i, mask=i < n, other=0)
    grad_x = tl.where(passes != 0, grad * scale, 0.0)
    tl.store(grad_x_ptr + i, grad_x.to(grad_x_ptr.dtype.element_ty), mask=i < n)


def forward(x: Tensor, p: ILIFParams, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    """(s in x's dtype, the mask if wanted)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device) if want_mask else None
    low, high = p.window
    if x.numel():
        launch(
            ilif_forward, element_grid(x), x_ptr=x, out_ptr=out, mask_ptr=mask, scale=1 / p.v_threshold,
            levels=float(p.levels), low=low, high=high, **element_sizes(x),
        )  # fmt: skip
    return out, mask


def backward(grad: Tensor, mask: Tensor, p: ILIFParams) -> Tensor:
    """Gradient of x."""
    grad = grad.contiguous()
    grad_x = torch.empty_like(grad)
    if grad.numel():
        launch(
            ilif_backward, element_grid(grad), grad_ptr=grad, mask_ptr=mask, grad_x_ptr=grad_x,
            scale=1 / p.v_threshold,
            **element_sizes(grad),
        )  # fmt: skip
    return grad_x
