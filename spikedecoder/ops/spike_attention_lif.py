"""Causal spiking self-attention followed by LIF, as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors, direct, unwatched
from spikedecoder.ops._dispatch import Call, requested_backend, resolve, select
from spikedecoder.ops.lif import lif_params
from spikedecoder.ops.pack_spikes import _pack, _unpack, pack, unpack
from spikedecoder.ops.spike_attention import (
    as_words,
    by_token,
    check_attention,
    check_dropout,
    heads_last,
    keep,
    kept,
    laid_out,
    spike_attention,
)
from spikedecoder.params import LIFParams


def _run(q, k, v, scale, decay, threshold, q_words, k_words, v_words, p: LIFParams, backend: str) -> Tensor:
    limit = p.v_threshold if threshold is None else threshold
    return laid_out(_impl(q, decay, backend).forward(q, k, v, scale, decay, limit, p))


@torch.library.custom_op("spikedecoder::spike_attention_lif", mutates_args=())
def _spike_attention_lif(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    threshold: Tensor | None,
    q_words: Tensor | None,
    k_words: Tensor | None,
    v_words: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> Tensor:
    """threshold: a scalar or [H, d]."""
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    return _run(q, k, v, scale, decay, threshold, q_words, k_words, v_words, p, backend)


def _impl(q: Tensor, decay: Tensor | None, backend: str):
    call = Call(q.device, q.dtype, tuple(q.shape), {"decay": decay is not None})
    return select("spike_attention_lif", call, backend)


@_spike_attention_lif.register_fake
def _(q, *_):
    return heads_last(q)


def _run_back(grad_spikes, q, k, v, scale, decay, threshold, p: LIFParams, backend: str):
    """Gradients of q, k, v and threshold, the last None without a threshold tensor."""
    limit = p.v_threshold if threshold is None else threshold
    dq, dk, dv, grad_threshold = _impl(q, decay, backend).backward(
        grad_spikes, q, k, v, scale, decay, limit, p
    )
    if threshold is not None:
        grad_threshold = grad_threshold.sum_to_size(threshold.shape).float()
    return laid_out(dq), laid_out(dk), laid_out(dv), None if threshold is None else grad_threshold


@torch.library.custom_op("spikedecoder::spike_attention_lif_backward", mutates_args=())
def _backward(
    grad_spikes: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    threshold: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    grads = _run_back(grad_spikes, q, k, v, scale, decay, threshold, p, backend)
    return as_tensors(q, *grads, dtype=torch.float32)


@_backward.register_fake
def _(grad_spikes, q, k, v, scale, decay, threshold, *_):
    grad_threshold = q.new_empty(0 if threshold is None else threshold.shape, dtype=torch.float32)
    return heads_last(q), heads_last(q), heads_last(q), grad_threshold


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, decay, threshold, q_words, k_words, v_words, *rest = inputs
    ctx.rest = tuple(rest)
    keep(ctx, (q, k, v), (q_words, k_words, v_words), decay, threshold)


def _gradients(ctx, grad_spikes, unpack, backward):
    """Gradients of (q, k, v, scale, decay, threshold)."""
    q, k, v, decay, threshold = kept(ctx, unpack)
    dq, dk, dv, grad_threshold = backward(grad_spikes, q, k, v, ctx.scale, decay, threshold, *ctx.rest)
    return dq, dk, dv, None, None, None if threshold is None else grad_threshold.to(threshold.dtype)


def _autograd(ctx, grad_spikes):
    of_tensors = _gradients(ctx, grad_spikes, _unpack, _backward)
    return *of_tensors, *(None,) * (3 + len(ctx.rest))


_spike_attention_lif.register_autograd(_autograd, setup_context=_setup_context)
_by_token = direct(
    lambda *inputs: by_token(_run(*inputs)),
    _setup_context,
    lambda ctx, grad: (*_gradients(ctx, grad.transpose(2, 3), unpack, _run_back), *(None,) * 5),
)


def spike_attention_lif(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: LIFParams,
    scale: float = 0.125,
    decay: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Spikes [T, B, H, S, d] of LIF(spike_attention(q, k, v, scale, decay)).

    A backend may do both in one kernel that never writes the current. In 16 bits Triton's kernels round the
    current to q's dtype; the others do not.

    Args:
        q, k, v, scale, decay, dropout: as in `spikedecoder.ops.spike_attention`.
        p: the neurons.
        threshold: a tensor that overrides ``p.v_threshold`` and gets a gradient: a scalar, or one that
            broadcasts to [H, 1, d] (a value per head, per channel, or both).

    Returns:
        spikes in q's dtype, laid out so that ``.transpose(2, 3)`` is contiguous. Kept for backward:
        q, k and v as bits (the reference backend, and dropout, keep them as they are, and the current).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.of_type("p", p, LIFParams)
    check_attention(q, k, v, scale, decay)
    check_dropout(dropout)
    if threshold is not None:
        _check.floating("v_threshold", threshold, min_dims=0)
    _check.same_device(q=q, v_threshold=threshold)
    if threshold is not None and threshold.dim() > 0:
        by_head = torch.Size((q.shape[2], 1, q.shape[-1]))
        _check.broadcasts("v_threshold", threshold, by_head)
        threshold = threshold.expand(by_head)[:, 0]
    backend = resolve("spike_attention_lif", q.device.type, q.dtype, requested_backend())
    if backend == "reference" or dropout > 0:
        exact = torch.promote_types(q.dtype, torch.float32)  # the current is not rounded to 16 bits
        current = spike_attention(q.to(exact), k.to(exact), v.to(exact), scale, decay, dropout=dropout)
        assert isinstance(current, Tensor)
        spikes = lif_params(current.transpose(2, 3), p, threshold=threshold)
        assert isinstance(spikes, Tensor)
        return spikes.transpose(2, 3).to(q.dtype)
    free = unwatched(q, k, v, decay, threshold)
    inputs = (q, k, v, float(scale), decay, threshold, *as_words(q, k, v, backend, pack if free else _pack))
    if free:
        return _by_token(*inputs, p, backend).transpose(2, 3)
    return _spike_attention_lif(*inputs, *p.flat(), backend)
