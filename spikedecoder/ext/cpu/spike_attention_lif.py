"""Causal spiking attention, then LIF, in C++ (csrc/spike_attention_lif.cpp).

As in `spikedecoder.ext.cpu.spike_attention`, q, k and v must hold spikes.
"""

from __future__ import annotations

from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import (
    address,
    dense,
    floats_on_cpu,
    grad_threshold_like,
    neuron,
    threshold_of,
)
from spikedecoder.ext.cpu._memory import empty_like
from spikedecoder.ext.cpu.spike_attention import heads_last, sizes
from spikedecoder.params import LIFParams

why_not = floats_on_cpu


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    threshold: Tensor | float,
    p: LIFParams,
) -> Tensor:
    """Spikes [T, B, H, S, d]; the threshold is a number, a scalar or [H, d]."""
    dtype = q.dtype
    q, k, v = heads_last(q), heads_last(k), heads_last(v)
    decay = None if decay is None else dense(decay)
    t = threshold_of(threshold, q)
    spikes = empty_like(q)
    native.attention_lif_forward(
        *(neuron(p), t.native, address(q), address(k), address(v), address(decay), scale),
        *(address(spikes), *sizes(q)),
    )
    return spikes.to(dtype).transpose(2, 3)


def backward(
    grad_spikes: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    threshold: Tensor | float,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the threshold (None for a number)."""
    dtype = q.dtype
    grad_spikes, q, k, v = (heads_last(x) for x in (grad_spikes, q, k, v))
    decay = None if decay is None else dense(decay)
    t = threshold_of(threshold, q)
    grads = [empty_like(q) for _ in range(3)]
    grad_threshold = grad_threshold_like(threshold, t)
    native.attention_lif_backward(
        *(neuron(p), t.native, address(grad_spikes), address(q), address(k), address(v), address(decay)),
        *(scale, *map(address, grads), address(grad_threshold), *sizes(q)),
    )
    grad_q, grad_k, grad_v = (g.to(dtype).transpose(2, 3) for g in grads)
    return grad_q, grad_k, grad_v, grad_threshold
