"""Fuzzing of the packed formats: random shapes, sparse and dense, on every variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder import ext
from spikedecoder.reference import pack_spikes as reference

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import native, pack_spikes

FUZZ = settings(max_examples=60, deadline=None)


def on_each_variant():
    before = native.variant()
    for name in native.variants():
        native.use_variant(name)
        yield name
    native.use_variant(before)


def random_spikes(seed: int, shape: tuple[int, ...], rate: float) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


@FUZZ
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    channels=st.integers(1, 300),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_pack_and_unpack(shape, channels, rate, seed):
    spikes = random_spikes(seed, (*shape, channels), rate)
    expected = reference.pack(spikes)
    for name in on_each_variant():
        words, count = pack_spikes.pack_and_count(spikes)
        assert torch.equal(words, expected), name
        assert count == spikes.sum()
        assert torch.equal(pack_spikes.pack(spikes.bool()), expected), name
        assert torch.equal(pack_spikes.unpack(words, channels, torch.float32), spikes), name
