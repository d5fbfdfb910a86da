"""Choose the fastest way to multiply spikes by a matrix, by a small cost model.

For M rows of K channels, with `count` ones among all values, and N output channels, the ways cost

    gather       count * (N * (add, far) + entry) + M * K * word + M * N * row + K * N * fetch,
                 of a small weight M * walk + count * N * step
    subset_sums  M * K * N * look_up + K * N * table + M * N * store
    tiles        M * K * (N * (byte or tile) + spread) + K * N * split * (M / 1024, up) + M * N * written
    dense        M * K * N * multiply_add + M * N * row + K * N * panel

in nanoseconds of one thread. All ways scale alike with threads, so that their number does not matter.

`add, far`: `far` is added to `add` if the sum is over more than NEAR_ROWS values. `byte or tile`: `byte` if
it is over at least BYTES_FROM values. `up`: rounded up.

In a weight gradient M and K exchange their roles. It also pays M * K * bits to transpose the spikes, and
`transposition` for its own; if it is dense, M * K * unpack instead.

A weight that is not stored by columns pays `transposition`, too, except by torch's product. That is the dense
way where ours is not as fast on this CPU (`own_products`), and for float32 with few rows: up to FEW, if the
weight is not stored by columns, or a single one in a weight gradient.

The constants depend on the CPU and on the variant in use. The product and the weight gradient have a set
each, because their sources lie in different caches. ``python -m spikedecoder.ext.cpu.calibrate`` measures
them anew and reports how far the model's choices are from the fastest; SPIKEDECODER_SPIKE_LINEAR_COST names a
JSON file that it wrote, to be used instead.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from spikedecoder.ext.cpu import native

KINDS = ("product", "weight gradient")
METHODS = ("gather", "subset_sums", "tiles", "dense")
TILE_ROWS = 1024  # rows per split of the source into tiles (csrc/tiles.cpp)
SMALL_BYTES, SMALL_CHANNELS, SMALL_OUTPUTS = 48 << 10, 256, 128  # largest weight for which bits are walked
NEAR_ROWS = 96  # rows of a panel of 8 vectors that the first-level cache holds
SMALL_ROWS = 4  # rows per channel from which on bits are walked, with a small weight (csrc/spike_linear.cpp)
BYTES_FROM = 128  # summed values from which on floats are split into digits of a byte (csrc/tile_digits.h)
TILES_MARGIN = 1.25  # tiles must win by this: the matrix unit slows down when others use it
# Nanoseconds per element to transpose a weight or its gradient: for matrices that the second-level cache
# holds, and for larger ones
TRANSPOSE_NEAR, TRANSPOSE_FAR, NEAR_BYTES = 0.3, 1.4, 1 << 20
FEW = 128  # rows up to which torch's product, which transposes nothing, is the fastest dense one
_ENV = "SPIKEDECODER_SPIKE_LINEAR_COST"


def transposition(k: int, n: int) -> float:
    """Nanoseconds of one thread to transpose a float32 matrix [k, n]."""
    return (TRANSPOSE_NEAR if 4 * k * n <= NEAR_BYTES else TRANSPOSE_FAR) * k * n


def _walks(m: int, k: int, n: int) -> bool:
    small = 4 * k * n <= SMALL_BYTES and k <= SMALL_CHANNELS and n <= SMALL_OUTPUTS
    return small and m >= SMALL_ROWS * k


@dataclass(frozen=True)
class Costs:
    """Nanoseconds per unit, as in the module's equations."""

    add: float
    entry: float
    word: float
    row: float
    look_up: float
    table: float
    store: float
    multiply_add: float
    bits: float
    fetch: float = 0.0
    panel: float = 0.0
    unpack: float = 0.0
    tile: float = 0.0
    split: float = 0.0
    written: float = 0.0
    spread: float = 0.0
    byte: float = 0.0
    walk: float = 0.0
    step: float = 0.0
    far: float = 0.0

    def of(self, method: str, m: int, k: int, n: int, count: int, weight_grad: bool) -> float:
        """Nanoseconds of a method for s [m, k] with `count` ones and weight [n, k], which lies by columns."""
        extra = self.bits * m * k + transposition(k, n) if weight_grad else 0.0
        rows, summed = (k, m) if weight_grad else (m, k)
        if method == "gather" and not weight_grad and _walks(m, k, n):
            return m * self.walk + count * n * self.step
        if method == "gather":
            add = self.add + (self.far if summed > NEAR_ROWS else 0.0)
            sums = count * (n * add + self.entry) + rows * summed * self.word + rows * n * self.row
            return sums + summed * n * self.fetch + extra
        if method == "subset_sums":
            sums = rows * summed * n * self.look_up + rows * n * self.store
            return sums + summed * n * self.table + extra
        if method == "tiles":
            each = self.byte if summed >= BYTES_FROM else self.tile
            sums = rows * summed * (n * each + self.spread) + rows * n * self.written
            return sums + summed * n * self.split * -(-rows // TILE_ROWS) + extra
        extra = self.unpack * m * k if weight_grad else 0.0
        return rows * summed * n * self.multiply_add + rows * n * self.row + summed * n * self.panel + extra


# Walking the bits with a small weight, measured on Emerald Rapids.
_AVX512 = {"walk": 9.0, "step": 0.016}
_AVX2 = {"walk": 9.0, "step": 0.04}
_BASELINE = {"walk": 9.0, "step": 0.105}

# By CPU and variant, for the product and for the weight gradient. Measured with one thread and torch 2.13
# with its own BLAS, which used AVX-512 where the CPU has it. Except for Zen 5 and Zen 1, the constants of
# weight gradients also contain their transposition, which so counts in part twice, and those of
# the dense one are of an earlier kernel.
COSTS = {
    # EPYC of family 26, with vectors of 512 bits in all units. Its other variants take Zen 3's costs, below.
    "zen 5": {
        "avx512": (
            Costs(
                *(0.0108, 0.0, 0.0118, 0.0508, 0.00313, 0.0824, 0.118, 0.00764, 0.0, 0.0351, 0.143),
                walk=8.17,
                step=0.00948,
                far=0.0124,
            ),
            Costs(
                *(0.0139, 0.197, 0.0, 0.0, 0.00248, 0.134, 0.0776, 0.00837, 0.0276, 0.0725, 0.143, 0.0497),
                far=0.00465,
            ),
        ),
    },
    # EPYC of family 23 that computes vectors of 256 bits in halves; torch's BLAS used AVX2.
    "zen 1": {
        "avx2": (
            Costs(
                *(0.0729, 0.281, 0.131, 0.263, 0.0198, 0.634, 0.529, 0.0559, 0.0, 0.178, 0.688),
                walk=40.0,
                step=0.0618,
                far=0.048,
            ),
            Costs(
                *(0.0961, 1.31, 0.0864, 0.884, 0.0203, 0.678, 1.14, 0.0535, 0.128, 0.413, 1.49, 0.867),
                far=0.0224,
            ),
        ),
    },
    # Other EPYC. AVX-512 was measured on Zen 4, the other variants on Zen 3.
    "amd": {
        "avx512": (
            Costs(
                *(0.0173, 0.0, 0.0239, 0.18, 0.00631, 0.257, 0.234, 0.0176, 0.0, 0.0619, 0.46),
                walk=17.5,
                step=0.0238,
                far=0.0215,
            ),
            Costs(
                *(0.0206, 0.0, 0.0176, 0.413, 0.00614, 0.281, 0.508, 0.0171, 0.0231, 0.19, 0.634, 0.219),
                far=0.0196,
            ),
        ),
        "avx2": (
            Costs(
                *(0.0517, 2.43, 0.186, 0.0544, 0.00933, 0.271, 0.191, 0.0259, 0.0, 0.0449, 0.27),
                walk=25.7,
                step=0.0239,
            ),
            Costs(0.0697, 0.0, 0.177, 0.966, 0.0109, 0.175, 1.29, 0.0298, 0.0, 0.265, 0.512),
        ),
        "baseline": (
            Costs(
                *(0.0861, 1.52, 0.187, 0.161, 0.0193, 0.0771, 0.0737, 0.0304, 0.0, 0.0801),
                walk=35.3,
                step=0.061,
            ),
            Costs(0.138, 0.0, 0.145, 0.285, 0.0223, 0.0, 0.765, 0.028, 0.0, 0.363, 0.0, 0.591),
        ),
    },
    # Xeon. AVX-512 was measured on Ice Lake, the other variants on Emerald Rapids. There the subset sums are
    # not those of today's kernel: AMX has those of an earlier one, which kept them in registers; AVX2 and the
    # baseline have Zen 3's, with `look_up` scaled like `add`.
    "intel": {
        "amx": (
            Costs(
                *(0.0292, 0.0, 0.295, 0.0921, 0.00849, 0.613, 0.295, 0.0147, 0.0, 0.0608, 0.196, 0.0),
                tile=0.00378,
                split=0.299,
                written=0.137,
                spread=0.12,
                byte=0.0023,
                **_AVX512,
            ),
            Costs(
                *(0.0348, 0.0, 0.115, 0.37, 0.00691, 1.07, 0.082, 0.0137, 0.00205, 0.166, 0.501, 0.0226),
                tile=0.00387,
                split=0.383,
                written=0.447,
                spread=0.0684,
                byte=0.0026,
            ),
        ),
        "avx512": (
            Costs(
                *(0.0362, 0.401, 0.0215, 0.186, 0.0102, 0.0929, 0.133, 0.0161, 0.0, 0.039, 0.139),
                walk=11.9,
                step=0.0258,
            ),
            Costs(0.0424, 0.0, 0.0518, 0.363, 0.0103, 0.191, 0.453, 0.0178, 0.0, 0.161, 0.375, 0.0498),
        ),
        "avx2": (
            Costs(0.0463, 0.397, 0.361, 0.113, 0.0084, 0.271, 0.191, 0.0139, 0.0, 0.0535, **_AVX2),
            Costs(0.0646, 0.0, 0.106, 0.246, 0.0101, 0.175, 1.29, 0.0127, 0.0412, 0.158, 0.274, 0.172),
        ),
        "baseline": (
            Costs(0.112, 0.0, 0.577, 0.388, 0.0251, 0.0771, 0.0737, 0.0176, 0.0, **_BASELINE),
            Costs(0.163, 0.0, 0.147, 0.0, 0.0263, 0.0, 0.765, 0.0193, 0.0918, 0.133, 0.268, 0.246),
        ),
    },
}
OTHERS = ("amd", "intel")  # their costs stand in for those of CPUs that were not measured
ZEN_5 = 26  # CPU family

# The time of a dense bfloat16 product over that of float32, if the CPU multiplies pairs of bfloat16 ...
BFLOAT16_PAIRS = {"zen 5": 0.54, "amd": 0.48, "intel": 0.48}  # the last two: measured on Zen 4
# ... and its costs if the CPU multiplies tiles of bfloat16, so that torch's product is used (Emerald Rapids).
# `fetch`: gathering reads bfloat16 as floats.
BFLOAT16_TILES = {"multiply_add": 0.002, "fetch": 0.4, "panel": 0.27, "unpack": 0.4}


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU has a matrix unit (AMX), which torch's bfloat16 products use, too."""
    return "amx" in native.variants()


def _cpus() -> tuple[str, ...]:
    """The keys of COSTS that apply to this CPU, the closest first."""
    build = native.build()
    own: tuple[str, ...] = ()
    if build["vendor"] == "amd":
        own = ("zen 5",) if build["family"] >= ZEN_5 else ("zen 1",) if build["halves_vectors"] else ()
    return (*own, *sorted(OTHERS, key=lambda maker: maker != build["vendor"]))


@functools.cache
def costs_of(variant: str, dtype: torch.dtype, weight_grad: bool) -> Costs:
    """`costs`, for a weight of this dtype."""
    table = costs(variant, weight_grad)
    if dtype != torch.bfloat16:
        return table
    if has_tiles():
        # a bfloat16 is one part, where a float32 is three, and half the bytes
        one = table.tile / 3
        ours = {"tile": one, "byte": one, "split": table.split / 2, "written": table.written / 2}
        return replace(table, **BFLOAT16_TILES, **ours)
    if variant == "avx512" and native.build()["bfloat16_products"]:
        return replace(table, multiply_add=BFLOAT16_PAIRS[_cpus()[0]] * table.multiply_add)
    return table


@functools.cache
def costs(variant: str, weight_grad: bool = False) -> Costs:
    """The costs of this CPU for float32, or those of the user's file (ValueError if it cannot be used)."""
    path = os.environ.get(_ENV)
    if not path:
        return next(COSTS[cpu] for cpu in _cpus() if variant in COSTS[cpu])[variant][weight_grad]
    known = {field.name for field in fields(Costs)}
    try:
        values = json.loads(Path(path).read_text("utf-8"))[variant][KINDS[weight_grad]]
        if set(values) != known:
            raise KeyError(", ".join(sorted(set(values) ^ known)))
        return Costs(**{name: float(value) for name, value in values.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{_ENV}: cannot use {path!r} for {variant} ({error!r}); write it anew with "
            "python -m spikedecoder.ext.cpu.calibrate"
        ) from error


@functools.cache
def _methods(variant: str) -> tuple[str, ...]:
    return METHODS if variant == "amx" else tuple(method for method in METHODS if method != "tiles")


class Way(NamedTuple):
    """Gather up to `most` set bits; beyond that use METHODS[other]."""

    most: int
    other: int
    torch_dense: bool  # whether METHODS[other] is "dense", by torch's product

    def method(self, count: int) -> str:
        """The one of METHODS for `count` set bits."""
        return METHODS[self.other] if count > self.most else "gather"

    def by_torch(self, count: int) -> bool:
        """Whether torch's product is the method for `count` set bits."""
        return self.torch_dense and count > self.most


def own_products(variant: str, dtype: torch.dtype) -> bool:
    """Whether our dense kernel is as fast as torch's product.

    With AVX-512 it is, except for bfloat16 on a CPU with a matrix unit. With AVX2 it is on CPUs that torch's
    BLAS was not written for (on Zen 3 it is 0.9 to 1.6 times as fast), and for bfloat16, which torch
    multiplies a hundred times more slowly there.
    """
    if dtype == torch.bfloat16 and has_tiles():
        return False
    if variant == "avx2":
        return dtype == torch.bfloat16 or native.build()["vendor"] != "intel"
    return variant in ("amx", "avx512")


def outpaces_torch(variant: str) -> bool:
    """Whether our dense kernel takes far less time than torch's float32 product: with AVX-512 on Zen 5, where
    torch's BLAS uses half of the vectors' 512 bits. With AVX2 it takes 0.85 to 1.1 of torch's time there."""
    return variant == "avx512" and _cpus()[0] == "zen 5"


def only(method: str, dtype: torch.dtype) -> Way:
    """The way that uses one method for any number of set bits."""
    return Way(-1, METHODS.index(method), method == "dense" and not own_products(native.variant(), dtype))


@functools.lru_cache(maxsize=1024)
def crossover(
    variant: str, m: int, k: int, n: int, weight_grad: bool, transposed: bool, dtype: torch.dtype
) -> Way:
    """`fastest` by this CPU's costs."""
    return fastest(costs_of(variant, dtype, weight_grad), variant, (m, k, n), weight_grad, transposed, dtype)


def fastest(
    table: Costs,
    variant: str,
    shape: tuple[int, int, int],
    weight_grad: bool,
    transposed: bool,
    dtype: torch.dtype,
) -> Way:
    """The fastest way for s [m, k] and weight [n, k], of shape (m, k, n).

    transposed: whether the weight must be transposed, which torch's product need not do.
    Every method but gathering takes the same time for any number of set bits.
    """
    m, k, n = shape
    few = m == 1 if weight_grad else transposed and m <= FEW
    by_torch = (few and dtype == torch.float32) or not own_products(variant, dtype)
    fixed = {method: table.of(method, m, k, n, 0, weight_grad) for method in _methods(variant)}
    each = (table.of("gather", m, k, n, 1024, weight_grad) - fixed["gather"]) / 1024
    if transposed:
        for method in fixed:
            if method != "dense" or not by_torch:
                fixed[method] += transposition(k, n)
    gather = fixed.pop("gather")
    other = min(fixed, key=fixed.__getitem__)
    least = fixed[other] * (TILES_MARGIN if other == "tiles" else 1.0)
    most = min((least - gather) / each, m * k) if each else m * k
    return Way(max(-1, int(most)), METHODS.index(other), other == "dense" and by_torch)
