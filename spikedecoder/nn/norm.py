"""Normalisation layers; each hands its tensors to `spikedecoder.ops` as `NormParams`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder import ops, sync
from spikedecoder.params import RUNNING, NormParams, repeats_a_pass


class Norm(nn.Module):
    """LayerNorm, BatchNorm or PowerNorm over the last dimension."""

    num_batches_tracked: Tensor

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.group: str | None = None  # of processes that share the statistics: see `sync_norms`
        self.momentum = NormParams.momentum
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
        """The tensors and settings of one pass; in training, BatchNorm counts the pass."""
        if self.kind == "batch" and self.training and not repeats_a_pass():
            self.num_batches_tracked.add_(1)
        tensors = tuple(getattr(self, name) for name in RUNNING[self.kind])
        return NormParams(
            self.kind, self.weight, self.bias, training=self.training, running=tensors,
            momentum=self.momentum, group=self.group,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.params())

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.weight.shape[0]}"


def sync_norms(model: nn.Module, group: Any = None) -> int:
    """Let the BatchNorms and PowerNorms of `model` share their statistics between processes in training.

    As with torch.nn.SyncBatchNorm, statistics are taken over the rows of all processes of the group, every
    row counting once, and running statistics stay equal everywhere. This takes one small collective per norm
    in forward and one in backward. Without it each process normalises by its own batch, as torch's BatchNorm
    does, which is noisy with few sequences per process.

    Args:
        model: changed in place.
        group: a torch.distributed.ProcessGroup; None: all processes.

    Returns:
        the number of norms that were changed (LayerNorm has nothing to share).

    Raises:
        TypeError: group is not a process group.
        ValueError: torch.distributed is not initialised.
    """
    name = sync.name_of(group)
    sync.group_of(name)
    norms = [m for m in model.modules() if isinstance(m, Norm) and m.kind != "layer"]
    for norm in norms:
        norm.group = name
    return len(norms)


@torch.no_grad()
def measure_norms(model: nn.Module, batches: Iterable[Any]) -> int:
    """Measure BatchNorm's running statistics anew, as the mean over `batches`, each an input of `model`.

    For weights that were not trained as they are, such as those of `torch.optim.swa_utils.AveragedModel`;
    torch's `update_bn` knows only torch's own norms. Dropout is off meanwhile. If norms share statistics
    (`sync_norms`), each process calls this with its share of the batches.

    Returns:
        the number of norms that were measured.

    Raises:
        ValueError: no batches; the statistics stay as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, Norm) and m.kind == "batch"]
    modes = [(m, m.training) for m in model.modules()]
    momenta, seen = [norm.momentum for norm in norms], 0
    try:
        model.eval()
        for seen, batch in enumerate(batches, 1):
            for norm in norms:
                norm.train()
                norm.momentum = 1 / seen  # the first batch replaces the old statistics
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if not seen:
        raise ValueError("batches: got none, takes at least one")
    return len(norms)
