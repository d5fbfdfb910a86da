"""Spike products and packing at several spike rates: the CUDA extension, Triton and cuBLAS, side by side.

One group is one operator, dtype, shape and rate; from their rows `gpu_crossover.py` finds where the extension
is the fastest. Each row does all that `auto` would call: it packs the spikes, and the extension transposes a
weight that is not stored by columns (a row of its own has the time without that). "dense" has its spikes as
floats already, and keeps no bits. float32 is multiplied without TF32, which is torch's default. Packing takes
the same time at any rate, and is measured at one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_crossover import CUDA, DENSE, TRITON
from gpu_groups import DEVICE, RATE, Calls, Group, _spikes, extension

from spikedecoder.reference import pack_spikes as pack_reference

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SHAPES = ((512, 2048), (2048, 512), (80, 1280))  # channels, outputs
MANY, FEW = 8192, 4  # rows; few are one token's at T = 4
DTYPES = (torch.bfloat16, torch.float32)
BY_COLUMNS = "cuda, weight by columns"
ROWS = (TRITON, CUDA, DENSE, BY_COLUMNS)


def product_group(dtype: torch.dtype, M: int, K: int, N: int, rate: float) -> Group:
    from spikedecoder.kernels import spike_linear as k

    def make() -> Calls:
        s, cuda = _spikes(M, K, dtype=dtype, rate=rate), extension("spike_linear")
        weight = torch.randn(N, K, device=DEVICE, dtype=dtype) / K**0.5
        columns = weight.t().contiguous().t()
        calls: Calls = {
            DENSE: lambda: F.linear(s, weight),
            TRITON: lambda: k.forward(s, weight, None)[0],
            CUDA: cuda if isinstance(cuda, str) else lambda: cuda.forward(s, weight, None)[0],
            BY_COLUMNS: cuda if isinstance(cuda, str) else lambda: cuda.forward(s, columns, None)[0],
        }
        return calls

    moved = dtype.itemsize * (M * K + N * K + M * N) + M * K / 8
    return _group("spike_linear", dtype, M, K, N, rate, make, moved, 2.0 * M * K * N)


def gradient_group(dtype: torch.dtype, M: int, K: int, N: int, rate: float) -> Group:
    from spikedecoder.kernels import spike_linear as k

    def make() -> Calls:
        s, cuda = _spikes(M, K, dtype=dtype, rate=rate), extension("spike_linear")
        grad = torch.randn(M, N, device=DEVICE, dtype=dtype)
        words = k.pack(s)
        return {
            DENSE: lambda: grad.t() @ s,
            TRITON: lambda: k.weight_grad(words, K, grad),
            CUDA: cuda if isinstance(cuda, str) else lambda: cuda.weight_grad(words, K, grad),
        }

    moved = dtype.itemsize * (M * N + N * K) + M * K / 8
    return _group("spike_linear_weight_grad", dtype, M, K, N, rate, make, moved, 2.0 * M * K * N)


def packing_groups(dtype: torch.dtype, M: int, K: int) -> Iterator[Group]:
    from spikedecoder.kernels import pack_spikes as k

    def make() -> Calls:
        s, cuda = _spikes(M, K, dtype=dtype), extension("pack_spikes")
        return {
            "eager reference": lambda: pack_reference.pack(s),
            TRITON: lambda: k.pack(s),
            CUDA: cuda if isinstance(cuda, str) else lambda: cuda.pack(s),
        }

    def make_back() -> Calls:
        words, cuda = k.pack(_spikes(M, K, dtype=dtype)), extension("pack_spikes")
        return {
            "eager reference": lambda: pack_reference.unpack(words, K, dtype),
            TRITON: lambda: k.unpack(words, K, dtype),
            CUDA: cuda if isinstance(cuda, str) else lambda: cuda.unpack(words, K, dtype),
        }

    moved = (dtype.itemsize + 0.125) * M * K
    for operator, made in (("pack_spikes", make), ("unpack_spikes", make_back)):
        group = _group(operator, dtype, M, K, None, RATE, made, moved, 0.0)
        group.reference, group.exact = "eager reference", (TRITON, CUDA)
        yield group


def _group(
    operator: str, dtype: torch.dtype, M: int, K: int, N: int | None, rate: float, make: Any, moved: float,
    flops: float,
) -> Group:  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    about = {"operator": operator, "dtype": name, "rows": M, "channels": K, "outputs": N, "rate": rate}
    title = f"{operator} {name} M={M} K={K}" + ("" if N is None else f" N={N}") + f" p={rate}"
    return Group(title, make, moved, flops, exact=(), reference=DENSE, about=about)


def rate_groups(dry: bool) -> Iterator[Group]:
    """The dtype and the operators that models use most come first, because the last may be left out."""
    shapes, many, rates = (((64, 32),), 40, RATES[-2:]) if dry else (SHAPES, MANY, RATES)
    for dtype in DTYPES:
        for make, rows in ((product_group, many), (product_group, FEW), (gradient_group, many)):
            for K, N in shapes:
                for rate in rates:
                    yield make(dtype, rows, K, N, rate)
        for rows in (many, FEW):
            for K in dict.fromkeys(K for K, _ in shapes):
                yield from packing_groups(dtype, rows, K)
