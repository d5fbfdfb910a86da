"""The backward kernel of `norm_lif`: the gradient through the LIF or I-LIF neurons, then through the norm.
Bytes and equations: `norm_lif`.

A program walks down many tiles of BLOCK_R rows. Of each it computes the potentials h again from x and keeps
those of CHUNK timesteps in float32 registers while it walks back through them. If T > CHUNK, it first sweeps
forward and writes the potential before each chunk to scratch memory, one tile per program and chunk; the walk
backwards then reads these and x again, both still in cache unless T is long. The same code serves any T.

x and gradient are fetched into shared memory STAGES - 1 tiles ahead (chunks, if T > CHUNK): waiting for them
used to take half the time. Sums over rows stay in registers until the program has seen its last row.
"""

# mypy: disable-error-code="assignment,var-annotated,index", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from spikedecoder.kernels._launch import kernel
from spikedecoder.kernels._neuron import (
    ROWS_AT_ONCE,
    WINDOW,
    affine,
    as_float,
    fire_backward,
    height,
    inside_of,
    load_inside,
    load_slices,
    load_steps,
    load_threshold,
    potentials,
    row_sums,
    standardised,
    tile_columns,
    times,
)

# Whether the statistics of several timesteps are loaded at once. With Triton 3.6 that makes it spill.
TOGETHER = tl.constexpr(not triton.__version__.startswith("3.6."))


@triton.jit
def _of_rows(at, rows, r, COUNT: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE: tl.constexpr):
    """One number per row for COUNT timesteps, as a tuple, by a single load: each load is a copy to shared
    memory with an address and a wait, as much work as a thread's neurons of 8 elements."""
    WIDTH: tl.constexpr = triton.next_power_of_2(COUNT)
    t = tl.arange(0, WIDTH)[None, :]
    inside = None if WHOLE and WIDTH == COUNT else (r < rows) & (t < COUNT)
    numbers = tile_columns(load_inside(at + t * rows.to(tl.int64), inside), BLOCK_R, WIDTH)
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (numbers[i][:, None],)
    return tiles


@triton.jit
def _row_statistics(
    mean, rstd, mean_ptr, rstd_ptr, first, r, rows,
    COUNT: tl.constexpr, STATISTICS: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(means, rstds) of COUNT timesteps from `first` on, as tuples."""
    if STATISTICS == 0:
        means = ()
        rstds = ()
        for _ in tl.static_range(COUNT):
            means = means + (mean,)
            rstds = rstds + (rstd,)
    else:
        at = first * rows.to(tl.int64) + r
        if TOGETHER:
            rstds = _of_rows(rstd_ptr + at, rows, r, COUNT, BLOCK_R, WHOLE)
            means = _of_rows(mean_ptr + at, rows, r, COUNT, BLOCK_R, WHOLE)
        else:
            inside = None if WHOLE else r < rows
            means = load_steps(mean_ptr + at, rows, inside, COUNT)
            rstds = load_steps(rstd_ptr + at, rows, inside, COUNT)
    return means, rstds


@triton.jit
def _currents(xs, means, rstds, weight, bias, COUNT: tl.constexpr, STATISTICS: tl.constexpr):
    """y of COUNT timesteps, by the same operations as in forward, so that the same neurons fire."""
    ys = ()
    for i in tl.static_range(COUNT):
        z = standardised(as_float(xs[i]), means[i], rstds[i], xs[i].dtype, STATISTICS)
        ys = ys + (affine(z, weight, bias, STATISTICS),)
    return ys


@triton.jit
def _standardised(x, mean, rstd, STATISTICS: tl.constexpr):
    """z = (x - mean) rstd for the gradients. For row statistics it is written differently than in y (error
    about 6e-8 |mean| rstd): the compiler would share a common z and keep it for all timesteps in registers,
    which then spill."""
    if STATISTICS == 0:
        return (as_float(x) - mean) * rstd
    else:
        return as_float(x) * rstd - mean * rstd


@triton.jit
def _through_norm(gw, x, mean, rstd, scale, mean_gw, mean_gwz):
    """scale rstd (gw - mean_gw - z mean_gwz), in two operations per element, without z."""
    factor = scale * rstd
    slope = mean_gwz * rstd * factor
    return gw * factor - (as_float(x) * slope + (mean_gw * factor - mean * slope))


@triton.jit
def _save(at, v, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store a tile in its scratch, even columns before odd ones. The halves are stored from the registers
    that hold them. The whole tile would go through shared memory first, since a thread stores 4 neighbouring
    values at a time but has loaded 8 of x."""
    even, odd = tl.split(tl.reshape(v, (BLOCK_R, BLOCK_C // 2, 2)))
    tl.store(at, even)
    tl.store(at + BLOCK_R * BLOCK_C // 2, odd)


@triton.jit
def _saved(at, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    halves = tl.join(tl.load(at), tl.load(at + BLOCK_R * BLOCK_C // 2))
    return tl.reshape(halves, (BLOCK_R, BLOCK_C))


@triton.jit
def _without_thresholds(sums, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SLICES: tl.constexpr):
    new = ()
    for s in tl.static_range(SLICES):
        new = new + (sums[3 * s], sums[3 * s + 1], tl.zeros((BLOCK_R, BLOCK_C), tl.float32))
    return new


@triton.jit
def _added(xs, ys):
    sums = ()
    for i in tl.static_range(len(xs)):
        sums = sums + (xs[i] + ys[i],)
    return sums


@triton.jit
def _zeros(BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    return tiles


@triton.jit
def _backward_chunk(
    grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, grad_x_ptr, row_gw_ptr, row_gwz_ptr,
    threshold_ptr, first, vs, carries, sums, mean, rstd, weights, biases, a, b, shift,
    r1, at, c, rows, channels, timestep, stride_t, grad_stride_t,
    threshold, tau, keep, v_reset, alpha, scale,
    COUNT: tl.constexpr, T: tl.constexpr, STATISTICS: tl.constexpr, SUMS: tl.constexpr,
    THRESHOLD: tl.constexpr, RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr,
    DETACH: tl.constexpr, SURROGATE: tl.constexpr, ROOM: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SLICES: tl.constexpr, FITS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Walks backwards through COUNT timesteps from `first` on, one slice of the rows after the other.

    vs: the potentials before them; carries: dL/dh of the timestep after them; None stands for 0. Returns the
    new carries, and sums with this chunk's added.

    g, carries and the threshold's gradient are divided by the surrogate's `height`, and dL/dy = scale g:
    these factors are applied to one number per row or channel, not per element. Where a tile reaches beyond
    x, everything loaded is 0 and so is every gradient, so that only loads and stores need a mask.
    """
    r = r1[:, None]
    last: tl.constexpr = COUNT - 1
    means, rstds = _row_statistics(
        mean, rstd, mean_ptr, rstd_ptr, first, r, rows, COUNT, STATISTICS, BLOCK_R, WHOLE
    )
    xs = ()  # of all slices; so is gws
    gws = ()
    of_rows = ()  # STATISTICS 1: g weight, g weight z of each timestep, last first; slices added up
    new_carries = ()
    new_sums = ()
    for s in tl.static_range(SLICES):
        part = s * BLOCK_C
        inside = None if WHOLE else inside_of(r, rows, c + part, channels, FITS)
        here = load_steps(x_ptr + first * stride_t + part + at, stride_t, inside, COUNT)
        xs = xs + here
        weight, bias = weights[s], biases[s]
        limit = load_threshold(
            threshold_ptr, threshold, c + part, c + part < channels, at + part, inside, THRESHOLD
        )
        ys = _currents(here, means, rstds, weight, bias, COUNT, STATISTICS)
        if LEVELS == 0:
            v = None if vs is None else vs[s]
            hs, v = potentials(ys, v, limit, tau, v_reset, COUNT, RECIPROCAL, HARD, DECAY_INPUT)
        carry = None if carries is None else carries[s]
        sum_gz, sum_g, total = sums[3 * s], sums[3 * s + 1], sums[3 * s + 2]
        grad_from = grad_spikes_ptr + (first + last) * grad_stride_t + part + at
        to = (first + last) * timestep + part
        row_to = (first + last) * rows.to(tl.int64) + r1
        of_slice = ()
        for back in tl.static_range(COUNT):
            grad = as_float(load_inside(grad_from, inside))
            grad_from -= grad_stride_t
            if LEVELS > 0:
                u = times(ys[last - back], tau)
                g = tl.where((u >= -WINDOW) & (u <= LEVELS + WINDOW), grad, 0.0)
                grad_threshold = 0.0
            else:
                g, grad_threshold = fire_backward(
                    grad, carry, keep, hs[last - back], limit, v_reset, alpha, HARD, DETACH, SURROGATE, ROOM
                )
                carry = g
            mean, rstd = means[last - back], rstds[last - back]
            x = here[last - back]
            z = _standardised(x, mean, rstd, STATISTICS)
            if SUMS:
                sum_gz += g * z
                sum_g += g
                total += grad_threshold
            if STATISTICS == 1:
                gw = g * weight
                gws = gws + (gw,)
                of_slice = of_slice + (gw, gw * z)
            elif STATISTICS == 2:
                gw = g * weight
                if SUMS:  # this tile's share of the row's sums
                    share = tl.program_id(1).to(tl.int64) * T * rows + row_to
                    tl.store(row_gw_ptr + share, tl.sum(gw, 1), mask=r1 < rows)
                    tl.store(row_gwz_ptr + share, tl.sum(gw * z, 1), mask=r1 < rows)
                else:
                    mean_gw = tl.load(a_ptr + row_to, mask=r1 < rows, other=0.0)[:, None]
                    mean_gwz = tl.load(b_ptr + row_to, mask=r1 < rows, other=0.0)[:, None]
                    grad_x = _through_norm(gw, x, mean, rstd, scale, mean_gw, mean_gwz)
                    tl.store(grad_x_ptr + to + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
            elif not SUMS:
                grad_x = a * g + b * z + shift
                tl.store(grad_x_ptr + to + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
            to -= timestep
            row_to -= rows
        if LEVELS == 0:
            new_carries = new_carries + (carry,)
        new_sums = new_sums + (sum_gz, sum_g, total)
        of_rows = of_slice if s == 0 else _added(of_rows, of_slice)
    if STATISTICS == 1:
        row_totals = row_sums(of_rows, 2 * COUNT, ROWS_AT_ONCE if ROOM else 1)
        share = 1.0 / channels
        to = first * timestep
        for i in tl.static_range(COUNT):
            mean_gw = (row_totals[2 * (last - i)] * share)[:, None]
            mean_gwz = (row_totals[2 * (last - i) + 1] * share)[:, None]
            for s in tl.static_range(SLICES):
                grad_x = _through_norm(
                    gws[s * COUNT + last - i], xs[s * COUNT + i], means[i], rstds[i], scale, mean_gw, mean_gwz
                )
                part = s * BLOCK_C
                inside = None if WHOLE else inside_of(r, rows, c + part, channels, FITS)
                tl.store(grad_x_ptr + to + part + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
            to += timestep
    return new_carries, new_sums


@kernel
def norm_lif_backward(
    grad_spikes_ptr, x_ptr, weight_ptr, bias_ptr, threshold_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, c_ptr,
    scratch_ptr, grad_x_ptr, sums_ptr, grad_threshold_ptr, row_gw_ptr, row_gwz_ptr,
    rows, channels, stride_t, grad_stride_t, threshold, tau, keep, v_reset, alpha,
    T: tl.constexpr, STATISTICS: tl.constexpr, SUMS: tl.constexpr, THRESHOLD: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
    RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, ROOM: tl.constexpr, LEVELS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, SLICES: tl.constexpr, FITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """g = dL/dy, through the neurons; then, as requested:

    SUMS: the sums over rows of g z and g [programs, 2, C], and the threshold's gradient, laid out by
    `threshold_partial`.
    STATISTICS 0 (per channel), without SUMS: dx = a g + b z + c.
    STATISTICS 1 (per row, whole rows in a tile): dx = rstd (g weight - <g weight> - z <g weight z>).
    STATISTICS 2 (per row, rows wider than a tile): with SUMS, this tile's share of the row's sums of g weight
    and g weight z [tiles, T, R]; without, dx from the means of these, which are passed as a and b [T, R].
    scratch is [programs, chunks, slices, tile], used if T > CHUNK.
    """
    channels = channels * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    grad_stride_t = grad_stride_t.to(tl.int64) * ALIGN
    c1 = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c, c_inside = c1[None, :], (c1 < channels)[None, :]
    timestep = rows.to(tl.int64) * channels
    weights = load_slices(weight_ptr, c, channels, BLOCK_R, BLOCK_C, SLICES)
    biases = load_slices(bias_ptr, c, channels, BLOCK_R, BLOCK_C, SLICES)
    most = 1.0
    scale = tau  # dL/dy = scale g
    if LEVELS == 0:
        most = height(alpha, SURROGATE)
        scale = most
        if DECAY_INPUT and RECIPROCAL:
            scale *= tau
        elif DECAY_INPUT:
            scale /= tau
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
    sums = _zeros(BLOCK_R, BLOCK_C, 3 * SLICES)  # of g z, of g, the threshold's gradient, slice by slice
    LAST: tl.constexpr = (T - 1) // CHUNK * CHUNK
    ROW_STAGES: tl.constexpr = STAGES if LAST == 0 else 1
    EVEN: tl.constexpr = LAST > 0 and T % CHUNK == 0  # one loop walks all chunks backwards
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    WHOLE: tl.constexpr = FITS and BLOCK_R == 1
    scratch = scratch_ptr
    if LAST > 0:
        pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        scratch += pid.to(tl.int64) * ((T + CHUNK - 1) // CHUNK * SLICES * TILE)
        scratch += tl.arange(0, BLOCK_R)[:, None] * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)[None, :]

    every = tl.num_programs(0).to(tl.int64) * BLOCK_R
    for first in tl.range(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, every, num_stages=ROW_STAGES):
        r1 = tl.arange(0, BLOCK_R).to(tl.int64) + first
        r = r1[:, None]
        at = r * channels + c
        if THRESHOLD == 3:
            sums = _without_thresholds(sums, BLOCK_R, BLOCK_C, SLICES)
        vs = None
        carries = None
        if LAST > 0:
            vs = _zeros(BLOCK_R, BLOCK_C, SLICES)
            for begin in tl.range(0, LAST, CHUNK, num_stages=STAGES):
                means, rstds = _row_statistics(
                    mean, rstd, mean_ptr, rstd_ptr, begin, r, rows, CHUNK, STATISTICS, BLOCK_R, WHOLE
                )
                after = ()
                for s in tl.static_range(SLICES):
                    part = s * BLOCK_C
                    _save(scratch + (begin // CHUNK * SLICES + s) * TILE, vs[s], BLOCK_R, BLOCK_C)
                    inside = None if WHOLE else inside_of(r, rows, c + part, channels, FITS)
                    xs = load_steps(x_ptr + begin * stride_t + part + at, stride_t, inside, CHUNK)
                    weight, bias = weights[s], biases[s]
                    limit = load_threshold(
                        threshold_ptr, threshold, c + part, c + part < channels, at + part, inside, THRESHOLD
                    )
                    ys = _currents(xs, means, rstds, weight, bias, CHUNK, STATISTICS)
                    _, v = potentials(ys, vs[s], limit, tau, v_reset, CHUNK, RECIPROCAL, HARD, DECAY_INPUT)
                    after = after + (v,)
                vs = after
        if EVEN:
            carries = _zeros(BLOCK_R, BLOCK_C, SLICES)
            for s in tl.static_range(SLICES):
                _save(scratch + (LAST // CHUNK * SLICES + s) * TILE, vs[s], BLOCK_R, BLOCK_C)
        else:
            carries, sums = _backward_chunk(
                grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, grad_x_ptr, row_gw_ptr,
                row_gwz_ptr, threshold_ptr, LAST, vs, carries, sums, mean, rstd,
                weights, biases, a, b, shift, r1, at, c, rows, channels, timestep, stride_t,
                grad_stride_t, threshold, tau, keep, v_reset, alpha, scale, T - LAST, T, STATISTICS, SUMS,
                THRESHOLD, RECIPROCAL, HARD, DECAY_INPUT, DETACH, SURROGATE, ROOM, LEVELS, BLOCK_R,
                BLOCK_C, SLICES, FITS, WHOLE,
            )  # fmt: skip
        if LAST > 0:
            tl.debug_barrier()  # a thread may read potentials that another one wrote
            WHOLE_CHUNKS: tl.constexpr = T // CHUNK * CHUNK
            for done in tl.range(0, WHOLE_CHUNKS, CHUNK, num_stages=STAGES):
                begin = WHOLE_CHUNKS - CHUNK - done
                vs = ()
                for s in tl.static_range(SLICES):
                    from_ = scratch + (begin // CHUNK * SLICES + s) * TILE
                    vs = vs + (_saved(from_, BLOCK_R, BLOCK_C),)
                carries, sums = _backward_chunk(
                    grad_spikes_ptr, x_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, grad_x_ptr, row_gw_ptr,
                    row_gwz_ptr, threshold_ptr, begin, vs, carries, sums, mean, rstd,
                    weights, biases, a, b, shift, r1, at, c, rows, channels, timestep, stride_t,
                    grad_stride_t, threshold, tau, keep, v_reset, alpha, scale, CHUNK, T, STATISTICS, SUMS,
                    THRESHOLD, RECIPROCAL, HARD, DECAY_INPUT, DETACH, SURROGATE, ROOM, LEVELS, BLOCK_R,
                    BLOCK_C, SLICES, FITS, WHOLE,
                )  # fmt: skip
        if SUMS and THRESHOLD == 3:
            for s in tl.static_range(SLICES):
                part = s * BLOCK_C
                inside = None if WHOLE else inside_of(r, rows, c + part, channels, FITS)
                tl.store(grad_threshold_ptr + at + part, sums[3 * s + 2] * most, mask=inside)

    if SUMS:
        row = tl.program_id(0).to(tl.int64) * channels
        for s in tl.static_range(SLICES):
            to, asked = c1 + s * BLOCK_C, c1 + s * BLOCK_C < channels
            tl.store(sums_ptr + 2 * row + to, tl.sum(sums[3 * s], 0) * scale, mask=asked)
            tl.store(sums_ptr + 2 * row + channels + to, tl.sum(sums[3 * s + 1], 0) * scale, mask=asked)
            if THRESHOLD == 2:
                tl.store(grad_threshold_ptr + row + to, tl.sum(sums[3 * s + 2], 0) * most, mask=asked)
        if THRESHOLD == 1:
            total = tl.sum(tl.sum(sums[2], 1), 0)
            for s in tl.static_range(1, SLICES):
                total += tl.sum(tl.sum(sums[3 * s + 2], 1), 0)
            pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(grad_threshold_ptr + pid, total * most)
