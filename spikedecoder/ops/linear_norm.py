"""Linear on spikes, then LayerNorm; only bits and statistics are kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.fields import switch
from spikedecoder.ops import _check
from spikedecoder.ops._dispatch import Call, own_or_reference, select
from spikedecoder.ops.norm import check_norm, layer_fake, layer_norm_backward, norm
from spikedecoder.ops.spike_linear import _spike_linear, as_product, check_linear, from_words, spike_linear
from spikedecoder.ops.spike_linear import backward as linear_backward
from spikedecoder.params import NormParams
from spikedecoder.reference.norm import layer_dtype


@torch.library.custom_op("spikedecoder::linear_norm", mutates_args=())
def _linear_norm(
    s: Tensor,
    current: Tensor,
    words: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
    linear_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, mean, rstd); `current`, the Linear's result, is used here and not kept."""
    impl = select("norm", Call(current.device, current.dtype, tuple(current.shape)), backend)
    return impl.forward(current, weight, bias, eps, dtype)


@_linear_norm.register_fake
def _(s, current, words, linear_weight, linear_bias, weight, bias, eps, dtype, backend, linear_backend):
    return layer_fake(current, dtype)


def _setup_context(ctx, inputs, output):
    s, _, words, linear_weight, linear_bias, weight, bias, _, _, *backends = inputs
    _, mean, rstd = output
    ctx.channels, ctx.dtype = s.shape[-1], s.dtype
    ctx.backend, ctx.linear_backend = backends
    ctx.save_for_backward(words, linear_weight, linear_bias, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx, grad, _grad_mean, _grad_rstd):
    words, linear_weight, linear_bias, weight, bias, mean, rstd = ctx.saved_tensors
    current = from_words(words, ctx.channels, linear_weight, linear_bias, ctx.linear_backend)
    grad, grad_weight, grad_bias = layer_norm_backward(grad, current, mean, rstd, weight, bias, ctx.backend)
    del current
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], linear_bias is not None)
    grad_s, grad_linear, grad_linear_bias = linear_backward(
        grad, words, linear_weight, ctx.channels, ctx.dtype, ctx.linear_backend, wanted
    )
    return grad_s, None, None, grad_linear, grad_linear_bias, grad_weight, grad_bias, *(None,) * 4


_linear_norm.register_autograd(_autograd, setup_context=_setup_context)


def linear_norm(
    s: Tensor, weight: Tensor, bias: Tensor | None, n: NormParams, *, recompute: bool = True
) -> Tensor:
    """norm(s W^T + b): `spike_linear`, then `norm`.

    Args:
        s: spikes [..., K], exactly 0 and 1. weight: [N, K]; bias: [N] or None. n: the norm of N channels.
        recompute: keep for backward only s, as bits, and mean and 1 / standard deviation of each row, and
            compute s W^T + b again. LayerNorm only: the other kinds keep s W^T + b in any case.

    Returns:
        y [..., N]. Same result and gradients with and without `recompute`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.of_type("n", n, NormParams)
    switch("recompute", recompute)
    if not recompute or n.kind != "layer":
        return norm(spike_linear(s, weight, bias), n)
    check_linear(s, weight, bias)
    weight, bias, backend = as_product(weight, bias)
    with torch.no_grad():
        current, words = _spike_linear(s, weight, bias, backend)
    check_norm(current, n)
    settings = (n.eps, layer_dtype(current), own_or_reference("norm"), backend)
    return _linear_norm(s, current, words, weight, bias, n.weight, n.bias, *settings)[0]
