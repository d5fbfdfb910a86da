"""Programs of a kernel side by side: registers, masks, and the walk through the code.

Threads that take different ways wait for each other where these meet: of all threads those at the lowest
address go on, but for those that wait for the rest of their program at a barrier.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.memory import Globals, Shared, TensorMemory
from ptx.parse import Address, Instruction, Kernel, Number, Operand, Register, Special, Symbol, Vector
from ptx.traffic import Traffic

Array = np.ndarray[Any, Any]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
STORED = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
STORED |= {"u16": np.uint16, "s16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s64": np.uint64}
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "f32": np.float32,
    "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
AT_ONCE = 1 << 14  # threads whose registers are worked on together
Step = Callable[["Batch"], None]
Read = Callable[["Batch"], Any]


class PTXError(Exception):
    """The code does what a GPU would not do, or what means nothing."""


@dataclass
class Batch:
    """Some programs, all of their threads: lane i of program j is thread j * per + i."""

    kernel: Kernel
    first: int  # number of the first program
    programs: int
    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    parameters: Mapping[str, int]
    memory: Globals
    shared: Shared
    tensor: TensorMemory
    traffic: Traffic | None = None
    registers: dict[str, Array] = field(default_factory=dict)
    arrivals: dict[tuple[int, int], int] = field(default_factory=dict)  # of each mbarrier
    mask: Array | None = None  # threads that are at this instruction; None: all

    def __post_init__(self) -> None:
        self.per = int(np.prod(self.block))
        self.threads = self.per * self.programs
        thread = np.tile(np.arange(self.per), self.programs)
        program = np.repeat(np.arange(self.first, self.first + self.programs), self.per)
        self.special = {"%laneid": (thread % 32).astype(np.uint32)}
        for axis, size, whole in zip("xyz", self.block, self.grid, strict=True):
            self.special[f"%tid.{axis}"] = (thread % size).astype(np.uint32)
            self.special[f"%ctaid.{axis}"] = (program % whole).astype(np.uint32)
            self.special[f"%ntid.{axis}"] = np.full(self.threads, size, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(self.threads, whole, np.uint32)
            thread, program = thread // size, program // whole
        self.every = np.arange(self.threads)

    def note(self, space: str, ins: Instruction, threads: Array, addresses: Array, size: int) -> None:
        """Count an access, where that is wanted."""
        if self.traffic is not None and threads.size:
            count = self.traffic.shared if space == "shared" else self.traffic.tensors
            count(self.kernel.name, f"{space} {ins.name}", threads, addresses, size)

    def active(self) -> Array:
        """Numbers of the threads at this instruction."""
        return self.every if self.mask is None else np.flatnonzero(self.mask)

    def write(self, name: str, value: Any) -> None:
        kind = STORED[self.kernel.registers[name]]
        value = np.asarray(value)
        if value.dtype != kind:
            value = value.view(kind)
        if value.shape != (self.threads,):
            value = np.full(self.threads, value)
        if self.mask is not None:
            value = np.where(self.mask, value, self.registers.get(name, kind(0)))
        self.registers[name] = value

    def whole(self, group: int, what: str) -> Array:
        """The threads at this instruction, [groups, group]: all or none of each group."""
        if self.mask is None:
            return self.every.reshape(-1, group)
        some = self.mask.reshape(-1, group)
        full = some.all(1)
        if (full != some.any(1)).any():
            raise PTXError(f"{what}: only a part of {group} threads is there")
        return self.every.reshape(-1, group)[full]


def source(kernel: Kernel, operand: Operand, kind: Any) -> Read:
    """What reads an operand as `kind`, an array over the threads or one number."""
    size = np.dtype(kind).itemsize
    if isinstance(operand, Register):
        name, kept = operand.name, np.dtype(STORED[kernel.registers[operand.name]])

        def read(b: Batch) -> Array:
            value = b.registers.get(name)
            if value is None:  # a half of a pair that is not used: NaN, for those that use it all the same
                value = np.full(b.threads, kept.type(0) if kept.kind == "b" else ~kept.type(0))
            return value if kept == kind else value.view(kind)

        if kept.itemsize < size:
            raise PTXError(f"{name} has {kept.itemsize} bytes, {size} are read")
        if kept.itemsize > size:
            return lambda b: b.registers[name].astype(UNSIGNED[size]).view(kind)
        return read
    if isinstance(operand, Special):
        return lambda b: b.special[operand.name].view(kind)
    if isinstance(operand, Symbol):
        address = kernel.shared[operand.name]
        return lambda _: kind(address)
    if isinstance(operand, Number):
        if kind is np.bool_:
            return lambda _: np.bool_(operand.value)
        value = np.array(operand.value % 2 ** (8 * size), UNSIGNED[size]).view(kind)[()]
        return lambda _: value
    raise PTXError(f"no value: {operand}")


def widened(value: Array, stored: Any) -> Array:
    """In a register that is wider: with the sign, where there is one."""
    if value.dtype.itemsize < np.dtype(stored).itemsize:
        signed = {2: np.int16, 4: np.int32, 8: np.int64}[np.dtype(stored).itemsize]
        value = value.astype(signed if value.dtype.kind == "i" else stored)
    return value


def over(b: Batch, read: Read) -> Array:
    """What an operand is in each thread."""
    return np.broadcast_to(np.asarray(read(b)), (b.threads,))


def target(operand: Operand) -> str:
    if not isinstance(operand, Register):
        raise PTXError(f"no register: {operand}")
    return operand.name


def reads(kernel: Kernel, operand: Operand, kind: Any) -> list[Read]:
    """What reads each part of an operand."""
    return [source(kernel, part, kind) for part in parts(operand)]


def parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


Maker = Callable[[Kernel, Instruction], Step]
MAKERS: dict[str, Maker] = {}


def makes(*names: str) -> Callable[[Maker], Maker]:
    """Says which instructions a function makes steps of."""

    def note(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return note


def guarded(step: Step, guard: tuple[str, bool]) -> Step:
    name, negated = guard

    def run(b: Batch) -> None:
        here = ~b.registers[name] if negated else b.registers[name]
        before = b.mask
        b.mask = here if before is None else before & here
        if b.mask.all():
            b.mask = None
        if b.mask is None or b.mask.any():
            step(b)
        b.mask = before

    return run


@dataclass
class Segment:
    """Code without a jump into or out of it, and how it ends: by a jump, a return, a barrier, or going on."""

    steps: list[tuple[Step, Instruction]]
    jump: str | None = None
    guard: tuple[str, bool] | None = None  # of the jump or return
    ends: bool = False
    waits: bool = False


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.name in ("bar", "barrier") and "warp" not in instruction.modifiers


def segments(kernel: Kernel) -> tuple[list[Segment], dict[str, int]]:
    """The code in pieces, and which piece each label names."""
    last = {i + 1 for i, x in enumerate(kernel.code) if x.name in ("bra", "ret", "exit") or _is_barrier(x)}
    starts = sorted({0, *kernel.labels.values()} | last)
    number = {start: i for i, start in enumerate(starts)}
    pieces = []
    for start, end in itertools.pairwise([*starts, len(kernel.code)]):
        piece = Segment([])
        for instruction in kernel.code[start:end]:
            if instruction.name == "bra":
                label = instruction.operands[0]
                assert isinstance(label, Symbol)
                piece.jump, piece.guard = label.name, instruction.guard
            elif instruction.name in ("ret", "exit"):
                piece.ends, piece.guard = True, instruction.guard
            else:
                if instruction.name not in MAKERS:
                    raise NotImplementedError(instruction.text)
                step, guard = MAKERS[instruction.name](kernel, instruction), instruction.guard
                piece.steps.append((guarded(step, guard) if guard else step, instruction))
                piece.waits = _is_barrier(instruction)
        pieces.append(piece)
    return pieces, {label: number[at] for label, at in kernel.labels.items() if at in number}


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: list[int],
    shared_size: int,
    memory: Globals,
    traffic: Traffic | None = None,
) -> None:
    """Run a kernel. `arguments`: the bits of each parameter, in order; `shared_size`: bytes a program;
    `traffic` counts what is moved."""
    whole, threads = _three(grid), _three(block)
    pieces, labels = segments(kernel)
    names = [name for name, _ in kernel.parameters]
    parameters = dict(zip(names, arguments, strict=True))
    programs, per = int(np.prod(whole)), int(np.prod(threads))
    together = max(1, AT_ONCE // per)
    uses_tensors = any(instruction.name == "tcgen05" for instruction in kernel.code)
    for first in range(0, programs, together):
        count = min(together, programs - first)
        shared = Shared(count, per, shared_size)
        tensor = TensorMemory(count if uses_tensors else 0)
        batch = Batch(kernel, first, count, threads, whole, parameters, memory, shared, tensor, traffic)
        with np.errstate(all="ignore"):
            _walk(batch, pieces, labels)


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _walk(b: Batch, pieces: list[Segment], labels: Mapping[str, int]) -> None:
    end = len(pieces)
    at = np.zeros(b.threads, np.int64)
    waiting = np.zeros(b.threads, bool)
    while (at < end).any():
        ready = np.where(waiting, end, at)
        here = int(ready.min())
        if here == end:  # who is not at a barrier is done
            b.shared.barrier(np.flatnonzero(np.repeat(waiting.reshape(-1, b.per).any(1), b.per)))
            waiting[:] = False
            continue
        piece = pieces[here]
        mask = ready == here
        b.mask = None if mask.all() else mask
        for step, instruction in piece.steps:
            try:
                step(b)
            except (PTXError, KeyError, ValueError, IndexError, TypeError) as error:
                raise PTXError(f"{b.kernel.name}: {instruction.text}: {error}") from error
        after = end if piece.ends else labels[piece.jump] if piece.jump is not None else here + 1
        if piece.guard is not None:
            name, negated = piece.guard
            taken = ~b.registers[name] if negated else b.registers[name]
            at[mask & taken], at[mask & ~taken] = after, here + 1
        else:
            at[mask] = after
        if piece.waits:
            waiting[mask] = True


def address(kernel: Kernel, operand: Operand, wide: bool) -> Callable[[Batch], Array]:
    """Addresses over all threads, int64."""
    assert isinstance(operand, Address)
    base = source(kernel, operand.base, np.uint64 if wide else np.uint32)

    def read(b: Batch) -> Array:
        return over(b, base).astype(np.int64) + operand.offset

    return read
