"""Normalisation, then LIF."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.params import LIFParams, NormParams
from spikedecoder.reference.lif import lif
from spikedecoder.reference.norm import norm


def norm_lif(x: Tensor, n: NormParams, threshold: Tensor | float, p: LIFParams) -> Tensor:
    """Spikes [T, ..., C] for x [T, ..., C], by autograd."""
    return lif(norm(x, n), threshold, None, p)[0]
