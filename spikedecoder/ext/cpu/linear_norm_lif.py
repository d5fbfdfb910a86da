"""Linear on spikes, normalisation and LIF. A large result of the Linear is computed some rows at a time, so
that no more than NEAR bytes of it exist at once."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import norm_lif
from spikedecoder.ext.cpu._arguments import floats_on_cpu
from spikedecoder.ext.cpu._memory import empty
from spikedecoder.ext.cpu.pack_spikes import pack_and_count
from spikedecoder.ext.cpu.spike_linear import multiply, way_of
from spikedecoder.params import LIFParams

why_not = floats_on_cpu

# Bytes of the Linear's result at a time. Fewer would stay in nearer caches but are slower: sums are bound by
# arithmetic, and the weight is prepared again each time.
NEAR = 64 << 20


def forward(
    s: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    threshold: Tensor | float,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes [T, ..., N], mean, rstd, words of s): statistics as in `norm_lif.forward`."""
    words, count = pack_and_count(s)
    way, outputs = way_of(words, linear_weight), len(linear_weight)
    dtype, shape = linear_weight.dtype, torch.Size((*s.shape[:-1], outputs))
    rows = shape[1:-1].numel()
    at_once = max(1, NEAR // max(1, shape[0] * outputs * dtype.itemsize))
    if rows <= at_once:
        current = multiply(words, count, linear_weight, linear_bias, way)
        return *norm_lif.forward(current, weight, bias, mean, rstd, eps, threshold, p), words
    spikes = empty(shape, dtype)
    flat, bits = spikes.flatten(1, -2), words.flatten(1, -2)
    of_rows = None
    if isinstance(threshold, Tensor) and threshold.dim() > 1 and threshold.numel() > 1:
        of_rows = threshold.expand(shape[1:]).flatten(0, -2)
    found = []
    for begin in range(0, rows, at_once):
        part = slice(begin, begin + at_once)
        current = multiply(bits[:, part].contiguous(), count, linear_weight, linear_bias, way)
        own = threshold if of_rows is None else of_rows[part]
        found.append(norm_lif.forward(current, weight, bias, mean, rstd, eps, own, p, flat[:, part])[1:])
    if mean is None or rstd is None:
        mean, rstd = (torch.cat(each, 1).view(s.shape[:-1]) for each in zip(*found, strict=True))
    return spikes, mean, rstd, words
