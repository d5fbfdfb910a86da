"""Token shift: spikes of the previous tokens, without a parameter or a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor


def token_shift(x: Tensor, n: int) -> Tensor:
    """Channel group i of n takes its values from the token i places back (zeros before the first).

    x [..., S, E] -> [..., S, E]. Groups are as equal as possible, the first ones wider. Spikes stay
    spikes. Source: the token shift of RWKV (Peng et al., 2023), made binary and longer.
    """
    if n == 1:
        return x
    groups = x.tensor_split(n, dim=-1)
    shifted = [groups[0]]
    for i, group in enumerate(groups[1:], start=1):
        i = min(i, x.shape[-2])
        past = group[..., : group.shape[-2] - i, :]
        shifted.append(torch.cat([group.new_zeros(*group.shape[:-2], i, group.shape[-1]), past], dim=-2))
    return torch.cat(shifted, dim=-1)
