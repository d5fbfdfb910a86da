"""Causal spiking self-attention: (q k^T, causal) v * scale, no softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.fields import number, switch
from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors, direct, unwatched
from spikedecoder.ops._dispatch import Call, requested_backend, resolve, select
from spikedecoder.ops.pack_spikes import _pack, _unpack, pack, unpack
from spikedecoder.params import check_levels
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.spike_attention import decay_matrix, decay_powers


def heads_last(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, laid out [T, B, S, H, d] so that merging the heads is free."""
    t, b, h, s, d = x.shape
    return x.new_empty(t, b, s, h, d).transpose(2, 3)


def laid_out(x: Tensor) -> Tensor:
    """x itself if it is laid out as by `heads_last`, else a copy that is."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def by_token(x: Tensor) -> Tensor:
    """x, laid out as by `heads_last`, as a [T, B, S, H, d] tensor that is not a view: a view made by an
    autograd function must not be changed in place."""
    x = x.transpose(2, 3)
    base = x._base
    if base is None:  # inference mode: views are not tracked
        return x
    return base if base.shape == x.shape and base.is_contiguous() else x.clone()


def _impl(q: Tensor, decay: Tensor | None, backend: str, levels: int):
    options = {"decay": decay is not None, **_integers(levels)}
    return select("spike_attention", Call(q.device, q.dtype, tuple(q.shape), options), backend)


def _integers(levels: int) -> dict[str, int]:
    return {} if levels == 1 else {"levels": levels}


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    q_words: Tensor | None,
    k_words: Tensor | None,
    v_words: Tensor | None,
    return_state: bool,
    backend: str,
    levels: int,
) -> tuple[Tensor, Tensor]:
    impl = _impl(q, decay, backend, levels)
    with torch.autocast(q.device.type, enabled=False):  # with autocast torch's products would round the sums
        out, final = impl.forward(q, k, v, scale, decay, state, return_state, **_integers(levels))
    return as_tensors(q, laid_out(out), None if final is None else final.contiguous())


_spike_attention = torch.library.custom_op("spikedecoder::spike_attention", _run, mutates_args=())


@_spike_attention.register_fake
def _(q, k, v, scale, decay, state, q_words, k_words, v_words, return_state, backend, levels):
    t, b, h, _, d = q.shape
    dtype = compute_dtype(q.dtype)
    return heads_last(q), q.new_empty(t, b, h, d, d, dtype=dtype) if return_state else q.new_empty(0)


def _run_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    backend: str,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = _impl(q, decay, backend, levels)
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = impl.backward(grad, q, k, v, scale, decay, state, **_integers(levels))
    return laid_out(dq), laid_out(dk), laid_out(dv)


_spike_attention_backward = torch.library.custom_op(
    "spikedecoder::spike_attention_backward", _run_back, mutates_args=()
)


@_spike_attention_backward.register_fake
def _(grad, q, k, v, *_):
    return heads_last(q), heads_last(q), heads_last(q)


def as_words(
    q: Tensor, k: Tensor, v: Tensor, backend: str, pack: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """Bits [T, B, S, ceil(H d / 64)] of q, k, v; three times None if backward needs none of them or keeps
    floats. (An operator takes them one by one: AOTInductor makes None of an empty list.)"""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not wanted or backend == "reference":
        return None, None, None
    with torch.no_grad():
        return tuple(pack(x.transpose(2, 3).flatten(-2), "auto") for x in (q, k, v))


def keep(ctx, qkv, words, first, second):
    """Save q, k, v for backward, as bits if there are `words`, and two more tensors."""
    ctx.packed = words[0] is not None
    ctx.size, ctx.dtype = qkv[0].shape, qkv[0].dtype
    ctx.save_for_backward(*(words if ctx.packed else qkv), first, second)


def kept(ctx, unpack):
    """q, k, v and the two other tensors from `keep`; q, k, v laid out as by `heads_last` if kept as bits."""
    *qkv, first, second = ctx.saved_tensors
    if ctx.packed:
        _, _, h, _, d = ctx.size
        spikes = (unpack(x, h * d, ctx.dtype, "auto") for x in qkv)
        qkv = [x.unflatten(-1, (h, d)).transpose(2, 3) for x in spikes]
    return *qkv, first, second


def _setup_context(ctx, inputs, output):
    q, k, v, scale, decay, state, *words, _return_state, backend, levels = inputs
    ctx.rest = backend, levels
    keep(ctx, (q, k, v), words, decay, state)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, unpack, backward):
    """Gradients of (q, k, v, scale, decay, state)."""
    q, k, v, decay, state = kept(ctx, unpack)
    dq, dk, dv = backward(grad, q, k, v, ctx.scale, decay, state, *ctx.rest)
    wanted = state is not None and ctx.needs_input_grad[5]
    grad_state = _state_gradient(grad, q, ctx.scale, decay, state) if wanted else None
    return dq, dk, dv, None, None, grad_state


def _autograd(ctx, grad, _grad_state):
    of_tensors = _gradients(ctx, grad, _unpack, _spike_attention_backward)
    return *of_tensors, *(None,) * 6


def _state_gradient(grad: Tensor, q: Tensor, scale: float, decay: Tensor | None, state: Tensor) -> Tensor:
    """scale sum_i decay^(i+1) q[i]^T g[i], in one product."""
    dtype = compute_dtype(state.dtype)
    q, grad = q.to(dtype), grad.to(dtype)
    if decay is not None:
        q = q * decay_powers(decay.to(dtype), 1, q.shape[-2])
    return (q.transpose(-1, -2) @ grad * scale).to(state.dtype)


_spike_attention.register_autograd(_autograd, setup_context=_setup_context)


def _run_by_token(*inputs):
    out, final = _run(*inputs)
    return by_token(out), final


def _gradients_by_token(ctx, grad, _grad_state):
    return *_gradients(ctx, grad.transpose(2, 3), unpack, _run_back), *(None,) * 6


_by_token = direct(_run_by_token, _setup_context, _gradients_by_token)


def check_dropout(dropout: float) -> None:
    number("dropout", dropout, "a probability, 0 to 1", 0, 1)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, state: Tensor | None = None
) -> None:
    """q, k, v alike, [T, B, H, S, d]; decay [H], its values checked on the CPU only: a GPU would stall."""
    _check.floating("q", q, dims=5)
    _check.timesteps("q", q)
    for name, x in (("k", k), ("v", v)):
        _check.floating(name, x)
        _check.same_shape("q", q, name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, takes that of q, {q.dtype}")
    number("scale", scale, "a finite number")
    if decay is not None:
        _check.floating("decay", decay)
    if state is not None:
        _check.floating("state", state)
    _check.same_device(q=q, k=k, v=v, decay=decay, state=state)
    t, b, heads, _, d = q.shape
    if state is not None and state.shape != (t, b, heads, d, d):
        takes = (t, b, heads, d, d)
        raise ValueError(f"state: got shape {tuple(state.shape)}, takes [T, B, H, d, d] = {takes}")
    if decay is not None and decay.shape != (heads,):
        raise ValueError(f"decay: got shape {tuple(decay.shape)}, takes one value a head, ({heads},)")
    if decay is not None and decay.device.type == "cpu" and unwatched(decay):
        _check_decay(decay)


def _check_decay(decay: Tensor) -> None:
    for value in decay.tolist():
        if not 0 < value <= 1:
            raise ValueError(f"decay: got {value:g}, takes numbers in (0, 1]")


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, dropout: float
) -> Tensor:
    given, dtype = q.dtype, compute_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scores = q @ k.transpose(-1, -2)
        scores = scores.tril() if decay is None else scores * decay_matrix(decay.to(dtype), q.shape[-2])
        return laid_out((F.dropout(scores, dropout) @ v * scale).to(given))


def spike_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 0.125,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    dropout: float = 0.0,
    levels: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """o[i] = scale * (sum_{j<=i} decay^(i-j) (q[i] . k[j]) v[j] + decay^(i+1) q[i] state).

    Without decay every sum is an integer, and exact as long as S d levels^3 stays below 2^24 (with a state, S
    includes the past). Cost is linear in S (chunks, with the state carried between them). Kept for backward:
    q, k and v; as bits if levels is 1, on every backend but the reference.

    Args:
        q, k, v: spikes [T, B, H, S, d], exactly 0 and 1 (only the reference takes anything else), or integers
            from 0 to `levels`; any strides.
        scale: factor on the result.
        decay: per head [H], in (0, 1]; None for 1. Gets no gradient.
        state: the past's sum of k^T v, [T, B, H, d, d]; None for no past.
        return_state: also return the state after the last token (carries no gradient).
        dropout: probability of dropping a score q[i] . k[j]. Computes all scores, so cost and memory are
            quadratic in S, and neither `state` nor `return_state` can be used.
        levels: the largest value in q, k and v, 1 to 15.

    Returns:
        o [T, B, H, S, d] in q's dtype, laid out so that ``o.transpose(2, 3)`` is contiguous; with
        return_state, (o, state in float32 or wider).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Zhou et al., 2023 (Spikformer); decay: Sun et al., 2023 (RetNet).
    """
    check_attention(q, k, v, scale, decay, state)
    check_levels(levels)
    check_dropout(dropout)
    switch("return_state", return_state)
    if dropout > 0 and (state is not None or return_state):
        raise ValueError("dropout: takes 0 where the state is given or asked for")
    backend = requested_backend()
    found = resolve("spike_attention", q.device.type, q.dtype, backend)
    if dropout > 0:  # torch's products, whatever the backend, once `resolve` has checked that it could run
        return _with_dropout(q, k, v, scale, decay, dropout)
    free = unwatched(q, k, v, decay, state)
    # integers are kept as they are
    words = as_words(q, k, v, "reference" if levels > 1 else found, pack if free else _pack)
    operator = _by_token if free else _spike_attention
    out, final = operator(q, k, v, float(scale), decay, state, *words, return_state, backend, levels)
    out = out.transpose(2, 3) if free else out
    return (out, final) if return_state else out
