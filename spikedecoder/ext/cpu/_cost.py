"""Which way of multiplying spikes by a matrix is the fastest, by a small model of what each costs.

For M rows of K channels, of which `count` values in all are 1, and N output channels:

    gather       count * (N * add + entry) + M * K * word + M * N * row
    subset_sums  M * K * N * look_up + K * N * table + M * N * store
    dense        M * K * N * multiply_add + M * N * row

in nanoseconds of one thread; the ways share threads alike, so that their number does not matter. A weight
gradient has M and K exchanged in the roles of rows and sum, and pays `bits` per value to transpose them (or
to unpack them, if dense).

The constants are those of the machine named beside them. ``python -m spikedecoder.ext.cpu.calibrate``
measures them anew and says how far from the fastest choice the model is; SPIKEDECODER_SPIKE_LINEAR_COST
names a JSON file that it wrote, to be used instead.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from spikedecoder.ext.cpu import native

METHODS = ("gather", "subset_sums", "dense")
TRANSPOSE = 0.3  # nanoseconds per element, for a weight that does not lie by columns
_ENV = "SPIKEDECODER_SPIKE_LINEAR_COST"


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

    def of(self, method: str, m: int, k: int, n: int, count: int, weight_grad: bool) -> float:
        extra = self.bits * m * k if weight_grad else 0.0
        rows, summed = (k, m) if weight_grad else (m, k)
        if method == "gather":
            sums = count * (n * self.add + self.entry) + rows * summed * self.word + rows * n * self.row
            return sums + extra
        if method == "subset_sums":
            sums = rows * summed * n * self.look_up + rows * n * self.store
            return sums + summed * n * self.table + extra
        return rows * summed * n * self.multiply_add + rows * n * self.row + extra


# AMD EPYC (Zen 4), one thread, torch 2.13 with its own BLAS, which used AVX-512 for all three rows.
COSTS = {
    "avx512": Costs(0.0431, 0.0, 0.0857, 0.15, 0.0086, 0.662, 0.402, 0.0242, 0.0378),
    "avx2": Costs(0.049, 0.0, 0.109, 0.32, 0.0, 0.0, 0.0, 0.0242, 0.0804),
    "baseline": Costs(0.0937, 0.0, 0.169, 0.303, 0.0, 0.0, 0.0, 0.0242, 0.0223),
}


# Of float32's time for a dense product of bfloat16, where the CPU multiplies pairs of them; the same machine.
BFLOAT16_PRODUCT = 0.41


@functools.cache
def costs_of(variant: str, dtype: torch.dtype) -> Costs:
    """The costs for a weight of this dtype."""
    table = costs(variant)
    if dtype == torch.bfloat16 and variant == "avx512" and native.build()["bfloat16_products"]:
        return replace(table, multiply_add=BFLOAT16_PRODUCT * table.multiply_add)
    return table


@functools.cache
def costs(variant: str) -> Costs:
    path = os.environ.get(_ENV)
    if not path:
        return COSTS[variant]
    known = {field.name for field in fields(Costs)}
    try:
        values = json.loads(Path(path).read_text("utf-8"))[variant]
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
    # without AVX-512 there is no instruction that looks up sixteen floats
    return METHODS if variant == "avx512" else ("gather", "dense")


def fastest(
    m: int,
    k: int,
    n: int,
    count: int,
    weight_grad: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str:
    """One of METHODS, for s [m, k] with `count` ones and weight [n, k]; `transposed`: if it has to be."""
    most, other = _crossover(native.variant(), m, k, n, weight_grad, transposed, dtype)
    return "gather" if count <= most else other


@functools.lru_cache(maxsize=1024)
def _crossover(
    variant: str, m: int, k: int, n: int, weight_grad: bool, transposed: bool, dtype: torch.dtype
) -> tuple[float, str]:
    """(ones up to which gathering is the fastest, what is beyond): the others do not depend on ones."""
    table = costs_of(variant, dtype)
    extra = {"gather": TRANSPOSE * k * n, "subset_sums": TRANSPOSE * k * n} if transposed else {}
    fixed = {
        method: table.of(method, m, k, n, 0, weight_grad) + extra.get(method, 0.0)
        for method in _methods(variant)
    }
    gather = fixed.pop("gather")
    other = min(fixed, key=fixed.__getitem__)
    each = n * table.add + table.entry
    return ((fixed[other] - gather) / each if each else math.inf), other
