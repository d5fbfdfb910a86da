"""Causal spiking self-attention, then LIF."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.params import LIFParams
from spikedecoder.reference import lif as _lif
from spikedecoder.reference import spike_attention as _attention

Threshold = Tensor | float


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, threshold: Threshold, p: LIFParams
) -> Tensor:
    """Spikes [T, B, H, S, d]."""
    current, _ = _attention.forward(q, k, v, scale, decay, None, False)
    return _lif.forward(current, threshold, None, p)[0]


def backward(
    grad_spikes: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    threshold: Threshold,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the threshold; the attention's result is recomputed."""
    current, _ = _attention.forward(q, k, v, scale, decay, None, False)
    grad_current, grad_threshold, _ = _lif.backward(grad_spikes, None, current, threshold, None, p)
    return *_attention.backward(grad_current, q, k, v, scale, decay, None), grad_threshold
