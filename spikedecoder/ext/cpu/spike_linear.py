"""Linear layer on spikes in C++: by gathering columns of the weight (csrc/spike_linear.cpp), by subset sums
(subset_sums.cpp), in the CPU's matrix unit (tiles.cpp), or dense (matmul.cpp, dense_weight_grad.cpp).

The shape and the measured spike rate decide which of these runs; see `_cost`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ext.cpu import _cost, native
from spikedecoder.ext.cpu._arguments import BITS, ELEMENTS, address, dense, floats_on_cpu, same
from spikedecoder.ext.cpu._memory import empty, hand_over
from spikedecoder.ext.cpu.pack_spikes import check_words, pack_and_count, packable, unpack
from spikedecoder.reference.pack_spikes import WORD

why_not = floats_on_cpu

UNKNOWN = -1  # as a number of set bits: to be counted
_ROUNDED_ONCE = 2048  # channels up to which kernels sum a bfloat16 output in float32 throughout


def forward(
    s: Tensor, weight: Tensor, bias: Tensor | None, method: str | None = None
) -> tuple[Tensor, Tensor]:
    """(y [..., N] in the weight's dtype, s as words of bits).

    method: one of `_cost.METHODS`; None is the fastest.

    The kernels read the weight by columns. A weight [N, K] whose transpose is contiguous is used as it is
    (``weight.t().contiguous().t()``, made once before generating); any other is transposed in each call,
    which for a handful of rows costs more than the product itself.
    """
    if method is None and (found := few_rows(s, weight, bias)) is not None:
        return found
    # few_rows declines spikes that lie or are stored otherwise, but takes their words, and sums in its order
    few = weight.dtype == torch.float32 and _rows(s) <= native.FEW_ROWS
    if (plain := same(s, torch.float32 if few else s.dtype)) is not s:
        return forward(plain, weight, bias, method)
    way = way_of(s, weight, method)
    if weight.dtype == torch.float32 and not way.torch_dense:
        s = packable(s)
        words = s.new_empty((*s.shape[:-1], -(-s.shape[-1] // WORD)), dtype=torch.int64)
        return multiply(words, UNKNOWN, weight, bias, way, s), words
    words, count = pack_and_count(s)
    if way.by_torch(count) and s.dtype == weight.dtype:
        return F.linear(s, weight, bias), words  # `multiply` would unpack s again
    return multiply(words, count, weight, bias, way), words


def few_rows(
    s: Tensor, weight: Tensor, bias: Tensor | None, learns: bool = False, want_words: bool = True
) -> Any:
    """`forward` for a handful of rows and a weight stored by columns, where microseconds count: (y, words).

    s: spikes, or their words. Returns None if this does not handle the arguments, whatever they are, or if
    `learns` is set and one of them requires a gradient. Without `want_words`, the words of spikes are None.
    """
    return hand_over(native.few_rows, s, weight, bias, learns, want_words)


def from_words(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] from words of spikes, bit for bit that of `forward`."""
    if (found := few_rows(words, weight, bias)) is not None:
        return found[0]
    check_words(words, channels)
    if weight.shape[1] != channels:
        raise ValueError(f"channels: got {channels}, takes those of weight, {weight.shape[1]}")
    words = words.contiguous()
    return multiply(words, UNKNOWN, weight, bias, way_of(words, weight))


def way_of(spikes: Tensor, weight: Tensor, method: str | None = None) -> _cost.Way:
    """The fastest way to multiply all of these spikes (or words), or the way of `method`."""
    n, k = weight.shape
    if method is not None:
        return _cost.only(method, weight.dtype)
    return _cost.crossover(
        native.variant(), _rows(spikes), k, n, False, not _lies_by_columns(weight), weight.dtype
    )


def multiply(
    words: Tensor,
    count: int,
    weight: Tensor,
    bias: Tensor | None,
    way: _cost.Way,
    spikes: Tensor | None = None,
) -> Tensor:
    """y [..., N] in the weight's dtype, from all the words that `way` was chosen for, or from some of their
    rows, which then have the same values, bit for bit.

    count: the set bits of all these words; UNKNOWN only if all are given.
    spikes: from `packable`; packed into `words` in passing. Only for a float32 weight that torch does not
        multiply.
    """
    n, k = weight.shape
    dtype = weight.dtype
    if not k:  # words without channels do not tell how many rows there are
        return F.linear(unpack(words, k, dtype), weight, bias)
    if dtype != torch.float32 or way.torch_dense:  # the count is needed here, not only in the kernel
        count = _count(words, k) if count == UNKNOWN else count
        if way.by_torch(count):
            return F.linear(unpack(words, k, dtype), weight, bias)
    method = None if dtype == torch.float32 else way.method(count)
    by_columns = _lies_by_columns(weight)
    source, bias = dense(weight.t() if by_columns else weight), None if bias is None else dense(bias)
    shape = list(words.shape)  # slicing a torch.Size takes longer
    shape[-1] = n
    whole = method is None or k <= _ROUNDED_ONCE or method in ("tiles", "dense")
    y = empty(shape, dtype if whole else torch.float32)
    sizes = (_rows(words), k, n, torch.get_num_threads())
    if method == "dense":
        matmul(words, same(weight.t()), bias, y, None, sizes)
    else:
        native.spike_linear(
            *(address(spikes), 0 if spikes is None else ELEMENTS[spikes.dtype], address(words), count),
            *(way.most, way.other, address(source), by_columns, address(bias)),
            *(address(y), ELEMENTS[y.dtype], *sizes),
        )
    return y if whole else y.to(dtype)


def _count(words: Tensor, channels: int) -> int:
    """The number of set bits. Raises ValueError if one is beyond the last channel."""
    return int(native.count(address(words), _rows(words), channels, torch.get_num_threads()))


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor,
    a_sums: Tensor | None,
    sizes: tuple[int, ...],
) -> None:
    """Writes c = a b + bias; all are contiguous, and a may be words of bits. sizes: M, K, N and threads. For
    a_sums see Matmul in csrc/kernels.h."""
    native.matmul(
        *(
            address(a),
            ELEMENTS.get(a.dtype, BITS),
            address(b),
            ELEMENTS[b.dtype],
            address(bias),
            address(c),
            ELEMENTS[c.dtype],
        ),
        *(address(a_sums), *sizes),
    )


def _lies_by_columns(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.t().is_contiguous()


def weight_grad(words: Tensor, channels: int, grad: Tensor, method: str | None = None) -> Tensor:
    """grad_weight [N, K] in grad's dtype: for each channel, the sum of grad [..., N] over the rows where it
    spiked."""
    check_words(words, channels)
    if words.shape[:-1] != grad.shape[:-1]:
        raise ValueError(
            f"grad: got shape {tuple(grad.shape)}, takes [..., N] of as many rows as words, "
            f"{tuple(words.shape)}"
        )
    words, grad = words.contiguous(), same(grad)
    rows, n, dtype = _rows(words), grad.shape[-1], grad.dtype
    if method is not None:
        way = _cost.only(method, dtype)
    else:
        way = _cost.crossover(native.variant(), rows, channels, n, True, False, dtype)
    count = _count(words, channels) if way.torch_dense else UNKNOWN
    if way.by_torch(count):
        return grad.view(rows, n).t() @ unpack(words, channels, dtype).view(rows, channels)
    grad_weight = empty((n, channels))
    native.spike_linear_weight_grad(
        *(address(words), count, way.most, way.other, address(grad), ELEMENTS[dtype], address(grad_weight)),
        *(rows, channels, n, torch.get_num_threads()),
    )
    return grad_weight if dtype == torch.float32 else grad_weight.to(dtype)


def input_and_bias_grad(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(grad [..., N] times weight [N, K], sum of grad over its rows [N]) in grad's dtype, in one pass."""
    n, k = weight.shape
    if not weight.numel() or not _cost.own_products(native.variant(), grad.dtype):
        return grad @ weight.to(grad.dtype), grad.unsqueeze(0).flatten(0, -2).sum(0)
    grad, weight = same(grad), same(weight, grad.dtype)
    grad_s, grad_bias = empty((*grad.shape[:-1], k), grad.dtype), weight.new_empty(n, dtype=torch.float32)
    sizes = (grad.numel() // n, n, k, torch.get_num_threads())
    matmul(grad, weight, None, grad_s, grad_bias, sizes)
    return grad_s, grad_bias.to(grad.dtype)
