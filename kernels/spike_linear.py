"""Linear on spikes, which are kept as bits: y = s W^T + b, and the gradients of W and b from the bits.

s [M, K] is packed first. Both products then read words of 32 spikes and expand them to 0 and 1 in registers.
    y  [M, N] = s W^T + b         on tensor cores in the weight's dtype, with float32 accumulators
    dW [N, K] = g^T s             the same in the gradient's dtype; M is cut into pieces, whose sums are added
    db [N]    = g^T 1             along the way, as the weight of an input that is always 1
A program owns BLOCK_M rows and BLOCK_N outputs of y, or BLOCK_N outputs and 64 inputs of one piece's dW, and
walks along K or M. A float32 weight or gradient is split into three bfloat16, which lose nothing of it
(`_digits`).

Bytes (b = bytes of the dtype): packing b M K + M K / 8; y: M K / 8 + b (N K + M N); dW: M K / 8 + b (M N +
N K), and 4 N K per piece. In 16 bits, the input that dW needs is 16 times smaller than for a dense product.
The bound is memory bandwidth for N below some hundreds and the tensor cores above. The kernels save memory,
not time: they expand the bits again for every tile. When last timed, on an H200 at 28ecee3, cuBLAS took 0.3
to 0.6 of their time on dense spikes. A round of their loops now takes 0.55 to 0.72 of the instructions.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._digits import digit, dot_digits, stages
from spikedecoder.kernels._launch import alignment, cdiv, family, kernel, launch, multiprocessors, why_not
from spikedecoder.kernels._sum import sum_parts
from spikedecoder.kernels.pack_spikes import WORD, halves, pack, spread_tile, unpack_tile

__all__ = ["forward", "from_words", "weight_and_bias_grad", "weight_grad", "why_not"]


@triton.jit
def load_bits(
    words_ptr, row, rows, word, words, dtype: tl.constexpr, FAMILY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Spikes of rows `row`, from 32-bit word number `word` on, as 0 and 1 [BLOCK_R, BLOCK_K] for a product in
    `dtype`."""
    w = word + tl.arange(0, BLOCK_K // 32)
    at = words_ptr + row[:, None] * words + w[None, :]
    packed = tl.load(at, mask=(row < rows)[:, None] & (w < words)[None, :], other=0)
    if FAMILY == 8:  # there the compiler would load a word for every element of `spread_tile`
        return unpack_tile(packed, BLOCK_R, BLOCK_K).to(tl.float32)
    else:
        return spread_tile(packed, dtype, BLOCK_R, BLOCK_K)


@triton.jit
def product(a, b, acc, dtype: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """acc + a b in `dtype`; float32 by digits, A of a and B of b."""
    if dtype == tl.float32:
        return dot_digits(a, b, acc, A, B)
    elif dtype == tl.bfloat16:
        return tl.dot(digit(a), digit(b), acc)
    else:
        return tl.dot(a.to(dtype), b.to(dtype), acc)


@triton.jit
def linear_tile(
    words_ptr, weight_ptr, bias_ptr, m, rows, n, inputs, outputs, words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FAMILY: tl.constexpr,
):  # fmt: skip
    """y of rows m and outputs n in float32. The bias alone from row `rows` on, 0 from output `outputs` on."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    # as y^T = W s^T, wgmma takes the bits from shared memory, where they need not come back from
    TURN: tl.constexpr = FAMILY == 9 and dtype != tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TURN else (BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(inputs > 0)  # if the loop might not run, ptxas makes every wgmma wait for the one before
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        bits = load_bits(words_ptr, m, rows, first // 32, words, dtype, FAMILY, BLOCK_M, BLOCK_K)
        if TURN:
            at = weight_ptr + n[:, None].to(tl.int64) * inputs + k[None, :]
            weight = tl.load(at, mask=(n < outputs)[:, None] & (k < inputs)[None, :], other=0.0)
            acc = product(weight, tl.trans(bits), acc, dtype, 3, 1)
        else:
            at = weight_ptr + n[None, :].to(tl.int64) * inputs + k[:, None]
            weight = tl.load(at, mask=(k < inputs)[:, None] & (n < outputs)[None, :], other=0.0)
            acc = product(bits, weight, acc, dtype, 1, 3)
    if TURN:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    return acc


@kernel
def linear_forward(
    words_ptr, weight_ptr, bias_ptr, y_ptr, rows, inputs, outputs, words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FAMILY: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    inputs = inputs * ALIGN
    outputs = outputs * ALIGN
    across = tl.cdiv(outputs, BLOCK_N)
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = linear_tile(
        words_ptr, weight_ptr, bias_ptr, m, rows, n, inputs, outputs, words, BLOCK_M, BLOCK_N, BLOCK_K, FAMILY
    )
    at = y_ptr + m[:, None] * outputs + n[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


@kernel
def linear_weight_grad(
    words_ptr, grad_ptr, out_ptr, rows, inputs, outputs, words, piece,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FAMILY: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out [pieces, N K]: each piece of the rows' share of dW. BIAS: followed by its share of db [N]."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    inputs = inputs * ALIGN
    outputs = outputs * ALIGN
    across = tl.cdiv(inputs, BLOCK_K)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(0) % across * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    start = tl.program_id(1).to(tl.int64) * piece
    stop = tl.minimum(start + piece, rows)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ones = tl.full((BLOCK_M, 16), 1.0, tl.float32)
    tl.assume(start < stop)  # see `linear_tile`
    of_ones = tl.zeros((BLOCK_N, 16), tl.float32)  # 16 equal columns, the narrowest product
    for first in range(start, stop, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        at = grad_ptr + m[:, None] * outputs + n[None, :]
        grad = tl.load(at, mask=(m < stop)[:, None] & (n < outputs)[None, :], other=0.0)
        bits = load_bits(words_ptr, m, stop, first_k // 32, words, dtype, FAMILY, BLOCK_M, BLOCK_K)
        acc = product(tl.trans(grad), bits, acc, dtype, 3, 1)
        if BIAS:
            of_ones = product(tl.trans(grad), ones, of_ones, dtype, 3, 1)
    of_weight = outputs.to(tl.int64) * inputs
    share = of_weight
    if BIAS:
        share += outputs
    out_ptr += tl.program_id(1) * share
    at = n[:, None].to(tl.int64) * inputs + k[None, :]
    tl.store(out_ptr + at, acc, mask=(n < outputs)[:, None] & (k < inputs)[None, :])
    if BIAS and first_k + BLOCK_K >= inputs:  # the other programs have the same
        tl.store(out_ptr + of_weight + n, tl.max(of_ones, 1), mask=n < outputs)


def _float32_tile(device: torch.device) -> dict[str, int]:
    return {"BLOCK_M": 64, "BLOCK_N": 32 if family(device) == 8 else 64, "num_stages": stages(device)}


def forward_tile(outputs: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Rows and outputs of a tile, warps, and chunks of inputs in flight. Measured on an H200; for float32 and
    sm_80 read off compiled code: the most that doesn't spill."""
    if dtype == torch.float32:
        return _float32_tile(device)
    if outputs <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64}
    if family(device) == 8:
        return {"BLOCK_M": 64, "BLOCK_N": 128}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}


def grad_tile(dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """The same for the weight's gradient: BLOCK_M rows at a time, BLOCK_N outputs."""
    if dtype == torch.float32:
        return _float32_tile(device)
    if family(device) == 8:
        return {"BLOCK_M": 64, "BLOCK_N": 64}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 3}


def forward(s: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y [..., N] in the weight's dtype, spikes as int64 words [..., ceil(K / 64)])."""
    words = pack(s)
    return from_words(words, s.shape[-1], weight, bias), words


def from_words(words: Tensor, inputs: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y from spikes that are packed already. It is the same launch as in `forward`, so y is bit-identical."""
    outputs = weight.shape[0]
    y = weight.new_empty(*words.shape[:-1], outputs)
    rows = words.numel() // words.shape[-1] if inputs else 0
    if y.numel() == 0 or rows == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    align = alignment(inputs, outputs)
    blocks = forward_tile(outputs, weight.dtype, weight.device)
    launch(
        linear_forward, (cdiv(rows, blocks["BLOCK_M"]) * cdiv(outputs, blocks["BLOCK_N"]),),
        words_ptr=halves(words), weight_ptr=weight.contiguous(),
        bias_ptr=None if bias is None else bias.contiguous(), y_ptr=y, rows=rows, inputs=inputs // align,
        outputs=outputs // align, words=2 * words.shape[-1], BLOCK_K=WORD, FAMILY=family(weight.device),
        ALIGN=align, **blocks,
    )  # fmt: skip
    return y


def _parameter_grads(words: Tensor, inputs: int, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    grad = grad.contiguous()
    outputs = grad.shape[-1]
    out, out_bias = grad.new_empty(outputs, inputs), grad.new_empty(outputs) if bias else None
    if out.numel() == 0 or grad.numel() == 0:
        return out.zero_(), grad[None].flatten(0, -2).sum(0) if bias else None
    rows = grad.numel() // outputs
    blocks = grad_tile(grad.dtype, grad.device)
    tiles = cdiv(outputs, blocks["BLOCK_N"]) * cdiv(inputs, WORD)
    pieces = max(1, min(cdiv(2 * multiprocessors(grad.device), tiles), cdiv(rows, 512)))
    piece = cdiv(cdiv(rows, pieces), 64) * 64
    pieces = cdiv(rows, piece)
    # float32 even for a single part: otherwise the dtype of the kernel's output would depend on the batch
    parts = grad.new_empty((pieces, outputs * (inputs + bias)), dtype=torch.float32)
    align = alignment(inputs, outputs)
    launch(
        linear_weight_grad, (tiles, pieces), words_ptr=halves(words), grad_ptr=grad, out_ptr=parts,
        rows=rows, inputs=inputs // align, outputs=outputs // align, words=2 * words.shape[-1], piece=piece,
        BIAS=bias, BLOCK_K=WORD, FAMILY=family(grad.device), ALIGN=align, **blocks,
    )  # fmt: skip
    sum_parts(parts, out, out_bias)
    return out, out_bias


def weight_grad(words: Tensor, inputs: int, grad: Tensor) -> Tensor:
    """[N, K] in grad's dtype, from words [..., ceil(K / 64)] and grad [..., N]."""
    return _parameter_grads(words, inputs, grad, False)[0]


def weight_and_bias_grad(words: Tensor, inputs: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`weight_grad` and the sum of grad over its rows [N], in one pass over grad."""
    grad_weight, grad_bias = _parameter_grads(words, inputs, grad, True)
    assert grad_bias is not None
    return grad_weight, grad_bias
