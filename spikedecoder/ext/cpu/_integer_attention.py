"""Causal attention of integers on the CPU, by torch's dense matrix products.

Inside `QUADRATIC` tokens the scores are formed as a whole, in fewer and larger products than the reference's
chunks, and the backward pass forms them once for all three gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.reference import spike_attention as reference
from spikedecoder.reference.lif import compute_dtype

QUADRATIC = 512


def _weights(decay: Tensor | None, s: int, like: Tensor) -> Tensor:
    """[S, S] or [H, S, S]: decay^(i-j) for j <= i, else 0."""
    if decay is None:
        return torch.ones(s, s, dtype=like.dtype).tril_()
    return reference.decay_matrix(decay.to(like.dtype), s)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `spikedecoder.reference.spike_attention.forward`."""
    s, dtype = q.shape[-2], q.dtype
    if s > QUADRATIC or state is not None or return_state:
        return reference.forward(q, k, v, scale, decay, state, return_state)
    q, k, v = (x.to(compute_dtype(dtype)) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).mul_(_weights(decay, s, q))
    return (scores @ v).mul_(scale).to(dtype), None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    s, dtype = q.shape[-2], q.dtype
    if s > QUADRATIC or state is not None:
        return reference.backward(grad, q, k, v, scale, decay, state)
    q, k, v, grad = (x.to(compute_dtype(dtype)) for x in (q, k, v, grad))
    weights, grad = _weights(decay, s, q), grad * scale
    scores = (q @ k.transpose(-1, -2)).mul_(weights)
    grad_v = scores.transpose(-1, -2) @ grad
    grad_scores = torch.matmul(grad, v.transpose(-1, -2), out=scores).mul_(weights)
    return (grad_scores @ k).to(dtype), (grad_scores.transpose(-1, -2) @ q).to(dtype), grad_v.to(dtype)
