"""Mean and variance of each channel over all rows, in one pass over memory (`moments`).

A program takes a band of rows and BLOCK_C channels of them, 128 bits per thread at a time. A thread takes
every BLOCK_R-th row of the band: it computes the mean of AT_ONCE values and the sum of their squared
distances from it, and merges both into its totals by the formula of Chan, Golub and LeVeque (1979). So large
sums are never subtracted from each other, and threads synchronise only at the end of a band. A second, small
kernel merges the bands. Bytes per element of x [M, C]: b = bytes of its dtype, the minimum. Bound by memory
bandwidth.

`row_moments` computes mean and 1 / standard deviation of rows too wide for a program's registers; it walks
along a row and merges in the same way.
"""

# mypy: disable-error-code="assignment,misc,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

import torch
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
)
from spikedecoder.kernels._neuron import as_float, times

AT_ONCE, WARPS, PROGRAMS = 16, 2, 6  # loads per thread, warps, programs per multiprocessor (H200)


@kernel
def moments_of_bands(
    x_ptr, mean_ptr, square_ptr, rows, channels, band,
    CENTER: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Per band of rows, [bands, C]: with CENTER the mean and the sum of squared distances from it; without,
    only the sum of squares."""
    channels = channels.to(tl.int64) * ALIGN
    start = tl.program_id(0).to(tl.int64) * band
    stop = tl.minimum(start + band, rows)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    c_inside = c < channels
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    done = tl.zeros((BLOCK_R, 1), tl.float32)
    for first in range(start, stop, AT_ONCE * BLOCK_R):
        xs = ()
        for i in tl.static_range(AT_ONCE):
            r = tl.arange(0, BLOCK_R)[:, None].to(tl.int64) + (first + i * BLOCK_R)
            xs = xs + (tl.load(x_ptr + r * channels + c, mask=(r < stop) & c_inside, other=0.0),)
        if CENTER:
            r1 = tl.arange(0, BLOCK_R)[:, None].to(tl.int64) + first
            new = tl.minimum(AT_ONCE, (stop - r1 + (BLOCK_R - 1)) // BLOCK_R)
            new = tl.maximum(new, 0).to(tl.float32)
            total = as_float(xs[0])
            for i in tl.static_range(1, AT_ONCE):
                total += as_float(xs[i])
            here = total * (1 / tl.maximum(new, 1.0))
            for i in tl.static_range(AT_ONCE):
                distance = tl.where(r1 + i * BLOCK_R < stop, as_float(xs[i]) - here, 0.0)
                square += distance * distance
            delta = here - mean
            moved = delta * (new / tl.maximum(done + new, 1.0))
            square += moved * (delta * done)  # not delta^2, which may overflow, times a weight of 0
            mean += moved
            done += new
        else:
            for i in tl.static_range(AT_ONCE):
                x = as_float(xs[i])
                square += x * x
    if CENTER:
        # `times` rounds before the sum: otherwise each thread would fuse its own product into the sum, and
        # the threads that share a sum would get different results
        band_mean = tl.sum(times(mean, done), 0) / (stop - start).to(tl.float32)
        delta = mean - band_mean[None, :]
        square += delta * (delta * done)
    c1 = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.program_id(0) * channels + c1
    tl.store(square_ptr + at, tl.sum(square, 0), mask=c1 < channels)
    if CENTER:
        tl.store(mean_ptr + at, band_mean, mask=c1 < channels)


@kernel
def merge_bands(
    means_ptr, squares_ptr, mean_ptr, var_ptr, bands, band, rows, channels,
    CENTER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean = sum n_i mean_i / M;  var = sum (square_i + n_i (mean_i - mean)^2) / M."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = rows.to(tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if CENTER:
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, bands, BLOCK_P):
            i = tl.arange(0, BLOCK_P)[:, None].to(tl.int64) + first
            inside = (i < bands) & (c < channels)
            n = tl.minimum(band, rows - i * band).to(tl.float32)
            part = tl.load(means_ptr + i * channels + c, mask=inside, other=0.0)
            sums += tl.where(inside, part * (n / total), 0.0)
        mean = tl.sum(sums, 0)
    for first in range(0, bands, BLOCK_P):
        i = tl.arange(0, BLOCK_P)[:, None].to(tl.int64) + first
        inside = (i < bands) & (c < channels)
        at = i * channels + c
        square += tl.load(squares_ptr + at, mask=inside, other=0.0)
        if CENTER:
            n = tl.minimum(band, rows - i * band).to(tl.float32)
            part = tl.load(means_ptr + at, mask=inside, other=0.0)
            delta = tl.where(inside, part - mean[None, :], 0.0)
            square += delta * (delta * n)
    c1 = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(mean_ptr + c1, mean, mask=c1 < channels)
    tl.store(var_ptr + c1, tl.sum(square, 0) / total, mask=c1 < channels)


def columns(channels: int) -> int:
    """The width of tiles for channel statistics: the widest with at most 15 % of its lanes beyond the
    channels, or else the one with the fewest."""
    ways = [(cdiv(channels, width) * width, width) for width in (256, 128, 64, 32)]
    near = [width for lanes, width in ways if lanes <= 1.15 * channels]
    fewest = min(ways, key=lambda way: (way[0], -way[1]))[1]
    return min(max(near, default=fewest), max(16, power_of_2(channels)))


def moments(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C], in float32, over all rows of x [..., C]; without `center`, 0 and E[x^2].
    NaN if x is empty."""
    x = x.contiguous()
    channels = x.shape[-1]
    mean = x.new_empty(channels, dtype=torch.float32)
    var = torch.empty_like(mean)
    if x.numel() == 0:
        return mean.fill_(float("nan") if center else 0.0), var.fill_(float("nan"))
    rows = x.numel() // channels
    block_c = columns(channels)
    block_r = 32 * WARPS * (16 // x.element_size()) // block_c  # 128 bits a thread
    across = cdiv(channels, block_c)
    bands = max(1, min(cdiv(rows, AT_ONCE * block_r), PROGRAMS * multiprocessors(x.device) // across))
    band = cdiv(cdiv(rows, bands), block_r) * block_r
    bands = cdiv(rows, band)
    means, squares = (x.new_empty((bands, channels), dtype=torch.float32) for _ in range(2))
    align = alignment(channels)
    launch(
        moments_of_bands, (bands, across), x_ptr=x, mean_ptr=means, square_ptr=squares, rows=rows,
        channels=channels // align, band=band, CENTER=center, AT_ONCE=AT_ONCE, BLOCK_R=block_r,
        BLOCK_C=block_c, ALIGN=align, num_warps=WARPS, maxnreg=REGISTERS // (32 * WARPS * PROGRAMS) // 8 * 8,
        fuse=True,
    )  # fmt: skip
    launch(
        merge_bands, (cdiv(channels, 8),), means_ptr=means, squares_ptr=squares, mean_ptr=mean,
        var_ptr=var,
        bands=bands, band=band, rows=rows, channels=channels, CENTER=center, BLOCK_P=512, BLOCK_C=8,
        num_warps=8,
    )  # fmt: skip
    return mean, var


@kernel
def moments_of_rows(
    x_ptr, mean_ptr, rstd_ptr, rows, channels, stride_t, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Mean and rstd [T, R] of rows, tile by tile. Program (rows, timestep)."""
    channels = channels * ALIGN
    t = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = x_ptr + t * (stride_t.to(tl.int64) * ALIGN) + r[:, None] * channels
    mean = tl.zeros((BLOCK_R,), tl.float32)
    square = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < channels)[None, :]
        x = tl.load(at + c[None, :], mask=inside, other=0.0).to(tl.float32)
        new = tl.minimum(BLOCK_C, channels - first).to(tl.float32)
        tile_mean = tl.sum(x, 1) / new
        distance = tl.where(inside, x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = new / (first + new)
        square += tl.sum(distance * distance, 1) + delta * (delta * (first * share))
        mean += delta * share
    tl.store(mean_ptr + t * rows + r, mean, mask=r < rows)
    tl.store(rstd_ptr + t * rows + r, 1 / tl.sqrt_rn(square / channels + eps), mask=r < rows)


def row_moments(x: Tensor, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """Write mean and 1 / sqrt(variance + eps) of each row of x [T, ..., C], timesteps contiguous."""
    channels = x.shape[-1]
    rows, stride = x[0].numel() // channels, x.stride(0) if x.shape[0] > 1 else 0
    align = alignment(channels, stride)
    block_c = 256 * (16 // x.element_size())
    launch(
        moments_of_rows, (rows, x.shape[0]), x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, rows=rows,
        channels=channels // align, stride_t=stride // align, eps=eps, BLOCK_R=1, BLOCK_C=block_c,
        ALIGN=align,
    )  # fmt: skip
