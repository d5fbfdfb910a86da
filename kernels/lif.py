"""Multi-timestep LIF neuron over dim 0, forward and backward. Equations: `spikedecoder.params.LIFParams`.

x is [T, R, C]. With one threshold per channel, or with spikes packed along channels, a timestep is R rows of
C channels; otherwise R = 1 and C is the whole timestep. A program owns a tile of neurons and walks the T
timesteps with their membrane potentials in float32 registers; all T loads are issued before the first is
used. Backward keeps nothing from forward: it computes the potentials again from x, holds all T of them in
registers and walks back through them.

Bytes per element of x (b = bytes of its dtype), each the minimum possible:
    forward   2 b            x read once, spikes written once (b + 1/8 if spikes are packed)
    backward  3 b            x and the gradient read once, the gradient of x written once
plus 4 / T for each of these that is read or written: initial potential, final potential, their gradients.
Bound by memory bandwidth: instructions alone, 8 to 10 per element forward and 23 to 27 backward, would take
less time.

More than 16 timesteps are walked 16 at a time. Forward passes the potential from one launch to the next.
Backward first runs forward for the potential at every 16th timestep (4/16 bytes per element), which reads x
once more.
"""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import alignment, cdiv, kernel, launch, power_of_2, why_not
from spikedecoder.kernels._neuron import (
    MAX_T,
    PER_CHANNEL,
    as_float,
    as_spikes,
    charge,
    fire_backward,
    has_room,
    height,
    load_steps,
    load_threshold,
    neuron,
    neuron_forward,
    over_tau,
    potentials,
    reset,
    threshold_argument,
    threshold_gradient,
    threshold_partial,
)
from spikedecoder.kernels.pack_spikes import pack_tile
from spikedecoder.params import LIFParams

STATES_ON_REQUEST = True  # forward takes want_v, backward want_grad_v_init

__all__ = ["backward", "forward", "forward_packed", "why_not"]


@kernel
def lif_forward(
    x_ptr, threshold_ptr, v_init_ptr, spikes_ptr, words_ptr, v_ptr,
    rows, channels, stride_t, words, threshold, tau, v_reset,
    T: tl.constexpr, RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Spikes (as floats, or as words of 32 bits) and, if requested, the last potential."""
    channels = channels.to(tl.int64) * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    pid = tl.program_id(0)
    across = tl.cdiv(channels, BLOCK_C).to(tl.int32)
    first = (pid % across).to(tl.int64) * BLOCK_C
    r = (pid // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = first + tl.arange(0, BLOCK_C)[None, :]
    keep = (r < rows) & (c < channels)
    at = r * channels + c
    timestep = rows * channels

    xs = load_steps(x_ptr + at, stride_t, keep, T)
    threshold = load_threshold(threshold_ptr, threshold, c, c < channels, at, keep, THRESHOLD)
    v = None
    if v_init_ptr is not None:
        v = tl.load(v_init_ptr + at, mask=keep, other=0.0)
    for t in tl.static_range(T):
        h = charge(as_float(xs[t]), v, tau, v_reset, RECIPROCAL, HARD, DECAY_INPUT)
        fired = h >= threshold
        if spikes_ptr is not None:
            tl.store(spikes_ptr + t * timestep + at, as_spikes(fired, spikes_ptr.dtype.element_ty), mask=keep)
        if words_ptr is not None:
            packed = pack_tile(fired & keep, BLOCK_R, BLOCK_C)
            w = first // 32 + tl.arange(0, BLOCK_C // 32)[None, :]
            inside = (r < rows) & (w < words)
            tl.store(words_ptr + (t * rows.to(tl.int64) + r) * words + w, packed, mask=inside)
        v = reset(h, fired, threshold, v_reset, HARD)
    if v_ptr is not None:
        tl.store(v_ptr + at, v, mask=keep)


@kernel
def lif_backward(
    grad_spikes_ptr, grad_v_ptr, x_ptr, threshold_ptr, v_init_ptr, grad_x_ptr, grad_threshold_ptr,
    grad_v_init_ptr, rows, channels, stride_t, grad_stride_t, threshold, tau, keep, v_reset, alpha,
    T: tl.constexpr, RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr,
    DETACH: tl.constexpr, SURROGATE: tl.constexpr, ROOM: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the threshold (laid out by `threshold_partial`) and of v_init.

    h is computed again from x and stays in registers while t runs backwards.
    """
    channels = channels.to(tl.int64) * ALIGN
    stride_t = stride_t.to(tl.int64) * ALIGN
    grad_stride_t = grad_stride_t.to(tl.int64) * ALIGN
    pid = tl.program_id(0)
    across = tl.cdiv(channels, BLOCK_C).to(tl.int32)
    row_block = (pid // across).to(tl.int64)
    first = (pid % across).to(tl.int64) * BLOCK_C
    r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = first + tl.arange(0, BLOCK_C)[None, :]
    inside = (r < rows) & (c < channels)
    at = r * channels + c
    timestep = rows * channels

    threshold = load_threshold(threshold_ptr, threshold, c, c < channels, at, inside, THRESHOLD)
    v = None
    if v_init_ptr is not None:
        v = tl.load(v_init_ptr + at, mask=inside, other=0.0)
    most = height(alpha, SURROGATE)
    scale = most  # dL/dx = scale g, g being what fire_backward returns for dL/dh
    if DECAY_INPUT:
        scale = over_tau(most, tau, RECIPROCAL)
    carry, kept = None, 1.0
    if grad_v_ptr is not None:
        carry = tl.load(grad_v_ptr + at, mask=inside, other=0.0) / most
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)

    xs = load_steps(x_ptr + at, stride_t, inside, T)
    gs = load_steps(grad_spikes_ptr + at, grad_stride_t, inside, T)
    hs, v = potentials(xs, v, threshold, tau, v_reset, T, RECIPROCAL, HARD, DECAY_INPUT)
    to = grad_x_ptr + (T - 1) * timestep + at
    for back in tl.static_range(T):
        grad_h, grad_threshold = fire_backward(
            as_float(gs[T - 1 - back]), carry, kept, hs[T - 1 - back], threshold, v_reset, alpha, HARD,
            DETACH, SURROGATE, ROOM,
        )  # fmt: skip
        tl.store(to, (grad_h * scale).to(grad_x_ptr.dtype.element_ty), mask=inside)
        to -= timestep
        carry, kept = grad_h, keep
        total += grad_threshold
    if grad_v_init_ptr is not None:
        tl.store(grad_v_init_ptr + at, carry * (keep * most), mask=inside)
    if grad_threshold_ptr is not None:
        total = tl.where(inside, total, 0.0) * most
        if THRESHOLD == 3:
            tl.store(grad_threshold_ptr + at, total, mask=inside)
        elif THRESHOLD == 2:
            c1 = first + tl.arange(0, BLOCK_C)
            tl.store(grad_threshold_ptr + row_block * channels + c1, tl.sum(total, 0), mask=c1 < channels)
        else:
            tl.store(grad_threshold_ptr + pid, tl.sum(tl.sum(total, 1), 0))


def view(x: Tensor, by_channel: bool) -> tuple[int, int]:
    """(rows, channels) of a timestep of x [T, ...]; a single row unless `by_channel`."""
    numel = x[0].numel()
    return (numel // x.shape[-1], x.shape[-1]) if by_channel else (1, numel)


def steps_contiguous(x: Tensor) -> Tensor:
    """x with each timestep contiguous. A timestep repeated by `expand` is not copied."""
    return x if x[0].is_contiguous() else x.contiguous()


def tile(by_channel: bool, channels: int, element_size: int, T: int, backward: bool) -> dict[str, int]:
    """Rows and channels of a tile, as measured on an H200 in bfloat16.

    Forward: 128 bits per thread and timestep, twice that for T <= 2 and T > 8. Backward keeps T potentials
    per element, so it has 4 elements per thread (8 for T <= 2) and only 2 for T > 4, which lets more programs
    run side by side; 128 bits took 1.1 times as long at T = 4 and twice as long at T = 16. By channel, tiles
    are narrow, with many rows: a threshold's gradient is written once per tile and channel.
    """
    warps = 4
    if backward and T > 4:
        elements, warps = 128, 2
    elif backward:
        elements = 128 * (8 if T <= 2 else 4)
    else:
        elements = 128 * (16 // element_size) * (2 if T <= 2 or T > 8 else 1)
    block_c = min(128, max(16, power_of_2(channels))) if by_channel else elements
    return {"BLOCK_R": elements // block_c, "BLOCK_C": block_c, "num_warps": warps}


def sizes(x: Tensor, rows: int, channels: int, **strides: int) -> dict[str, int]:
    """ALIGN and the sizes divided by it. Whatever divides x's last dimension divides a timestep, at any
    batch size and length. Other divisors of a timestep are ignored, since they change with those."""
    align = alignment(x.shape[-1], channels, *strides.values())
    divided = {name: n // align for name, n in strides.items()}
    return {"rows": rows, "channels": channels // align, "ALIGN": align, **divided}


def programs(rows: int, channels: int, blocks: dict[str, int]) -> int:
    return cdiv(rows, blocks["BLOCK_R"]) * cdiv(channels, blocks["BLOCK_C"])


def _walk(
    x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams, *,
    spikes: Tensor | None = None, words: Tensor | None = None, v: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch on at most MAX_T timesteps; writes `spikes`, `words` (int32) and `v` as far as given."""
    T = x.shape[0]
    kind, pointer, number = threshold_argument(threshold, x.shape[1:])
    by_channel = kind == PER_CHANNEL or words is not None
    rows, channels = view(x, by_channel)
    blocks = tile(by_channel, channels, x.element_size(), T, backward=False)
    if words is not None:
        blocks["BLOCK_C"] = max(64, blocks["BLOCK_C"])
    launch(
        lif_forward, (programs(rows, channels, blocks),), x_ptr=x, threshold_ptr=pointer, v_init_ptr=v_init,
        spikes_ptr=spikes, words_ptr=words, v_ptr=v, words=0 if words is None else words.shape[-1],
        threshold=number, T=T, THRESHOLD=kind,
        **sizes(x, rows, channels, stride_t=x.stride(0) if T > 1 else 0), **neuron_forward(p), **blocks,
    )  # fmt: skip


def _pieces(T: int) -> list[slice]:
    return [slice(t, min(t + MAX_T, T)) for t in range(0, T, MAX_T)]


def _state(v_init: Tensor | None) -> Tensor | None:
    return None if v_init is None else v_init.to(torch.float32).contiguous()


def forward_into(
    x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams, want_v: bool, *,
    spikes: Tensor | None = None, words: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Write `spikes` or `words` (int32). Returns the last potential in float32, None without `want_v`."""
    x, state = steps_contiguous(x), _state(v_init)
    last = x.new_empty(x.shape[1:], dtype=torch.float32) if want_v else None
    pieces = _pieces(x.shape[0]) if x.numel() else []
    for piece in pieces:
        end = piece is pieces[-1]
        v = last if end else torch.empty_like(x[0], dtype=torch.float32)
        floats, bits = (None if out is None else out[piece] for out in (spikes, words))
        _walk(x[piece], threshold, state, p, spikes=floats, words=bits, v=v)
        state = v
    return last


def forward(
    x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams, want_v: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(spikes [T, ...] in x's dtype, potential [...] in float32; None without `want_v`)."""
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    return spikes, forward_into(x, threshold, v_init, p, want_v, spikes=spikes)


def forward_packed(
    x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams, want_v: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`forward` with spikes only as bits: int64 [T, ..., ceil(C / 64)], laid out as by `pack_spikes`."""
    words = x.new_empty(*x.shape[:-1], cdiv(x.shape[-1], 64), dtype=torch.int64)
    return words, forward_into(x, threshold, v_init, p, want_v, words=words.view(torch.int32))


def _walk_back(
    grad_spikes: Tensor, grad_v: Tensor | None, x: Tensor, threshold: Tensor | float, v_init: Tensor | None,
    p: LIFParams, grad_x: Tensor, grad_v_init: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Launch on at most MAX_T timesteps. Returns the threshold's gradient, None if that is a number."""
    T = x.shape[0]
    kind, pointer, number = threshold_argument(threshold, x.shape[1:])
    rows, channels = view(x, kind == PER_CHANNEL)
    blocks = tile(kind == PER_CHANNEL, channels, x.element_size(), T, backward=True)
    grid = programs(rows, channels, blocks)
    partial = threshold_partial(kind, x, x.shape[1:], grid, cdiv(rows, blocks["BLOCK_R"]))
    strides = (x.stride(0), grad_spikes.stride(0)) if T > 1 else (0, 0)
    launch(
        lif_backward, (grid,), grad_spikes_ptr=grad_spikes, grad_v_ptr=grad_v, x_ptr=x, threshold_ptr=pointer,
        v_init_ptr=v_init, grad_x_ptr=grad_x, grad_threshold_ptr=partial, grad_v_init_ptr=grad_v_init,
        threshold=number, T=T, THRESHOLD=kind,
        **sizes(x, rows, channels, stride_t=strides[0], grad_stride_t=strides[1]), **neuron(p), **blocks,
        ROOM=has_room(x.device), fuse=True,
    )  # fmt: skip
    return threshold_gradient(kind, partial, threshold)


def backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor | float,
    v_init: Tensor | None,
    p: LIFParams,
    want_grad_v_init: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_x in x's dtype, grad_threshold, grad_v_init), the latter two in float32. grad_threshold is None
    for a number, grad_v_init is None without `want_grad_v_init`."""
    x, grad_spikes = steps_contiguous(x), steps_contiguous(grad_spikes)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        zeros = torch.zeros(threshold.shape, device=x.device) if isinstance(threshold, Tensor) else None
        return grad_x, zeros, torch.zeros_like(x[0], dtype=torch.float32) if want_grad_v_init else None
    pieces = _pieces(x.shape[0])
    starts = [_state(v_init)]
    for piece in pieces[:-1]:
        starts.append(torch.empty_like(x[0], dtype=torch.float32))
        _walk(x[piece], threshold, starts[-2], p, v=starts[-1])
    carry, grad_threshold = _state(grad_v), None
    for piece in reversed(pieces):
        wanted = piece is not pieces[0] or want_grad_v_init
        before = torch.empty_like(x[0], dtype=torch.float32) if wanted else None
        part = _walk_back(
            grad_spikes[piece], carry, x[piece], threshold, starts.pop(), p, grad_x[piece], before
        )
        grad_threshold = part if grad_threshold is None or part is None else grad_threshold + part
        carry = before
    return grad_x, grad_threshold, carry
