"""The backward kernel of `norm_lif`: the gradient through the LIF or I-LIF, then through the norm.

h is computed again from x, CHUNK timesteps at a time: a sweep writes the potential before each chunk to a
scratch of one tile a program and chunk, and the walk backwards reads it and x again, both still in cache
where T is not long. The code is the same for any T. Bytes and equations: `norm_lif`.

x and gradient come through shared memory, STAGES - 1 rows ahead, or chunks where there are several: waiting
for them took half the time.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from spikedecoder.kernels._launch import kernel
from spikedecoder.kernels._neuron import (
    WINDOW,
    affine,
    fire_backward,
    load_inside,
    load_steps,
    load_threshold,
    potentials,
    row_sums,
    standardised,
    times,
)


@triton.jit
def _affine(
    xs, mean, rstd, mean_ptr, rstd_ptr, first, r, inside, rows, weight, bias,
    COUNT: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """(y, mean, rstd) of COUNT timesteps, y operation by operation as in forward: the same neurons fire."""
    if STATISTICS == 0:
        means = ()
        rstds = ()
        for _ in tl.static_range(COUNT):
            means = means + (mean,)
            rstds = rstds + (rstd,)
    else:
        at = first * rows.to(tl.int64) + r
        r_inside = None if inside is None else r < rows
        means = load_steps(mean_ptr + at, rows, r_inside, COUNT)
        rstds = load_steps(rstd_ptr + at, rows, r_inside, COUNT)
    ys = ()
    for i in tl.static_range(COUNT):
        ys = ys + (affine(standardised(xs[i], means[i], rstds[i], STATISTICS), weight, bias, STATISTICS),)
    return ys, means, rstds


@triton.jit
def _standardised(x, mean, rstd, STATISTICS: tl.constexpr):
    """z = (x - mean) rstd for the gradients. Of rows written otherwise than for y, off by some 6e-8 |mean|
    rstd: what y takes too, the compiler keeps for all timesteps, in registers that spill."""
    if STATISTICS == 0:
        return (x.to(tl.float32) - mean) * rstd
    else:
        return x.to(tl.float32) * rstd - mean * rstd


@triton.jit
def _through_norm(gw, x, mean, rstd, scale, mean_gw, mean_gwz):
    """scale rstd (gw - mean_gw - z mean_gwz) in two operations an element, without z = (x - mean) rstd."""
    factor = scale * rstd
    slope = mean_gwz * rstd * factor
    return gw * factor - (x.to(tl.float32) * slope + (mean_gw * factor - mean * slope))


@triton.jit
def _save(at, v, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile to its scratch, even columns before odd ones: the halves are stored from the registers that hold
    them, the whole goes through shared memory first, since a thread stores 4 values but loaded 8 of x."""
    even, odd = tl.split(tl.reshape(v, (BLOCK_R, BLOCK_C // 2, 2)))
    tl.store(at, even)
    tl.store(at + BLOCK_R * BLOCK_C // 2, odd)


@triton.jit
def _saved(at, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    halves = tl.join(tl.load(at), tl.load(at + BLOCK_R * BLOCK_C // 2))
    return tl.reshape(halves, (BLOCK_R, BLOCK_C))


@triton.jit
def _backward_chunk(
    grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, grad_x_ptr, row_gw_ptr, row_gwz_ptr,
    first, v, carry, sum_gz, sum_g, total, mean, rstd, weight, bias, a, b, shift,
    r1, at, inside, rows, channels, timestep, stride_t, grad_stride_t,
    limit, tau, keep, v_reset, alpha, scale,
    COUNT: tl.constexpr, T: tl.constexpr, STATISTICS: tl.constexpr, SUMS: tl.constexpr,
    RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """COUNT timesteps from `first` on, backwards; v before and carry = dL/dv after them.

    dL/dy = scale g: the factor comes in where there is one number a row or channel. Where a tile reaches
    beyond x, all that was loaded is 0 and so is every gradient: only stores ask.
    """
    r = r1[:, None]
    xs = load_steps(x_ptr + first * stride_t + at, stride_t, inside, COUNT)
    grad_to = grad_spikes_ptr + (first + COUNT - 1) * grad_stride_t + at
    ys, means, rstds = _affine(
        xs, mean, rstd, mean_ptr, rstd_ptr, first, r, inside, rows, weight, bias, COUNT, STATISTICS
    )
    if LEVELS == 0:
        hs, v = potentials(ys, v, limit, tau, v_reset, COUNT, RECIPROCAL, HARD, DECAY_INPUT)
    to = (first + COUNT - 1) * timestep + at
    row_to = (first + COUNT - 1) * rows.to(tl.int64) + r1
    of_rows = ()  # STATISTICS 1: g weight of each timestep and its product with z
    for back in tl.static_range(COUNT):
        grad = load_inside(grad_to, inside).to(tl.float32)
        grad_to -= grad_stride_t
        if LEVELS > 0:
            u = times(ys[COUNT - 1 - back], tau)
            g = tl.where((u >= -WINDOW) & (u <= LEVELS + WINDOW), grad, 0.0)
            grad_threshold = 0.0
        else:
            g, grad_threshold = fire_backward(
                grad, carry, hs[COUNT - 1 - back], limit, v_reset, alpha, HARD, DETACH, SURROGATE
            )
            carry = g * keep
        mean, rstd = means[COUNT - 1 - back], rstds[COUNT - 1 - back]
        x = xs[COUNT - 1 - back]
        z = _standardised(x, mean, rstd, STATISTICS)
        if SUMS:
            sum_gz += g * z
            sum_g += g
            total += grad_threshold
        if STATISTICS == 1:
            gw = g * weight
            of_rows = of_rows + (gw, gw * z)
        elif STATISTICS == 2:
            gw = g * weight
            if SUMS:  # the tile's share of the row's sums
                part = tl.program_id(1).to(tl.int64) * T * rows + row_to
                tl.store(row_gw_ptr + part, tl.sum(gw, 1), mask=r1 < rows)
                tl.store(row_gwz_ptr + part, tl.sum(gw * z, 1), mask=r1 < rows)
            else:
                mean_gw = tl.load(a_ptr + row_to, mask=r1 < rows, other=0.0)[:, None]
                mean_gwz = tl.load(b_ptr + row_to, mask=r1 < rows, other=0.0)[:, None]
                grad_x = _through_norm(gw, x, mean, rstd, scale, mean_gw, mean_gwz)
                tl.store(grad_x_ptr + to, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        elif not SUMS:
            tl.store(grad_x_ptr + to, (a * g + b * z + shift).to(grad_x_ptr.dtype.element_ty), mask=inside)
        to -= timestep
        row_to -= rows
    if STATISTICS == 1:
        sums = row_sums(of_rows, 2 * COUNT)
        share = 1.0 / channels
        for i in tl.static_range(COUNT):  # forwards: what `of_rows` holds last comes first
            to += timestep
            mean_gw = (sums[2 * (COUNT - 1 - i)] * share)[:, None]
            mean_gwz = (sums[2 * (COUNT - 1 - i) + 1] * share)[:, None]
            grad_x = _through_norm(
                of_rows[2 * (COUNT - 1 - i)], xs[i], means[i], rstds[i], scale, mean_gw, mean_gwz
            )
            tl.store(grad_x_ptr + to, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    return carry, sum_gz, sum_g, total


@kernel
def norm_lif_backward(
    grad_spikes_ptr, x_ptr, weight_ptr, bias_ptr, threshold_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, c_ptr,
    scratch_ptr, grad_x_ptr, sums_ptr, grad_threshold_ptr, row_gw_ptr, row_gwz_ptr,
    rows, channels, stride_t, grad_stride_t, threshold, tau, keep, v_reset, alpha,
    T: tl.constexpr, STATISTICS: tl.constexpr, SUMS: tl.constexpr, THRESHOLD: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
    RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, LEVELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """g = dL/dy through the neurons; then, as asked for,

    SUMS: sums over rows of g z and g [programs, 2, C], and the threshold's gradient, one row a program.
    STATISTICS 0, of channels, without SUMS: dx = a g + b z + c.
    STATISTICS 1, of rows, a tile wide: dx = rstd (g weight - <g weight> - z <g weight z>).
    STATISTICS 2, of rows wider than a tile: with SUMS the tile's share of the sums of g weight and g weight z
    [tiles, T, R]; without, dx from their means, which a and b [T, R] then are.
    scratch [programs, chunks, tile], if T > CHUNK.
    """
    channels = channels * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    grad_stride_t = grad_stride_t.to(tl.int64) * ALIGN
    c1 = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c, c_inside = c1[None, :], (c1 < channels)[None, :]
    timestep = rows.to(tl.int64) * channels
    weight = tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    scale = 1.0  # dL/dy = scale g
    if LEVELS > 0 or (DECAY_INPUT and RECIPROCAL):
        scale = tau
    elif DECAY_INPUT:
        scale = 1 / tau
    mean = 0.0
    rstd = 0.0
    if STATISTICS == 0:
        mean = tl.load(mean_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    a = 0.0
    b = 0.0
    shift = 0.0
    if STATISTICS == 0 and not SUMS:
        a = tl.load(a_ptr + c, mask=c_inside, other=0.0) * scale
        b = tl.load(b_ptr + c, mask=c_inside, other=0.0)
        shift = tl.load(c_ptr + c, mask=c_inside, other=0.0)
    sum_gz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    LAST: tl.constexpr = (T - 1) // CHUNK * CHUNK
    ROW_STAGES: tl.constexpr = STAGES if LAST == 0 else 1
    EVEN: tl.constexpr = LAST > 0 and T % CHUNK == 0  # all chunks are walked backwards by one loop
    scratch = scratch_ptr
    if LAST > 0:
        pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        scratch += pid.to(tl.int64) * ((T + CHUNK - 1) // CHUNK * BLOCK_R * BLOCK_C)
        scratch += tl.arange(0, BLOCK_R)[:, None] * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)[None, :]

    every = tl.num_programs(0).to(tl.int64) * BLOCK_R
    for first in tl.range(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, every, num_stages=ROW_STAGES):
        r1 = tl.arange(0, BLOCK_R).to(tl.int64) + first
        r = r1[:, None]
        inside = None if WHOLE else (r < rows) & c_inside
        at = r * channels + c
        limit = load_threshold(threshold_ptr, threshold, c, c_inside, at, inside, THRESHOLD)
        if THRESHOLD == 3:
            total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        carry = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if LAST > 0:
            for begin in tl.range(0, LAST, CHUNK, num_stages=STAGES):
                _save(scratch + begin // CHUNK * (BLOCK_R * BLOCK_C), v, BLOCK_R, BLOCK_C)
                xs = load_steps(x_ptr + begin * stride_t + at, stride_t, inside, CHUNK)
                ys, _, _ = _affine(
                    xs,
                    mean,
                    rstd,
                    mean_ptr,
                    rstd_ptr,
                    begin,
                    r,
                    inside,
                    rows,
                    weight,
                    bias,
                    CHUNK,
                    STATISTICS,
                )
                _, v = potentials(ys, v, limit, tau, v_reset, CHUNK, RECIPROCAL, HARD, DECAY_INPUT)
        if EVEN:
            _save(scratch + LAST // CHUNK * (BLOCK_R * BLOCK_C), v, BLOCK_R, BLOCK_C)
        else:
            carry, sum_gz, sum_g, total = _backward_chunk(
                grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, grad_x_ptr, row_gw_ptr,
                row_gwz_ptr, LAST, v, carry, sum_gz, sum_g, total, mean, rstd, weight, bias, a, b, shift,
                r1, at, inside, rows, channels, timestep, stride_t, grad_stride_t, limit, tau, keep,
                v_reset, alpha, scale, T - LAST, T, STATISTICS, SUMS, RECIPROCAL, HARD, DECAY_INPUT, DETACH,
                SURROGATE, LEVELS,
            )  # fmt: skip
        if LAST > 0:
            tl.debug_barrier()  # a potential may be read by another thread than wrote it
            WHOLE_CHUNKS: tl.constexpr = T // CHUNK * CHUNK
            for done in tl.range(0, WHOLE_CHUNKS, CHUNK, num_stages=STAGES):
                begin = WHOLE_CHUNKS - CHUNK - done
                v = _saved(scratch + begin // CHUNK * (BLOCK_R * BLOCK_C), BLOCK_R, BLOCK_C)
                carry, sum_gz, sum_g, total = _backward_chunk(
                    grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, grad_x_ptr, row_gw_ptr,
                    row_gwz_ptr, begin, v, carry, sum_gz, sum_g, total, mean, rstd, weight, bias, a, b, shift,
                    r1, at, inside, rows, channels, timestep, stride_t, grad_stride_t, limit, tau, keep,
                    v_reset, alpha, scale, CHUNK, T, STATISTICS, SUMS, RECIPROCAL, HARD, DECAY_INPUT, DETACH,
                    SURROGATE, LEVELS,
                )  # fmt: skip
        if SUMS and THRESHOLD == 3:
            tl.store(grad_threshold_ptr + at, total, mask=inside)

    if SUMS:
        row = tl.program_id(0).to(tl.int64) * channels
        tl.store(sums_ptr + 2 * row + c1, tl.sum(sum_gz, 0) * scale, mask=c1 < channels)
        tl.store(sums_ptr + 2 * row + channels + c1, tl.sum(sum_g, 0) * scale, mask=c1 < channels)
        if THRESHOLD == 2:
            tl.store(grad_threshold_ptr + row + c1, tl.sum(total, 0), mask=c1 < channels)
        elif THRESHOLD == 1:
            pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(grad_threshold_ptr + pid, tl.sum(tl.sum(total, 1), 0))
