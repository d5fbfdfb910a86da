"""Causal spiking attention in C++ (csrc/spike_attention.cpp): a scan over tokens, cost linear in S.

q, k and v must hold spikes: what is not 0 counts as 1 in q and k, and in the backward pass in v, too. With
`levels` > 1 they may hold any numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import address, dense, floats_on_cpu
from spikedecoder.ext.cpu._memory import empty_like

why_not = floats_on_cpu


def heads_last(x: Tensor) -> Tensor:
    """[T, B, H, S, d] as contiguous float32 [T, B, S, H, d]; a float32 model's tensors are not copied."""
    return dense(x.transpose(2, 3))


def sizes(x: Tensor) -> tuple[int, ...]:
    """The last arguments of every kernel: the sizes of x [T, B, S, H, d], and the number of threads."""
    return (*x.shape, torch.get_num_threads())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    levels: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """(o [T, B, H, S, d], final state [T, B, H, d, d] if asked for)."""
    dtype = q.dtype
    q, k, v = heads_last(q), heads_last(k), heads_last(v)
    decay = None if decay is None else dense(decay)
    state = None if state is None else dense(state)
    t, b, _, h, d = q.shape
    out = empty_like(q)
    final = q.new_empty(t, b, h, d, d) if return_state else None
    native.attention_forward(
        *(address(q), address(k), address(v), address(decay), address(state), scale, levels > 1),
        *(address(out), address(final), *sizes(q)),
    )
    return out.to(dtype).transpose(2, 3), final


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    levels: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    dtype = q.dtype
    grad, q, k, v = (heads_last(x) for x in (grad, q, k, v))
    decay = None if decay is None else dense(decay)
    state = None if state is None else dense(state)
    grads = [empty_like(q) for _ in range(3)]
    native.attention_backward(
        *(address(grad), address(q), address(k), address(v), address(decay), address(state)),
        *(scale, levels > 1, *map(address, grads), *sizes(q)),
    )
    grad_q, grad_k, grad_v = (g.to(dtype).transpose(2, 3) for g in grads)
    return grad_q, grad_k, grad_v
