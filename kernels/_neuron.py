"""One timestep of the LIF neuron, forward and backward, as device functions. Equations: `LIFParams`."""

# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable
# ruff: noqa: RUF005
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import INTERPRETED, family
from spikedecoder.kernels._sum import sum_parts
from spikedecoder.kernels._surrogate import height, shape
from spikedecoder.params import ILIFParams, LIFParams
from spikedecoder.surrogate import SURROGATES

PLAIN = tl.constexpr(INTERPRETED)  # the interpreter has no inline assembly
ROWS_AT_ONCE = tl.constexpr(1 if INTERPRETED else 16)  # tiles whose rows are summed together
WINDOW = tl.constexpr(ILIFParams.WINDOW)
SOFT, TO_NUMBER, TO_ZERO = range(3)  # HARD: the kind of reset; hard ones go to v_reset or to 0
MAX_T = 16  # timesteps whose potentials a kernel keeps in registers


def neuron(p: LIFParams) -> dict[str, Any]:
    """The neuron's kernel arguments. `tau` is passed as 1 / tau where that is exact (RECIPROCAL). Numbers are
    always floats: for an int Triton would compile another variant."""
    exact = math.frexp(p.tau)[0] == 0.5
    return {
        "tau": 1 / p.tau if exact else float(p.tau),
        "keep": 1 - 1 / p.tau,
        "v_reset": float(p.v_reset or 0.0),
        "alpha": min(max(float(p.alpha), 1e-30), 1e30),  # potentials' gradients are divided by it
        "RECIPROCAL": exact,
        "HARD": SOFT if p.v_reset is None else TO_ZERO if p.v_reset == 0 else TO_NUMBER,
        "DECAY_INPUT": p.decay_input,
        "DETACH": p.detach_reset,
        "SURROGATE": SURROGATES[p.surrogate].kernel_id,
    }


def has_room(device: torch.device) -> bool:
    """Whether backward may keep a few more values in registers: not from sm_100 on, where the compiler then
    spills. If so, it adds the next timestep's contribution by a predicated fused multiply-add, and sums the
    rows of several tiles in one reduction."""
    return family(device) < 10


BACKWARD_ONLY = ("keep", "alpha", "DETACH", "SURROGATE")


def neuron_forward(p: LIFParams) -> dict[str, Any]:
    """`neuron` without the arguments that only the backward pass needs."""
    return {name: value for name, value in neuron(p).items() if name not in BACKWARD_ONLY}


NUMBER, SCALAR, PER_CHANNEL, FULL = range(4)  # what a threshold may be


def threshold_argument(threshold: Tensor | float, timestep: torch.Size) -> tuple[int, Tensor | None, float]:
    """(kind, float32 tensor to point at, number). A threshold is a number or a tensor with one value, one per
    channel or one per element of a timestep."""
    if not isinstance(threshold, Tensor):
        return NUMBER, None, float(threshold)
    threshold = threshold.detach().to(torch.float32)
    if threshold.numel() == 1:
        return SCALAR, threshold, 0.0
    if threshold.numel() == threshold.shape[-1] == timestep[-1]:
        return PER_CHANNEL, threshold.contiguous(), 0.0
    return FULL, threshold.expand(timestep).contiguous(), 0.0


def threshold_partial(
    kind: int, like: Tensor, timestep: torch.Size, programs: int, row_blocks: int
) -> Tensor | None:
    """The tensor into which a backward kernel writes the threshold's gradient, in parts that are then summed
    over dim 0; for FULL the gradient itself. None if the threshold is a number."""
    if kind == NUMBER:
        return None
    if kind == SCALAR:
        shape: tuple[int, ...] = (programs,)
    else:
        shape = (row_blocks, timestep[-1]) if kind == PER_CHANNEL else timestep
    return like.new_empty(shape, dtype=torch.float32)


def threshold_gradient(kind: int, partial: Tensor | None, threshold: Tensor | float) -> Tensor | None:
    """The threshold's gradient, from the tensor that `threshold_partial` made and a kernel filled."""
    if partial is None or not isinstance(threshold, Tensor):
        return None
    if kind != PER_CHANNEL:
        return partial if kind == FULL else partial.sum(0).view(threshold.shape)
    grad = partial.new_empty(threshold.shape)
    sum_parts(partial, grad)
    return grad


@triton.jit
def times(x, y):
    """x y, rounded before anything is added. As an instruction of its own, since Triton 3.6 fuses products
    and sums on sm_100 although told not to."""
    if PLAIN:
        return x * y
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def as_float(x):
    """x in float32. For two bfloat16 in a register: two instructions, where the compiler's own take three."""
    if PLAIN or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def standardised(x, mean, rstd, DTYPE: tl.constexpr, STATISTICS: tl.constexpr):
    """z = (x - mean) rstd; x is float32, converted from DTYPE. For row statistics and 16-bit x: one fused
    operation with an error of about 6e-8 |mean| rstd, where x itself is rounded to 2^-9 or 2^-12 of its size.
    """
    if STATISTICS == 0 or DTYPE == tl.float32:  # noqa: SIM300
        return (x - mean) * rstd
    else:
        return tl.fma(x, rstd, -times(mean, rstd))


@triton.jit
def affine(z, weight, bias, STATISTICS: tl.constexpr):
    """z weight + bias; with channel statistics (STATISTICS 0) rounded twice, as in the reference."""
    if STATISTICS == 0:
        return times(z, weight) + bias
    else:
        return tl.fma(z, weight, bias)


@triton.jit
def over_tau(x, tau, RECIPROCAL: tl.constexpr):
    """x / tau, rounded once. With RECIPROCAL, the argument `tau` holds 1 / tau."""
    if RECIPROCAL:
        return x * tau  # by a power of two, which is exact: fusing it with a sum changes nothing
    else:
        return tl.div_rn(x, tau)


@triton.jit
def charge(x, v, tau, v_reset, RECIPROCAL: tl.constexpr, HARD: tl.constexpr, DECAY_INPUT: tl.constexpr):
    """Membrane potential h after the input x, before firing. `v` = None stands for 0."""
    if v is None:
        if HARD == 1:
            if DECAY_INPUT:
                return over_tau(x + v_reset, tau, RECIPROCAL)
            else:
                return x + over_tau(v_reset, tau, RECIPROCAL)
        elif DECAY_INPUT:
            return over_tau(x, tau, RECIPROCAL)
        else:
            return x
    else:
        leak = v
        if HARD == 1:
            leak = v - v_reset
        if DECAY_INPUT:
            return v + over_tau(x - leak, tau, RECIPROCAL)
        else:
            return v + x - over_tau(leak, tau, RECIPROCAL)


@triton.jit
def reset(h, fired, threshold, v_reset, HARD: tl.constexpr):
    """Membrane potential after firing."""
    if HARD:
        return tl.where(fired, v_reset, h)
    else:
        return tl.where(fired, h - threshold, h)


@triton.jit
def unless_fired(carry, h, threshold):
    """carry where the neuron did not fire, else 0. Comparing h again takes one instruction; the compiler
    would keep the result of the forward walk as a bit of a register, which takes three to set and read."""
    if PLAIN:
        return tl.where(h >= threshold, 0.0, carry)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 silent; set.ltu.u32.f32 silent, $2, $3; and.b32 $0, $1, silent; }",
            "=r,r,f,f", [carry, h, threshold], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def plus_unless_fired(grad_u, carry, keep, h, threshold):
    """grad_u + carry keep where the neuron did not fire, else grad_u: a predicated fused multiply-add.
    The comparison is a `set` and not a `setp` for the reason given in `unless_fired`."""
    if PLAIN:
        return tl.where(h >= threshold, grad_u, grad_u + carry * keep)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 silent; set.ltu.u32.f32 silent, $4, $5; setp.ne.u32 p, silent, 0; "
            "mov.b32 $0, $1; @p fma.rn.f32 $0, $2, $3, $1; }",
            "=&f,f,f,f,f,f", [grad_u, carry, keep, h, threshold], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def fire_backward(
    grad_s,
    carry,
    keep,
    h,
    threshold,
    v_reset,
    alpha,
    HARD: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    ROOM: tl.constexpr,
):
    """(dL/dh, this timestep's term of dL/dthreshold). carry keep is dL/dv after the timestep; carry = None
    stands for 0. carry and both results are divided by the surrogate's `height`: the caller multiplies sums
    by it, which takes fewer instructions than multiplying every element."""
    slope = shape(h, threshold, alpha, SURROGATE)
    if carry is None:
        if HARD and not DETACH:
            grad_s = grad_s + 0.0 * (v_reset - h)  # NaN where h is not finite, as with a carry of 0
        grad_u = grad_s * slope
        return grad_u, -grad_u
    elif HARD and ROOM and DETACH:
        grad_u = grad_s * slope
        return plus_unless_fired(grad_u, carry, keep, h, threshold), -grad_u
    elif HARD:
        carry = carry * keep
        if not DETACH:
            grad_s = grad_s + carry * (height(alpha, SURROGATE) * (v_reset - h))
        grad_u = grad_s * slope
        return grad_u + unless_fired(carry, h, threshold), -grad_u
    else:
        carry = carry * keep
        if not DETACH:
            grad_s = grad_s - carry * (height(alpha, SURROGATE) * threshold)
        grad_u = grad_s * slope
        return grad_u + carry, unless_fired(carry, h, threshold) - carry - grad_u


@triton.jit
def count(u, levels):
    """The integer that an I-LIF emits for the input u = x / v_threshold; comparisons keep a NaN."""
    s = tl.floor(u + 0.5)
    s = tl.where(s < 0, 0.0, s)
    return tl.where(s > levels, levels, s)


@triton.jit
def load_inside(at, inside):
    """Load, with 0 where not `inside`; `inside` = None loads everything."""
    if inside is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def inside_of(r, rows, c, channels, FITS: tl.constexpr):
    """The mask of a tile's elements that are inside x. FITS: no tile reaches beyond the channels."""
    if FITS:
        return r < rows
    else:
        return (r < rows) & (c < channels)


@triton.jit
def load_threshold(threshold_ptr, number, c, c_inside, at, inside, THRESHOLD: tl.constexpr):
    """The threshold of a tile: channels c, elements `at` of a timestep. THRESHOLD is its kind."""
    if THRESHOLD == 0:
        return number
    elif THRESHOLD == 1:
        return tl.load(threshold_ptr)
    elif THRESHOLD == 2:
        return tl.load(threshold_ptr + c, mask=c_inside, other=0.0)
    else:
        return load_inside(threshold_ptr + at, inside)


@triton.jit
def as_spikes(fired, dtype: tl.constexpr):
    """0 and 1 in `dtype`, by way of float32 because the interpreter can't convert bool to bfloat16."""
    return tl.where(fired, 1.0, 0.0).to(dtype)


@triton.jit
def load_slices(at, c, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SLICES: tl.constexpr):
    """Values per channel as a tuple of float32 tiles, one per slice, all BLOCK_R rows equal. Had they a
    single row, the compiler would choose a layout of its own for it and then use that for x as well, so
    that bfloat16 would be loaded one at a time."""
    slices = ()
    for s in tl.static_range(SLICES):
        here = c + s * BLOCK_C + tl.zeros((BLOCK_R, 1), tl.int32)
        slices = slices + (tl.load(at + here, mask=here < channels, other=0.0).to(tl.float32),)
    return slices


@triton.jit
def load_steps(at_first, stride_t, inside, COUNT: tl.constexpr):
    """Tiles of COUNT timesteps as a tuple, all loaded before the first is used.

    The address is incremented from timestep to timestep: products t * stride, hoisted out of a loop over
    rows, would take two registers each.
    """
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (load_inside(at_first, inside),)
        at_first += stride_t
    return tiles


@triton.jit
def tile_columns(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The WIDTH columns of a tile, a power of two, as a tuple of vectors."""
    if WIDTH == 1:
        return (tl.reshape(tile, (ROWS,)),)
    else:
        even, odd = tl.split(tl.reshape(tile, (ROWS, WIDTH // 2, 2)))
        evens = tile_columns(even, ROWS, WIDTH // 2)
        odds = tile_columns(odd, ROWS, WIDTH // 2)
        both = ()
        for i in tl.static_range(WIDTH // 2):
            both = both + (evens[i], odds[i])
        return both


@triton.jit
def _joined(tiles, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles, a power of two, every STEPth from FIRST on, as one tensor with a new dimension a join."""
    if COUNT == 1:
        return tiles[FIRST]
    else:
        return tl.join(
            _joined(tiles, FIRST, 2 * STEP, COUNT // 2), _joined(tiles, FIRST + STEP, 2 * STEP, COUNT // 2)
        )


@triton.jit
def _sums_of(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Sums along the rows of COUNT tiles, by one reduction, as a tuple."""
    rows: tl.constexpr = tiles[0].shape[0]
    return tile_columns(tl.reshape(tl.sum(_joined(tiles, FIRST, 1, COUNT), 1), (rows, COUNT)), rows, COUNT)


@triton.jit
def row_sums(tiles, COUNT: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sums along the rows of COUNT tiles, as a tuple. AT_ONCE of them, a power of two up to 16, share one
    reduction: their shuffles interleave, and warps that share a row wait for each other once."""
    sums = ()
    for i in tl.static_range(COUNT // AT_ONCE):
        sums = sums + _sums_of(tiles, i * AT_ONCE, AT_ONCE)
    for log in tl.static_range(3, -1, -1):
        if 2**log < AT_ONCE and COUNT // 2**log % 2 == 1:
            sums = sums + _sums_of(tiles, COUNT // 2 ** (log + 1) * 2 ** (log + 1), 2**log)
    return sums


@triton.jit
def potentials(
    xs, v, threshold, tau, v_reset, COUNT: tl.constexpr, RECIPROCAL: tl.constexpr, HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
):  # fmt: skip
    """(h of COUNT timesteps, v after them), from v before them and inputs xs."""
    hs = ()
    for i in tl.static_range(COUNT):
        h = charge(as_float(xs[i]), v, tau, v_reset, RECIPROCAL, HARD, DECAY_INPUT)
        hs = hs + (h,)
        v = reset(h, h >= threshold, threshold, v_reset, HARD)
    return hs, v
