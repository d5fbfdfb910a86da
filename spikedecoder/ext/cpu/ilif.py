"""Integer LIF in C++ (csrc/ilif.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import address, dense, floats_on_cpu, neuron
from spikedecoder.ext.cpu._memory import empty_like, hand_over
from spikedecoder.params import ILIFParams

why_not = floats_on_cpu


def forward(x: Tensor, p: ILIFParams, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    """(s in x's dtype, mask of where the gradient passes, in bytes of 0 and 1; None if it is not wanted)."""
    if (done := hand_over(native.ilif, neuron(p), x, want_mask)) is not None:
        return done
    dtype = x.dtype
    x = dense(x)
    out = empty_like(x)
    mask = x.new_empty(x.shape, dtype=torch.uint8) if want_mask else None
    native.ilif_forward(
        *(address(x), address(out), address(mask), 1 / p.v_threshold, float(p.levels), *p.window),
        *(x.numel(), torch.get_num_threads()),
    )
    return out.to(dtype), mask


def backward(grad: Tensor, mask: Tensor, p: ILIFParams) -> Tensor:
    """Gradient of x."""
    if (done := hand_over(native.ilif_gradient, neuron(p), grad, mask)) is not None:
        return done
    if mask.shape != grad.shape or mask.dtype != torch.uint8:
        raise ValueError(
            f"mask: got {tuple(mask.shape)} of {mask.dtype}, takes {tuple(grad.shape)} of torch.uint8"
        )
    dtype = grad.dtype
    grad, mask = dense(grad), mask.contiguous()
    grad_x = empty_like(grad)
    native.ilif_backward(
        *(address(grad), address(mask), address(grad_x), 1 / p.v_threshold),
        *(grad.numel(), torch.get_num_threads()),
    )
    return grad_x.to(dtype)
