"""Normalisation over channels, then LIF over T or I-LIF: y = (x - mean) rstd weight + bias, spikes = LIF(y).

x is [T, R, C]. Statistics are either per row (LayerNorm: computed here, [T, R]) or per channel (BatchNorm,
PowerNorm: passed in, [C]). y is never written. The backward kernel is in `_norm_backward`, statistics per
channel and of very wide rows in `_norm`.

Work: a program owns BLOCK_R rows with all T timesteps of each, and their membrane potentials in float32
registers. For row statistics it has whole rows, so mean and variance are computed in registers, in two passes
over values that are read once; for channel statistics it has BLOCK_C of the channels. Tiles are powers of two
wide. Where a single tile would leave many lanes beyond the row's end, the row is split into three or five
narrower tiles side by side, its slices: neurons are processed one slice after the other, and a sum along the
row is the sum over its slices.

Bytes per element of x (b = bytes of its dtype; row statistics add 8 / C forward and as much backward):
    forward, row statistics         2 b     the minimum: x read once, spikes written once
    backward, row statistics        3 b     the minimum: x and gradient read, gradient of x written
    forward, channel statistics     2 b     3 b with `moments`, which reads x before: the minimum, since the
                                            statistics of a channel need all of x
    backward, channel statistics    5 b     the minimum: x and gradient are read once for the sums over rows
                                            and once more to write the gradient of x, which needs these sums
Rows of more than MAX_ROW channels are walked tile by tile and read twice: 3 b forward, where the statistics
come first; 5 b backward, where the sums along the row come first.

Backward, a program walks many rows and fetches the next ones into shared memory while it works on one. More
than 8 timesteps (4 with five slices, 16 with channel statistics, 2 for rows that take more than 8 warps) are
walked in chunks, which are fetched in the same way. x is then read twice, and 4 bytes of potentials (2 with
channel statistics) are written to scratch memory and read back, all of it in cache unless T is long.

For an I-LIF (LEVELS > 0; tau then holds 1 / v_threshold) timesteps are no different from rows: x [..., C] is
taken as one timestep, in tiles with up to CHUNK times as many rows, so that as much data is in flight.

Forward is bound by memory bandwidth; backward with row statistics by instructions, 29 to 41 per element for
512 channels and 30 to 54 for rows of slices. How instructions are saved: docs/performance.md.

For the gradients of weight, bias and threshold each program sums over its rows in registers, and a small
launch adds up the programs. Their number is fixed by device and shape, so every run has the same result.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import (
    REGISTERS,
    alignment,
    cdiv,
    kernel,
    launch,
    multiprocessors,
    power_of_2,
    shared_memory,
    why_not,
)
from spikedecoder.kernels._neuron import (
    MAX_T,
    ROWS_AT_ONCE,
    affine,
    as_float,
    as_spikes,
    charge,
    count,
    has_room,
    inside_of,
    load_slices,
    load_steps,
    load_threshold,
    neuron,
    neuron_forward,
    reset,
    row_sums,
    standardised,
    threshold_argument,
    threshold_gradient,
    threshold_partial,
    times,
)
from spikedecoder.kernels._norm import columns, moments, row_moments
from spikedecoder.kernels._norm_backward import norm_lif_backward
from spikedecoder.kernels._sum import sum_parts
from spikedecoder.kernels.lif import steps_contiguous
from spikedecoder.params import ILIFParams, LIFParams

__all__ = ["backward_apply", "backward_layer", "backward_reduce", "forward", "moments", "why_not"]

CHUNK = 4  # rows of an I-LIF's tile, as a multiple of a LIF's
MAX_ROW = 4096  # channels of the widest row whose statistics are computed in registers
CHANNEL, ROW, WIDE_ROW = range(3)  # STATISTICS: per channel; per row, computed in a tile; per row, passed in


@triton.jit
def _forward_chunk(
    x_ptr, mean_ptr, rstd_ptr, spikes_ptr, first, vs, weights, biases, thresholds, mean, rstd, r, at, c, rows,
    channels, timestep, stride_t, eps, tau, v_reset,
    COUNT: tl.constexpr, STATISTICS: tl.constexpr, RECIPROCAL: tl.constexpr, HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr, LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, SLICES: tl.constexpr,
    FITS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """COUNT timesteps from `first` on, all loaded before the first is used; returns the potentials after."""
    xs = ()  # slice by slice
    for s in tl.static_range(SLICES):
        inside = None if WHOLE else inside_of(r, rows, c + s * BLOCK_C, channels, FITS)
        xs = xs + load_steps(x_ptr + first * stride_t + s * BLOCK_C + at, stride_t, inside, COUNT)
    row_to = first * rows.to(tl.int64) + r
    share = 1.0 / channels
    means = ()
    rstds = ()
    if STATISTICS == 1:
        sums = row_sums(_values(xs, COUNT, SLICES), COUNT, ROWS_AT_ONCE)
        squares = row_sums(
            _squares(xs, sums, share, c, channels, BLOCK_C, COUNT, SLICES), COUNT, ROWS_AT_ONCE
        )
    for i in tl.static_range(COUNT):
        if STATISTICS == 1:
            mean = (sums[i] * share)[:, None]
            rstd = tl.rsqrt(squares[i] * share + eps)[:, None]
            tl.store(mean_ptr + row_to, mean, mask=r < rows)
            tl.store(rstd_ptr + row_to, rstd, mask=r < rows)
        elif STATISTICS == 2:
            mean = tl.load(mean_ptr + row_to, mask=r < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row_to, mask=r < rows, other=0.0)
        means = means + (mean,)
        rstds = rstds + (rstd,)
        row_to += rows
    after = ()
    for s in tl.static_range(SLICES):
        inside = None if WHOLE else inside_of(r, rows, c + s * BLOCK_C, channels, FITS)
        to = first * timestep + s * BLOCK_C + at
        v, threshold = vs[s], thresholds[s]
        for i in tl.static_range(COUNT):
            x = xs[s * COUNT + i]
            z = standardised(as_float(x), means[i], rstds[i], x.dtype, STATISTICS)
            y = affine(z, weights[s], biases[s], STATISTICS)
            if LEVELS > 0:
                spikes = count(times(y, tau), LEVELS).to(spikes_ptr.dtype.element_ty)
            else:
                h = charge(y, v, tau, v_reset, RECIPROCAL, HARD, DECAY_INPUT)
                fired = h >= threshold
                spikes = as_spikes(fired, spikes_ptr.dtype.element_ty)
                v = reset(h, fired, threshold, v_reset, HARD)
            tl.store(spikes_ptr + to, spikes, mask=inside)
            to += timestep
        after = after + (v,)
    return after


@triton.jit
def _values(xs, COUNT: tl.constexpr, SLICES: tl.constexpr):
    """x of each timestep in float32, added up over slices."""
    values = ()
    for i in tl.static_range(COUNT):
        total = as_float(xs[i])
        for s in tl.static_range(1, SLICES):
            total += as_float(xs[s * COUNT + i])
        values = values + (total,)
    return values


@triton.jit
def _squares(xs, sums, share, c, channels, BLOCK_C: tl.constexpr, COUNT: tl.constexpr, SLICES: tl.constexpr):
    """(x - mean)^2 of each timestep, added up over slices; 0 beyond the row's end, where x is 0."""
    squares = ()
    for i in tl.static_range(COUNT):
        mean = (sums[i] * share)[:, None]
        distance = as_float(xs[i]) - mean * tl.where(c < channels, 1.0, 0.0)
        total = distance * distance
        for s in tl.static_range(1, SLICES):
            inside = tl.where(c + s * BLOCK_C < channels, 1.0, 0.0)
            distance = as_float(xs[s * COUNT + i]) - mean * inside
            total += distance * distance
        squares = squares + (total,)
    return squares


@kernel
def norm_lif_forward(
    x_ptr, weight_ptr, bias_ptr, threshold_ptr, mean_ptr, rstd_ptr, spikes_ptr,
    rows, channels, stride_t, eps, threshold, tau, v_reset,
    T: tl.constexpr, STATISTICS: tl.constexpr, THRESHOLD: tl.constexpr, CHUNK: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    HARD: tl.constexpr, DECAY_INPUT: tl.constexpr, LEVELS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr, FITS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Spikes, and with STATISTICS 1 also mean and rstd [T, R]."""
    channels = channels * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    WHOLE: tl.constexpr = FITS and BLOCK_R == 1
    pid = tl.program_id(0)
    across = 1 if STATISTICS == 1 else tl.cdiv(channels, BLOCK_C)  # neighbours, so that rows are read whole
    r = (pid // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    at = r * channels + c
    timestep = rows.to(tl.int64) * channels

    weights = load_slices(weight_ptr, c, channels, BLOCK_R, BLOCK_C, SLICES)
    biases = load_slices(bias_ptr, c, channels, BLOCK_R, BLOCK_C, SLICES)
    thresholds = ()
    vs = ()
    for s in tl.static_range(SLICES):
        here = c + s * BLOCK_C
        inside = None if WHOLE else inside_of(r, rows, here, channels, FITS)
        limit = load_threshold(
            threshold_ptr, threshold, here, here < channels, at + s * BLOCK_C, inside, THRESHOLD
        )
        thresholds = thresholds + (limit,)
        vs = vs + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    mean = 0.0
    rstd = 0.0
    if STATISTICS == 0:
        mean = tl.load(mean_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    for first in tl.range(0, T // CHUNK * CHUNK, CHUNK, num_stages=STAGES):
        vs = _forward_chunk(
            x_ptr, mean_ptr, rstd_ptr, spikes_ptr, first, vs, weights, biases, thresholds, mean, rstd, r, at,
            c, rows, channels, timestep, stride_t, eps, tau, v_reset, CHUNK, STATISTICS, RECIPROCAL, HARD,
            DECAY_INPUT, LEVELS, BLOCK_C, SLICES, FITS, WHOLE,
        )  # fmt: skip
    if T % CHUNK > 0:
        _forward_chunk(
            x_ptr, mean_ptr, rstd_ptr, spikes_ptr, T // CHUNK * CHUNK, vs, weights, biases, thresholds, mean,
            rstd, r, at, c, rows, channels, timestep, stride_t, eps, tau, v_reset, T % CHUNK, STATISTICS,
            RECIPROCAL, HARD, DECAY_INPUT, LEVELS, BLOCK_C, SLICES, FITS, WHOLE,
        )  # fmt: skip


def slices(channels: int) -> tuple[int, int]:
    """(number, width) of the tiles side by side that make up a row: one, or three or five where that leaves
    fewer lanes beyond the row's end (80 channels are 5 x 16; a single tile would be 128 wide)."""
    ways = ((many, max(16, power_of_2(cdiv(channels, many)))) for many in (1, 3, 5))
    return min(ways, key=lambda way: way[0] * way[1])


def _tile(channels: int, by_row: bool, a_thread: int, warps: int) -> dict[str, int]:
    """A tile with `a_thread` elements per thread and timestep, or more if rows are too wide for that, and at
    least `warps` warps. `by_row`: tiles hold whole rows, in slices; otherwise a part of the channels."""
    many, width = slices(channels) if by_row else (1, columns(channels))
    warps = min(16, max(warps, width // (32 * a_thread)))
    rows = max(1, 32 * warps * a_thread // width)
    return {"BLOCK_R": rows, "BLOCK_C": width, "SLICES": many, "num_warps": warps}


def _forward_tile(T: int, x: Tensor, statistics: int, p: LIFParams | ILIFParams) -> dict[str, int]:
    """As measured on an H200 in bfloat16. Rows have few warps, since the warps of a row wait for each other
    at every sum. A row that belongs to a single warp has its timesteps pipelined. Rows of slices were not
    measured; each thread has 4 elements of every slice, so that nothing spills."""
    a_thread, channels = 16 // x.element_size(), x.shape[-1]
    many = slices(channels)[0] if statistics == ROW else 1
    if isinstance(p, ILIFParams):
        tile = _tile(channels, statistics == ROW, a_thread if many == 1 else 4, 4)
        more = (CHUNK if many == 1 else 2) if tile["num_warps"] <= 8 else 1
        return {**tile, "BLOCK_R": tile["BLOCK_R"] * more, "CHUNK": 1}
    if statistics != ROW:
        return {**_tile(channels, False, a_thread, 4), "CHUNK": min(T, 8)}
    if many == 1 and channels <= 256 and T > 4:
        return {**_tile(channels, True, a_thread, 1), "CHUNK": min(T, 8)}
    tile = _tile(channels, True, 2 * a_thread if many == 1 else 4, 1)
    if tile["num_warps"] == 1 and tile["BLOCK_R"] == 1 and _fits(x, tile):
        return {**tile, "CHUNK": 1 if T <= 8 else 2, "STAGES": 4}
    if many > 1 and tile["num_warps"] == 1:
        return {**tile, "CHUNK": min(T, 4)}
    return {**tile, "CHUNK": T} if T <= 4 else {**tile, "CHUNK": 2, "STAGES": 3}


@dataclass(frozen=True)
class _Backward:
    """How a backward launch works: its tile; timesteps; `chunk`, how many of them have their potentials in
    registers; registers per thread; `stages`, how many rows (or chunks, if chunk < T) are in flight,
    including the one being worked on."""

    tile: dict[str, int]
    T: int
    chunk: int
    registers: int
    stages: int

    def programs(self, size: int, device: torch.device) -> int:
        """How many programs a multiprocessor holds; each walks many rows."""
        threads, shared = 32 * self.tile["num_warps"], self.shared(size)
        return max(1, min(REGISTERS // (threads * self.registers), shared_memory(device) // shared))

    def shared(self, size: int) -> int:
        """An upper bound on the bytes of shared memory: x and gradient of what is in flight; with chunks also
        the potentials before each, and space to pass them between threads; 1 KiB for sums across warps."""
        tile, ahead = self.tile["BLOCK_R"] * self.tile["BLOCK_C"] * self.tile["SLICES"], self.stages - 1
        pieces = (4 * ahead + 2) * tile if self.chunk < self.T else 0
        return 2 * self.chunk * tile * size * ahead + pieces + 1024


def _backward_way(T: int, x: Tensor, statistics: int, sums: bool, p: LIFParams | ILIFParams) -> _Backward:
    """As measured on an H200, except for rows of slices, which have as many elements per thread as don't
    spill. More elements per thread mean fewer sums across threads, but a thread's registers hold only some 64
    potentials (elements times timesteps). More registers per thread mean fewer programs side by side."""
    size, channels, rows = x.element_size(), x.shape[-1], statistics == ROW
    many, width = slices(channels) if rows else (1, channels)
    stages, warps = 3, 1 if rows else 2  # warps at least
    if isinstance(p, ILIFParams):
        a_thread, chunk, stages, warps = 16 // size if many == 1 else 4, 1, 4, 4
        registers = 128 if many <= 3 else 168
    elif many == 3:
        a_thread, chunk, registers = (4, T, 255) if T <= 4 else (2, T, 255) if T <= 8 else (4, 2, 255)
    elif many > 3:
        a_thread, chunk, registers = 2, T if T <= 4 else 4 if T <= 8 else 2, 255
    elif size == 4:
        warps = 1 if rows else 4
        a_thread, chunk, registers = (4, T, 160) if T <= 4 else (4, T, 255) if T <= 8 else (4, 2, 128)
    elif rows and channels <= 256 and T <= 4:
        a_thread, chunk, registers = 8, T, 160
    elif rows:
        a_thread, chunk, registers = (16, T, 255) if T <= 4 else (8, T, 255) if T <= 8 else (16, 2, 255)
    elif T <= 8:
        a_thread, chunk, registers = (8, T, 168) if T <= 4 else (4, T, 128)
    elif T > MAX_T or statistics == WIDE_ROW:
        a_thread, chunk, registers, warps = 8, 2 if statistics == WIDE_ROW else 4, 168, 4
    elif sums:
        a_thread, chunk, registers, stages = 4, T, 168, 2
    else:
        a_thread, chunk, registers, warps = 4, T, 255, 4
    if rows and width > 256 * a_thread:  # more than 8 warps, for which there are not enough registers
        a_thread, chunk, registers = 32 // size if many == 1 else 4, min(T, 2), 255
    if chunk == 2:
        stages = 4
    tile = _tile(channels, rows, a_thread, warps)
    registers = min(registers, REGISTERS // (32 * tile["num_warps"]))
    way = _Backward(tile, T, chunk, registers, stages)
    while way.stages > 1 and way.shared(size) > shared_memory(x.device):
        way = replace(way, stages=way.stages - 1)
    return way


def _fits(x: Tensor, tile: dict[str, int]) -> bool:
    """Whether no tile reaches beyond the channels."""
    return x.shape[-1] % (tile["BLOCK_C"] * tile["SLICES"]) == 0


def _sizes(x: Tensor, **strides: int) -> dict[str, int]:
    channels = x.shape[-1]
    align = alignment(channels, *strides.values())
    divided = {name: n // align for name, n in strides.items()}
    return {"rows": x[0].numel() // channels, "channels": channels // align, "ALIGN": align, **divided}


def _neurons(p: LIFParams | ILIFParams, arguments: Callable[[LIFParams], dict[str, Any]]) -> dict[str, Any]:
    if isinstance(p, ILIFParams):
        return {**arguments(LIFParams()), "tau": 1 / p.v_threshold, "LEVELS": p.levels}
    return {**arguments(p), "LEVELS": 0}


def _steps(x: Tensor, p: LIFParams | ILIFParams) -> Tensor:
    """x [..., C], not empty, as the kernels take it: [T, ..., C], for an I-LIF [1, rows, C]."""
    if isinstance(p, LIFParams):
        return steps_contiguous(x)
    return x.contiguous().view(1, -1, x.shape[-1])


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
    p: LIFParams | ILIFParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, mean, rstd). If mean and rstd are None, these are row statistics [T, ...], computed here."""
    statistics = CHANNEL
    if mean is None or rstd is None:
        statistics = ROW if x.shape[-1] <= MAX_ROW else WIDE_ROW
        mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
        rstd = torch.empty_like(mean)
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return spikes, mean, rstd
    x = _steps(x, p)
    if statistics == WIDE_ROW:
        row_moments(x, eps, mean, rstd)
    T, channels = x.shape[0], x.shape[-1]
    kind, pointer, number = threshold_argument(threshold, x.shape[1:])
    blocks = {"STAGES": 1, **_forward_tile(T, x, statistics, p)}
    across = cdiv(channels, blocks["BLOCK_C"] * blocks["SLICES"])
    grid = (cdiv(x[0].numel() // channels, blocks["BLOCK_R"]) * across,)
    launch(
        norm_lif_forward, grid, x_ptr=x, weight_ptr=weight.contiguous(), bias_ptr=bias.contiguous(),
        threshold_ptr=pointer, mean_ptr=mean, rstd_ptr=rstd, spikes_ptr=spikes, eps=eps, threshold=number,
        T=T, STATISTICS=statistics, THRESHOLD=kind, **_sizes(x, stride_t=_stride(x)),
        **_neurons(p, neuron_forward), fuse=statistics == ROW, FITS=_fits(x, blocks), **blocks,
    )  # fmt: skip
    return spikes, mean, rstd


class Sums(NamedTuple):
    """What a backward pass sums over rows; what is not requested is empty. `rows`: for wide rows, <g weight>
    and <g weight z> [T, ...]."""

    weight: Tensor
    bias: Tensor
    threshold: Tensor
    rows: tuple[Tensor, ...]


def _backward(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams | ILIFParams, statistics: int, *, sums: bool = False,
    coefficients: tuple[Tensor, ...] = (), over: bool = False,
) -> tuple[Tensor | None, Sums]:  # fmt: skip
    """(grad_x, sums), as requested. `over`: grad_x overwrites x, which must be contiguous. That is safe,
    since a program writes to a place in x only after it has read there for the last time."""
    grad_x = None
    if statistics == ROW or not sums:
        grad_x = x if over else torch.empty_like(x, memory_format=torch.contiguous_format)
    nothing, channels = x.new_empty(0, dtype=torch.float32), x.shape[-1]
    if x.numel() == 0:
        zeros = x.new_zeros(channels, dtype=torch.float32)
        like = threshold.shape if isinstance(threshold, Tensor) else (0,)
        return grad_x, Sums(
            zeros, zeros.clone(), x.new_zeros(like, dtype=torch.float32), (torch.zeros_like(mean),) * 2
        )
    x, grad_spikes = _steps(x, p), _steps(grad_spikes, p)
    T = x.shape[0]
    kind, pointer, number = threshold_argument(threshold, x.shape[1:])
    way = _backward_way(T, x, statistics, sums, p)
    blocks, chunk = way.tile, way.chunk
    across = cdiv(channels, blocks["BLOCK_C"] * blocks["SLICES"])
    down = cdiv(x[0].numel() // channels, blocks["BLOCK_R"])
    programs = way.programs(x.element_size(), x.device) * multiprocessors(x.device)
    down = min(down, max(1, programs // across))
    scratch = parts = row_gw = row_gwz = partial = None
    if chunk < T:
        shape = (down, across, cdiv(T, chunk), blocks["SLICES"], blocks["BLOCK_R"], blocks["BLOCK_C"])
        scratch = x.new_empty(shape, dtype=torch.float32)
    if sums:
        parts = x.new_empty((down, 2, channels), dtype=torch.float32)
        partial = threshold_partial(kind, x, x.shape[1:], down * across, down)
        if statistics == WIDE_ROW:
            row_gw, row_gwz = (x.new_empty((across, *x.shape[:-1]), dtype=torch.float32) for _ in range(2))
    a, b, c = (*(value.to(torch.float32).contiguous() for value in coefficients), None, None, None)[:3]
    launch(
        norm_lif_backward, (down, across), grad_spikes_ptr=grad_spikes, x_ptr=x,
        weight_ptr=weight.contiguous(), bias_ptr=bias.contiguous(), threshold_ptr=pointer,
        mean_ptr=mean.contiguous(), rstd_ptr=rstd.contiguous(), a_ptr=a, b_ptr=b, c_ptr=c,
        scratch_ptr=scratch, grad_x_ptr=grad_x, sums_ptr=parts, grad_threshold_ptr=partial,
        row_gw_ptr=row_gw, row_gwz_ptr=row_gwz, threshold=number, T=T,
        STATISTICS=statistics, SUMS=sums, THRESHOLD=kind, CHUNK=chunk,
        STAGES=way.stages, FITS=_fits(x, blocks), maxnreg=way.registers,
        **_sizes(x, stride_t=_stride(x), grad_stride_t=_stride(grad_spikes)), **_neurons(p, neuron),
        ROOM=has_room(x.device), fuse=True, **blocks,
    )  # fmt: skip
    if parts is None:
        return grad_x, Sums(nothing, nothing, nothing, ())
    sum_gz, sum_g = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    sum_parts(parts, sum_gz, sum_g)
    grad_threshold = threshold_gradient(kind, partial, threshold)
    rows = tuple(part.sum(0) / channels for part in (row_gw, row_gwz) if part is not None)
    return grad_x, Sums(sum_gz, sum_g, nothing if grad_threshold is None else grad_threshold, rows)


def backward_layer(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams | ILIFParams, over: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_weight, grad_bias, grad_threshold) for row statistics. `over`: grad_x overwrites x, which
    must be contiguous."""
    args = (grad_spikes, x, weight, bias, mean, rstd, threshold, p)
    wide = x.shape[-1] > MAX_ROW
    grad_x, found = _backward(*args, WIDE_ROW if wide else ROW, sums=True, over=over)
    if wide:
        grad_x, _ = _backward(*args, WIDE_ROW, coefficients=found.rows, over=over)
    assert grad_x is not None
    return grad_x, found.weight, found.bias, found.threshold


def backward_reduce(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams | ILIFParams,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_weight = sum g z, grad_bias = sum g, grad_threshold) for channel statistics."""
    found = _backward(grad_spikes, x, weight, bias, mean, rstd, threshold, p, CHANNEL, sums=True)[1]
    return found.weight, found.bias, found.threshold


def backward_apply(
    grad_spikes: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    threshold: Tensor | float, p: LIFParams | ILIFParams, a: Tensor, b: Tensor, c: Tensor,
) -> Tensor:  # fmt: skip
    """grad_x = a g + b z + c, for channel statistics; a, b and c are per channel."""
    args = (grad_spikes, x, weight, bias, mean, rstd, threshold, p)
    grad_x = _backward(*args, CHANNEL, coefficients=(a, b, c))[0]
    assert grad_x is not None
    return grad_x
