"""Normalisation followed by LIF, as one operator."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.ops.lif import lif_params
from spikedecoder.ops.norm import norm
from spikedecoder.params import LIFParams, NormParams


def norm_lif(x: Tensor, n: NormParams, p: LIFParams, *, threshold: Tensor | None = None) -> Tensor:
    """Spikes [T, ..., C] of ``lif(norm(x))``; see `spikedecoder.ops.norm` and `spikedecoder.ops.lif`."""
    spikes = lif_params(norm(x, n), p, threshold=threshold)
    assert isinstance(spikes, Tensor)
    return spikes
