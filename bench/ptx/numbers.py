"""Rounding as PTX asks for it."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)[()]  # what a GPU makes of each


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f32(x: Array) -> Array:
    """To the nearest, ties to even; any NaN becomes the same."""
    x = np.asarray(x).astype(np.float32, copy=False)
    nan = np.isnan(x)
    return np.where(nan, NAN, x) if nan.any() else x


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even; NaN becomes 0x7fff. float64 too is rounded once."""
    x = np.asarray(x)
    bits = (_to_odd(x) if x.dtype == np.float64 else x.astype(np.float32)).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_f16(x: Array) -> Array:
    """To the nearest, ties to even; NaN becomes 0x7fff."""
    x = np.asarray(x)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def flush(x: Array) -> Array:
    """Denormal float32 become 0 of their sign."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _odd(nearest: Array, error: Array) -> Array:
    """The neighbour of nearest + error whose last bit is 1, where it is none itself: rounded again to fewer
    bits, the result is as if the sum had been rounded once."""
    bits = nearest.view({4: np.uint32, 8: np.uint64}[nearest.dtype.itemsize])
    one = bits.dtype.type(1)
    even = (error != 0) & ~np.isnan(error) & (bits & one == 0)
    outwards = (error > 0) != np.signbit(nearest)
    return np.where(even, np.where(outwards, bits + one, bits - one), bits).view(nearest.dtype)


def _to_odd(x: Array) -> Array:
    nearest = x.astype(np.float32)
    return _odd(nearest, x - nearest)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32, in float64 and so that it may be rounded again: the product is exact."""
    product = np.asarray(a, np.float64) * b
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    back = total - product
    return _odd(total, (product - (total - back)) + (c - back))
