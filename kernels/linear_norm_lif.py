"""Linear on spikes, normalisation and LIF in one kernel, which never writes the current between them.

    x = s W^T + b,   y = (x - mean) rstd weight + bias,   spikes = LIF(y)      (`spike_linear`, `norm_lif`)

s [T, R, K] comes as words of 32 spikes. A program owns BLOCK_M rows and BLOCK_N of the N outputs and walks
all T timesteps: product on tensor cores, norm, neuron. The membrane potentials stay in float32 registers,
beside the accumulators. x is rounded to the dtype of W before the norm, as if it had been written. Statistics
are per channel (BatchNorm and PowerNorm in evaluation: passed in) or per row. Where a tile spans whole rows,
these are computed in registers; for wider rows a first kernel, linear_moments, computes the product only for
mean and variance.

Bytes per row of s and timestep (b = bytes of the dtype), not counting W: b N + K / 8, the minimum; two
kernels one after the other move 3 b N + K / 8. The price: for rows wider than a tile the product is computed
twice, so each block of BLOCK_M rows reads W from cache once more, b N K / BLOCK_M bytes per row. Such rows
are therefore fused only if that is no more than the 2 b N bytes of memory traffic saved, which is K <= 128;
all others are always fused, except on sm_90.

Accumulators and potentials share the registers, so a tile is at most 128 outputs wide and few programs run
side by side. On an H200 the two separate kernels take 0.4 to 0.8 of this kernel's time, so on sm_90 they are
used. Backward computes the product again (`spike_linear`), then runs the backward pass of `norm_lif`.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels import norm_lif, spike_linear
from spikedecoder.kernels._digits import stages
from spikedecoder.kernels._launch import alignment, cdiv, family, kernel, launch, power_of_2, why_not
from spikedecoder.kernels._neuron import (
    affine,
    as_spikes,
    charge,
    load_threshold,
    neuron_forward,
    reset,
    standardised,
    threshold_argument,
)
from spikedecoder.kernels.norm_lif import CHANNEL, ROW, WIDE_ROW
from spikedecoder.kernels.pack_spikes import WORD, pack
from spikedecoder.kernels.spike_linear import linear_tile
from spikedecoder.params import LIFParams

__all__ = ["forward", "why_not"]

BLOCK_M = 64
MAX_INPUTS = 128  # of rows wider than a tile: see above


@kernel
def linear_moments(
    words_ptr, linear_weight_ptr, linear_bias_ptr, mean_ptr, rstd_ptr, rows, inputs, outputs, words, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FAMILY: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of each of the `rows` rows of x (all timesteps), merged tile by tile as in `_norm`."""
    inputs = inputs * ALIGN
    outputs = outputs * ALIGN
    dtype: tl.constexpr = linear_weight_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, outputs, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        acc = linear_tile(
            words_ptr, linear_weight_ptr, linear_bias_ptr, r, rows, n, inputs, outputs, words,
            BLOCK_M, BLOCK_N, BLOCK_K, FAMILY,
        )  # fmt: skip
        x = acc.to(dtype).to(tl.float32)  # 0 beyond the last output
        new = tl.minimum(BLOCK_N, outputs - first).to(tl.float32)
        tile_mean = tl.sum(x, 1) / new
        distance = tl.where((n < outputs)[None, :], x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = new / (first + new)
        square += tl.sum(distance * distance, 1) + delta * (delta * (first * share))
        mean += delta * share
    tl.store(mean_ptr + r, mean, mask=r < rows)
    tl.store(rstd_ptr + r, 1 / tl.sqrt_rn(square / outputs + eps), mask=r < rows)


@kernel
def linear_norm_lif_forward(
    words_ptr, linear_weight_ptr, linear_bias_ptr, weight_ptr, bias_ptr, threshold_ptr, mean_ptr, rstd_ptr,
    spikes_ptr, rows, inputs, outputs, words, eps, threshold, tau, v_reset,
    T: tl.constexpr, STATISTICS: tl.constexpr, THRESHOLD: tl.constexpr, RECIPROCAL: tl.constexpr,
    HARD: tl.constexpr, DECAY_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FAMILY: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Spikes, and with STATISTICS 1 also mean and rstd [T, R]. `rows` is R, the rows of one timestep."""
    inputs = inputs * ALIGN
    outputs = outputs * ALIGN
    dtype: tl.constexpr = linear_weight_ptr.dtype.element_ty
    across = tl.cdiv(outputs, BLOCK_N)
    r = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    c, c_inside = n[None, :], (n < outputs)[None, :]
    inside = (r < rows)[:, None] & c_inside
    at = r[:, None] * outputs + c
    threshold = load_threshold(threshold_ptr, threshold, c, c_inside, at, inside, THRESHOLD)
    v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, T):
        m = r + t * rows.to(tl.int64)
        acc = linear_tile(
            words_ptr, linear_weight_ptr, linear_bias_ptr, m, T * rows.to(tl.int64), n, inputs, outputs,
            words, BLOCK_M, BLOCK_N, BLOCK_K, FAMILY,
        )  # fmt: skip
        x = acc.to(dtype)
        # loaded at each timestep, from cache: kept, they would fill the registers
        weight = tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
        if STATISTICS == 0:
            mean = tl.load(mean_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
        elif STATISTICS == 1:
            row_mean = tl.sum(x.to(tl.float32), 1) / outputs
            centered = tl.where(c_inside, x.to(tl.float32) - row_mean[:, None], 0.0)
            row_rstd = 1 / tl.sqrt_rn(tl.sum(centered * centered, 1) / outputs + eps)
            tl.store(mean_ptr + m, row_mean, mask=r < rows)
            tl.store(rstd_ptr + m, row_rstd, mask=r < rows)
            mean, rstd = row_mean[:, None], row_rstd[:, None]
        else:
            mean = tl.load(mean_ptr + m, mask=r < rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + m, mask=r < rows, other=0.0)[:, None]
        y = affine(standardised(x.to(tl.float32), mean, rstd, dtype, STATISTICS), weight, bias, STATISTICS)
        h = charge(y, v, tau, v_reset, RECIPROCAL, HARD, DECAY_INPUT)
        fired = h >= threshold
        to = spikes_ptr + m[:, None] * outputs + c
        tl.store(to, as_spikes(fired, spikes_ptr.dtype.element_ty), mask=inside)
        v = reset(h, fired, threshold, v_reset, HARD)


def tile(outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """(BLOCK_N, warps): the widest tile whose accumulators and potentials fit the registers, as read off
    compiled code."""
    if dtype == torch.float32 and family(device):  # 0: the interpreter
        widest, warps = (32, 4) if family(device) == 8 else (64, 8)
    else:
        widest, warps = 128, 8
    return min(widest, max(16, power_of_2(outputs))), warps


def forward(
    s: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor, bias: Tensor,
    mean: Tensor | None, rstd: Tensor | None, eps: float, threshold: Tensor | float, p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(spikes [T, ..., N], mean, rstd, words of s). Statistics are as in `norm_lif.forward`."""
    words, inputs, outputs = pack(s), s.shape[-1], linear_weight.shape[0]
    block_n, warps = tile(outputs, linear_weight.dtype, s.device)
    statistics = CHANNEL
    if mean is None or rstd is None:
        statistics = ROW if outputs <= block_n else WIDE_ROW
    moves_more = statistics == WIDE_ROW and inputs > MAX_INPUTS
    if s.numel() == 0 or outputs == 0 or moves_more or family(s.device) == 9:
        current = spike_linear.from_words(words, inputs, linear_weight, linear_bias)
        return *norm_lif.forward(current, weight, bias, mean, rstd, eps, threshold, p), words
    if mean is None or rstd is None:
        mean = s.new_empty(s.shape[:-1], dtype=torch.float32)
        rstd = torch.empty_like(mean)
    spikes = linear_weight.new_empty(*s.shape[:-1], outputs)
    T, rows = s.shape[0], s[0].numel() // inputs
    kind, pointer, number = threshold_argument(threshold, spikes.shape[1:])
    align = alignment(inputs, outputs)
    shared = {
        "words_ptr": words.view(torch.int32), "linear_weight_ptr": linear_weight.contiguous(),
        "linear_bias_ptr": None if linear_bias is None else linear_bias.contiguous(), "mean_ptr": mean,
        "rstd_ptr": rstd, "inputs": inputs // align, "outputs": outputs // align,
        "words": 2 * words.shape[-1], "eps": eps, "BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_K": WORD,
        "FAMILY": family(s.device), "ALIGN": align, "num_warps": warps,
        "num_stages": stages(s.device) if linear_weight.dtype == torch.float32 else 2,
    }  # fmt: skip
    if statistics == WIDE_ROW:
        launch(linear_moments, (cdiv(T * rows, BLOCK_M),), rows=T * rows, **shared)
    launch(
        linear_norm_lif_forward, (cdiv(rows, BLOCK_M) * cdiv(outputs, block_n),), spikes_ptr=spikes,
        weight_ptr=weight.contiguous(), bias_ptr=bias.contiguous(), threshold_ptr=pointer, rows=rows,
        threshold=number, T=T, STATISTICS=statistics, THRESHOLD=kind, **shared, **neuron_forward(p),
    )  # fmt: skip
    return spikes, mean, rstd, words
