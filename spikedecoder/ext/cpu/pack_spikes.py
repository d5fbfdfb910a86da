"""Packing in C++ (csrc/pack_spikes.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import ELEMENTS, address, on_cpu
from spikedecoder.ext.cpu._memory import empty
from spikedecoder.reference.pack_spikes import WORD

why_not = on_cpu


def pack(spikes: Tensor) -> Tensor:
    """[..., C] of any dtype -> int64 words [..., ceil(C / 64)]; what is not 0 is a spike."""
    return pack_and_count(spikes)[0]


def pack_and_count(spikes: Tensor) -> tuple[Tensor, int]:
    """(words, number of set bits in them)."""
    spikes = packable(spikes)
    channels = spikes.shape[-1]
    words = spikes.new_empty(*spikes.shape[:-1], -(-channels // WORD), dtype=torch.int64)
    count = native.pack(
        *(address(spikes), ELEMENTS[spikes.dtype], address(words)),
        *(spikes.numel() // channels if channels else 0, channels, torch.get_num_threads()),
    )
    return words, count


def packable(spikes: Tensor) -> Tensor:
    """Spikes, contiguous and in a dtype that the kernels read."""
    if spikes.dtype not in ELEMENTS:
        spikes = spikes != 0
    return spikes if spikes.is_contiguous() else spikes.detach().contiguous()


def check_words(words: Tensor, channels: int) -> None:
    """Raises ValueError unless a row has as many words as `channels` take."""
    needed = -(-channels // WORD)
    if words.shape[-1] != needed:
        raise ValueError(f"words: got {words.shape[-1]} a row, takes {needed} for {channels} channels")


def unpack(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """int64 words [..., ceil(C / 64)] -> [..., C] of 0 and 1 in `dtype`."""
    check_words(words, channels)
    words = words.contiguous()
    kernel_dtype = dtype if dtype == torch.bfloat16 else torch.float32
    values = empty((*words.shape[:-1], channels), kernel_dtype)
    rows = values.numel() // channels if channels else 0
    native.unpack(
        *(address(words), address(values), ELEMENTS[kernel_dtype]),
        *(rows, channels, torch.get_num_threads()),
    )
    return values.to(dtype)
