"""Token shift: channels that come from previous tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, n: int, back: bool = False) -> Tensor:
    """x [..., S, C] shifted, differentiable by autograd; `back`: the other way, as its gradient is."""
    wide, first = divmod(x.shape[-1], n)
    # (the gradient of tensor_split would fill a tensor of x's size with zeros for each group)
    groups = x.split([wide + (i < first) for i in range(n)], dim=-1)
    return torch.cat([_moved(group, -i if back else i) for i, group in enumerate(groups)], dim=-1)


def _moved(group: Tensor, i: int) -> Tensor:
    """group [..., S, C] moved i places later (earlier for i < 0), with zeros where nothing moves to."""
    s = group.shape[-2]
    i = max(-s, min(i, s))
    return F.pad(group, (0, 0, i, -i)) if i else group
