"""Causal spiking self-attention followed by LIF, as one operator."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.ops.lif import lif_params
from spikedecoder.ops.spike_attention import spike_attention
from spikedecoder.params import LIFParams


def spike_attention_lif(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: LIFParams,
    scale: float = 0.125,
    decay: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Spikes [T, B, H, S, d] of ``lif(spike_attention(q, k, v, scale, decay))``.

    `threshold` is a scalar tensor or broadcasts against [B, H, S, d]. The result is laid out so that
    ``.transpose(2, 3)`` is contiguous. See `spikedecoder.ops.spike_attention` and `spikedecoder.ops.lif`.
    """
    current = spike_attention(q, k, v, scale, decay, dropout=dropout)
    assert isinstance(current, Tensor)
    if threshold is not None and threshold.dim() > 0:
        threshold = threshold.transpose(-2, -3) if threshold.dim() >= 3 else threshold
    spikes = lif_params(current.transpose(2, 3), p, threshold=threshold)
    assert isinstance(spikes, Tensor)
    return spikes.transpose(2, 3)
