"""Products on 16-bit tensor cores that lose nothing of a float32 operand.

A float32 has 24 significant bits; a bfloat16 has 8 and the same range of exponents. So x = d0 + d1 + d2,
where d0 is the bfloat16 nearest to x, d1 the one nearest to x - d0, and d2 = x - d0 - d1; each difference is
exact. (The same holds for truncation in place of rounding, which the interpreter uses.) The product with a
matrix of 0 and 1 is therefore the sum of three bfloat16 products, accumulated in float32. An integer below
2^16 needs two digits, because d0 leaves a remainder below 2^8; one below 2^8 needs one digit.

Why bfloat16 and not int8: spikes are bfloat16 under autocast, so they go from memory to the tensor core
unchanged; Hopper's int8 product takes no transposed operand, which k^T v needs; and the state would need
three int8 digits already at 2^16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spikedecoder.kernels._launch import INTERPRETED, family

# the interpreter would multiply the bit patterns of bfloat16
FLOAT_DOTS = tl.constexpr(INTERPRETED)


def digits(dtype: torch.dtype) -> int:
    """How many bfloat16 digits a real number of this dtype takes."""
    return {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]


def stages(device: torch.device) -> int:
    """Chunks in flight in a loop of several products. From sm_100 on one: if chunks are loaded ahead, Triton
    3.6 to 3.8 read a decaying state before it was updated, and 3.9 overwrites an operand that products share
    as soon as the first of them is done."""
    return 1 if family(device) >= 10 else 2


@triton.jit
def digit(x):
    """The bfloat16 nearest to x, for a product. Under the interpreter: x truncated, in float32."""
    if FLOAT_DOTS:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return (bits & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def dot_digits(a, b, acc, A: tl.constexpr, B: tl.constexpr):
    """acc + a b, with a in A digits and b in B. Digits i and j are multiplied if i + j < max(A, B); the other
    products lie below the last digit."""
    rest_a = a
    for i in tl.static_range(A):
        digit_a = digit(rest_a)
        rest_b = b
        for j in tl.static_range(B):
            digit_b = digit(rest_b)
            if i + j < A or i + j < B:
                acc = tl.dot(digit_a, digit_b, acc)
            if j + 1 < B:
                rest_b = rest_b.to(tl.float32) - digit_b.to(tl.float32)
        if i + 1 < A:
            rest_a = rest_a.to(tl.float32) - digit_a.to(tl.float32)
    return acc
