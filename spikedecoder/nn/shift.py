"""Token shift: spikes of the previous tokens, without a parameter or a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.nn.state import LayerState


def token_shift(x: Tensor, n: int, layer: LayerState | None = None, key: str = "") -> Tensor:
    """Channel group i of n takes its values from the token i places back (zeros before the first).

    x [..., S, E] -> [..., S, E]. Groups are as equal as possible, the first ones wider. Spikes stay
    spikes. With `layer`, its entry `key` holds the last n - 1 tokens [..., n - 1, E] and is moved on.
    Source: the token shift of RWKV (Peng et al., 2023), made binary and longer.
    """
    if n == 1:
        return x
    past = None if layer is None else layer.get(key)
    if past is None:
        past = x.new_zeros(*x.shape[:-2], n - 1, x.shape[-1])
    extended = torch.cat([past, x], dim=-2)
    if layer is not None:
        layer[key] = extended[..., -(n - 1) :, :].clone()
    s = x.shape[-2]
    groups = extended.tensor_split(n, dim=-1)
    return torch.cat([group[..., n - 1 - i : n - 1 - i + s, :] for i, group in enumerate(groups)], dim=-1)
