"""Spikes as bits."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.reference.pack_spikes import WORD


def pack(spikes: Tensor, backend: str) -> Tensor:
    """`pack_spikes`, for calls that nothing watches."""
    return select("pack_spikes", Call(spikes.device, spikes.dtype, tuple(spikes.shape)), backend).pack(spikes)


_pack = torch.library.custom_op("spikedecoder::pack_spikes", pack, mutates_args=())


@_pack.register_fake
def _(spikes, backend):
    return spikes.new_empty(*spikes.shape[:-1], -(-spikes.shape[-1] // WORD), dtype=torch.int64)


def unpack(words: Tensor, channels: int, dtype: torch.dtype, backend: str) -> Tensor:
    """`unpack_spikes`, for calls that nothing watches."""
    call = Call(words.device, dtype, (*words.shape[:-1], channels), {"part": "unpack_spikes"})
    return select("pack_spikes", call, backend).unpack(words, channels, dtype)


_unpack = torch.library.custom_op("spikedecoder::unpack_spikes", unpack, mutates_args=())


@_unpack.register_fake
def _(words, channels, dtype, backend):
    return words.new_empty(*words.shape[:-1], channels, dtype=dtype)


def _seen(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def pack_spikes(spikes: Tensor) -> Tensor:
    """One bit per spike: [..., C] of 0 and 1 (float or bool) -> int64 words [..., ceil(C / 64)].

    Bit i of word w is channel 64 w + i, set where the value is not 0; bits past C are 0. Carries no gradient.
    Raises TypeError for anything but a dense tensor of at least one dimension.
    """
    if not isinstance(spikes, Tensor) or spikes.dim() < 1:
        raise TypeError(f"spikes: got {_seen(spikes)}, takes a tensor of at least one dimension")
    _check.dense("spikes", spikes)
    return _pack(spikes, requested_backend())


def unpack_spikes(words: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_spikes`: int64 words [..., ceil(C / 64)] -> spikes [..., C] in `dtype`.

    channels: C. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(words, Tensor) or words.dtype != torch.int64 or words.dim() < 1:
        raise TypeError(f"words: got {_seen(words)}, takes an int64 tensor of at least one dimension")
    _check.dense("words", words)
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype: got {dtype}, takes a floating dtype")
    _check.integer("channels", channels)
    if channels < 0 or words.shape[-1] != -(-channels // WORD):
        raise ValueError(
            f"channels: got {channels} for {words.shape[-1]} words, takes C with ceil(C / {WORD}) words"
        )
    return _unpack(words, int(channels), dtype, requested_backend())
