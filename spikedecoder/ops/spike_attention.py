"""Causal spiking self-attention: (q k^T, causal) v * scale, no softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.spike_attention import decay_matrix


def heads_last(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, laid out [T, B, S, H, d] so that merging the heads is free."""
    t, b, h, s, d = x.shape
    return x.new_empty(t, b, s, h, d).transpose(2, 3)


def laid_out(x: Tensor) -> Tensor:
    """x itself where it is laid out so, else a copy that is."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@torch.library.custom_op("spikedecoder::spike_attention", mutates_args=())
def _spike_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    impl = select(
        "spike_attention", Call(q.device, q.dtype, tuple(q.shape), {"decay": decay is not None}), backend
    )
    out, final = impl.forward(q, k, v, scale, decay, state, return_state)
    return laid_out(out), q.new_empty(0) if final is None else final


@_spike_attention.register_fake
def _(q, k, v, scale, decay, state, return_state, backend):
    t, b, h, _, d = q.shape
    dtype = compute_dtype(q.dtype)
    return heads_last(q), q.new_empty(t, b, h, d, d, dtype=dtype) if return_state else q.new_empty(0)


@torch.library.custom_op("spikedecoder::spike_attention_backward", mutates_args=())
def _spike_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = select(
        "spike_attention", Call(q.device, q.dtype, tuple(q.shape), {"decay": decay is not None}), backend
    )
    dq, dk, dv = impl.backward(grad, q, k, v, scale, decay, state)
    return laid_out(dq), laid_out(dk), laid_out(dv)


@_spike_attention_backward.register_fake
def _(grad, q, k, v, *_):
    return heads_last(q), heads_last(q), heads_last(q)


def _setup_context(ctx, inputs, output):
    q, k, v, scale, decay, state, _return_state, backend = inputs
    ctx.save_for_backward(q, k, v, decay, state)
    ctx.scale, ctx.backend = scale, backend
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _grad_state):
    q, k, v, decay, state = ctx.saved_tensors
    dq, dk, dv = _spike_attention_backward(grad, q, k, v, ctx.scale, decay, state, ctx.backend)
    return dq, dk, dv, None, None, None, None, None


_spike_attention.register_autograd(_autograd, setup_context=_setup_context)


def check_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> None:
    """q, k, v alike, [T, B, H, S, d]; decay one value a head."""
    _check.floating("q", q, dims=5)
    _check.timesteps("q", q)
    for name, x in (("k", k), ("v", v)):
        _check.floating(name, x)
        _check.same_shape("q", q, name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, takes that of q, {q.dtype}")
    _check.same_device(q=q, k=k, v=v, decay=decay)
    heads = q.shape[2]
    if decay is not None and decay.shape != (heads,):
        raise ValueError(f"decay: got shape {tuple(decay.shape)}, takes one value a head, ({heads},)")


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, dropout: float
) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores = scores.tril() if decay is None else scores * decay_matrix(decay.to(scores.dtype), q.shape[-2])
    return laid_out(F.dropout(scores, dropout) @ v * scale)


def spike_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 0.125,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    dropout: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """o[i] = scale * (sum_{j<=i} decay^(i-j) (q[i] . k[j]) v[j] + decay^(i+1) q[i] state).

    Exact without decay: q, k, v hold 0 and 1, so every sum is an integer. Cost linear in S (chunks with
    the state carried between them). Kept for backward: q, k, v.

    Args:
        q, k, v: spikes [T, B, H, S, d], any strides.
        scale: factor of the result.
        decay: per head [H], in (0, 1]; None for 1. Gets no gradient.
        state: the past's sum of k^T v, [T, B, H, d, d]; None for no past. Gets no gradient.
        return_state: also return the state after the last token (carries no gradient).
        dropout: probability of dropping a score q[i] . k[j]; needs the scores themselves, so cost and
            memory are quadratic in S, and it takes no state.

    Returns:
        o [T, B, H, S, d] in q's dtype, laid out so that ``o.transpose(2, 3)`` is contiguous; with
        return_state, (o, state in float32 or wider).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Zhou et al., 2023 (Spikformer); decay: Sun et al., 2023 (RetNet).
    """
    check_attention(q, k, v, decay)
    _check.same_device(q=q, state=state)
    t, b, h, _, d = q.shape
    if state is not None and state.shape != (t, b, h, d, d):
        raise ValueError(f"state: got shape {tuple(state.shape)}, takes [T, B, H, d, d] = {(t, b, h, d, d)}")
    if dropout > 0:
        if state is not None or return_state:
            raise ValueError("dropout: takes 0 where the state is given or asked for")
        return _with_dropout(q, k, v, scale, decay, dropout)
    out, final = _spike_attention(q, k, v, float(scale), decay, state, return_state, requested_backend())
    return (out, final) if return_state else out
