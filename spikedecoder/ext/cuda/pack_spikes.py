"""Packing on the GPU (csrc/pack_spikes.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cuda import native
from spikedecoder.ext.cuda._arguments import TYPES, address, launch, on_a_gpu
from spikedecoder.ops._dispatch import Call
from spikedecoder.reference.pack_spikes import WORD


def why_not(call: Call) -> str | None:
    """Why this backend cannot run the call; None if it can. It packs bytes, too."""
    return on_a_gpu(call, bytes_too=True)


def pack(spikes: Tensor) -> Tensor:
    """[..., C] -> int64 words [..., ceil(C / 64)]; what is not 0 is a spike."""
    spikes = spikes.detach().contiguous()
    channels = spikes.shape[-1]
    words = spikes.new_empty(*spikes.shape[:-1], -(-channels // WORD), dtype=torch.int64)
    rows = spikes.numel() // channels if channels else 0
    launch(native.pack, spikes, address(spikes), TYPES[spikes.dtype], address(words), rows, channels)
    return words


def unpack(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """int64 words [..., ceil(C / 64)] -> [..., C] of 0 and 1 in `dtype`."""
    words = words.contiguous()
    values = words.new_empty(*words.shape[:-1], channels, dtype=dtype)
    rows = values.numel() // channels if channels else 0
    launch(native.unpack, words, address(words), address(values), TYPES[dtype], rows, channels)
    return values


def transpose_bits(words: Tensor, rows: int, channels: int) -> Tensor:
    """words [rows, ceil(C / 64)] -> [C, ceil(rows / 64)]."""
    out = words.new_empty(channels, -(-rows // WORD))
    launch(native.transpose_bits, words, address(words), address(out), rows, channels)
    return out
