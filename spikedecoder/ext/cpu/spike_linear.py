"""Linear layer on spikes in C++ (csrc/spike_linear.cpp, subset_sums.cpp, tiles.cpp, matmul.cpp): by gathering
columns of the weight, by subset sums, in the CPU's matrix unit, or dense.

Which of these runs is decided from the shape and the measured spike rate; see `_cost`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ext.cpu import _cost, native
from spikedecoder.ext.cpu._arguments import BITS, ELEMENTS, address, dense, floats_on_cpu, same
from spikedecoder.ext.cpu._memory import empty
from spikedecoder.ext.cpu.pack_spikes import pack_and_count, unpack

why_not = floats_on_cpu

FEW_ROWS = 32
_ROUNDED_ONCE = 2048  # channels up to which a kernel's bfloat16 output was summed in float32 throughout


def forward(
    s: Tensor, weight: Tensor, bias: Tensor | None, method: str | None = None
) -> tuple[Tensor, Tensor]:
    """(y [..., N] in the weight's dtype, s as words of bits). `method`: one of `_cost.METHODS`, or None.

    The kernels read the weight by columns: a weight [N, K] whose transpose is contiguous is used as it is
    (``weight.t().contiguous().t()``, made once before generating), any other is transposed in each call,
    which for a handful of rows costs more than the product itself.
    """
    if method is None and _is_few(s, weight):
        words = torch.empty((*s.shape[:-1], -(-s.shape[-1] // 64)), dtype=torch.int64)
        return _few_rows(s, weight, bias, words), words
    words, count = pack_and_count(s)
    product = Product(words, count, weight, bias, method)
    if product.by_torch and s.dtype == weight.dtype:
        return F.linear(s, weight, bias), words  # what `product` would unpack
    return product(words), words


def product(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The y of `forward`, where nobody wants the bits."""
    return _few_rows(s, weight, bias, None) if _is_few(s, weight) else forward(s, weight, bias)[0]


def from_words(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] from the spikes' bits: that of `forward`, bit for bit."""
    words = words.contiguous()
    return Product(words, _count(words, channels), weight, bias)(words)


def _count(words: Tensor, channels: int) -> int:
    """How many bits are set, none of them beyond the last channel (ValueError)."""
    return int(native.count(address(words), _rows(words), channels, torch.get_num_threads()))


class Product:
    """A weight's product with spikes, in the way that is the fastest for all of `words`, whose set bits are
    `count`. Called with some of their rows it gives the same numbers, bit for bit."""

    def __init__(
        self, words: Tensor, count: int, weight: Tensor, bias: Tensor | None, method: str | None = None
    ) -> None:
        self.weight, self.bias = weight, bias
        self.outputs, self.channels = weight.shape
        if method is None:
            sizes = (_rows(words), self.channels, self.outputs, count)
            method = _cost.fastest(*sizes, transposed=not _is_by_columns(weight), dtype=weight.dtype)
        self.method = method
        self.by_torch = method == "dense" and not _own_products(weight.dtype)
        if not self.by_torch:
            self.bias = None if bias is None else dense(bias)
            columns = by_columns(weight)
            self.columns = columns.to(weight.dtype) if method == "dense" else columns

    def __call__(self, words: Tensor) -> Tensor:
        """y [..., N] in the weight's dtype."""
        dtype = self.weight.dtype
        if self.by_torch:
            return F.linear(unpack(words, self.channels, dtype), self.weight, self.bias)
        whole = self.channels <= _ROUNDED_ONCE or self.method in ("tiles", "dense")
        y = empty((*words.shape[:-1], self.outputs), dtype if whole else torch.float32)
        sizes = (_rows(words), self.channels, self.outputs, torch.get_num_threads())
        if self.method == "dense":
            _matmul(words, BITS, self.columns, self.bias, y, None, sizes)
        else:
            kernels = {
                "gather": native.gather,
                "subset_sums": native.subset_sums,
                "tiles": native.tile_sums,
            }
            addresses = (address(words), address(self.columns), address(self.bias), address(y))
            kernels[self.method](*addresses, ELEMENTS[y.dtype], *sizes)
        return y if whole else y.to(dtype)


def _rows(words: Tensor) -> int:
    return words.numel() // words.shape[-1] if words.shape[-1] else 0


def _own_products(dtype: torch.dtype) -> bool:
    """Whether the dense kernel is as fast as torch's: it has been written for AVX-512, and not for the matrix
    unit that multiplies bfloat16 in some CPUs."""
    return native.variant() in ("amx", "avx512") and not (dtype == torch.bfloat16 and _cost.has_tiles())


def _matmul(
    a: Tensor,
    a_type: int,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor,
    a_sums: Tensor | None,
    sizes: tuple[int, ...],
) -> None:
    native.matmul(
        *(address(a), a_type, address(b), ELEMENTS[b.dtype], address(bias), address(c), ELEMENTS[c.dtype]),
        *(address(a_sums), *sizes),
    )


def _is_by_columns(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.stride() == (1, weight.shape[0])


def _is_few(s: Tensor, weight: Tensor) -> bool:
    return s.numel() <= FEW_ROWS * s.shape[-1] and _is_by_columns(weight)


def _few_rows(s: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor | None) -> Tensor:
    """Packing (where `words` are wanted) and gathering in one call: each microsecond counts."""
    s = dense(s)
    out_channels, channels = weight.shape
    y = torch.empty((*s.shape[:-1], out_channels))
    if bias is not None:
        bias = dense(bias)
    native.gather_few(
        *(s.data_ptr(), address(words), weight.data_ptr(), address(bias), y.data_ptr()),
        *(y.numel() // out_channels if out_channels else 0, channels, out_channels, torch.get_num_threads()),
    )
    return y


def by_columns(weight: Tensor) -> Tensor:
    """weight [N, K] as contiguous float32 [K, N]."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return dense(weight.detach().t())
    weight = dense(weight)
    n, k = weight.shape
    columns = empty((k, n))
    native.transpose(address(weight), address(columns), n, k, torch.get_num_threads())
    return columns


def weight_grad(words: Tensor, channels: int, grad: Tensor, method: str | None = None) -> Tensor:
    """grad_weight [N, K] in grad's dtype: the sum of grad [..., N] over rows where each channel spiked."""
    words, grad = words.contiguous(), same(grad)
    out_channels = grad.shape[-1]
    rows = _rows(words)
    if method is None:
        method = _cost.fastest(
            rows, channels, out_channels, _count(words, channels), weight_grad=True, dtype=grad.dtype
        )
    if method == "dense" and not _own_products(grad.dtype):
        s = unpack(words, channels, grad.dtype).view(rows, channels)
        return grad.view(rows, out_channels).t() @ s
    grad_weight = empty((out_channels, channels))
    kernel = {
        "gather": native.gather_weight_grad,
        "subset_sums": native.subset_sums_weight_grad,
        "tiles": native.tile_weight_grad,
        "dense": native.matmul_weight_grad,
    }[method]
    kernel(
        *(address(words), address(grad), ELEMENTS[grad.dtype], address(grad_weight)),
        *(rows, channels, out_channels, torch.get_num_threads()),
    )
    return grad_weight.to(grad.dtype)


def input_and_bias_grad(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(grad [..., N] times weight [N, K], the sum of grad over its rows [N]) in grad's dtype, in one pass."""
    n, k = weight.shape
    if not _own_products(grad.dtype):
        return grad @ weight.to(grad.dtype), grad.flatten(0, -2).sum(0)
    grad, weight = same(grad), same(weight, grad.dtype)
    grad_s, grad_bias = empty((*grad.shape[:-1], k), grad.dtype), torch.empty(n)
    sizes = (grad.numel() // n if n else 0, n, k, torch.get_num_threads())
    _matmul(grad, ELEMENTS[grad.dtype], weight, None, grad_s, grad_bias, sizes)
    return grad_s, grad_bias.to(grad.dtype)
