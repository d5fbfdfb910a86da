"""Linear layer whose input is spikes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._direct import direct, unwatched
from spikedecoder.ops._dispatch import Call, goes_by_shape, module, requested_backend, resolve, select
from spikedecoder.ops.pack_spikes import _unpack
from spikedecoder.reference.pack_spikes import WORD


def _impl(x: Tensor, shape: tuple[int, ...], outputs: int, backend: str):
    """The module for spikes of this shape, with x's device and dtype, that of the product."""
    return select("spike_linear", Call(x.device, x.dtype, shape, {"outputs": outputs}), backend)


def _impl_of_gradients(grad: Tensor, channels: int, backend: str):
    options = {"part": "spike_linear_weight_grad", "outputs": grad.shape[-1]}
    return select(
        "spike_linear", Call(grad.device, grad.dtype, (*grad.shape[:-1], channels), options), backend
    )


def _forward(s: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _impl(weight, tuple(s.shape), weight.shape[0], backend).forward(s, weight, bias)


_spike_linear = torch.library.custom_op("spikedecoder::spike_linear", _forward, mutates_args=())


@_spike_linear.register_fake
def _(s, weight, bias, backend):
    y = weight.new_empty(*s.shape[:-1], weight.shape[0])
    return y, s.new_empty(*s.shape[:-1], -(-s.shape[-1] // WORD), dtype=torch.int64)


def _from_words(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """y [..., N] from the spikes' bits, equal to that of `spike_linear` bit for bit."""
    impl = _impl(weight, (*words.shape[:-1], channels), weight.shape[0], backend)
    if hasattr(impl, "from_words"):
        return impl.from_words(words, channels, weight, bias)
    return impl.forward(_unpack(words, channels, weight.dtype, "auto"), weight, bias)[0]


from_words = torch.library.custom_op("spikedecoder::spike_linear_from_words", _from_words, mutates_args=())


@from_words.register_fake
def _(words, channels, weight, bias, backend):
    return weight.new_empty(*words.shape[:-1], weight.shape[0])


def _weight(words: Tensor, channels: int, grad: Tensor, backend: str) -> Tensor:
    return _impl_of_gradients(grad, channels, backend).weight_grad(words, channels, grad)


_weight_grad = torch.library.custom_op("spikedecoder::spike_linear_weight_grad", _weight, mutates_args=())


@_weight_grad.register_fake
def _(words, channels, grad, backend):
    return grad.new_empty(grad.shape[-1], channels)


def _dense(grad: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _impl_of_gradients(grad, weight.shape[1], backend).input_and_bias_grad(grad, weight)


_dense_grads = torch.library.custom_op("spikedecoder::spike_linear_dense_grads", _dense, mutates_args=())


@_dense_grads.register_fake
def _(grad, weight, backend):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1]), grad.new_empty(weight.shape[0])


def _weight_and_bias(words: Tensor, channels: int, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _impl_of_gradients(grad, channels, backend).weight_and_bias_grad(words, channels, grad)


_weight_and_bias_grad = torch.library.custom_op(
    "spikedecoder::spike_linear_weight_and_bias_grad", _weight_and_bias, mutates_args=()
)


@_weight_and_bias_grad.register_fake
def _(words, channels, grad, backend):
    return grad.new_empty(grad.shape[-1], channels), grad.new_empty(grad.shape[-1])


_OPERATORS = _dense_grads, _weight_grad, _weight_and_bias_grad
_FUNCTIONS = _dense, _weight, _weight_and_bias


def backward(grad, words, weight, channels, dtype, backend, wanted, parts=_OPERATORS):
    """Gradients of (s, in `dtype`; weight; bias) from that of y; None for those not `wanted`."""
    impl = _impl_of_gradients(grad, channels, backend)
    dense_grads, weight_grad, weight_and_bias_grad = parts
    grad_s = grad_weight = grad_bias = None
    if wanted[0] and hasattr(impl, "input_and_bias_grad"):
        grad_s, grad_bias = dense_grads(grad, weight, backend)
    elif wanted[0]:
        grad_s = grad @ weight
    if wanted[1] and wanted[2] and hasattr(impl, "weight_and_bias_grad"):
        grad_weight, grad_bias = weight_and_bias_grad(words, channels, grad, backend)
    elif wanted[1]:
        grad_weight = weight_grad(words, channels, grad, backend)
    if wanted[2] and grad_bias is None:
        grad_bias = grad.unsqueeze(0).flatten(0, -2).sum(0)  # also if s is a single row [K]
    return None if grad_s is None else grad_s.to(dtype), grad_weight, grad_bias if wanted[2] else None


def _setup_context(ctx, inputs, output):
    s, weight, bias, ctx.backend = inputs
    ctx.channels, ctx.has_bias, ctx.dtype = s.shape[-1], bias is not None, s.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, parts):
    if grad is None:
        return (None,) * 4
    words, weight = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad[:2], ctx.has_bias)
    return *backward(grad, words, weight, ctx.channels, ctx.dtype, ctx.backend, wanted, parts), None


_spike_linear.register_autograd(
    lambda ctx, grad, _: _gradients(ctx, grad, _OPERATORS), setup_context=_setup_context
)
_direct = direct(_forward, _setup_context, lambda ctx, grad, _: _gradients(ctx, grad, _FUNCTIONS))


def _words_context(ctx, inputs, output):
    words, ctx.channels, weight, bias, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(words, weight)


def _words_gradients(ctx, grad, parts):
    words, weight = ctx.saved_tensors
    wanted = (False, ctx.needs_input_grad[2], ctx.has_bias)
    _, *grads = backward(grad, words, weight, ctx.channels, grad.dtype, ctx.backend, wanted, parts)
    return None, None, *grads, None


from_words.register_autograd(
    lambda ctx, grad: _words_gradients(ctx, grad, _OPERATORS), setup_context=_words_context
)
_direct_words = direct(_from_words, _words_context, lambda ctx, grad: _words_gradients(ctx, grad, _FUNCTIONS))


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


def autocast_is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # torch has none for meta, and raises


def as_product(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, str]:
    """(weight, bias, backend), the tensors in the dtype of the product: autocast's, if it is on.

    The backend is one for all shapes, or "auto" if the shape decides between backends that keep bits.
    """
    device = weight.device.type
    autocast = autocast_is_on(device) and weight.dtype != torch.float64  # autocast leaves float64 as it is
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    requested = requested_backend()
    backend = resolve("spike_linear", device, dtype, requested)
    if requested == "auto" and backend != "reference" and goes_by_shape("spike_linear", str(weight.device)):
        backend = "auto"
    return weight.to(dtype), None if bias is None else bias.to(dtype), backend


@functools.cache
def _few_rows(requested: str) -> Callable[..., Any] | None:
    """The "cpu" backend's function for a handful of rows, whose product takes less time than all checks."""
    # resolved for "auto": if the requested backend cannot run, the general path raises the error
    if requested not in ("auto", "cpu") or resolve("spike_linear", "cpu", torch.float32, "auto") != "cpu":
        return None
    return module("cpu", "spike_linear").few_rows


def spike_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = s W^T + b for spikes: a sum of the weight's active columns.

    Args:
        s: spikes [..., K], exactly 0 and 1 (sparse backends take any other nonzero value for 1), or their
            int64 words [..., ceil(K / 64)], from `pack_spikes` or ``lif(..., packed=True)``: an eighth of a
            byte per spike instead of 2 or 4.
        weight: [N, K]; bias: [N] or None. What is NaN or infinite in a column that no row's spikes read does
            not show in y where columns are added up, as it does in a dense product; which of the two is done
            goes by shape and spike rate.

    Returns:
        y [..., N] in the weight's dtype, or autocast's if that is on. Gradients to s (not to words), weight
        and bias. Kept for backward: s, as bits on every backend but the reference.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if unwatched() and not torch.is_autocast_enabled("cpu") and (few_rows := _few_rows(requested_backend())):
        found = few_rows(s, weight, bias, torch.is_grad_enabled(), False)
        if found is not None:
            return found[0]
    packed = isinstance(s, Tensor) and s.dtype == torch.int64
    (_check_words if packed else check_linear)(s, weight, bias)
    weight, bias, backend = as_product(weight, bias)
    if backend == "reference":
        spikes = _unpack(s, weight.shape[1], weight.dtype, backend) if packed else s.to(weight.dtype)
        return F.linear(spikes, weight, bias)
    plain = unwatched(s, weight, bias)
    if packed:
        return (_direct_words if plain else from_words)(s, weight.shape[1], weight, bias, backend)
    y, _ = (_direct if plain else _spike_linear)(s, weight, bias, backend)
    return y
