"""Linear layer on spikes in C++ (csrc/spike_linear.cpp, csrc/subset_sums.cpp), or dense where that is faster.

Which of the three runs is decided from the shape and the measured spike rate; see `_cost`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ext.cpu import _cost, native
from spikedecoder.ext.cpu._arguments import address, dense, float32_on_cpu
from spikedecoder.ext.cpu.pack_spikes import pack_and_count, unpack

why_not = float32_on_cpu

FEW_ROWS = 32


def forward(
    s: Tensor, weight: Tensor, bias: Tensor | None, method: str | None = None
) -> tuple[Tensor, Tensor]:
    """(y [..., N] in the weight's dtype, s as words of bits). `method`: one of `_cost.METHODS`, or None.

    The kernels read the weight by columns: a weight [N, K] whose transpose is contiguous is used as it is
    (``weight.t().contiguous().t()``, made once before generating), any other is transposed in each call,
    which for a handful of rows costs more than the product itself.
    """
    channels, out_channels = s.shape[-1], weight.shape[0]
    rows = s.numel() // channels if channels else 0
    if method is None and rows <= FEW_ROWS and _is_by_columns(weight):
        return _few_rows(s, weight, bias, rows)
    words, count = pack_and_count(s)
    if method is None:
        method = _cost.fastest(rows, channels, out_channels, count, transposed=not _is_by_columns(weight))
    if method == "dense":
        return F.linear(s.to(weight.dtype), weight, bias), words
    y = torch.empty(*s.shape[:-1], out_channels)
    columns = by_columns(weight)
    bias = None if bias is None else dense(bias)
    sum_rows = native.gather if method == "gather" else native.subset_sums
    sum_rows(
        *(address(words), address(columns), address(bias), address(y)),
        *(rows, channels, out_channels, torch.get_num_threads()),
    )
    return y.to(weight.dtype), words


def _is_by_columns(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.stride() == (1, weight.shape[0])


def _few_rows(s: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Packing and gathering in one call, for generation: at this size each microsecond of Python counts."""
    s = dense(s)
    channels, out_channels = s.shape[-1], weight.shape[0]
    y = torch.empty(*s.shape[:-1], out_channels)
    words = torch.empty(*s.shape[:-1], -(-channels // 64), dtype=torch.int64)
    bias = None if bias is None else dense(bias)
    native.pack_and_gather(
        *(s.data_ptr(), words.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr()),
        *(rows, channels, out_channels, torch.get_num_threads()),
    )
    return y, words


def by_columns(weight: Tensor) -> Tensor:
    """weight [N, K] as contiguous float32 [K, N]."""
    transposed = weight.detach().t()
    if transposed.is_contiguous():
        return dense(transposed)
    weight = dense(weight)
    n, k = weight.shape
    columns = torch.empty(k, n)
    native.transpose(address(weight), address(columns), n, k, torch.get_num_threads())
    return columns


def weight_grad(words: Tensor, channels: int, grad: Tensor, method: str | None = None) -> Tensor:
    """grad_weight [N, K]: the sum of grad [..., N] over the rows in which each channel spiked."""
    words, grad = words.contiguous(), dense(grad)
    out_channels = grad.shape[-1]
    rows = words.numel() // words.shape[-1] if words.shape[-1] else 0
    if method is None:
        count = native.count(address(words), words.numel())
        method = _cost.fastest(rows, channels, out_channels, count, weight_grad=True)
    if method == "dense":
        s = unpack(words, channels, torch.float32).view(rows, channels)
        return grad.view(rows, out_channels).t() @ s
    grad_weight = torch.empty(out_channels, channels)
    kernel = native.gather_weight_grad if method == "gather" else native.subset_sums_weight_grad
    kernel(
        *(address(words), address(grad), address(grad_weight)),
        *(rows, channels, out_channels, torch.get_num_threads()),
    )
    return grad_weight
