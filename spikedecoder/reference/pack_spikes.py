"""Spikes as bits: words of 64 along the last dimension, bit i of word w is channel 64 w + i."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64


def pack(spikes: Tensor) -> Tensor:
    """[..., C] of 0 and 1 -> int64 [..., ceil(C / 64)]; missing channels are 0."""
    c = spikes.shape[-1]
    words = -(-c // WORD)
    bits = torch.zeros(*spikes.shape[:-1], words * WORD, dtype=torch.int64, device=spikes.device)
    bits[..., :c] = spikes != 0
    shifts = torch.arange(WORD, device=spikes.device)
    return (bits.unflatten(-1, (words, WORD)) << shifts).sum(-1)


def unpack(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """int64 [..., ceil(C / 64)] -> [..., C] of 0 and 1 in `dtype`."""
    shifts = torch.arange(WORD, device=words.device)
    bits = (words.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :channels].to(dtype)
