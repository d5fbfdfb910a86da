"""LayerNorm over the last dimension, without neurons: y = (x - mean) rstd weight + bias.

x is [R, C]. y has a dtype of its own: under autocast x has 16 bits and y 32. A program holds whole rows in
registers, BLOCK_R at a time, and walks down x; mean and variance are computed in two passes over registers,
from values that are read once. Backward, with z = (x - mean) rstd and <> the mean over a row:
    dx = rstd (dy weight - <dy weight> - z <dy weight z>);   dweight = sum dy z;   dbias = sum dy

Bytes per element (b = bytes of x's dtype, o = bytes of y's; plus 8 / C for the statistics), each the minimum:
    forward     b + o       x read once, y written once
    backward    2 b + o     x and gradient read once, gradient of x written once
Bound by memory bandwidth. For dweight and dbias each program sums over its rows in registers, and one small
launch adds up the programs. Their number depends only on device and shape, so every run has the same result.
"""

# mypy: disable-error-code="assignment", no-warn-unreachable
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import Call, alignment, cdiv, kernel, launch, multiprocessors, power_of_2
from spikedecoder.kernels._sum import sum_parts

__all__ = ["backward", "forward", "why_not"]

MAX_ROW = 4096  # channels that a program holds in registers
WARPS = 32  # per multiprocessor; these kernels take at most 64 registers per thread


def why_not(call: Call) -> str | None:
    if call.shape and call.shape[-1] > MAX_ROW:
        return f"rows of {call.shape[-1]} channels: its norm takes up to {MAX_ROW}"
    return _launch.why_not(call)


@kernel
def norm_forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, channels, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    channels = channels * ALIGN
    c = tl.arange(0, BLOCK_C)[None, :]
    c_inside = c < channels
    weight = tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    every = tl.num_programs(0).to(tl.int64) * BLOCK_R
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, every):
        r = tl.arange(0, BLOCK_R).to(tl.int64) + first
        inside = (r < rows)[:, None] & c_inside
        at = r[:, None] * channels + c
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / channels
        centered = tl.where(c_inside, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, 1) / channels + eps)
        tl.store(mean_ptr + r, mean, mask=r < rows)
        tl.store(rstd_ptr + r, rstd, mask=r < rows)
        y = centered * rstd[:, None] * weight + bias
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def norm_backward(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, grad_x_ptr, parts_ptr, rows, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """parts [programs, 2, C]: each program's sums of dy z and of dy over its rows."""
    channels = channels * ALIGN
    c1 = tl.arange(0, BLOCK_C)
    c, c_inside = c1[None, :], (c1 < channels)[None, :]
    weight = tl.load(weight_ptr + c, mask=c_inside, other=0.0).to(tl.float32)
    sum_gz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    every = tl.num_programs(0).to(tl.int64) * BLOCK_R
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, every):
        r = tl.arange(0, BLOCK_R).to(tl.int64) + first
        inside = (r < rows)[:, None] & c_inside
        at = r[:, None] * channels + c
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + r, mask=r < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=r < rows, other=0.0)[:, None]
        z = (x - mean) * rstd  # not 0 outside the row, but grad is
        sum_gz += grad * z
        sum_g += grad
        gw = grad * weight
        mean_gw = (tl.sum(gw, 1) / channels)[:, None]
        mean_gwz = (tl.sum(gw * z, 1) / channels)[:, None]
        grad_x = rstd * (gw - mean_gw - z * mean_gwz)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    to = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + c1
    tl.store(to, tl.sum(sum_gz, 0), mask=c1 < channels)
    tl.store(to + channels, tl.sum(sum_g, 0), mask=c1 < channels)


def _tile(x: Tensor) -> dict[str, int]:
    """Sizes and block sizes: 128 bits of x per thread, more if rows are too wide for that."""
    channels, a_thread = x.shape[-1], 16 // x.element_size()
    block_c = max(16, power_of_2(channels))
    warps = min(16, max(4, block_c // (32 * a_thread)))
    block_r = max(1, 32 * warps * a_thread // block_c)
    align = alignment(channels)
    return {
        "rows": x.numel() // channels, "channels": channels // align, "ALIGN": align,
        "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps,
    }  # fmt: skip


def _programs(x: Tensor, tile: dict[str, int]) -> int:
    """As many programs as the device runs side by side; together they walk all rows."""
    each = WARPS // tile["num_warps"]
    return min(cdiv(tile["rows"], tile["BLOCK_R"]), each * multiprocessors(x.device))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, mean, rstd); the statistics are [..., 1] in float32."""
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    if x.numel():
        tile = _tile(x)
        launch(
            norm_forward, (_programs(x, tile),), x_ptr=x.contiguous(), weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(), y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, eps=eps, **tile,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x in x's dtype, grad_weight and grad_bias in float32)."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    make = x.new_empty if x.numel() else x.new_zeros
    grad_weight, grad_bias = (make(x.shape[-1], dtype=torch.float32) for _ in range(2))
    if x.numel():
        tile = _tile(x)
        programs = _programs(x, tile)
        parts = x.new_empty((programs, 2, x.shape[-1]), dtype=torch.float32)
        launch(
            norm_backward, (programs,), grad_ptr=grad.contiguous(), x_ptr=x.contiguous(),
            mean_ptr=mean.contiguous(), rstd_ptr=rstd.contiguous(), weight_ptr=weight.contiguous(),
            grad_x_ptr=grad_x, parts_ptr=parts, **tile,
        )  # fmt: skip
        sum_parts(parts, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
