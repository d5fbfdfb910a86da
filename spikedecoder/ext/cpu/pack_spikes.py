"""Packing in C++ (csrc/pack_spikes.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext import NOT_BUILT
from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import address
from spikedecoder.ops._dispatch import Call

_PACKED = (torch.float32, torch.bool, torch.uint8)


def why_not(call: Call) -> str | None:
    if native is None:
        return NOT_BUILT
    if call.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {call.device}"
    if call.dtype not in _PACKED:
        return f"it takes float32, bool or uint8, got {call.dtype}"
    return None


def pack(spikes: Tensor) -> Tensor:
    return pack_and_count(spikes)[0]


def pack_and_count(spikes: Tensor) -> tuple[Tensor, int]:
    """The words, and how many bits in them are set."""
    if not spikes.is_contiguous():
        spikes = spikes.detach().contiguous()
    channels = spikes.shape[-1]
    words = torch.empty(*spikes.shape[:-1], -(-channels // 64), dtype=torch.int64)
    count = native.pack(
        *(address(spikes), spikes.dtype != torch.float32, address(words)),
        *(spikes.numel() // channels if channels else 0, channels, torch.get_num_threads()),
    )
    return words, count


def unpack(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    words = words.contiguous()
    values = torch.empty(*words.shape[:-1], channels, dtype=torch.float32)
    rows = values.numel() // channels if channels else 0
    native.unpack(address(words), address(values), rows, channels, torch.get_num_threads())
    return values.to(dtype)
