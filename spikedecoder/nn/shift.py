"""Token shift with a state: the parallel form and its continuation token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder import ops
from spikedecoder.nn.state import LayerState


def token_shift(x: Tensor, n: int, layer: LayerState | None = None, key: str = "") -> Tensor:
    """`ops.token_shift` of x [..., S, E] -> [..., S, E].

    With `layer`, its entry `key` holds the last n - 1 tokens [..., n - 1, E] and is updated.
    """
    if n == 1:
        return x
    if layer is None:
        return ops.token_shift(x, n)
    past = layer.get(key)
    if past is None:
        past = x.new_zeros(*x.shape[:-2], n - 1, x.shape[-1])
    extended = torch.cat([past.to(x.dtype), x], dim=-2)
    layer[key] = extended[..., -(n - 1) :, :].clone()
    return ops.token_shift(extended, n)[..., n - 1 :, :]
