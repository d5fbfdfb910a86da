"""Token shift: spikes of previous tokens, without parameters or multiplications."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.nn.state import LayerState


def token_shift(x: Tensor, n: int, layer: LayerState | None = None, key: str = "") -> Tensor:
    """Channel group i of n takes its values from the token i places back (zeros before the first).

    x [..., S, E] -> [..., S, E]. Group widths differ by at most 1, the first ones being wider. Spikes stay
    spikes. With `layer`, its entry `key` holds the last n - 1 tokens [..., n - 1, E] and is updated.
    Source: the token shift of RWKV (Peng et al., 2023), made binary and longer.
    """
    if n == 1:
        return x
    if layer is None:
        return torch.cat([_moved(group, i) for i, group in enumerate(_groups(x, n))], dim=-1)
    past = layer.get(key)
    if past is None:
        past = x.new_zeros(*x.shape[:-2], n - 1, x.shape[-1])
    extended = torch.cat([past.to(x.dtype), x], dim=-2)
    layer[key] = extended[..., -(n - 1) :, :].clone()
    s = x.shape[-2]
    groups = _groups(extended, n)
    return torch.cat([group[..., n - 1 - i : n - 1 - i + s, :] for i, group in enumerate(groups)], dim=-1)


def _groups(x: Tensor, n: int) -> Sequence[Tensor]:
    """x.tensor_split(n, dim=-1), whose gradient would fill a tensor of x's size with zeros for each group."""
    wide, first = divmod(x.shape[-1], n)
    return x.split([wide + (i < first) for i in range(n)], dim=-1)


def _moved(group: Tensor, i: int) -> Tensor:
    """group [..., S, C] moved i places later: zeros come first, and the last i places are dropped."""
    i = min(i, group.shape[-2])
    return F.pad(group, (0, 0, i, -i)) if i else group
