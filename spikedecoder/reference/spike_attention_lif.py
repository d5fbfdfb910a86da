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
    """Spikes [T, B, H, S, d]; the threshold is a number, or a tensor: a scalar or [H, d]."""
    current, _ = _attention.forward(q, k, v, scale, decay, None, False)
    return _lif.forward(current.transpose(2, 3), threshold, None, p)[0].transpose(2, 3)


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
    grad, current = grad_spikes.transpose(2, 3), current.transpose(2, 3)
    grad_current, grad_threshold, _ = _lif.backward(grad, None, current, threshold, None, p)
    grads = _attention.backward(grad_current.transpose(2, 3), q, k, v, scale, decay, None)
    return *grads, grad_threshold
