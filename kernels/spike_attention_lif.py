"""Causal spiking self-attention, then LIF over T; forward in one kernel that never writes the attention.

    a[t] = attention(q[t], k[t], v[t]) scale,   spikes = LIF(a)          (see `spike_attention`, `LIFParams`)

q, k, v and spikes are [T, B, S, H, d] in memory. A program owns one head of one sequence and BLOCK_V columns
of v. It walks the sequence in chunks, and within a chunk through all T timesteps. In float32 registers it
keeps the membrane potentials of the chunk and the T states k^T v [d, BLOCK_V]. a is rounded to the dtype of q
before it charges the membrane, as if it had been written, so the spikes are bit for bit those of attention
and LIF run one after the other.

Two kernels, attention and LIF, run one after the other instead
  - where T states don't fit the registers: d > 64; T > 4 (T > 8 in 16 bits with d <= 16); float32 with
    a decay, with more than 2^16 tokens, or with d > 32 on sm_80;
  - where they were measured to be faster: sm_90 with d > 16 (0.22 ms against 0.28 at d = 64);
  - where the sequences are long but too few to fill the device.
Backward always runs separate kernels: it computes a again, then the gradient of the LIF, then that of the
attention. float32 spikes are converted to bfloat16 when loaded, which is exact for 0 and 1.

Bytes per element of q (b = bytes of the dtype): forward 4 b, the minimum (the d / BLOCK_V programs of a head
read q and k again, from cache); in two kernels 6 b. Backward 17 b where that of the attention takes 10 b; the
minimum is 7 b. Bound by memory bandwidth.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005, B007, SIM300
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels import lif as lif_kernels
from spikedecoder.kernels import spike_attention as attention
from spikedecoder.kernels._launch import cdiv, family, kernel, launch, multiprocessors, power_of_2, why_not
from spikedecoder.kernels._neuron import (
    as_spikes,
    charge,
    load_threshold,
    neuron_forward,
    reset,
    threshold_argument,
    times,
)
from spikedecoder.kernels.spike_attention import (
    POWERS,
    Blocks,
    Pass,
    advance_state,
    attend,
    causal_weights,
    heads_last,
    load_tile,
    power_table,
    store_tile,
    walk,
)
from spikedecoder.params import LIFParams
from spikedecoder.reference import spike_attention as reference

__all__ = ["backward", "forward", "why_not"]


@kernel
def attention_lif_forward(
    q_ptr, k_ptr, v_ptr, spikes_ptr, powers_ptr, threshold_ptr, batch, tokens, heads,
    scale, threshold, tau, v_reset,
    T: tl.constexpr, D: tl.constexpr, SCORE: tl.constexpr, STATE: tl.constexpr, KV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, THRESHOLD: tl.constexpr,
    RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, columns)."""
    ACROSS: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // ACROSS
    h = head % heads
    row_stride = heads * D
    base = ((head // heads).to(tl.int64) * tokens * heads + h) * D
    timestep = batch.to(tl.int64) * tokens * heads * D
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(0) % ACROSS * BLOCK_V + tl.arange(0, BLOCK_V)
    powers = powers_ptr
    if DECAY:
        powers = powers_ptr + h * POWERS
    weights = causal_weights(powers, BLOCK_S, DECAY)
    c, c_inside = (h * D + e)[None, :], (e < D)[None, :]
    threshold = load_threshold(threshold_ptr, threshold, c, c_inside, c, c_inside, THRESHOLD)
    states = ()
    for t in tl.static_range(T):
        states = states + (tl.zeros((BLOCK_D, BLOCK_V), tl.float32),)
    for first in range(0, tokens, BLOCK_S):
        potential = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
        count = tl.minimum(BLOCK_S, tokens - first)
        after = ()
        at_t = base
        for t in tl.static_range(T):
            q = load_tile(q_ptr, at_t, first, tokens, tokens, row_stride, d, D, False, BLOCK_S)
            k = load_tile(k_ptr, at_t, first, tokens, tokens, row_stride, d, D, False, BLOCK_S)
            v = load_tile(v_ptr, at_t, first, tokens, tokens, row_stride, e, D, False, BLOCK_S)
            a = attend(q, k, v, states[t], weights, powers, 1, 1, 1, SCORE, STATE, DECAY, BLOCK_S, BLOCK_V)
            a = times(a, scale).to(q_ptr.dtype.element_ty).to(tl.float32)
            after = after + (advance_state(k, v, states[t], powers, count, K, V, KV, DECAY, BLOCK_S),)
            charged = charge(a, potential, tau, v_reset, RECIPROCAL, HARD, DECAY_INPUT)
            fired = charged >= threshold
            spikes = as_spikes(fired, spikes_ptr.dtype.element_ty)
            store_tile(spikes_ptr, spikes, at_t, first, tokens, tokens, row_stride, e, D, False, BLOCK_S)
            potential = reset(charged, fired, threshold, v_reset, HARD)
            at_t += timestep
        states = after


def blocks(
    T: int, batch: int, tokens: int, heads: int, d: int, way: Pass, device: torch.device
) -> Blocks | None:
    """The table of tile sizes with which T states fit the registers. None where two kernels one after the
    other are better: the states are too large, or there are so few programs that attention alone, which has T
    times as many, fills the device better."""
    padded = max(16, power_of_2(d))
    float32, ampere, hopper = way.dtype == torch.float32, family(device) == 8, family(device) == 9
    if padded > (16 if hopper else 64) or T > (8 if padded == 16 and not float32 else 4):
        return None
    if float32 and (way.decay is not None or tokens > 1 << 16 or (padded == 64 and ampere)):
        return None
    integers = way.decay is None and way.dtype == torch.bfloat16
    columns = 32 if integers and padded == 64 and not ampere else 16
    if tokens > 1024 and batch * heads * cdiv(d, columns) < multiprocessors(device):
        return None
    if hopper and way.dtype != torch.bfloat16:  # two warps: see spike_attention.blocks
        return Blocks(32, padded, columns, warps=2, stages=1)
    stages = 2 if hopper else 1
    return Blocks(
        32 if float32 or ampere else 64, padded, columns, 8 if float32 and padded == 64 else 4, stages=stages
    )


def _current(way: Pass, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The attention [T, B, S, H, d]; by the reference (PyTorch) for heads wider than the kernel takes."""
    if q.shape[-1] <= attention.MAX_D:
        return walk(way, q, k, v, scale)
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    return heads_last(reference.forward(q, k, v, scale, way.decay, None, False)[0])


def _by_channel(threshold: Tensor | float) -> Tensor | float:
    """The threshold for the channels of all heads side by side, as they lie in memory."""
    return threshold.flatten() if isinstance(threshold, Tensor) else threshold


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    threshold: Tensor | float,
    p: LIFParams,
) -> Tensor:
    """Spikes [T, B, H, S, d], laid out heads last. The threshold is one value or one per channel [H, d]."""
    q, k, v = (heads_last(x) for x in (q, k, v))
    spikes = torch.empty_like(q)
    if q.numel() == 0:
        return spikes.transpose(2, 3)
    T, batch, tokens, heads, d = q.shape
    way = Pass(decay, power_table(decay), q.dtype)
    size = blocks(T, batch, tokens, heads, d, way, q.device)
    if size is None:
        current = _current(way, q, k, v, scale).flatten(-2)
        lif_kernels.forward_into(
            current, _by_channel(threshold), None, p, want_v=False, spikes=spikes.flatten(-2)
        )
        return spikes.transpose(2, 3)
    kind, pointer, number = threshold_argument(_by_channel(threshold), torch.Size((heads * d,)))
    launch(
        attention_lif_forward, (batch * heads * cdiv(d, size.columns),), q_ptr=q, k_ptr=k, v_ptr=v,
        spikes_ptr=spikes,
        powers_ptr=way.powers, threshold_ptr=pointer, batch=batch, tokens=tokens, heads=heads,
        scale=scale, threshold=number, T=T, D=d, THRESHOLD=kind, SCORE=1 if decay is None else way.real,
        STATE=way.real if decay is not None else 2 if tokens <= 1 << 16 else 3, BLOCK_S=size.tokens,
        BLOCK_D=size.d, BLOCK_V=size.columns, num_warps=size.warps, num_stages=size.stages,
        **way.flags(1, 1),
        **neuron_forward(p),
    )  # fmt: skip
    return spikes.transpose(2, 3)


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
    """(dq, dk, dv laid out heads last, grad_threshold); the last is None if the threshold is a number."""
    if q.numel() == 0:
        zero = torch.zeros(threshold.shape, device=q.device) if isinstance(threshold, Tensor) else None
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), zero
    way = Pass(decay, power_table(decay), q.dtype)
    current = _current(way, heads_last(q), heads_last(k), heads_last(v), scale)
    grad, grad_threshold, _ = lif_kernels.backward(
        heads_last(grad_spikes).flatten(-2), None, current.flatten(-2), _by_channel(threshold), None, p,
        want_grad_v_init=False,
    )  # fmt: skip
    grad = grad.view(current.shape)
    if grad_threshold is not None and isinstance(threshold, Tensor):
        grad_threshold = grad_threshold.view(threshold.shape)
    wide = q.shape[-1] > attention.MAX_D
    dq, dk, dv = (reference if wide else attention).backward(
        grad.transpose(2, 3), q, k, v, scale, decay, None
    )
    return dq, dk, dv, grad_threshold
