"""Sums and moments over the processes of a group: statistics of a batch that is split between them.

Groups go by strings, which fit an operator's schema and a pickled model: ``WORLD`` is all processes, other
groups get their names from `name_of`. The collectives are registered operators, so models that use them can
be traced; no value is read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = "world"
_groups: dict[str, Any] = {}


def name_of(group: Any = None) -> str:
    """The name by which operators find this process group (None: all processes); else TypeError."""
    if group is None:
        return WORLD
    if not isinstance(getattr(group, "group_name", None), str):
        raise TypeError(f"group: got {type(group).__name__}, takes a torch.distributed.ProcessGroup or None")
    _groups[group.group_name] = group
    return group.group_name


def group_of(name: str) -> Any:
    """The process group of that name; ValueError if there is none, or torch.distributed has not started."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"group: got {name!r}, but torch.distributed is not initialised here; call "
            "torch.distributed.init_process_group first, or take group=None"
        )
    if name == WORLD:
        return dist.group.WORLD
    if name not in _groups:
        raise ValueError(f"group: got {name!r}, takes {', '.join((WORLD, *_groups))}, or None")
    return _groups[name]


@torch.library.custom_op("spikedecoder::sum_over_processes", mutates_args=())
def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum of x over all processes of the group."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_of(group))
    return total


@sum_over.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("spikedecoder::gather_from_processes", mutates_args=())
def gather_from(x: Tensor, group: str) -> Tensor:
    """The x of all processes of the group, stacked: [processes, ...]."""
    members = group_of(group)
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(members))]
    dist.all_gather(parts, x, group=members)
    return torch.stack(parts)


@gather_from.register_fake
def _(x, group):  # type: ignore[no-untyped-def]
    return x.new_empty(dist.get_world_size(group_of(group)), *x.shape)


def moments_over(mean: Tensor, var: Tensor, rows: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [C], var [C], rows []) over the rows of all processes, from the moments of each process's own.

    With n_i rows in process i and N in all:  mean = sum n_i mean_i / N,
    var = sum n_i (var_i + (mean_i - mean)^2) / N,  so each process counts by its rows; one without rows
    passes zeros. One collective.
    """
    own = torch.cat([mean, var, torch.full((1,), rows, dtype=mean.dtype, device=mean.device)])
    means, variances, counts = gather_from(own, group).split([len(mean), len(var), 1], dim=1)
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, total
