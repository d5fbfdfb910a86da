"""Linear layer whose input is spikes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._direct import unwatched
from spikedecoder.ops._dispatch import Call, module, requested_backend, resolve, select
from spikedecoder.ops.pack_spikes import WORD, _unpack


def _impl(x: Tensor, shape: tuple[int, ...], backend: str):
    """For x in the dtype of the product."""
    return select("spike_linear", Call(x.device, x.dtype, shape), backend)


@torch.library.custom_op("spikedecoder::spike_linear", mutates_args=())
def _spike_linear(s: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _impl(weight, tuple(s.shape), backend).forward(s, weight, bias)


@_spike_linear.register_fake
def _(s, weight, bias, backend):
    y = weight.new_empty(*s.shape[:-1], weight.shape[0])
    return y, s.new_empty(*s.shape[:-1], -(-s.shape[-1] // WORD), dtype=torch.int64)


@torch.library.custom_op("spikedecoder::spike_linear_weight_grad", mutates_args=())
def _weight_grad(words: Tensor, channels: int, grad: Tensor, backend: str) -> Tensor:
    return _impl(grad, (*grad.shape[:-1], channels), backend).weight_grad(words, channels, grad)


@_weight_grad.register_fake
def _(words, channels, grad, backend):
    return grad.new_empty(grad.shape[-1], channels)


@torch.library.custom_op("spikedecoder::spike_linear_from_words", mutates_args=())
def from_words(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """y [..., N] from the spikes' bits: that of `spike_linear`, bit for bit."""
    impl = _impl(weight, (*words.shape[:-1], channels), backend)
    if hasattr(impl, "from_words"):
        return impl.from_words(words, channels, weight, bias)
    return impl.forward(_unpack(words, channels, weight.dtype, "auto"), weight, bias)[0]


@from_words.register_fake
def _(words, channels, weight, bias, backend):
    return weight.new_empty(*words.shape[:-1], weight.shape[0])


def _words_context(ctx, inputs, output):
    words, ctx.channels, weight, bias, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(words, weight)


def _words_autograd(ctx, grad):
    words, weight = ctx.saved_tensors
    wanted = (False, ctx.needs_input_grad[2], ctx.has_bias)
    _, *grads = backward(grad, words, weight, ctx.channels, grad.dtype, ctx.backend, wanted)
    return None, None, *grads, None


from_words.register_autograd(_words_autograd, setup_context=_words_context)


@torch.library.custom_op("spikedecoder::spike_linear_dense_grads", mutates_args=())
def _dense_grads(grad: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _impl(grad, tuple(grad.shape), backend).input_and_bias_grad(grad, weight)


@_dense_grads.register_fake
def _(grad, weight, backend):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1]), grad.new_empty(weight.shape[0])


@torch.library.custom_op("spikedecoder::spike_linear_weight_and_bias_grad", mutates_args=())
def _weight_and_bias_grad(words: Tensor, channels: int, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _impl(grad, (*grad.shape[:-1], channels), backend).weight_and_bias_grad(words, channels, grad)


@_weight_and_bias_grad.register_fake
def _(words, channels, grad, backend):
    return grad.new_empty(grad.shape[-1], channels), grad.new_empty(grad.shape[-1])


def backward(grad, words, weight, channels, dtype, backend, wanted):
    """Gradients of (s in `dtype`, weight, bias) from that of y, None for those that nobody wants."""
    impl = _impl(grad, (*grad.shape[:-1], channels), backend)
    grad_s = grad_weight = grad_bias = None
    if wanted[0] and hasattr(impl, "input_and_bias_grad"):
        grad_s, grad_bias = _dense_grads(grad, weight, backend)
    elif wanted[0]:
        grad_s = grad @ weight
    if wanted[1] and wanted[2] and hasattr(impl, "weight_and_bias_grad"):
        grad_weight, grad_bias = _weight_and_bias_grad(words, channels, grad, backend)
    elif wanted[1]:
        grad_weight = _weight_grad(words, channels, grad, backend)
    if wanted[2] and grad_bias is None:
        grad_bias = grad.flatten(0, -2).sum(0)
    return None if grad_s is None else grad_s.to(dtype), grad_weight, grad_bias if wanted[2] else None


def _setup_context(ctx, inputs, output):
    s, weight, bias, ctx.backend = inputs
    ctx.channels, ctx.has_bias, ctx.dtype = s.shape[-1], bias is not None, s.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _grad_words):
    words, weight = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad[:2], ctx.has_bias)
    return *backward(grad, words, weight, ctx.channels, ctx.dtype, ctx.backend, wanted), None


_spike_linear.register_autograd(_autograd, setup_context=_setup_context)


def check_linear(s: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """s [..., K], weight [N, K], bias [N]."""
    _check.floating("s", s)
    _check.floating("weight", weight, dims=2)
    if s.shape[-1] != weight.shape[1]:
        raise ValueError(f"s: got {s.shape[-1]} channels (shape {tuple(s.shape)}), takes {weight.shape[1]}")
    _check_bias(s, weight, bias)


def _check_words(s: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """s [..., ceil(K / 64)], weight [N, K], bias [N]."""
    _check.floating("weight", weight, dims=2)
    words = -(-weight.shape[1] // WORD)
    if s.dim() < 1 or s.shape[-1] != words:
        takes = f"floats, or words [..., {words}] for {weight.shape[1]} channels"
        raise ValueError(f"s: got int64 of shape {tuple(s.shape)}, takes {takes}")
    _check_bias(s, weight, bias)


def _check_bias(s: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        _check.floating("bias", bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, takes ({weight.shape[0]},)")
    _check.same_device(s=s, weight=weight, bias=bias)


def as_product(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, str]:
    """(weight, bias, backend) in the dtype that the product runs in: autocast's where that is on."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    backend = resolve("spike_linear", device, dtype, requested_backend())
    return weight.to(dtype), None if bias is None else bias.to(dtype), backend


def _bare(*tensors: Tensor | None) -> bool:
    """Whether a call's result is all that is wanted: no gradient, no trace, tensors that are what they seem.

    Then the dispatcher, which for one token takes as long as the kernel, can be passed by.
    """
    if not unwatched(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    learns = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if x.dtype != torch.float32 or x.is_neg() or (learns and x.requires_grad) or not x.is_cpu:
            return False
    return True


def _fits(s: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `check_linear` has nothing to say of the shapes."""
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    return s.dim() > 0 and s.shape[-1] == k and (bias is None or bias.shape == (n,))


def spike_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = s W^T + b for spikes: a sum of the weight's active columns.

    Args:
        s: spikes [..., K], exactly 0 and 1 (anything else that is not 0 counts as 1 on sparse backends), or
            their int64 words [..., ceil(K / 64)], from `pack_spikes` or ``lif(..., packed=True)``: an eighth
            of a byte a spike in place of 2 or 4.
        weight: [N, K]; bias: [N] or None.

    Returns:
        y [..., N] in the weight's dtype. Gradients to s (words have none), weight and bias. Kept for
        backward: s, as bits on every backend but the reference.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if (
        _bare(s, weight, bias)
        and _fits(s, weight, bias)
        and resolve("spike_linear", "cpu", torch.float32, requested_backend()) == "cpu"
    ):
        return module("cpu", "spike_linear").product(s, weight, bias)
    packed = isinstance(s, Tensor) and s.dtype == torch.int64
    (_check_words if packed else check_linear)(s, weight, bias)
    *product, backend = as_product(weight, bias)
    if backend == "reference":
        spikes = _unpack(s, weight.shape[1], weight.dtype, backend) if packed else s.to(weight.dtype)
        return F.linear(spikes, weight, bias)
    if packed:
        return from_words(s, weight.shape[1], *product, backend)
    y, _ = _spike_linear(s, *product, backend)
    return y
