"""Products of integers from 0 to D as sums of products of spikes: the binary timesteps of I-LIF neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops.spike_attention import check_levels, spike_attention
from spikedecoder.ops.spike_linear import spike_linear


def spike_planes(s: Tensor, levels: int) -> Tensor:
    """The spikes whose sum over timesteps is s: [levels, ...] of 0 and 1 in s's dtype.

    Timestep t, from 1, holds 1 where s >= t: what a binary neuron emits, see
    `spikedecoder.params.ILIFParams`. The gradient to s is the mean of the timesteps', which makes that of
    every sum over timesteps of a product exact.

    Args:
        s: integers 0 to levels, any shape, float; levels: 1 to 15.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.floating("s", s, min_dims=0)
    check_levels(levels)
    t = torch.arange(levels, device=s.device, dtype=s.dtype).view(-1, *(1,) * s.dim())
    planes = (s.detach() > t).to(s.dtype)
    if s.requires_grad and torch.is_grad_enabled():
        planes = planes + (s - s.detach()) / levels
    return planes


def unrolled_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None, *, levels: int) -> Tensor:
    """y = s W^T + b for integers s [..., K] from 0 to `levels`: the sum of `spike_linear` over timesteps.

    Arguments, result and errors otherwise as of `spikedecoder.ops.spike_linear`.
    """
    y = spike_linear(spike_planes(s, levels), weight).sum(0)
    return y if bias is None else y + bias


def unrolled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 0.125,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    dropout: float = 0.0,
    *,
    levels: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """`spikedecoder.ops.spike_attention` of integers from 0 to `levels`, from binary operands alone.

    (q k^T, causal) v is linear in each of q, k and v: the sum over all D^3 triples of their timesteps. The
    state is the sum of k^T v over D^2 pairs; each timestep of q meets the past's once.
    """
    if dropout > 0:
        raise ValueError("dropout: takes 0 where the attention is unrolled")
    queries, keys, values = (spike_planes(x, levels) for x in (q, k, v))
    total: Tensor | None = None
    final: Tensor | None = None
    for i, query in enumerate(queries):
        for j, (key, value) in enumerate((key, value) for key in keys for value in values):
            past = state if j == 0 else None
            result = spike_attention(query, key, value, scale, decay, past, return_state)
            out, new = result if isinstance(result, tuple) else (result, None)
            total = out if total is None else total + out
            if i == 0 and new is not None:
                final = new if final is None else final + new
    assert total is not None
    if return_state:
        assert final is not None
        return total, final
    return total
