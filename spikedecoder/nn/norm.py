"""Normalisation layers; each hands its tensors to `spikedecoder.ops` as `NormParams`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder import ops, sync
from spikedecoder.params import RUNNING, NormParams


class Norm(nn.Module):
    """LayerNorm, BatchNorm or PowerNorm over the last dimension."""

    num_batches_tracked: Tensor

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.group: str | None = None  # whose processes share the statistics: see `sync_norms`
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
            self.num_batches_tracked.add_(1)
        tensors = tuple(getattr(self, name) for name in RUNNING[self.kind])
        return NormParams(
            self.kind, self.weight, self.bias, training=self.training, running=tensors, group=self.group
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.params())

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.weight.shape[0]}"


def sync_norms(model: nn.Module, group: Any = None) -> int:
    """Let BatchNorm and PowerNorm of `model` take their statistics over all processes of a group in training.

    As torch.nn.SyncBatchNorm does: the statistics are those of all processes' rows together, each process
    counting by its rows, and the running ones stay equal everywhere. One small collective a norm in forward
    and one in backward. Without it each process normalises by its own batch, as torch's BatchNorm does, which
    at few sequences a process is noisy.

    Args:
        model: changed in place.
        group: a torch.distributed.ProcessGroup; None: all processes.

    Returns:
        how many norms were changed (LayerNorm has nothing to share).

    Raises:
        TypeError, ValueError: not a group; torch.distributed is not initialised.
    """
    name = sync.name_of(group)
    sync.group_of(name)
    norms = [m for m in model.modules() if isinstance(m, Norm) and m.kind != "layer"]
    for norm in norms:
        norm.group = name
    return len(norms)
