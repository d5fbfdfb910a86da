"""Products on 16-bit tensor cores that lose nothing of a float32 operand.

A float32 has 24 significant bits, a bfloat16 8 and the same range of exponents: x = d0 + d1 + d2 with d0
the bfloat16 nearest to x, d1 that nearest to x - d0, and d2 = x - d0 - d1, each difference exact (cut off
instead of rounded, as the interpreter does, the same holds). So the product with a matrix of 0 and 1 is
three bfloat16 products, accumulated in float32. An integer below 2^16 needs two digits: d0 leaves a
remainder below 2^8. One below 2^8 needs one.

bfloat16 rather than int8: the spikes are bfloat16 under autocast, so they go from memory to the tensor core
as they are; Hopper's int8 product takes no transposed operand, which k^T v needs; and int8 digits of the
state would be three already at 2^16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spikedecoder.kernels._launch import INTERPRETED

# the interpreter multiplies the bit patterns of bfloat16
FLOAT_DOTS = tl.constexpr(INTERPRETED)


def digits(dtype: torch.dtype) -> int:
    """How many bfloat16 hold a real number of this dtype."""
    return {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]


@triton.jit
def digit(x):
    """The bfloat16 nearest to x, as a product takes it; under the interpreter x cut off, held in float32."""
    if FLOAT_DOTS:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return (bits & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def dot_digits(a, b, acc, A: tl.constexpr, B: tl.constexpr):
    """acc + a b with a in A digits and b in B: of the products of digits those above the last place."""
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
