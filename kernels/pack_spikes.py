"""Spikes as bits along the channel: int64 words, bit i of word w is channel 64 w + i.

Kernels treat a word as two of 32 bits, low half first (little endian, as every GPU is): spikes [M, C] and
words [M, 2 ceil(C / 64)]. A program owns a tile of BLOCK_R rows and BLOCK_C channels, in registers. Bytes per
spike (b = bytes of the dtype), in both directions the minimum possible: b + 1/8, more where 64 does not
divide C. Bound by memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import Call, alignment, cdiv, kernel, launch, power_of_2
from spikedecoder.kernels._neuron import PLAIN, as_spikes

__all__ = ["pack", "unpack", "why_not"]

WORD = 64


def why_not(call: Call) -> str | None:
    """As for the other kernels, but spikes may also be bool."""
    if call.dtype == torch.bool:
        call = Call(call.device, torch.float32, call.shape, call.options)
    return _launch.why_not(call)


@triton.jit
def pack_tile(fired, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """bool [BLOCK_R, BLOCK_C] -> words of 32 bits [BLOCK_R, BLOCK_C / 32]."""
    bits = tl.reshape(fired.to(tl.int32), (BLOCK_R, BLOCK_C // 32, 32))
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def unpack_tile(words, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Words of 32 bits [BLOCK_R, BLOCK_C / 32] -> 0 and 1 as int32 [BLOCK_R, BLOCK_C]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_R, BLOCK_C))


@triton.jit
def spread_tile(words, dtype: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """`unpack_tile` for products: in float16 if `dtype` is that, else bfloat16. Every thread unpacks whole
    words, in one and a half instructions an element: bits 2i and 2i + 1 are brought 16 apart, so that one
    shift, mask and product with the bits of 1.0 makes the two elements of a register."""
    half: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.bfloat16
    one: tl.constexpr = 0x3C00 if dtype == tl.float16 else 0x3F80
    odd = words >> 1
    pairs = tl.join((words & 0xFFFF) | (odd << 16), (words >> 16 & 0xFFFF) | (odd & -65536))
    pairs = tl.join(pairs, pairs >> 8)
    pairs = tl.join(pairs, pairs >> 4)
    pairs = tl.join(pairs, pairs >> 2)
    pairs = (pairs & 0x10001) * one
    bits = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(half, bitcast=True)
    if PLAIN:  # as in `_digits`
        bits = bits.to(tl.float32)
    return tl.reshape(bits, (BLOCK_R, BLOCK_C))


@kernel
def pack_kernel(
    spikes_ptr, words_ptr, rows, channels, words,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    channels = channels.to(tl.int64) * ALIGN
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    x = tl.load(spikes_ptr + r * channels + c, mask=(r < rows) & (c < channels), other=0)
    w = tl.program_id(1) * (BLOCK_C // 32) + tl.arange(0, BLOCK_C // 32)[None, :]
    packed = pack_tile(x.to(tl.float32) != 0, BLOCK_R, BLOCK_C)
    tl.store(words_ptr + r * words + w, packed, mask=(r < rows) & (w < words))


@kernel
def unpack_kernel(
    words_ptr, spikes_ptr, rows, channels, words,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    channels = channels.to(tl.int64) * ALIGN
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    w = tl.program_id(1) * (BLOCK_C // 32) + tl.arange(0, BLOCK_C // 32)[None, :]
    packed = tl.load(words_ptr + r * words + w, mask=(r < rows) & (w < words), other=0)
    fired = unpack_tile(packed, BLOCK_R, BLOCK_C) != 0
    spikes = as_spikes(fired, spikes_ptr.dtype.element_ty)
    tl.store(spikes_ptr + r * channels + c, spikes, mask=(r < rows) & (c < channels))


def _tile(channels: int, element_size: int) -> dict[str, int]:
    elements = 256 * (16 // element_size)
    block_c = min(1024, elements, max(WORD, power_of_2(channels)))
    return {"BLOCK_R": elements // block_c, "BLOCK_C": block_c, "num_warps": 4}


def halves(words: Tensor) -> Tensor:
    """int64 words as a flat tensor of twice as many 32-bit words."""
    # flat first: where a size is 1, contiguous words may have any stride, which `view` would reject
    return words.reshape(-1).view(torch.int32)


def _launch_on(which: object, spikes: Tensor, words: Tensor) -> None:
    channels = spikes.shape[-1]
    rows = spikes.numel() // channels
    blocks = _tile(channels, spikes.element_size())
    align = alignment(channels)
    launch(
        which, (cdiv(rows, blocks["BLOCK_R"]), cdiv(channels, blocks["BLOCK_C"])), spikes_ptr=spikes,
        words_ptr=halves(words), rows=rows, channels=channels // align, words=2 * words.shape[-1],
        ALIGN=align, **blocks,
    )  # fmt: skip


def pack(spikes: Tensor) -> Tensor:
    """[..., C] of 0 and 1 -> int64 [..., ceil(C / 64)]. Any value but 0 counts as 1; bits beyond C are 0."""
    words = spikes.new_empty(*spikes.shape[:-1], cdiv(spikes.shape[-1], WORD), dtype=torch.int64)
    if words.numel():
        spikes = spikes.contiguous()
        _launch_on(pack_kernel, spikes.view(torch.int8) if spikes.dtype == torch.bool else spikes, words)
    return words


def unpack(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """int64 [..., ceil(C / 64)] -> [..., C] of 0 and 1 in `dtype`."""
    spikes = words.new_empty(*words.shape[:-1], channels, dtype=dtype)
    if spikes.numel():
        _launch_on(unpack_kernel, spikes, words)
    return spikes
