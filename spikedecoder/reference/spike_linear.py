"""Linear layer on spikes: y = s W^T + b."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from spikedecoder.reference.pack_spikes import pack, unpack


def forward(s: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y [..., N], s as bits)."""
    return F.linear(s.to(weight.dtype), weight, bias), pack(s)


def from_words(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] from bits."""
    return F.linear(unpack(words, channels, weight.dtype), weight, bias)


def weight_grad(words: Tensor, channels: int, grad: Tensor) -> Tensor:
    """dW = dy^T s, [N, K], from s as bits."""
    s = unpack(words, channels, grad.dtype).unsqueeze(0).flatten(0, -2)
    return grad.unsqueeze(0).flatten(0, -2).transpose(0, 1) @ s
