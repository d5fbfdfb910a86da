"""Products of the integers of I-LIF neurons as sums of products of spikes, by binary timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.fields import switch
from spikedecoder.ops import _check
from spikedecoder.ops.spike_attention import check_attention, check_dropout, spike_attention
from spikedecoder.ops.spike_linear import as_product, check_linear, spike_linear
from spikedecoder.params import binary_timesteps, check_levels


def spike_worths(levels: int) -> list[int]:
    """What a spike counts at each of B binary timesteps: 2^(B-1), ..., 2, 1, with 2^B > levels >= 2^(B-1)."""
    check_levels(levels)
    return [1 << bit for bit in reversed(range(binary_timesteps(levels)))]


def spike_planes(s: Tensor, levels: int) -> Tensor:
    """The spikes that the integers s stand for, i.e. their binary digits: [B, ...] of 0 and 1 in s's dtype.

    s = sum over timesteps t of `spike_worths`[t] planes[t], most significant first: what a binary neuron
    emits, see `spikedecoder.params.ILIFParams`. The gradient of s is the mean over timesteps of each plane's
    gradient divided by its worth. It is exact if the planes enter a sum of products, each times its worth.

    Args:
        s: integers 0 to levels, any shape, float.
        levels: 1 to 15.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.floating("s", s, min_dims=0)
    check_levels(levels)
    bits = torch.arange(binary_timesteps(levels) - 1, -1, -1, device=s.device)  # no copy from the host
    worths = (1 << bits).to(s.dtype).view(-1, *(1,) * s.dim())
    shifted = (s.detach() / worths).floor()
    # the last digit of each, without the slow `remainder`
    planes = torch.cat([shifted[:1], torch.sub(shifted[1:], shifted[:-1], alpha=2)])
    if s.requires_grad and torch.is_grad_enabled():
        planes = planes + (s - s.detach()) / (worths * len(worths))
    return planes


def spike_counts(s: Tensor, levels: int) -> Tensor:
    """The number of spikes that each integer of s, 0 to levels, stands for, in s's dtype and shape."""
    _check.floating("s", s, min_dims=0)
    check_levels(levels)
    s = s.detach()
    if levels == 1:
        return s
    # the number of binary digits of n that are 1 is n - floor(n / 2) - floor(n / 4) - ...
    shifted = (s / 2).floor_()
    counts = s - shifted
    for _ in range(binary_timesteps(levels) - 2):
        shifted.div_(2).floor_()
        counts -= shifted
    return counts


def unrolled_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None, *, levels: int) -> Tensor:
    """y = s W^T + b for integers s [..., K] from 0 to `levels`, by `spike_linear` at each binary timestep.

    Arguments, result and errors are otherwise those of `spikedecoder.ops.spike_linear`.
    """
    check_linear(s, weight, bias)
    weight, bias, _ = as_product(weight, bias)
    dtype, exact = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
    # in 16 bits each timestep's product would be rounded; that of integers is rounded once
    with torch.autocast(s.device.type, enabled=False):
        y = spike_linear(spike_planes(s.to(exact), levels), weight.to(exact))
        total = y[0]
        for timestep in y[1:]:  # most significant first: a shift and a sum each
            total = 2 * total + timestep
        return (total if bias is None else total + bias).to(dtype)


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
    """`spikedecoder.ops.spike_attention` of integers from 0 to `levels`, computed from binary operands only.

    (q k^T, causal) v is linear in each of q, k and v, hence the sum over all B^3 triples of their timesteps,
    each times the product of its worths, a power of 2. The state, k^T v, is the sum over B^2 pairs; the past
    state is multiplied once by each timestep of q. `dropout` has to be 0, else ValueError.
    """
    check_attention(q, k, v, scale, decay, state)
    check_dropout(dropout)
    switch("return_state", return_state)
    if dropout > 0:
        raise ValueError(f"dropout: got {dropout}, takes 0 where the attention is unrolled")
    worths, exact = spike_worths(levels), torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (spike_planes(x.to(exact), levels) for x in (q, k, v))
    pairs = [
        (key, value, a * b)
        for key, a in zip(keys, worths, strict=True)
        for value, b in zip(values, worths, strict=True)
    ]
    total: Tensor | None = None
    final: Tensor | None = None
    for i, query in enumerate(queries):
        for j, (key, value, worth) in enumerate(pairs):
            past = None if j or state is None else state / worth  # multiplied by it again below
            result = spike_attention(query, key, value, 1.0, decay, past, return_state)
            out, new = result if isinstance(result, tuple) else (result, None)
            out = out * (worths[i] * worth)
            total = out if total is None else total + out
            if i == 0 and new is not None:
                final = new * worth if final is None else final + new * worth
    assert total is not None
    # once, after the sums: without a decay these are integers, and the result is that of integers
    total = (scale * total).to(q.dtype)
    if return_state:
        assert final is not None
        return total, final
    return total
