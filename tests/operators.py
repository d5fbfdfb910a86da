"""Operators as the samples of a data set: a module of its own, since a spawned worker imports it."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder import ops
from spikedecoder.params import LIFParams, NormParams


class Operators(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample i: results and gradients of the compiled operators on random input of seed i."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        s = (torch.rand(4, 512, 64, generator=generator) < 0.2).float()
        weight = torch.randn(96, 64, generator=generator).requires_grad_()
        scale, shift = torch.ones(96, requires_grad=True), torch.zeros(96, requires_grad=True)
        with ops.use_backend("cpu"):
            current = ops.spike_linear(s, weight)
            spikes = ops.norm_lif(current, NormParams("layer", scale, shift), LIFParams())
            gradients = torch.autograd.grad((spikes * s.mean(-1, keepdim=True)).sum(), (weight, scale, shift))
        return {
            "current": current.detach(),
            "spikes": spikes.detach(),
            **dict(zip(("weight", "scale", "shift"), gradients, strict=True)),
        }
