"""Normalisation over channels, then LIF over T: y = (x - mean) rstd weight + bias, spikes = LIF(y).

x [T, R, C]. Statistics are of rows (LayerNorm: computed here, [T, R]) or of channels (BatchNorm, PowerNorm:
handed in, [C]). A program owns BLOCK_R rows, all T timesteps of each, with membrane potentials in float32
registers; for LayerNorm its tile spans the whole row, so mean and variance are taken in registers, in two
passes over values that were read once.

Bytes per element of x (b = bytes of its dtype; row statistics add 8 / C forward and as much backward):
    forward, row statistics         2 b     the minimum: x read once, spikes written once
    backward, row statistics        3 b     the minimum: x and gradient read, gradient written
    forward, channel statistics     2 b     and moments() reads x once before: 3 b, the minimum, since a
                                            channel's statistics are known only when all of x was read
    backward, channel statistics    5 b     the minimum: the sums over x and gradient come before the gradient
                                            of x can be written, and are kept by neither
Bound by memory bandwidth. Sums over rows (gradients of weight, bias, threshold) are kept in registers by a
fixed number of programs and added in one small reduction: the same result in every run.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import Call, cdiv, kernel, launch, multiprocessors, power_of_2
from spikedecoder.kernels._neuron import (
    MAX_T,
    as_spikes,
    charge,
    fire_backward,
    load_steps,
    load_threshold,
    neuron,
    neuron_forward,
    over_tau,
    potentials,
    reset,
    threshold_argument,
    threshold_gradient,
    threshold_partial,
)
from spikedecoder.kernels._norm import moments
from spikedecoder.kernels.lif import steps_contiguous
from spikedecoder.params import LIFParams

__all__ = ["backward_apply", "backward_layer", "backward_reduce", "forward", "moments", "why_not"]

CHUNK = 4  # timesteps whose potentials the backward kernel keeps in registers
MAX_ROW = 4096  # channels whose row statistics a program takes in registers


def why_not(call: Call) -> str | None:
    if call.shape and call.shape[0] > MAX_T:
        return f"T = {call.shape[0]}: its norm_lif keeps up to {MAX_T} timesteps in registers"
    if call.shape and call.options.get("rows") and call.shape[-1] > MAX_ROW:
        return f"C = {call.shape[-1]}: its layer norm keeps rows of up to {MAX_ROW} channels in registers"
    return _launch.why_not(call)


@kernel
def norm_lif_forward(
    x_ptr, weight_ptr, bias_ptr, threshold_ptr, mean_ptr, rstd_ptr, spikes_ptr,
    rows, channels, stride_t, eps, threshold, tau, v_reset,
    T: tl.constexpr, LAYER: tl.constexpr, THRESHOLD: tl.constexpr, CHUNK: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Spikes; LAYER: and mean and rstd [T, R]."""
    channels = channels * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    r1 = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    r, r_inside = r1[:, None], (r1 < rows)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    c_inside = c < channels
    inside = r_inside & c_inside
    at = r * channels + c
    timestep = rows.to(tl.int64) * channels

    weight = tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    threshold = load_threshold(threshold_ptr, threshold, c, c_inside, at, inside, THRESHOLD)
    if not LAYER:
        mean = tl.load(mean_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    xs = ()
    for t in tl.static_range(T):
        if t % CHUNK == 0:
            xs = load_steps(x_ptr + t * stride_t + at, stride_t, inside, CHUNK if t + CHUNK <= T else T - t)
        x = xs[t % CHUNK].to(tl.float32)
        if LAYER:
            mean = (tl.sum(x, 1) / channels)[:, None]
            centered = tl.where(c_inside, x - mean, 0.0)
            rstd = 1 / tl.sqrt_rn(tl.sum(centered * centered, 1) / channels + eps)
            tl.store(mean_ptr + t * rows + r, mean, mask=r_inside)
            tl.store(rstd_ptr + t * rows + r1, rstd, mask=r1 < rows)
            rstd = rstd[:, None]
        y = (x - mean) * rstd * weight + bias
        h = charge(y, v, tau, v_reset, RECIPROCAL, HARD, DECAY_INPUT)
        fired = h - threshold >= 0
        tl.store(spikes_ptr + t * timestep + at, as_spikes(fired, spikes_ptr.dtype.element_ty), mask=inside)
        v = reset(h, fired, threshold, v_reset, HARD)


@triton.jit
def _affine(
    xs, mean, rstd, mean_ptr, rstd_ptr, r, rows, weight, bias,
    FIRST: tl.constexpr, COUNT: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """(y, mean, rstd) of COUNT timesteps, y operation by operation as in forward: the same neurons fire."""
    if LAYER:
        first = FIRST * rows.to(tl.int64) + r
        means = load_steps(mean_ptr + first, rows, r < rows, COUNT)
        rstds = load_steps(rstd_ptr + first, rows, r < rows, COUNT)
    else:
        means = ()
        rstds = ()
        for _ in tl.static_range(COUNT):
            means = means + (mean,)
            rstds = rstds + (rstd,)
    ys = ()
    for i in tl.static_range(COUNT):
        ys = ys + ((xs[i].to(tl.float32) - means[i]) * rstds[i] * weight + bias,)
    return ys, means, rstds


@triton.jit
def _backward_chunk(
    grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, c_ptr, grad_x_ptr,
    v, carry, sum_gz, sum_g, total, mean, rstd, weight, bias,
    r, c, at, inside, c_inside, rows, channels, timestep, stride_t, grad_stride_t,
    limit, tau, keep, v_reset, alpha,
    FIRST: tl.constexpr, COUNT: tl.constexpr, LAYER: tl.constexpr, SUMS: tl.constexpr,
    RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):  # fmt: skip
    """COUNT timesteps from FIRST on, backwards; v before and carry = dL/dv after them."""
    xs = load_steps(x_ptr + FIRST * stride_t + at, stride_t, inside, COUNT)
    gs = load_steps(grad_spikes_ptr + FIRST * grad_stride_t + at, grad_stride_t, inside, COUNT)
    ys, means, rstds = _affine(xs, mean, rstd, mean_ptr, rstd_ptr, r, rows, weight, bias, FIRST, COUNT, LAYER)
    hs, v = potentials(ys, v, limit, tau, v_reset, COUNT, RECIPROCAL, HARD, DECAY_INPUT)
    to = (FIRST + COUNT - 1) * timestep + at
    for back in tl.static_range(COUNT):
        grad_h, grad_threshold = fire_backward(
            gs[COUNT - 1 - back].to(tl.float32), carry, hs[COUNT - 1 - back], limit, v_reset, alpha,
            HARD, DETACH, SURROGATE,
        )  # fmt: skip
        carry = grad_h * keep
        g = grad_h
        if DECAY_INPUT:
            g = over_tau(grad_h, tau, RECIPROCAL)
        g = tl.where(inside, g, 0.0)
        z = (xs[COUNT - 1 - back].to(tl.float32) - means[COUNT - 1 - back]) * rstds[COUNT - 1 - back]
        if SUMS:
            sum_gz += g * z
            sum_g += g
            total += tl.where(inside, grad_threshold, 0.0)
        if LAYER:
            gw = g * weight
            mean_gw = (tl.sum(gw, 1) / channels)[:, None]
            mean_gwz = (tl.sum(gw * z, 1) / channels)[:, None]
            grad_x = rstds[COUNT - 1 - back] * (gw - mean_gw - z * mean_gwz)
            tl.store(grad_x_ptr + to, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        elif a_ptr is not None:
            a = tl.load(a_ptr + c, mask=c_inside, other=0.0)
            b = tl.load(b_ptr + c, mask=c_inside, other=0.0)
            shift = tl.load(c_ptr + c, mask=c_inside, other=0.0)
            tl.store(grad_x_ptr + to, (a * g + b * z + shift).to(grad_x_ptr.dtype.element_ty), mask=inside)
        to -= timestep
    return carry, sum_gz, sum_g, total


@kernel
def norm_lif_backward(
    grad_spikes_ptr, x_ptr, weight_ptr, bias_ptr, threshold_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, c_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, grad_threshold_ptr,
    rows, channels, stride_t, grad_stride_t, threshold, tau, keep, v_reset, alpha,
    T: tl.constexpr, LAYER: tl.constexpr, SUMS: tl.constexpr, THRESHOLD: tl.constexpr, CHUNK: tl.constexpr,
    RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """g = dL/dy through the LIF; then, as asked for,

    SUMS: sums over rows of g z and g, and the threshold's gradient, one row a program.
    h is computed again, CHUNK timesteps at a time, as in the LIF's backward kernel.
    LAYER: dx = rstd (g weight - <g weight> - z <g weight z>);  else, with a_ptr: dx = a g + b z + c.
    """
    channels = channels * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    grad_stride_t = grad_stride_t.to(tl.int64) * ALIGN
    c1 = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c, c_inside = c1[None, :], (c1 < channels)[None, :]
    timestep = rows.to(tl.int64) * channels
    weight = tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    mean = 0.0
    rstd = 0.0
    if not LAYER:
        mean = tl.load(mean_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    sum_gz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)

    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        r1 = tl.arange(0, BLOCK_R).to(tl.int64) + first
        r, r_inside = r1[:, None], (r1 < rows)[:, None]
        inside = r_inside & c_inside
        at = r * channels + c
        limit = load_threshold(threshold_ptr, threshold, c, c_inside, at, inside, THRESHOLD)
        if THRESHOLD == 3:
            total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        starts = (v,)  # the potential before each chunk of timesteps
        for chunk in tl.static_range((T - 1) // CHUNK):
            xs = load_steps(x_ptr + chunk * CHUNK * stride_t + at, stride_t, inside, CHUNK)
            ys, _, _ = _affine(
                xs, mean, rstd, mean_ptr, rstd_ptr, r, rows, weight, bias, chunk * CHUNK, CHUNK, LAYER
            )
            _, v = potentials(ys, v, limit, tau, v_reset, CHUNK, RECIPROCAL, HARD, DECAY_INPUT)
            starts = starts + (v,)
        carry = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for back in tl.static_range((T + CHUNK - 1) // CHUNK):
            if T > CHUNK:  # or the compiler keeps the sweep's values, and spills
                tl.debug_barrier()
            carry, sum_gz, sum_g, total = _backward_chunk(
                grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, c_ptr, grad_x_ptr,
                starts[(T - 1) // CHUNK - back], carry, sum_gz, sum_g, total, mean, rstd, weight, bias,
                r, c, at, inside, c_inside, rows, channels, timestep, stride_t, grad_stride_t,
                limit, tau, keep, v_reset, alpha,
                (T - 1) // CHUNK * CHUNK - back * CHUNK, T - (T - 1) // CHUNK * CHUNK if back == 0 else CHUNK,
                LAYER, SUMS, RECIPROCAL, HARD, DECAY_INPUT, DETACH, SURROGATE,
            )  # fmt: skip
        if SUMS and THRESHOLD == 3:
            tl.store(grad_threshold_ptr + at, total, mask=inside)

    if SUMS:
        row = tl.program_id(0).to(tl.int64) * channels
        tl.store(grad_weight_ptr + row + c1, tl.sum(sum_gz, 0), mask=c1 < channels)
        tl.store(grad_bias_ptr + row + c1, tl.sum(sum_g, 0), mask=c1 < channels)
        if THRESHOLD == 2:
            tl.store(grad_threshold_ptr + row + c1, tl.sum(total, 0), mask=c1 < channels)
        elif THRESHOLD == 1:
            pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(grad_threshold_ptr + pid, tl.sum(tl.sum(total, 1), 0))


def _tile(channels: int, element_size: int, layer: bool, tight: bool = False) -> dict[str, int]:
    """128 bits a thread and timestep; 4 elements where the backward pass of row statistics walks more than 4
    timesteps (then also 2 at a time): 8 take more registers than there are."""
    a_thread = 4 if tight else 16 // element_size
    block_c = max(16, power_of_2(channels))
    if not layer:
        block_c = min(block_c, 256)
    warps = min(16, max(4, block_c // (32 * a_thread)))
    block_r = max(1, 32 * warps * a_thread // block_c)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}


def _sizes(x: Tensor, **strides: int) -> dict[str, int]:
    channels = x.shape[-1]
    align = 16 if all(n % 16 == 0 for n in (channels, *strides.values())) else 1
    divided = {name: n // align for name, n in strides.items()}
    return {"rows": x[0].numel() // channels, "channels": channels // align, "ALIGN": align, **divided}


def _stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    threshold: Tensor | float,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, mean, rstd): statistics [T, ...] per row if none are handed in, else those handed in."""
    x = steps_contiguous(x)
    layer = mean is None or rstd is None
    if mean is None or rstd is None:
        mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
        rstd = torch.empty_like(mean)
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return spikes, mean, rstd
    T, channels = x.shape[0], x.shape[-1]
    rows = x[0].numel() // channels
    kind, pointer, number = threshold_argument(threshold, x.shape[1:])
    blocks = _tile(channels, x.element_size(), layer)
    launch(
        norm_lif_forward, (cdiv(rows, blocks["BLOCK_R"]), cdiv(channels, blocks["BLOCK_C"])), x_ptr=x,
        weight_ptr=weight.contiguous(), bias_ptr=bias.contiguous(), threshold_ptr=pointer, mean_ptr=mean,
        rstd_ptr=rstd, spikes_ptr=spikes, eps=eps, threshold=number, T=T, LAYER=layer, THRESHOLD=kind,
        CHUNK=min(T, 8),
        **_sizes(x, stride_t=_stride(x)), **neuron_forward(p), **blocks,
    )  # fmt: skip
    return spikes, mean, rstd


def _backward(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams, *, layer: bool = False, sums: bool = False,
    coefficients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_weight, grad_bias, grad_threshold), those that were asked for."""
    x, grad_spikes = steps_contiguous(x), steps_contiguous(grad_spikes)
    T, channels = x.shape[0], x.shape[-1]
    writes_x = layer or coefficients is not None
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if writes_x else None
    nothing = x.new_empty(0, dtype=torch.float32)
    if x.numel() == 0:
        zeros = x.new_zeros(channels, dtype=torch.float32)
        like = threshold.shape if isinstance(threshold, Tensor) else ()
        return grad_x, zeros, zeros.clone(), x.new_zeros(like, dtype=torch.float32)
    rows = x[0].numel() // channels
    kind, pointer, number = threshold_argument(threshold, x.shape[1:])
    blocks = _tile(channels, x.element_size(), layer, tight := layer and T > 4)
    across = cdiv(channels, blocks["BLOCK_C"])
    down = cdiv(rows, blocks["BLOCK_R"])
    if sums:  # few programs that each walk many rows, so that few partial sums are written
        down = min(down, max(1, 4 * multiprocessors(x.device) // across))
    sum_gz, sum_g = (x.new_empty((down, channels), dtype=torch.float32) if sums else None for _ in range(2))
    partial = threshold_partial(kind, x, x.shape[1:], down * across, down) if sums else None
    named: dict[str, Any] = {"a_ptr": None, "b_ptr": None, "c_ptr": None}
    if coefficients is not None:
        named = {n: t.to(torch.float32).contiguous() for n, t in zip(named, coefficients, strict=True)}
    launch(
        norm_lif_backward, (down, across), grad_spikes_ptr=grad_spikes, x_ptr=x,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(), threshold_ptr=pointer, mean_ptr=mean.contiguous(),
        rstd_ptr=rstd.contiguous(),
        grad_x_ptr=grad_x, grad_weight_ptr=sum_gz, grad_bias_ptr=sum_g,
        grad_threshold_ptr=partial, threshold=number, T=T, LAYER=layer, SUMS=sums, THRESHOLD=kind,
        CHUNK=min(T, 2 if tight else CHUNK),
        **_sizes(x, stride_t=_stride(x), grad_stride_t=_stride(grad_spikes)), **named, **neuron(p), **blocks,
    )  # fmt: skip
    grad_threshold = threshold_gradient(kind, partial, threshold)
    if sum_gz is None or sum_g is None:
        return grad_x, nothing, nothing, nothing
    zero = x.new_zeros((), dtype=torch.float32)
    return grad_x, sum_gz.sum(0), sum_g.sum(0), zero if grad_threshold is None else grad_threshold


def backward_layer(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_weight, grad_bias, grad_threshold) for row statistics."""
    grad_x, grad_weight, grad_bias, grad_threshold = _backward(
        grad_spikes, x, weight, bias, mean, rstd, threshold, p, layer=True, sums=True
    )
    assert grad_x is not None
    return grad_x, grad_weight, grad_bias, grad_threshold


def backward_reduce(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_weight = sum g z, grad_bias = sum g, grad_threshold) for channel statistics."""
    return _backward(grad_spikes, x, weight, bias, mean, rstd, threshold, p, sums=True)[1:]


def backward_apply(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams, a: Tensor, b: Tensor, c: Tensor,
) -> Tensor:  # fmt: skip
    """grad_x = a g + b z + c, coefficients per channel."""
    grad_x = _backward(grad_spikes, x, weight, bias, mean, rstd, threshold, p, coefficients=(a, b, c))[0]
    assert grad_x is not None
    return grad_x
