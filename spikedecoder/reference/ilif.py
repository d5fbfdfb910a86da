"""Integer LIF neurons. Equations: `spikedecoder.params.ILIFParams`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.params import ILIFParams
from spikedecoder.reference.lif import compute_dtype


def _in_levels(x: Tensor, p: ILIFParams) -> Tensor:
    """x / v_threshold, as a product, which every backend rounds alike."""
    return x.to(compute_dtype(x.dtype)) * (1 / p.v_threshold)


def _count(u: Tensor, p: ILIFParams) -> Tensor:
    return (u + 0.5).floor().clamp(0, p.levels)


def ilif(x: Tensor, p: ILIFParams) -> Tensor:
    """By autograd: straight through in the window, ends included (clamp from torch 2.14 on excludes them)."""
    u = _in_levels(x, p)
    low, high = p.window
    through = torch.where((u >= low) & (u <= high), u, u.detach().clamp(low, high))
    return (through + (_count(u, p) - through).detach()).to(x.dtype)


def forward(x: Tensor, p: ILIFParams, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    """(s in x's dtype, mask): the mask, if wanted, has bytes of 1 where the gradient passes, else 0."""
    u = _in_levels(x, p)
    low, high = p.window
    mask = ((u >= low) & (u <= high)).view(torch.uint8) if want_mask else None
    return _count(u, p).to(x.dtype), mask


def backward(grad: Tensor, mask: Tensor, p: ILIFParams) -> Tensor:
    """Gradient of x."""
    scaled = grad.to(compute_dtype(grad.dtype)) * (1 / p.v_threshold)
    return scaled.masked_fill(mask == 0, 0).to(grad.dtype)
