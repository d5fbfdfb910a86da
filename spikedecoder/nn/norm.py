"""Normalisation layers; each hands its tensors to `spikedecoder.ops` as `NormParams`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.params import NormParams


class Norm(nn.Module):
    """LayerNorm, BatchNorm or PowerNorm over the last dimension."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if kind == "batch":
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))
            self.register_buffer("num_batches_tracked", torch.tensor(0))
        elif kind == "power":
            self.register_buffer("running_phi", torch.ones(channels))
            self.register_buffer("ema_gz", torch.zeros(channels))
            self.register_buffer("iters", torch.tensor(0))

    def params(self) -> NormParams:
        """The tensors and settings of one pass; counts the pass where the norm keeps count."""
        if self.kind == "batch" and self.training:
            self.get_buffer("num_batches_tracked").add_(1)
        running = {
            "layer": (),
            "batch": ("running_mean", "running_var"),
            "power": ("running_phi", "ema_gz", "iters"),
        }[self.kind]
        tensors = tuple(self.get_buffer(name) for name in running)
        return NormParams(self.kind, self.weight, self.bias, training=self.training, running=tensors)

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.params())

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.weight.shape[0]}"
