"""Rounding as PTX asks for it."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even; NaN becomes 0x7fff."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_f16(x: Array) -> Array:
    """To the nearest; NaN becomes 0x7fff."""
    x = np.asarray(x)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def flush(x: Array) -> Array:
    """Denormal float32 become 0 of their sign."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float32, rounded once: in float64 the product is exact and the sum is rounded to odd."""
    product = np.asarray(a, np.float64) * b
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.uint64)
    inexact = (error != 0) & np.isfinite(total) & (bits & np.uint64(1) == 0)
    away = (error > 0) == (total > 0)
    bits = np.where(inexact, np.where(away, bits + np.uint64(1), bits - np.uint64(1)), bits)
    return bits.view(np.float64).astype(np.float32)
