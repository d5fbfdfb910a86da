"""Instructions on registers: sums, products, comparisons, conversions, bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.machine import (
    STORED,
    TYPES,
    UNSIGNED,
    Array,
    Batch,
    Read,
    Step,
    makes,
    over,
    parts,
    source,
    target,
    widened,
)
from ptx.numbers import flush, fma, from_bf16, to_bf16, to_f16, to_f32
from ptx.parse import Instruction, Kernel, Number, Operand, Register, Vector

INTEGER, BITS = "[su](16|32|64)", "b(16|32|64)"
F16, F32 = "b?f16(x2)?", r"(ftz\.)?f32"
FLOAT = rf"{F32}(x2)?|{F16}|f32\.b?f16"  # the last: of 16-bit numbers and, added, a float32


def values(kernel: Kernel, operand: Operand, kind: str, ftz: bool = False) -> Read:
    """An operand to compute with: 16-bit floats as float32, both of a pair (x2) as [2, threads]."""
    single = kind.removesuffix("x2")
    read = source(kernel, operand, TYPES[kind] if single == kind else UNSIGNED[2 * _size(single)])
    if single != kind:
        both = read
        read = lambda b: np.ascontiguousarray(over(b, both)).view(TYPES[single]).reshape(-1, 2).T  # noqa: E731
    if single == "bf16":
        return lambda b: from_bf16(read(b))
    if single == "f16":
        return lambda b: np.asarray(read(b)).astype(np.float32)
    return (lambda b: flush(read(b))) if ftz and single == "f32" else read


def packed(result: Any, kind: str, ftz: bool = False) -> Any:
    """What a register gets for such numbers: floats are rounded, pairs put together."""
    single = kind.removesuffix("x2")
    if single == "bf16":
        result = to_bf16(result)
    elif single == "f16":
        result = to_f16(result)
    elif single == "f32":
        result = flush(to_f32(result)) if ftz else to_f32(result)
    elif single == "f64":
        result = np.asarray(result, np.float64)
    if single == kind:
        return result
    return np.ascontiguousarray(result.T).view(UNSIGNED[2 * _size(single)]).reshape(-1)


def _size(kind: str) -> int:
    return np.dtype(TYPES[kind]).itemsize


def _elementwise(
    kernel: Kernel, ins: Instruction, function: Callable[..., Any], kinds: Sequence[str] = ()
) -> Step:
    """A function of all operands but the first, whose result the first gets. `kinds`: of the operands."""
    kind, ftz = ins.modifiers[-1], "ftz" in ins.modifiers
    to, operands = target(ins.operands[0]), ins.operands[1:]
    kinds = [*(kinds or [kind] * len(operands))]
    if "f32" in ins.modifiers[:-1]:
        kinds[-1] = kind = "f32"
    reads = [values(kernel, operand, k, ftz) for operand, k in zip(operands, kinds, strict=True)]
    return lambda b: b.write(to, packed(function(*(read(b) for read in reads)), kind, ftz))


def _quotient(a: Any, b: Any) -> Any:
    """Of integers, towards zero."""
    b = np.where(b == 0, 1, b)  # means nothing
    whole = np.floor_divide(a, b)
    return whole + ((np.remainder(a, b) != 0) & (whole < 0)) if np.asarray(a).dtype.kind == "i" else whole


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b,
}  # fmt: skip


@makes("add sub mul", rf"(rn\.)?({FLOAT}|f64)")
@makes("add sub div rem", INTEGER)
@makes("and or xor", f"{BITS}|pred")
def binary(kernel: Kernel, ins: Instruction) -> Step:
    """Sums and products of 16-bit floats are rounded to float32 first, whose bits are enough for that."""
    return _elementwise(kernel, ins, BINARY[ins.name])


@makes("div", rf"(rn|full)\.{F32}")
def divide(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, lambda a, b: np.asarray(a, np.float64) / b)


@makes("fma", rf"rn\.({FLOAT})")
@makes("mad", rf"rn\.{F32}")
def fused(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, fma)


def _lesser(a: Any, b: Any) -> Any:
    """Of a NaN and a number the number, of two zeros the negative."""
    return np.where((a < b) | np.isnan(b) | (a == b) & np.signbit(a), a, b)


@makes("min max", rf"{INTEGER}|(ftz\.)?(NaN\.)?f32|(NaN\.)?{F16}")
def extremum(kernel: Kernel, ins: Instruction) -> Step:
    if ins.modifiers[-1][0] in "su":
        return _elementwise(kernel, ins, np.minimum if ins.name == "min" else np.maximum)
    sign = 1 if ins.name == "min" else -1

    def extreme(*of: Any) -> Any:
        found = sign * functools.reduce(_lesser, [sign * x for x in of])
        if "NaN" not in ins.modifiers:
            return found
        return np.where(functools.reduce(np.logical_or, [np.isnan(x) for x in of]), np.nan, found)

    return _elementwise(kernel, ins, extreme)


def _left(a: Any, n: Any) -> Any:
    a = np.asarray(a)
    bits = a.dtype.itemsize * 8
    return np.where(n >= bits, a.dtype.type(0), np.left_shift(a, np.minimum(n, bits - 1).astype(a.dtype)))


def _right(a: Any, n: Any) -> Any:
    a = np.asarray(a)
    bits = a.dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(n, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), shifted)


@makes("shl", BITS)
@makes("shr", "[bsu](16|32|64)")
def shift(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, _left if ins.name == "shl" else _right, (ins.modifiers[-1], "u32"))


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


UNARY: dict[str, Callable[[Any], Any]] = {
    "not": np.invert, "neg": np.negative, "abs": np.abs,
    "rcp": lambda x: 1 / np.asarray(x, np.float64),
    "sqrt": lambda x: np.sqrt(np.asarray(x, np.float64)),
    "rsqrt": lambda x: 1 / np.sqrt(np.asarray(x, np.float64)),
    "ex2": lambda x: np.exp2(np.asarray(x, np.float64)),
    "lg2": lambda x: np.log2(np.asarray(x, np.float64)),
    "popc": _ones, "clz": _leading_zeros, "brev": _reversed,
}  # fmt: skip


@makes("not", f"{BITS}|pred")
@makes("neg abs", rf"s(16|32|64)|{F32}|f64|{F16}")
@makes("rcp sqrt", rf"(rn|approx)\.{F32}")
@makes("rsqrt ex2 lg2", rf"approx\.{F32}")
@makes("popc clz brev", "b(32|64)")
def unary(kernel: Kernel, ins: Instruction) -> Step:
    return _elementwise(kernel, ins, UNARY[ins.name])


def _product(a: Any, b: Any, part: str) -> Any:
    a, b = np.asarray(a), np.asarray(b)
    if part == "lo":
        return a * b
    twice = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    full = a.astype(twice) * b.astype(twice)
    return full if part == "wide" else (full >> twice.type(8 * a.dtype.itemsize)).astype(a.dtype)


@makes("mul mad", rf"lo\.{INTEGER}|(hi|wide)\.[su](16|32)")
def multiply(kernel: Kernel, ins: Instruction) -> Step:
    part, kind = ins.modifiers
    wide = f"{kind[0]}{2 * int(kind[1:])}" if part == "wide" else kind
    kinds = (kind, kind, wide)[: len(ins.operands) - 1]
    return _elementwise(kernel, ins, lambda a, b, c=0: _product(a, b, part) + c, kinds)


@makes("bfe", "[su]32")
def extract(kernel: Kernel, ins: Instruction) -> Step:
    """`len` bits from `pos` on, with the sign of the highest where signed."""

    def bits(value: Any, pos: Any, length: Any) -> Any:
        value = np.asarray(value)
        wide = np.int64 if value.dtype.kind == "i" else np.uint64
        at = np.minimum(pos & 255, 63).astype(wide)
        unused = (64 - np.minimum(length & 255, 32)).astype(wide)  # of 64 bits
        found = value.astype(wide) >> at << np.minimum(unused, 63) >> np.minimum(unused, 63)
        return np.where(unused == 64, wide(0), found).astype(value.dtype)

    return _elementwise(kernel, ins, bits, (ins.modifiers[0], "u32", "u32"))


@makes("bfi", "b(32|64)")
def insert(kernel: Kernel, ins: Instruction) -> Step:
    """`len` bits of one number in another, from `pos` on."""
    kind = TYPES[ins.modifiers[0]]
    bits = 8 * np.dtype(kind).itemsize

    def inserted(new: Any, old: Any, pos: Any, length: Any) -> Any:
        at, count = (np.minimum(x & 255, bits).astype(np.uint64) for x in (pos, length))
        some = (np.uint64(1) << np.minimum(count, 63)) - np.uint64(1)
        ones = np.where(count >= 64, np.uint64(2**64 - 1), some)
        mask = np.where(at >= 64, np.uint64(0), ones << np.minimum(at, 63))
        moved = np.asarray(new).astype(np.uint64) << np.minimum(at, 63)
        return ((moved & mask) | (np.asarray(old).astype(np.uint64) & ~mask)).astype(kind)

    return _elementwise(kernel, ins, inserted, (*ins.modifiers, *ins.modifiers, "u32", "u32"))


def _both(low: Any, high: Any) -> Any:
    """Two registers as one of 64 bits."""
    return np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)


@makes("prmt", "b32")
def permute(kernel: Kernel, ins: Instruction) -> Step:
    """Four of eight bytes, or their signs."""

    def chosen(low: Any, high: Any, choice: Any) -> Any:
        both, choice = _both(low, high), np.asarray(choice).astype(np.uint64)
        out = np.zeros(np.broadcast(both, choice).shape, np.uint64)
        for i in range(4):
            which = (choice >> np.uint64(4 * i)) & np.uint64(15)
            octet = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            octet = np.where(which & np.uint64(8), (octet >> np.uint64(7)) * np.uint64(255), octet)
            out |= octet << np.uint64(8 * i)
        return out.astype(np.uint32)

    return _elementwise(kernel, ins, chosen)


@makes("lop3", "b32")
def logic(kernel: Kernel, ins: Instruction) -> Step:
    """Any function of three bits, by a table: its bit 4 a + 2 b + c."""
    *_, table = ins.operands
    assert isinstance(table, Number)

    def looked_up(x: Any, y: Any, z: Any, _: Any) -> Any:
        out = np.zeros(np.broadcast(x, y, z).shape, np.uint32)
        for i in range(8):
            if table.value >> i & 1:
                out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return out

    return _elementwise(kernel, ins, looked_up)


@makes("shf", r"[lr]\.(wrap|clamp)\.b32")
def funnel(kernel: Kernel, ins: Instruction) -> Step:
    """32 of the 64 bits of two registers."""
    way, mode, _ = ins.modifiers

    def shifted(low: Any, high: Any, by: Any) -> Any:
        n = np.asarray(by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))).astype(
            np.uint64
        )
        both = _both(low, high)
        return (both << n >> np.uint64(32) if way == "l" else both >> n).astype(np.uint32)

    return _elementwise(kernel, ins, shifted)


ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if np.asarray(a).dtype.kind == "f" else a != b,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")  # true of a NaN
TEST = "|".join((*ORDERED, *UNORDERED))
COMPARED = rf"{F32}|f64|{F16}|[bsu](16|32|64)"


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    if name in UNORDERED:
        return lambda a, b: np.isnan(a) | np.isnan(b) | ORDERED[name[:2]](a, b)
    return ORDERED[name]


@makes("setp", rf"({TEST})(\.(and|or|xor))?\.({COMPARED})")
def compare(kernel: Kernel, ins: Instruction) -> Step:
    """The second result is the opposite; of pairs, what the second of each give."""
    kind, ftz, test = ins.modifiers[-1], "ftz" in ins.modifiers, _comparison(ins.modifiers[0])
    targets = [target(part) for part in parts(ins.operands[0])]
    a, b_ = (values(kernel, operand, kind, ftz) for operand in ins.operands[1:3])
    join = BINARY.get(ins.modifiers[1])
    other = source(kernel, ins.operands[3], np.bool_) if join else None

    def run(b: Batch) -> None:
        found = np.asarray(test(a(b), b_(b)))
        for name, value in zip(targets, found if kind.endswith("x2") else (found, ~found), strict=False):
            b.write(name, join(value, other(b)) if join and other else value)

    return run


@makes("set", rf"({TEST})\.(f32|[su]32)\.({COMPARED})")
def compare_to_bits(kernel: Kernel, ins: Instruction) -> Step:
    """All bits where it holds; 1.0 where the result is a float."""
    test, to_kind, kind = _comparison(ins.modifiers[0]), ins.modifiers[1], ins.modifiers[-1]
    to = target(ins.operands[0])
    a, b_ = (values(kernel, operand, kind, "ftz" in ins.modifiers) for operand in ins.operands[1:3])
    yes = np.float32(1) if to_kind == "f32" else np.uint32(2**32 - 1)
    return lambda b: b.write(to, np.where(test(a(b), b_(b)), yes, type(yes)(0)))


@makes("selp", "[bsu](16|32|64)|f(32|64)")
def select(kernel: Kernel, ins: Instruction) -> Step:
    kind = UNSIGNED[_size(ins.modifiers[0])]
    to = target(ins.operands[0])
    a, b_ = (source(kernel, operand, kind) for operand in ins.operands[1:3])
    where = source(kernel, ins.operands[3], np.bool_)
    return lambda b: b.write(to, np.where(where(b), a(b), b_(b)))


@makes("mov", "[bsu](16|32|64)|f(32|64)|pred")
def move(kernel: Kernel, ins: Instruction) -> Step:
    kind = TYPES[ins.modifiers[0]]
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


@makes("cvta", r"(to\.)?(global|shared(::cta)?)\.u64")
def to_generic(kernel: Kernel, ins: Instruction) -> Step:
    """Addresses are what they are: no kernel here has addresses of two kinds."""
    to, read = target(ins.operands[0]), source(kernel, ins.operands[1], np.uint64)
    return lambda b: b.write(to, read(b))


ROUNDINGS = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
WHOLE = "|".join(ROUNDINGS)
NUMBER = "[su](8|16|32|64)"


@makes("cvt", rf"{NUMBER}\.{NUMBER}")
def convert_integer(kernel: Kernel, ins: Instruction) -> Step:
    """Cut off, or made wider by the sign of what it was."""
    to, (kind, given) = target(ins.operands[0]), ins.modifiers
    read, stored = source(kernel, ins.operands[1], TYPES[given]), STORED[kernel.registers[to]]
    return lambda b: b.write(to, widened(np.asarray(read(b)).astype(TYPES[kind]), stored))


@makes("cvt", rf"rn\.(b?f16\.[su](8|16|32)|f(32|64)\.{NUMBER})")
def convert_to_float(kernel: Kernel, ins: Instruction) -> Step:
    to, (_, kind, given) = target(ins.operands[0]), ins.modifiers
    read, exact = (
        source(kernel, ins.operands[1], TYPES[given]),
        np.float64 if kind[-2:] == "16" else TYPES[given],
    )
    return lambda b: b.write(to, packed(np.asarray(read(b)).astype(exact), kind))


@makes("cvt", rf"({WHOLE})\.((ftz\.)?{NUMBER}\.f32|{NUMBER}\.(f64|b?f16))")
def convert_to_integer(kernel: Kernel, ins: Instruction) -> Step:
    """The nearest that there is; 0 for NaN."""
    to, (kind, given) = target(ins.operands[0]), ins.modifiers[-2:]
    rounding, stored = ROUNDINGS[ins.modifiers[0]], STORED[kernel.registers[to]]
    read, to_type = values(kernel, ins.operands[1], given, "ftz" in ins.modifiers), TYPES[kind]
    least, most = (to_type(limit) for limit in (np.iinfo(to_type).min, np.iinfo(to_type).max))

    def run(b: Batch) -> None:
        value = rounding(np.asarray(read(b)).astype(np.float64))
        inside = (value > float(least)) & (value < float(most))
        beyond = np.where(value > 0, most, np.where(np.isnan(value), to_type(0), least))
        b.write(to, widened(np.where(inside, np.where(inside, value, 0).astype(to_type), beyond), stored))

    return run


@makes("cvt", rf"({WHOLE})\.({F32}\.f32|f64\.f64|f16\.f16|bf16\.bf16)")
@makes("cvt", r"rn\.((ftz\.)?b?f16\.f32|b?f16\.f64|(ftz\.)?f32\.f64|f16\.bf16|bf16\.f16)")
@makes("cvt", rf"{F32}\.b?f16|f64\.b?f16|(ftz\.)?f64\.f32")
def convert_float(kernel: Kernel, ins: Instruction) -> Step:
    to, (kind, given), ftz = target(ins.operands[0]), ins.modifiers[-2:], "ftz" in ins.modifiers
    read, rounding = values(kernel, ins.operands[1], given, ftz), ROUNDINGS.get(ins.modifiers[0], np.asarray)
    return lambda b: b.write(to, packed(rounding(read(b)), kind, ftz))


@makes("cvt", r"rn\.b?f16x2\.f32")
def convert_two(kernel: Kernel, ins: Instruction) -> Step:
    to, kind = target(ins.operands[0]), ins.modifiers[1]
    high, low = (source(kernel, operand, np.float32) for operand in ins.operands[1:])
    return lambda b: b.write(to, packed(np.stack(np.broadcast_arrays(low(b), high(b))), kind))
