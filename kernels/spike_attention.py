"""Causal spiking self-attention, in chunks of the sequence that hand on the state k^T v.

    o[i] = scale ( sum_{j<=i} decay^(i-j) (q[i] . k[j]) v[j]  +  decay^(i+1) q[i] state )

q, k, v and o are [T, B, S, H, d] in memory. A program owns one head of one sequence at one timestep, and
BLOCK_V of the d columns of v. It walks the sequence in chunks of BLOCK_S tokens. Within a chunk, it
multiplies the masked scores q k^T by v; for the past, it multiplies q by the state [d, BLOCK_V], which it
keeps in float32 registers and then advances by k^T v. The cost is linear in S.

Where this gives too few programs, the sequence is cut into segments: one kernel sums k^T v over each segment,
a second adds these up to the state before each, and every program then walks one segment from there.

Exactness: q, k and v are 0 and 1, so scores are integers up to d <= 128, exact in one bfloat16, and states
are integers up to S, exact in two bfloat16 for S <= 2^16 (and no initial state), else in three (`_digits`).
For integers up to D <= 15, scores reach d D^2 < 2^15, exact in two (up to 2^8 in one); states reach S D^2.
All sums are integers in float32 accumulators, exact below 2^24. With a decay, scores and states are real
numbers, with as many digits as the dtype's precision requires: 24 bits for float32, 16 for the others. The
powers of the decay come in a table.

Backward, with g = dL/do: each gradient is itself a causal attention, those of k and v backwards in time,

    dq[i] = scale sum_{j<=i} decay^(i-j) (g[i] . v[j]) k[j]     the forward kernel on (g, v, k), state^T
    dk[j] = scale sum_{i>=j} decay^(i-j) (v[j] . g[i]) q[i]     the same on (v, g, q), last token first
    dv[j] = scale sum_{i>=j} decay^(i-j) (k[j] . q[i]) g[i]     the same on (k, q, g), last token first

and the last two share their state R = sum q^T g (dk uses R^T), so one kernel can compute both.

Bytes per element of q (b = bytes of the dtype): forward 4 b, the minimum (if BLOCK_V < d, q and k are read
again from cache, as is k if d comes in parts). Backward 10 b where one kernel computes dk and dv (bfloat16,
no decay, d <= 64, on sm_80 d <= 16), since g, k and v are read a second time; otherwise 12 b. The minimum is
7 b. Segments read k and v once more.

Arithmetic per element, forward: 2 (2 BLOCK_S + 3 d) operations, which for d = BLOCK_S = 64 are 640 operations
for 8 bytes: bound by memory bandwidth if the tensor cores reach a third of their rate.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels import _launch
from spikedecoder.kernels._digits import digits, dot_digits, stages
from spikedecoder.kernels._launch import Call, cdiv, family, kernel, launch, multiprocessors, power_of_2

__all__ = ["backward", "forward", "why_not"]

POWERS = tl.constexpr(65)  # powers of a decay in the table, from 0 to the tokens of the longest chunk
MAX_D = 128
SEGMENT = 512  # a sequence is cut into at most tokens / SEGMENT segments, rounded up


def why_not(call: Call) -> str | None:
    if call.shape and call.shape[-1] > MAX_D:
        return f"head size {call.shape[-1]}: its attention takes up to {MAX_D}"
    return _launch.why_not(call)


@triton.jit
def _at(base, first, tokens, row_stride, column, REVERSE: tl.constexpr, BLOCK_S: tl.constexpr):
    s = first + tl.arange(0, BLOCK_S)
    if REVERSE:
        s = tokens - 1 - s
    return base + s[:, None].to(tl.int64) * row_stride + column[None, :]


@triton.jit
def load_tile(
    ptr, base, first, stop, tokens, row_stride, column,
    D: tl.constexpr, REVERSE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tokens first to first + BLOCK_S, counted from the end if REVERSE; 0 from `stop` and column D on."""
    inside = (first + tl.arange(0, BLOCK_S) < stop)[:, None] & (column < D)[None, :]
    return tl.load(
        ptr + _at(base, first, tokens, row_stride, column, REVERSE, BLOCK_S), mask=inside, other=0.0
    )


@triton.jit
def store_tile(
    ptr, value, base, first, stop, tokens, row_stride, column,
    D: tl.constexpr, REVERSE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    inside = (first + tl.arange(0, BLOCK_S) < stop)[:, None] & (column < D)[None, :]
    at = _at(base, first, tokens, row_stride, column, REVERSE, BLOCK_S)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_state(ptr, row, column, D: tl.constexpr):
    at = ptr + row[:, None] * D + column[None, :]
    return tl.load(at, mask=(row < D)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_state(ptr, state, row, column, D: tl.constexpr):
    at = ptr + row[:, None] * D + column[None, :]
    tl.store(at, state, mask=(row < D)[:, None] & (column < D)[None, :])


@triton.jit
def causal_weights(powers, BLOCK_S: tl.constexpr, DECAY: tl.constexpr):
    """[i, j]: decay^(i-j) for j <= i, else 0. `powers` points at decay^0, decay^1, ..."""
    i = tl.arange(0, BLOCK_S)[:, None]
    j = tl.arange(0, BLOCK_S)[None, :]
    if DECAY:
        return tl.load(powers + tl.maximum(i - j, 0), mask=i >= j, other=0.0)
    else:
        return tl.where(i >= j, 1.0, 0.0)


@triton.jit
def attend_chunk(
    scores, past, v, powers,
    V: tl.constexpr, SCORE: tl.constexpr, DECAY: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Unscaled attention of a chunk to itself and to the past. `scores` are weighted; `past` is q state."""
    if DECAY:
        past = past * tl.load(powers + 1 + tl.arange(0, BLOCK_S))[:, None]
    return dot_digits(scores, v, past, SCORE, V)


@triton.jit
def attend(
    q, k, v, state, weights, powers,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCORE: tl.constexpr, STATE: tl.constexpr,
    DECAY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`attend_chunk`, given all columns of q and k. Q, K, V, SCORE, STATE: digits of these operands."""
    scores = dot_digits(q, tl.trans(k), tl.zeros((BLOCK_S, BLOCK_S), tl.float32), Q, K) * weights
    past = dot_digits(q, state, tl.zeros((BLOCK_S, BLOCK_V), tl.float32), Q, STATE)
    return attend_chunk(scores, past, v, powers, V, SCORE, DECAY, BLOCK_S)


@triton.jit
def advance_state(
    k, v, state, powers, count,
    K: tl.constexpr, V: tl.constexpr, KV: tl.constexpr, DECAY: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The state after the `count` tokens of a chunk. KV: digits of v times a power of the decay."""
    if DECAY:
        i = tl.arange(0, BLOCK_S)
        left = tl.load(powers + tl.maximum(count - 1 - i, 0), mask=i < count, other=0.0)
        state = state * tl.load(powers + count)
        return dot_digits(tl.trans(k), v.to(tl.float32) * left[:, None], state, K, KV)
    else:
        return dot_digits(tl.trans(k), v, state, K, V)


@kernel
def attention(
    q_ptr, k_ptr, v_ptr, out_ptr, powers_ptr, state_ptr, final_ptr, tokens, heads, segment, scale,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCORE: tl.constexpr,
    STATE: tl.constexpr, KV: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, columns; segment). state_ptr: the states before segments, [sequence, head,
    segment, d, d].

    REVERSE runs from the last token to the first, so that "past" means the future. The d columns of q and k,
    which are the rows of the state, come in PARTS of BLOCK_D.
    """
    ACROSS: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // ACROSS  # of all sequences
    h = head % heads
    row_stride = heads * D
    base = ((head // heads).to(tl.int64) * tokens * heads + h) * D
    start = tl.program_id(1) * segment
    stop = tl.minimum(start + segment, tokens)
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(0) % ACROSS * BLOCK_V + tl.arange(0, BLOCK_V)
    powers = powers_ptr
    if DECAY:
        powers = powers_ptr + h * POWERS
    weights = causal_weights(powers, BLOCK_S, DECAY)
    states = ()
    for part in tl.static_range(PARTS):
        state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
        if state_ptr is not None:
            at = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (D * D)
            state = load_state(state_ptr + at, d + part * BLOCK_D, e, D)
        states = states + (state,)
    for first in range(start, stop, BLOCK_S):
        if PARTS == 1:
            q = load_tile(q_ptr, base, first, stop, tokens, row_stride, d, D, REVERSE, BLOCK_S)
            k = load_tile(k_ptr, base, first, stop, tokens, row_stride, d, D, REVERSE, BLOCK_S)
            v = load_tile(v_ptr, base, first, stop, tokens, row_stride, e, D, REVERSE, BLOCK_S)
            out = attend(
                q, k, v, states[PARTS - 1], weights, powers, Q, K, V, SCORE, STATE, DECAY, BLOCK_S, BLOCK_V
            )
        else:
            scores = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
            past = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
            for part in tl.static_range(PARTS):
                tl.debug_barrier()  # otherwise the compiler loads all parts first and spills
                columns = d + part * BLOCK_D
                q = load_tile(q_ptr, base, first, stop, tokens, row_stride, columns, D, REVERSE, BLOCK_S)
                k = load_tile(k_ptr, base, first, stop, tokens, row_stride, columns, D, REVERSE, BLOCK_S)
                scores = dot_digits(q, tl.trans(k), scores, Q, K)
                past = dot_digits(q, states[part], past, Q, STATE)
            v = load_tile(v_ptr, base, first, stop, tokens, row_stride, e, D, REVERSE, BLOCK_S)
            out = attend_chunk(scores * weights, past, v, powers, V, SCORE, DECAY, BLOCK_S)
        store_tile(out_ptr, out * scale, base, first, stop, tokens, row_stride, e, D, REVERSE, BLOCK_S)
        count = tl.minimum(BLOCK_S, stop - first)
        after = ()
        for part in tl.static_range(PARTS):
            if PARTS > 1:  # k again, from cache
                tl.debug_barrier()
                columns = d + part * BLOCK_D
                k = load_tile(k_ptr, base, first, stop, tokens, row_stride, columns, D, REVERSE, BLOCK_S)
            after = after + (advance_state(k, v, states[part], powers, count, K, V, KV, DECAY, BLOCK_S),)
        states = after
    if final_ptr is not None and stop == tokens:
        for part in tl.static_range(PARTS):
            final = final_ptr + head.to(tl.int64) * (D * D)
            store_state(final, states[part], d + part * BLOCK_D, e, D)


@kernel
def attention_backward_kv(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, powers_ptr, state_ptr, tokens, heads, segment, scale,
    D: tl.constexpr, G: tl.constexpr, SCORE: tl.constexpr, REAL: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv and dk together, from the last token to the first. G, REAL: digits of gradient and real sums."""
    head = tl.program_id(0)
    h = head % heads
    row_stride = heads * D
    base = ((head // heads).to(tl.int64) * tokens * heads + h) * D
    start = tl.program_id(1) * segment
    stop = tl.minimum(start + segment, tokens)
    d = tl.arange(0, BLOCK_D)
    powers = powers_ptr
    if DECAY:
        powers = powers_ptr + h * POWERS
    weights = causal_weights(powers, BLOCK_S, DECAY)
    state = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    if state_ptr is not None:
        at = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (D * D)
        state = load_state(state_ptr + at, d, d, D)
    for first in range(start, stop, BLOCK_S):
        q = load_tile(q_ptr, base, first, stop, tokens, row_stride, d, D, True, BLOCK_S)
        k = load_tile(k_ptr, base, first, stop, tokens, row_stride, d, D, True, BLOCK_S)
        v = load_tile(v_ptr, base, first, stop, tokens, row_stride, d, D, True, BLOCK_S)
        grad = load_tile(grad_ptr, base, first, stop, tokens, row_stride, d, D, True, BLOCK_S)
        dv = attend(k, q, grad, state, weights, powers, 1, 1, G, SCORE, REAL, DECAY, BLOCK_S, BLOCK_D)
        store_tile(dv_ptr, dv * scale, base, first, stop, tokens, row_stride, d, D, True, BLOCK_S)
        turned = tl.trans(state)
        dk = attend(v, grad, q, turned, weights, powers, 1, G, 1, REAL, REAL, DECAY, BLOCK_S, BLOCK_D)
        store_tile(dk_ptr, dk * scale, base, first, stop, tokens, row_stride, d, D, True, BLOCK_S)
        count = tl.minimum(BLOCK_S, stop - first)
        state = advance_state(q, grad, state, powers, count, 1, G, REAL, DECAY, BLOCK_S)


@kernel
def segment_states(
    k_ptr, v_ptr, powers_ptr, state_ptr, tokens, heads, segment,
    D: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KV: tl.constexpr, REVERSE: tl.constexpr,
    DECAY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """For each segment, the state after its last token if it started from 0."""
    ACROSS: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // ACROSS
    h = head % heads
    row_stride = heads * D
    base = ((head // heads).to(tl.int64) * tokens * heads + h) * D
    start = tl.program_id(1) * segment
    stop = tl.minimum(start + segment, tokens)
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(0) % ACROSS * BLOCK_V + tl.arange(0, BLOCK_V)
    powers = powers_ptr
    if DECAY:
        powers = powers_ptr + h * POWERS
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    for first in range(start, stop, BLOCK_S):
        k = load_tile(k_ptr, base, first, stop, tokens, row_stride, d, D, REVERSE, BLOCK_S)
        v = load_tile(v_ptr, base, first, stop, tokens, row_stride, e, D, REVERSE, BLOCK_S)
        state = advance_state(
            k, v, state, powers, tl.minimum(BLOCK_S, stop - first), K, V, KV, DECAY, BLOCK_S
        )
    at = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (D * D)
    store_state(state_ptr + at, state, d, e, D)


@kernel
def scan_segments(state_ptr, initial_ptr, decay_ptr, heads, segments, numel, BLOCK: tl.constexpr):
    """In place: the state that each segment adds is replaced by the state before it. decay_ptr: the decay
    over a whole segment."""
    head = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + head.to(tl.int64) * numel + i, mask=i < numel, other=0.0)
    for n in range(0, segments):
        at = state_ptr + (head.to(tl.int64) * segments + n) * numel + i
        own = tl.load(at, mask=i < numel, other=0.0)
        tl.store(at, state, mask=i < numel)
        if decay_ptr is not None:
            state = state * tl.load(decay_ptr + head % heads)
        state += own


@dataclass(frozen=True)
class Blocks:
    """Tile sizes: tokens per chunk, padded d, columns of v per program; warps; parts of d; stages."""

    tokens: int
    d: int
    columns: int
    warps: int = 4
    parts: int = 1
    stages: int = 2


def blocks(d: int, dtype: torch.dtype, integers: bool, device: torch.device) -> Blocks:
    """The table of tile sizes: the widest tiles that don't spill, read off compiled code; for bfloat16 on
    sm_90 as measured on an H200.

    Ampere's tensor cores take their operands from registers, Hopper's and Blackwell's mostly from shared
    memory. Three digits of more than 64 columns of a real q, k and state don't fit the registers of sm_80 and
    sm_90 with any tile, so d then comes in parts. float32 and float16 are converted to bfloat16 in registers;
    for such operands of wgmma, Triton 3.6 generates wrong code (on an H200 it read past its shared memory or
    summed wrongly in most cases with d > 16). On sm_90 these dtypes therefore get two warps per program, with
    which only mma.sync is used."""
    padded = max(16, power_of_2(d))
    wide = dtype != torch.float32 and padded <= 64
    if family(device) == 9 and dtype != torch.bfloat16:
        if padded <= 32:
            return Blocks(32, padded, padded if wide else 16, warps=2)
        return Blocks(32 if padded == 64 else 16, padded, 16, warps=2, parts=padded // 32)
    warps = 8 if dtype == torch.float32 and padded > 64 else 4  # three digits of every operand
    if dtype == torch.float32 and padded > 64 and not integers and family(device) == 8:
        return Blocks(32, padded, 16, parts=4)
    if family(device) == 8:
        return Blocks(32, padded, min(padded, 32 if wide else 16), warps)
    ahead = stages(device)
    if dtype == torch.float32:
        # under the interpreter (0) as few programs as possible
        return Blocks(64, padded, 16 if family(device) else min(padded, 64), warps, stages=ahead)
    if family(device) == 9:
        narrow = padded <= 64  # at d = 128, 64 columns take 0.7 of the time but spill 104 bytes
        return Blocks(64, padded, min(padded, 64) if narrow else 32, stages=3 if narrow else 2)
    return Blocks(64, padded, min(padded, 64 if wide and integers else 32), stages=ahead)


def heads_last(x: Tensor) -> Tensor:
    """[T, B, H, S, d] as contiguous [T, B, S, H, d]; copied only if it isn't laid out like that already."""
    return x.transpose(2, 3).contiguous()


def power_table(decay: Tensor | None) -> Tensor | None:
    """[H, POWERS]: decay^0, decay^1, ..."""
    if decay is None:
        return None
    exponents = torch.arange(POWERS.value, device=decay.device, dtype=torch.float64)
    return (decay.double()[:, None] ** exponents).float()


def segmentation(programs: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """(segments, tokens in each, a multiple of 64): enough to fill the device, if `SEGMENT` allows."""
    wanted = min(cdiv(multiprocessors(device), programs), cdiv(tokens, SEGMENT))
    segment = cdiv(cdiv(tokens, max(1, wanted)), 64) * 64
    return cdiv(tokens, segment), segment


@dataclass(frozen=True)
class Pass:
    """What the launches of an operator call share: decay, its table of powers, dtype and levels; from these,
    the digits of scores and states."""

    decay: Tensor | None
    powers: Tensor | None
    dtype: torch.dtype
    levels: int = 1  # the largest value of q, k and v

    @property
    def real(self) -> int:
        """Digits of sums that are not integers: 24 bits in float32, else 16."""
        return max(2, digits(self.dtype))

    def scores(self, d: int) -> int:
        """Digits of integer scores of heads of size d."""
        return 1 if d * self.levels**2 <= 1 << 8 else 2

    def flags(self, k_digits: int, v_digits: int) -> dict[str, object]:
        decays = self.decay is not None
        return {"K": k_digits, "V": v_digits, "KV": self.real if decays else v_digits, "DECAY": decays}


def states_before(
    way: Pass, k: Tensor, v: Tensor, initial: Tensor | None, segments: int, segment: int,
    k_digits: int, v_digits: int, reverse: bool,
) -> Tensor | None:  # fmt: skip
    """[T, B, H, segments, d, d]: the state before each segment; for a single one, `initial`. k and v are
    heads last."""
    initial = None if initial is None else initial.to(torch.float32).contiguous()
    if segments == 1:
        return initial
    T, batch, tokens, heads, d = k.shape
    states = k.new_empty((T, batch, heads, segments, d, d), dtype=torch.float32)
    programs = T * batch * heads
    size = blocks(d, way.dtype, way.decay is None and v_digits == 1, k.device)
    launch(
        segment_states, (programs * cdiv(d, size.columns), segments), k_ptr=k, v_ptr=v, powers_ptr=way.powers,
        state_ptr=states, tokens=tokens, heads=heads, segment=segment, D=d, REVERSE=reverse,
        BLOCK_S=size.tokens,
        BLOCK_D=size.d, BLOCK_V=size.columns, num_warps=size.warps, num_stages=size.stages,
        **way.flags(k_digits, v_digits),
    )  # fmt: skip
    whole = None if way.decay is None else (way.decay.double() ** segment).float()
    launch(
        scan_segments, (programs, cdiv(d * d, 1024)), state_ptr=states, initial_ptr=initial, decay_ptr=whole,
        heads=heads, segments=segments, numel=d * d, BLOCK=1024,
    )  # fmt: skip
    return states


def walk(
    way: Pass, q: Tensor, k: Tensor, v: Tensor, scale: float, state: Tensor | None = None,
    final: Tensor | None = None, real: str = "", reverse: bool = False,
) -> Tensor:  # fmt: skip
    """One pass of `attention` over tensors [T, B, S, H, d]. `real` names those of q, k, v that are real
    numbers, not spikes or integers up to `levels`."""
    T, batch, tokens, heads, d = q.shape
    out = torch.empty_like(q)
    q_digits, k_digits, v_digits = (digits(way.dtype) if name in real else 1 for name in "qkv")
    real_scores = way.decay is not None or "q" in real or "k" in real
    integers = way.decay is None and not real.strip("q")
    state_digits = (
        way.real if not integers else 2 if state is None and tokens * way.levels**2 <= 1 << 16 else 3
    )
    score_digits = way.real if real_scores else way.scores(d)
    size = blocks(d, way.dtype, way.decay is None and not real, q.device)
    ahead = size.stages if way.levels == 1 else min(2, size.stages)
    across = cdiv(d, size.columns)
    programs = T * batch * heads * across
    segments, segment = segmentation(programs, tokens, q.device)
    before = states_before(way, k, v, state, segments, segment, k_digits, v_digits, reverse)
    launch(
        attention, (programs, segments), q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, powers_ptr=way.powers,
        state_ptr=before, final_ptr=final, tokens=tokens, heads=heads, segment=segment, scale=scale, D=d,
        Q=q_digits, SCORE=score_digits, STATE=state_digits, REVERSE=reverse, BLOCK_S=size.tokens,
        BLOCK_D=size.d // size.parts, PARTS=size.parts,
        BLOCK_V=size.columns, num_warps=size.warps, num_stages=ahead,
        **way.flags(k_digits, v_digits),
    )  # fmt: skip
    return out


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
    """(o [T, B, H, S, d] laid out heads last, final state in float32 if requested)."""
    T, batch, heads, _, d = q.shape
    final = q.new_empty((T, batch, heads, d, d), dtype=torch.float32) if return_state else None
    if q.numel() == 0:
        if final is not None:
            final = final.zero_() if state is None else final.copy_(state)
        return torch.empty_like(heads_last(q)).transpose(2, 3), final
    way = Pass(decay, power_table(decay), q.dtype, levels)
    out = walk(way, heads_last(q), heads_last(k), heads_last(v), scale, state, final)
    return out.transpose(2, 3), final


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, state: Tensor | None,
    levels: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) [T, B, H, S, d], laid out heads last."""
    grad, q, k, v = (heads_last(x) for x in (grad, q, k, v))
    if q.numel() == 0:
        return q.transpose(2, 3).clone(), k.transpose(2, 3).clone(), v.transpose(2, 3).clone()
    way = Pass(decay, power_table(decay), q.dtype, levels)
    dq = walk(way, grad, v, k, scale, None if state is None else state.transpose(-1, -2), real="q")
    if decay is None and q.dtype == torch.bfloat16 and q.shape[-1] <= (16 if family(q.device) == 8 else 64):
        dk, dv = _backward_kv(way, grad, q, k, v, scale)
    else:
        dk = walk(way, v, grad, q, scale, real="k", reverse=True)
        dv = walk(way, k, q, grad, scale, real="v", reverse=True)
    return dq.transpose(2, 3), dk.transpose(2, 3), dv.transpose(2, 3)


def _backward_kv(
    way: Pass, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    T, batch, tokens, heads, d = q.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    programs = T * batch * heads
    segments, segment = segmentation(programs, tokens, q.device)
    one, ahead = digits(q.dtype), 3 if family(q.device) == 9 and way.levels == 1 else stages(q.device)
    behind = states_before(way, q, grad, None, segments, segment, 1, one, True)
    launch(
        attention_backward_kv, (programs, segments), q_ptr=q, k_ptr=k, v_ptr=v, grad_ptr=grad, dk_ptr=dk,
        dv_ptr=dv, powers_ptr=way.powers, state_ptr=behind, tokens=tokens, heads=heads, segment=segment,
        scale=scale, D=d, G=one, SCORE=way.scores(d), REAL=way.real, DECAY=False, BLOCK_S=64,
        BLOCK_D=max(16, power_of_2(d)), num_stages=ahead,
    )  # fmt: skip
    return dk, dv
