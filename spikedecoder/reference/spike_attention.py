"""Causal spiking self-attention without softmax, in three equivalent forms.

    o[i] = scale * ( sum_{j<=i} decay^(i-j) (q[i] . k[j]) v[j]  +  decay^(i+1) q[i] state )

Shapes: q, k, v, o [T, B, H, S, d]; decay [H] or None (1); state [T, B, H, d, d], the running sum of
k^T v over the past. Without decay every sum is an integer, so the three forms agree bit for bit in float32
while sums stay below 2^24.

Source: spiking self-attention, Zhou et al., 2023 (Spikformer), made causal; the decay is that of
retention, Sun et al., 2023 (RetNet).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # tokens; for fewer the quadratic form is cheaper


def decay_matrix(decay: Tensor, s: int) -> Tensor:
    """[H, s, s]: decay^(i-j) for j <= i, else 0."""
    i = torch.arange(s, device=decay.device)
    distance = (i[:, None] - i[None, :]).to(decay.dtype)
    return torch.where(distance >= 0, decay[:, None, None] ** distance.clamp(min=0), 0)


def decay_powers(decay: Tensor, first: int, s: int) -> Tensor:
    """[H, s, 1]: decay^first, decay^(first+1), ..."""
    return (decay[:, None] ** torch.arange(first, first + s, device=decay.device, dtype=decay.dtype))[
        ..., None
    ]


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, state: Tensor | None
) -> Tensor:
    """The definition: scores, causal mask, weighted sum. Differentiable; cost quadratic in S."""
    scores = q @ k.transpose(-1, -2)
    scores = scores.tril() if decay is None else scores * decay_matrix(decay, q.shape[-2])
    out = scores @ v
    if state is not None:
        past = q @ state
        out = out + (past if decay is None else past * decay_powers(decay, 1, q.shape[-2]))
    return out * scale


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token at a time, with the past in `state`. Returns (o, state)."""
    if state is None:
        state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])
    outs = []
    for i in range(q.shape[-2]):
        if decay is not None:
            state = state * decay[:, None, None]
        state = state + k[..., i, :, None] * v[..., i, None, :]
        outs.append((q[..., i, None, :] @ state).squeeze(-2) * scale)
    return torch.stack(outs, -2) if outs else torch.zeros_like(q), state


def advance_state(k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> Tensor:
    """The state after all S tokens."""
    s = k.shape[-2]
    if decay is not None:
        k = k * decay_powers(decay, 0, s).flip(-2)
        state = None if state is None else state * (decay**s)[:, None, None]
    new = k.transpose(-1, -2) @ v
    return new if state is None else state + new


def chunked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, state: Tensor | None
) -> Tensor:
    """Quadratic inside chunks, with the state carried between them: cost linear in S."""
    outs = []
    for start in range(0, q.shape[-2], CHUNK):
        part = (t[..., start : start + CHUNK, :] for t in (q, k, v))
        q_, k_, v_ = part
        outs.append(quadratic(q_, k_, v_, scale, decay, state))
        if start + CHUNK < q.shape[-2]:
            state = advance_state(k_, v_, decay, state)
    return torch.cat(outs, -2) if outs else q * scale


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    levels: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """(o, the final state or None), summed in float32 or wider. Takes any numbers; `levels` is not used."""
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    decay = None if decay is None else decay.to(q.dtype)
    state = None if state is None else state.to(q.dtype)
    out = chunked(q, k, v, scale, decay, state).to(dtype)
    return out, advance_state(k, v, decay, state) if return_state else None


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    levels: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v: each is itself a causal attention, those of k and v backwards in time.

    dq[i] = scale ( sum_{j<=i} decay^(i-j) (g[i] . v[j]) k[j] + decay^(i+1) g[i] state^T )
    dk[j] = scale   sum_{i>=j} decay^(i-j) (v[j] . g[i]) q[i]
    dv[j] = scale   sum_{i>=j} decay^(i-j) (k[j] . q[i]) g[i]
    """
    state_t = None if state is None else state.transpose(-1, -2)
    dq, _ = forward(grad, v, k, scale, decay, state_t, False)
    g, q, k, v = (t.flip(-2) for t in (grad, q, k, v))
    dk, _ = forward(v, g, q, scale, decay, None, False)
    dv, _ = forward(k, q, g, scale, decay, None, False)
    return dq, dk.flip(-2), dv.flip(-2)
