"""Instructions on registers: sums, products, comparisons, conversions, bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.machine import (
    STORED,
    TYPES,
    UNSIGNED,
    Array,
    Batch,
    PTXError,
    Read,
    Step,
    makes,
    over,
    parts,
    source,
    target,
    widened,
)
from ptx.numbers import flush, fma, from_bf16, to_bf16, to_f16
from ptx.parse import Instruction, Kernel, Register, Vector

ROUNDINGS = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


def _min(*of: Any) -> Any:
    return functools.reduce(np.fmin if np.asarray(of[0]).dtype.kind == "f" else np.minimum, of)


def _max(*of: Any) -> Any:
    return functools.reduce(np.fmax if np.asarray(of[0]).dtype.kind == "f" else np.maximum, of)


def _quotient(a: Any, b: Any) -> Any:
    """Towards zero."""
    if np.asarray(a).dtype.kind == "f":
        return (np.asarray(a, np.float64) / b).astype(np.float32)
    b = np.where(b == 0, 1, b)
    whole = np.floor_divide(a, b)
    return whole + ((np.remainder(a, b) != 0) & (whole < 0)) if np.asarray(a).dtype.kind == "i" else whole


def _left(a: Any, n: Any) -> Any:
    bits = np.asarray(a).dtype.itemsize * 8
    return np.where(n >= bits, 0, np.left_shift(a, np.minimum(n, bits - 1).astype(a.dtype)))


def _right(a: Any, n: Any) -> Any:
    a = np.asarray(a)
    bits = a.dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(n, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), shifted)


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": _min, "max": _max, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}  # fmt: skip


def _reciprocal(x: Any) -> Any:
    return (1 / np.asarray(x, np.float64)).astype(np.float32)


UNARY: dict[str, Callable[[Any], Any]] = {
    "not": np.invert, "rcp": _reciprocal, "neg": np.negative, "abs": np.abs,
    "sqrt": lambda x: np.sqrt(np.asarray(x, np.float64)).astype(np.float32),
    "rsqrt": lambda x: (1 / np.sqrt(np.asarray(x, np.float64))).astype(np.float32),
    "ex2": lambda x: np.exp2(np.asarray(x, np.float64)).astype(np.float32),
    "lg2": lambda x: np.log2(np.asarray(x, np.float64)).astype(np.float32),
    "popc": lambda x: _ones(x),
    "clz": lambda x: _leading_zeros(x),
    "brev": lambda x: _reversed(x),
}  # fmt: skip


def _ones(x: Any) -> Array:
    x = np.ascontiguousarray(x)
    return np.unpackbits(x.view(np.uint8).reshape(x.size, -1), axis=1).sum(1, dtype=np.uint32)


def _leading_zeros(x: Any) -> Array:
    x = np.asarray(x)
    bits, left = x.dtype.itemsize * 8, x.copy()
    step = bits // 2
    count = np.zeros(x.shape, np.uint32)
    while step:
        empty = (left >> x.dtype.type(bits - step)) == 0
        count += np.where(empty, np.uint32(step), np.uint32(0))
        left = np.where(empty, left << x.dtype.type(step), left)
        step //= 2
    return count + (left >> x.dtype.type(bits - 1) == 0)


def _reversed(x: Any) -> Array:
    x = np.ascontiguousarray(x)
    size = x.dtype.itemsize
    octets = x.view(np.uint8).reshape(-1, size)[:, ::-1]
    spread = np.packbits(np.unpackbits(octets, axis=1, bitorder="big"), axis=1, bitorder="little")
    return spread.reshape(-1).view(x.dtype)


def _floating(kind: str) -> bool:
    return kind in ("f16", "bf16", "f16x2", "bf16x2")


def _narrow(kernel: Kernel, operand: Any, kind: str) -> Read:
    """A 16-bit operand in float32; of a pair [2, threads]."""
    if kind.endswith("x2"):
        read = source(kernel, operand, np.uint32)

        def halves(b: Batch) -> Array:
            both = np.asarray(read(b))
            pair = np.stack([both & np.uint32(0xFFFF), both >> np.uint32(16)]).astype(np.uint16)
            return from_bf16(pair) if kind[0] == "b" else pair.view(np.float16).astype(np.float32)

        return halves
    if kind == "bf16":
        read = source(kernel, operand, np.uint16)
        return lambda b: from_bf16(read(b))
    read = source(kernel, operand, np.float16)
    return lambda b: np.asarray(read(b)).astype(np.float32)


def _reader(kind: str) -> Callable[..., Read]:
    return _narrow if _floating(kind) else lambda kernel, operand, kind: source(kernel, operand, TYPES[kind])


def _narrowed(x: Array, kind: str) -> Array:
    rounded = to_bf16(x) if kind[0] == "b" else to_f16(x)
    if not kind.endswith("x2"):
        return rounded
    return rounded[0].astype(np.uint32) | rounded[1].astype(np.uint32) << np.uint32(16)


def _elementwise(
    kernel: Kernel, ins: Instruction, function: Callable[..., Any], kinds: tuple[str, ...] | None = None
) -> Step:
    """A function of all operands but the first, whose result the first gets."""
    kind = ins.modifiers[-1]
    to, operands = target(ins.operands[0]), ins.operands[1:]
    if kind == "f32x2":
        pairs = [source(kernel, operand, np.uint64) for operand in operands]
        return lambda b: b.write(to, _both(function, b, pairs))
    if _floating(kind):
        narrow = [_narrow(kernel, operand, kind) for operand in operands]
        if "f32" in ins.modifiers:  # a float32 sum of 16-bit numbers and, the last operand, a float32
            narrow[-1] = source(kernel, operands[-1], np.float32)
            return lambda b: b.write(to, function(*(read(b) for read in narrow)))
        return lambda b: b.write(to, _narrowed(function(*(read(b) for read in narrow)), kind))
    reads = [
        source(kernel, operand, TYPES[k])
        for operand, k in zip(operands, kinds or (kind,) * len(operands), strict=True)
    ]
    if kind == "f32" and "ftz" in ins.modifiers:
        return lambda b: b.write(to, flush(function(*(flush(read(b)) for read in reads))))
    return lambda b: b.write(to, function(*(read(b) for read in reads)))


def _both(function: Callable[..., Any], b: Batch, pairs: list[Read]) -> Array:
    """Of two float32 in 64 bits each."""
    values = (over(b, read) for read in pairs)
    result = function(*(np.ascontiguousarray(value).view(np.float32) for value in values))
    return np.asarray(result, np.float32).view(np.uint64)


@makes("add", "sub", "min", "max", "and", "or", "xor", "div", "rem")
def binary(kernel: Kernel, ins: Instruction) -> Step:
    if {"cc", "sat"} & set(ins.modifiers):
        raise NotImplementedError(ins.text)
    return _elementwise(kernel, ins, BINARY[ins.name])


@makes("not", "rcp", "neg", "abs", "sqrt", "rsqrt", "ex2", "lg2", "popc", "clz", "brev")
def unary(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, UNARY[ins.name])


@makes("shl", "shr")
def shift(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, _left if ins.name == "shl" else _right, (ins.modifiers[-1], "u32"))


def _product(a: Any, b: Any, part: str) -> Any:
    a, b = np.asarray(a), np.asarray(b)
    if part == "lo":
        return a * b
    twice = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    full = a.astype(twice) * b.astype(twice)
    return full if part == "wide" else (full >> twice.type(8 * a.dtype.itemsize)).astype(a.dtype)


@makes("mul", "mad")
def multiply(kernel: Kernel, ins: Instruction) -> Step:
    kind = ins.modifiers[-1]
    if kind.startswith(("f", "bf")):
        return _elementwise(kernel, ins, np.multiply if ins.name == "mul" else fma)
    part = ins.modifiers[0]
    to = target(ins.operands[0])
    a, b_ = (source(kernel, operand, TYPES[kind]) for operand in ins.operands[1:3])
    if ins.name == "mul":
        return lambda b: b.write(to, _product(a(b), b_(b), part))
    wide = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}
    plus = source(kernel, ins.operands[3], wide[kind] if part == "wide" else TYPES[kind])
    return lambda b: b.write(to, _product(a(b), b_(b), part) + plus(b))


@makes("fma")
def fused(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, fma)


@makes("bfe")
def extract(kernel: Kernel, ins: Instruction) -> Step:
    """`len` bits from `pos` on, with the sign of the highest where signed."""
    kind = ins.modifiers[-1]
    to = target(ins.operands[0])
    value = source(kernel, ins.operands[1], UNSIGNED[np.dtype(TYPES[kind]).itemsize])
    pos, length = (source(kernel, operand, np.uint32) for operand in ins.operands[2:])

    def run(b: Batch) -> None:
        x = np.asarray(value(b)).astype(np.uint64)
        if kind[0] == "s":  # the sign goes on to the left
            x = x.astype(TYPES[kind.replace("s", "u")]).view(TYPES[kind]).astype(np.int64).view(np.uint64)
        at, count = (np.minimum(f(b), 63).astype(np.uint64) for f in (pos, length))
        got = (x >> at) & ((np.uint64(1) << count) - np.uint64(1))
        if kind[0] == "s":
            top = np.uint64(1) << np.maximum(count, 1).astype(np.uint64) - np.uint64(1)
            got = np.where(count > 0, (got ^ top) - top, got)
        b.write(to, got.astype(UNSIGNED[np.dtype(TYPES[kind]).itemsize]))

    return run


@makes("bfi")
def insert(kernel: Kernel, ins: Instruction) -> Step:
    """`len` bits of one number in another, from `pos` on."""
    kind = TYPES[ins.modifiers[-1]]
    to = target(ins.operands[0])
    new, old = (source(kernel, operand, kind) for operand in ins.operands[1:3])
    pos, length = (source(kernel, operand, np.uint32) for operand in ins.operands[3:])
    bits = 8 * np.dtype(kind).itemsize

    def run(b: Batch) -> None:
        at, count = (np.minimum(f(b), bits).astype(np.uint64) for f in (pos, length))
        some = (np.uint64(1) << np.minimum(count, 63)) - np.uint64(1)
        ones = np.where(count >= 64, np.uint64(2**64 - 1), some)
        mask = np.where(at >= 64, np.uint64(0), ones << np.minimum(at, 63))
        inserted = np.asarray(new(b)).astype(np.uint64) << np.minimum(at, 63)
        b.write(to, ((inserted & mask) | (np.asarray(old(b)).astype(np.uint64) & ~mask)).astype(kind))

    return run


@makes("prmt")
def permute(kernel: Kernel, ins: Instruction) -> Step:
    """Four of eight bytes."""
    if ins.modifiers != ("b32",):
        raise NotImplementedError(ins.text)
    to = target(ins.operands[0])
    low, high, choice = (source(kernel, operand, np.uint32) for operand in ins.operands[1:])

    def run(b: Batch) -> None:
        both = np.asarray(low(b)).astype(np.uint64) | np.asarray(high(b)).astype(np.uint64) << np.uint64(32)
        chosen = np.asarray(choice(b)).astype(np.uint64)
        out = np.zeros(np.broadcast(both, chosen).shape, np.uint64)
        for i in range(4):
            which = (chosen >> np.uint64(4 * i)) & np.uint64(15)
            octet = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            octet = np.where(which & np.uint64(8), (octet >> np.uint64(7)) * np.uint64(255), octet)
            out |= octet << np.uint64(8 * i)
        b.write(to, out.astype(np.uint32))

    return run


@makes("lop3")
def logic(kernel: Kernel, ins: Instruction) -> Step:
    to = target(ins.operands[0])
    a, b_, c = (source(kernel, operand, np.uint32) for operand in ins.operands[1:4])
    table = ins.operands[4].value  # type: ignore[union-attr]

    def run(b: Batch) -> None:
        x, y, z = a(b), b_(b), c(b)
        out = np.zeros(b.threads, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        b.write(to, out)

    return run


@makes("shf")
def funnel(kernel: Kernel, ins: Instruction) -> Step:
    """32 of the 64 bits of two registers."""
    way, clamp, _ = ins.modifiers
    to = target(ins.operands[0])
    low, high, by = (source(kernel, operand, np.uint32) for operand in ins.operands[1:])

    def run(b: Batch) -> None:
        both = np.asarray(high(b)).astype(np.uint64) << np.uint64(32) | np.asarray(low(b)).astype(np.uint64)
        n = by(b) & np.uint32(31) if clamp == "wrap" else np.minimum(by(b), np.uint32(32))
        n = np.asarray(n).astype(np.uint64)
        b.write(to, (both << n >> np.uint64(32) if way == "l" else both >> n).astype(np.uint32))

    return run


ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if np.asarray(a).dtype.kind == "f" else a != b,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")  # true of a NaN


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    if name in UNORDERED:
        return lambda a, b: np.isnan(a) | np.isnan(b) | ORDERED[name[:2]](a, b)
    return ORDERED[name]


@makes("setp")
def compare(kernel: Kernel, ins: Instruction) -> Step:
    kind, test = ins.modifiers[-1], _comparison(ins.modifiers[0])
    joins = [m for m in ins.modifiers[1:-1] if m in ("and", "or", "xor")]
    targets = [target(part) for part in parts(ins.operands[0])]
    a, b_ = (_reader(kind)(kernel, operand, kind) for operand in ins.operands[1:3])
    other = source(kernel, ins.operands[3], np.bool_) if joins else None

    def run(b: Batch) -> None:
        found = np.asarray(test(a(b), b_(b)))
        if kind.endswith("x2"):
            for name, value in zip(targets, found, strict=True):
                b.write(name, value)
            return
        results = (found, ~found)
        if other is not None:
            results = tuple(BINARY[joins[0]](result, other(b)) for result in results)
        for name, value in zip(targets, results, strict=False):
            b.write(name, value)

    return run


@makes("set")
def compare_to_bits(kernel: Kernel, ins: Instruction) -> Step:
    """All bits where it holds; 1.0 where the result is a float."""
    test, to_kind, kind = _comparison(ins.modifiers[0]), ins.modifiers[-2], ins.modifiers[-1]
    to = target(ins.operands[0])
    a, b_ = (_reader(kind)(kernel, operand, kind) for operand in ins.operands[1:3])
    yes = np.float32(1) if to_kind == "f32" else np.uint32(2**32 - 1)
    return lambda b: b.write(to, np.where(test(a(b), b_(b)), yes, type(yes)(0)))


@makes("selp")
def select(kernel: Kernel, ins: Instruction) -> Step:
    kind = UNSIGNED[np.dtype(TYPES[ins.modifiers[-1]]).itemsize]
    to = target(ins.operands[0])
    a, b_ = (source(kernel, operand, kind) for operand in ins.operands[1:3])
    where = source(kernel, ins.operands[3], np.bool_)
    return lambda b: b.write(to, np.where(where(b), a(b), b_(b)))


@makes("mov")
def move(kernel: Kernel, ins: Instruction) -> Step:
    kind = TYPES[ins.modifiers[-1]]
    kind = np.bool_ if kind is np.bool_ else UNSIGNED[np.dtype(kind).itemsize]
    to, given = ins.operands
    if isinstance(given, Vector):
        pieces = [source(kernel, part, _share(kind, given)) for part in given.parts]
        return lambda b: b.write(target(to), _joined(kind, [read(b) for read in pieces]))
    read = source(kernel, given, kind)
    if isinstance(to, Vector):
        small = _share(kind, to)
        width = 8 * np.dtype(small).itemsize

        def split(b: Batch) -> None:
            value = read(b)
            for i, part in enumerate(to.parts):
                if isinstance(part, Register):
                    b.write(part.name, (np.asarray(value) >> kind(width * i)).astype(small))

        return split
    return lambda b: b.write(target(to), read(b))


def _share(kind: Any, vector: Vector) -> Any:
    return UNSIGNED[np.dtype(kind).itemsize // len(vector.parts)]


def _joined(kind: Any, pieces: list[Any]) -> Any:
    width = 8 * np.dtype(kind).itemsize // len(pieces)
    out = kind(0)
    for i, piece in enumerate(pieces):
        out = out | np.asarray(piece).astype(kind) << kind(width * i)
    return out


@makes("cvta")
def to_generic(kernel: Kernel, ins: Instruction) -> Step:
    """Addresses are what they are: no kernel here has addresses of two kinds."""
    to, read = target(ins.operands[0]), source(kernel, ins.operands[1], np.uint64)
    return lambda b: b.write(to, read(b))


@makes("cvt")
def convert(kernel: Kernel, ins: Instruction) -> Step:
    kind, given = ins.modifiers[-2:]
    to = target(ins.operands[0])
    if "sat" in ins.modifiers or "satfinite" in ins.modifiers:
        raise NotImplementedError(ins.text)
    if kind in ("bf16x2", "f16x2"):
        high, low = (source(kernel, operand, np.float32) for operand in ins.operands[1:3])
        return lambda b: b.write(to, _narrowed(np.stack(np.broadcast_arrays(low(b), high(b))), kind))
    read = _reader(given)(kernel, ins.operands[1], given)
    rounding = next((ROUNDINGS[m] for m in ins.modifiers if m in ROUNDINGS), None)
    if not _floating(kind) and not kind.startswith("f") and _is_float(given) and rounding is None:
        raise PTXError("a float becomes an integer without a rounding")
    if "rn" not in ins.modifiers and kind in ("f16", "bf16") and given == "f32":
        raise NotImplementedError(ins.text)
    stored = STORED[kernel.registers[to]]

    def run(b: Batch) -> None:
        value = np.asarray(read(b))
        if rounding is not None:
            value = rounding(value)
        if "ftz" in ins.modifiers and value.dtype == np.float32:
            value = flush(value)
        if _floating(kind):
            b.write(to, _narrowed(value.astype(np.float32), kind))
        elif kind.startswith("f"):
            b.write(to, value.astype(TYPES[kind]))
        else:
            if _is_float(given):
                low, high = np.iinfo(TYPES[kind]).min, np.iinfo(TYPES[kind]).max
                value = np.clip(np.nan_to_num(value.astype(np.float64)), float(low), float(high))
            b.write(to, widened(value.astype(TYPES[kind]), stored))

    return run


def _is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))
