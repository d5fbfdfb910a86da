"""Linear on spikes, normalisation and LIF; only bits and statistics are kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.fields import switch
from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors
from spikedecoder.ops._dispatch import Call, offers, requested_backend, select
from spikedecoder.ops.norm import statistics
from spikedecoder.ops.norm_lif import backward as norm_lif_backward
from spikedecoder.ops.norm_lif import backward_over, check_norm_lif, flat, forward, norm_lif
from spikedecoder.ops.spike_linear import _spike_linear, as_product, check_linear, from_words, spike_linear
from spikedecoder.ops.spike_linear import backward as linear_backward
from spikedecoder.params import LIFParams, NormParams
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.pack_spikes import WORD


@torch.library.custom_op("spikedecoder::linear_norm_lif", mutates_args=())
def _linear_norm_lif(
    s: Tensor,
    current: Tensor,
    words: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    threshold: Tensor | None,
    rstd_batch: Tensor | None,
    ema_gz: Tensor | None,
    rows: Tensor | None,
    eps: float,
    batch_gradient: bool,
    group: str | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
    linear_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`current`, the Linear's result, is used here and not kept; gradients bypass it and go to s."""
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    return as_tensors(current, *forward(current, weight, bias, mean, rstd, threshold, eps, p, backend))


@_linear_norm_lif.register_fake
def _(s, current, words, linear_weight, linear_bias, weight, bias, mean, *_):
    spikes = torch.empty_like(current, memory_format=torch.contiguous_format)
    if mean is not None:
        return spikes, current.new_empty(0), current.new_empty(0)
    rows = current.new_empty(current.shape[:-1], dtype=compute_dtype(current.dtype))
    return spikes, rows, torch.empty_like(rows)


def _setup_context(ctx, inputs, output):
    s, _, words, linear_weight, linear_bias, weight, bias, mean, rstd, threshold, *rest = inputs
    rstd_batch, ema_gz, rows, eps, *rest = rest
    _, row_mean, row_rstd = output
    ctx.channel = mean is not None
    if mean is None:
        mean, rstd = row_mean, row_rstd
    ctx.ema_gz, ctx.eps = ema_gz, eps
    ctx.channels, ctx.dtype = s.shape[-1], s.dtype
    *rest, ctx.linear_backend = rest
    ctx.rest = tuple(rest)
    ctx.save_for_backward(
        words, linear_weight, linear_bias, weight, bias, mean, rstd, threshold, rstd_batch, rows
    )
    ctx.mark_non_differentiable(row_mean, row_rstd)


def _gradients(ctx, grad_spikes, want_s: bool, want_weight: bool):
    """Gradients of (s, Linear weight, Linear bias, weight, bias, threshold)."""
    words, linear_weight, linear_bias, *saved = ctx.saved_tensors
    backend = ctx.linear_backend
    current = from_words(words, ctx.channels, linear_weight, linear_bias, backend)
    found = backward_over(grad_spikes, current, saved, ctx.channel, ctx.rest)
    if found is None:
        found = norm_lif_backward(grad_spikes, (current, *saved), ctx.ema_gz, ctx.eps, ctx.channel, ctx.rest)
    del current
    grad, grad_weight, grad_bias, grad_threshold = found
    del found
    wanted = (want_s, want_weight, linear_bias is not None)
    of_linear = linear_backward(grad, words, linear_weight, ctx.channels, ctx.dtype, backend, wanted)
    return *of_linear, grad_weight, grad_bias, grad_threshold


def _autograd(ctx, grad_spikes, _grad_mean, _grad_rstd):
    grad_s, grad_linear, grad_linear_bias, grad_weight, grad_bias, grad_threshold = _gradients(
        ctx, grad_spikes, ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    )
    return (
        *(grad_s, None, None, grad_linear, grad_linear_bias, grad_weight, grad_bias, None, None),
        *(grad_threshold, None, None, None, None, *(None,) * len(ctx.rest), None),
    )


_linear_norm_lif.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("spikedecoder::linear_norm_lif_fused", mutates_args=())
def _fused(
    s: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    threshold: Tensor | None,
    eps: float,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes, row mean, row rstd, words of s) from a backend that does all of it in one; the row statistics
    are empty if channel statistics are passed in."""
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    call = Call(s.device, linear_weight.dtype, (*s.shape[:-1], linear_weight.shape[0]))
    impl = select("linear_norm_lif", call, backend)
    limit = p.v_threshold if threshold is None else threshold
    spikes, row_mean, row_rstd, words = impl.forward(
        s, linear_weight, linear_bias, weight, bias, mean, rstd, eps, limit, p
    )
    if mean is None:
        return spikes, row_mean, row_rstd, words
    return spikes, s.new_empty(0), s.new_empty(0), words


@_fused.register_fake
def _(s, linear_weight, linear_bias, weight, bias, mean, *_):
    spikes = linear_weight.new_empty(*s.shape[:-1], linear_weight.shape[0])
    words = s.new_empty(*s.shape[:-1], -(-s.shape[-1] // WORD), dtype=torch.int64)
    if mean is not None:
        return spikes, s.new_empty(0), s.new_empty(0), words
    rows = s.new_empty(s.shape[:-1], dtype=compute_dtype(linear_weight.dtype))
    return spikes, rows, torch.empty_like(rows), words


def _fused_context(ctx, inputs, output):
    s, linear_weight, linear_bias, weight, bias, mean, rstd, threshold, eps, *neuron, backend = inputs
    _, row_mean, row_rstd, words = output
    ctx.channel = mean is not None
    if mean is None:
        mean, rstd = row_mean, row_rstd
    ctx.ema_gz, ctx.eps = None, eps
    ctx.channels, ctx.dtype = s.shape[-1], s.dtype
    ctx.linear_backend = backend
    ctx.rest = (False, None, *neuron, backend)
    ctx.save_for_backward(words, linear_weight, linear_bias, weight, bias, mean, rstd, threshold, None, None)
    ctx.mark_non_differentiable(row_mean, row_rstd, words)


def _fused_autograd(ctx, grad_spikes, _grad_mean, _grad_rstd, _grad_words):
    *grads, grad_threshold = _gradients(ctx, grad_spikes, *ctx.needs_input_grad[:2])
    return *grads, None, None, grad_threshold, *(None,) * (len(ctx.rest) - 1)


_fused.register_autograd(_fused_autograd, setup_context=_fused_context)


def _one_kernel(
    s: Tensor, weight: Tensor, bias: Tensor | None, n: NormParams, p: LIFParams, threshold: Tensor | None,
    backend: str,
) -> Tensor:  # fmt: skip
    """For passes that take no channel statistics: nothing else needs the current."""
    shape_only = weight.new_empty(1).expand(*s.shape[:-1], weight.shape[0])
    check_norm_lif(shape_only, n, threshold)
    found = statistics(shape_only, n)
    mean, rstd = (None, None) if found is None else (found.mean, found.rstd)
    settings = (mean, rstd, threshold, n.eps, *p.flat(), backend)
    return _fused(s, weight, bias, n.weight, n.bias, *settings)[0]


def linear_norm_lif(
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n: NormParams,
    p: LIFParams,
    *,
    threshold: Tensor | None = None,
    recompute: bool = True,
) -> Tensor:
    """Spikes of LIF(norm(s W^T + b)): `spike_linear`, then `norm_lif`.

    Args:
        s: spikes [T, ..., K], exactly 0 and 1. weight: [N, K]; bias: [N] or None.
        n, p, threshold: as in `spikedecoder.ops.norm_lif`, of N channels.
        recompute: keep for backward only s, as bits (K / 8 bytes per row), and the norm's statistics, and
            compute s W^T + b again. This costs one more product and saves the N floats per row that
            `norm_lif` keeps. Spikes and gradients are the same either way.

    A backend may do all three in one kernel that never writes s W^T + b (Triton, where that moves fewer
    bytes). It is used with `recompute` or without gradients, for LayerNorm or in evaluation.

    Returns:
        spikes [T, ..., N] in the dtype of the product.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.of_type("n", n, NormParams)
    _check.of_type("p", p, LIFParams)
    switch("recompute", recompute)
    check_linear(s, weight, bias)
    product_weight, product_bias, backend = as_product(weight, bias)
    nothing_kept = recompute or not torch.is_grad_enabled()
    # the statistics are those of single rows, or known before the current is computed
    before = n.kind == "layer" or not n.training
    if nothing_kept and before and offers(backend, "linear_norm_lif"):
        return _one_kernel(s, product_weight, product_bias, n, p, threshold, backend)
    if not recompute:
        return norm_lif(spike_linear(s, weight, bias), n, p, threshold=threshold)
    weight, bias = product_weight, product_bias
    with torch.no_grad():
        current, words = _spike_linear(s, weight, bias, backend)
    check_norm_lif(current, n, threshold)
    settings = (*flat(statistics(current, n), n, threshold), *p.flat())
    spikes, _, _ = _linear_norm_lif(
        s, current, words, weight, bias, n.weight, n.bias, *settings, requested_backend(), backend
    )
    return spikes
