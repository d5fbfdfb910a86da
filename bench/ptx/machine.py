"""Programs of a kernel side by side: registers, masks, and the walk through the code.

Threads that take different ways wait for each other where these meet: of all threads those at the lowest
address go on, but for those that wait for the rest of their program at a barrier, or for an mbarrier.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.memory import Clock, Globals, Shared, TensorMemory
from ptx.parse import (
    Address,
    Instruction,
    Kernel,
    Negated,
    Number,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)
from ptx.traffic import Traffic

Array = np.ndarray[Any, Any]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
STORED = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "f32": np.float32,
    "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
AT_ONCE = 1 << 14  # threads whose registers are worked on together
SPECIAL = {"%laneid"} | {f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"}
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
    shared_size: int
    traffic: Traffic | None = None
    registers: dict[str, Array] = field(default_factory=dict)
    # of registers that products under way write or read, by name: of each thread the group + 1, or 0
    away: dict[str, Array] = field(default_factory=dict)
    lent: dict[str, Array] = field(default_factory=dict)
    arrivals: dict[tuple[int, int], int] = field(default_factory=dict)  # of each mbarrier
    arrived: int = 0  # at all of them
    tried: tuple[int, int] | None = None  # `arrived`, and how many threads spun when they were let go
    mask: Array | None = None  # threads that are at this instruction; None: all

    def __post_init__(self) -> None:
        self.per = int(np.prod(self.block))
        self.threads = self.per * self.programs
        self.clock = Clock(self.first * self.per, self.threads, self.per)
        self.shared = Shared(self.clock, self.programs, self.shared_size)
        uses_tensors = any(instruction.name == "tcgen05" for instruction in self.kernel.code)
        self.tensor = TensorMemory(self.clock, self.programs if uses_tensors else 0)
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
        self.spinning = np.zeros(self.threads, bool)  # an mbarrier was asked in vain

    def note(self, space: str, ins: Instruction, threads: Array, addresses: Array, size: int) -> None:
        """Count an access, where that is wanted."""
        if self.traffic is not None and threads.size:
            count = self.traffic.shared if space == "shared" else self.traffic.tensors
            count(self.kernel.name, f"{space} {ins.name}", threads, addresses, size)

    def active(self) -> Array:
        """Numbers of the threads at this instruction."""
        return self.every if self.mask is None else np.flatnonzero(self.mask)

    def value(self, name: str) -> Array:
        """A register, whether or not it was waited for. All ones where nobody wrote it, which are NaN:
        code may compute with a half of a pair that it never uses."""
        value = self.registers.get(name)
        return self._unset(name) if value is None else value

    def _unset(self, name: str) -> Array:
        kind = STORED[self.kernel.registers[name]]
        return np.full(self.threads, False if kind is np.bool_ else np.iinfo(kind).max, kind)

    def waited(self, name: str) -> Array:
        """A register, for what a product would leave there later than it does here."""
        if name in self.away and self.away[name][self.active()].any():
            raise PTXError(f"{name} is read before it was waited for")
        return self.value(name)

    def multiply(self, writes: list[str], reads: list[str], groups: Array) -> None:
        """Registers of the threads at this instruction are a product's, until `wait_for_products` of their
        groups."""
        for names, users in ((writes, self.away), (reads, self.lent)):
            for name in names:
                users.setdefault(name, np.zeros(self.threads, np.int64))[self.active()] = groups + 1

    def wait_for_products(self, last: int) -> None:
        """The threads at this instruction wait for all groups but the last ones."""
        threads = self.active()
        self.shared.wait_for_products(threads, last)
        done = self.shared.products.committed[threads] - last
        for users in (self.away, self.lent):
            for name, groups in list(users.items()):
                groups[threads] = np.where(groups[threads] <= done, 0, groups[threads])
                if not groups.any():
                    del users[name]

    def write(self, name: str, value: Any) -> None:
        for users in (self.away, self.lent):
            if name in users and users[name][self.active()].any():
                raise PTXError(f"{name} is written before a product that uses it was waited for")
        self.put(name, value)

    def put(self, name: str, value: Any) -> None:
        """`write` without regard to products."""
        kind = STORED[self.kernel.registers[name]]
        value = np.asarray(value)
        if value.dtype != kind:
            value = value.view(kind)
        if value.shape != (self.threads,):
            value = np.full(self.threads, value)
        if self.mask is not None:
            value = np.where(self.mask, value, self.value(name))
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
    if isinstance(operand, Register | Negated):
        name, kept = operand.name, np.dtype(STORED[kernel.registers[operand.name]])
        if kept.itemsize < size or (kept == np.bool_) != (kind is np.bool_):
            raise PTXError(f"{name} is a register of {kernel.registers[name]}")
        if isinstance(operand, Negated):
            return lambda b: ~b.waited(name)
        if kept.itemsize > size:
            return lambda b: b.waited(name).astype(UNSIGNED[size]).view(kind)
        return (lambda b: b.waited(name)) if kept == kind else lambda b: b.waited(name).view(kind)
    if isinstance(operand, Special):
        if operand.name not in SPECIAL or size != 4:
            raise NotImplementedError(f"{operand.name} of {size} bytes")
        return lambda b: b.special[operand.name].view(kind)
    if isinstance(operand, Symbol):
        if operand.name not in kernel.shared:
            raise NotImplementedError(f"the variable {operand.name}")
        address = kernel.shared[operand.name]
        return lambda _: kind(address)
    if isinstance(operand, Number):
        if kind is np.bool_:
            return lambda _: np.bool_(operand.value)
        if not -(1 << 8 * size - 1) <= operand.value < 1 << 8 * size:
            raise PTXError(f"{operand.value} does not fit in {size} bytes")
        value = np.array(operand.value % 2 ** (8 * size), UNSIGNED[size]).view(kind)[()]
        return lambda _: value
    raise PTXError(f"no value: {operand}")


def widened(value: Array, stored: Any) -> Array:
    """In a register that may be wider: with the sign, where there is one."""
    return value if value.dtype.kind == "f" else value.astype(stored)


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
MAKERS: dict[str, list[tuple[re.Pattern[str], Maker]]] = collections.defaultdict(list)


def makes(names: str, form: str) -> Callable[[Maker], Maker]:
    """Says which instructions a function makes steps of: their names, and the modifiers that may follow.

    `form` is a regular expression for these. It names all that the function heeds and all that changes no
    result, so that an instruction with any other modifier is refused.
    """

    def note(maker: Maker) -> Maker:
        for name in names.split():
            MAKERS[name].append((re.compile(form), maker))
        return maker

    return note


def step_of(kernel: Kernel, instruction: Instruction) -> Step:
    modifiers = ".".join(instruction.modifiers)
    for form, maker in MAKERS.get(instruction.name, ()):
        if form.fullmatch(modifiers):
            try:
                step = maker(kernel, instruction)
            except NotImplementedError as error:
                raise NotImplementedError(instruction.text) from error
            return guarded(step, instruction.guard) if instruction.guard else step
    raise NotImplementedError(instruction.text)


def guarded(step: Step, guard: Register | Negated) -> Step:
    def run(b: Batch) -> None:
        before, here = b.mask, _holds(b, guard)
        b.mask = here if before is None else before & here
        if b.mask.all():
            b.mask = None
        if b.mask is None or b.mask.any():
            step(b)
        b.mask = before

    return run


def _holds(b: Batch, guard: Register | Negated) -> Array:
    value = b.registers[guard.name]
    return ~value if isinstance(guard, Negated) else value


@dataclass
class Segment:
    """Code without a jump into or out of it, and how it ends: by a jump, a return, a barrier, or going on."""

    steps: list[tuple[Step, Instruction]]
    jump: str | None = None
    guard: Register | Negated | None = None  # of the jump or return
    ends: bool = False
    waits: bool = False


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.name in ("bar", "barrier") and "warp" not in instruction.modifiers


@functools.cache
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
                piece.steps.append((step_of(kernel, instruction), instruction))
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
    if kernel.threads not in (None, per):
        raise PTXError(f"{kernel.name}: {per} threads, {kernel.threads} are required")
    if per % 32:
        raise NotImplementedError(f"{kernel.name}: {per} threads, which are no whole warps")
    together = max(1, AT_ONCE // per)
    for first in range(0, programs, together):
        count = min(together, programs - first)
        batch = Batch(kernel, first, count, threads, whole, parameters, memory, shared_size, traffic)
        with np.errstate(all="ignore"):
            _walk(batch, pieces, labels)
        if any(batch.tensor.used):
            raise PTXError(f"{kernel.name}: tensor memory is not freed")


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _walk(b: Batch, pieces: list[Segment], labels: Mapping[str, int]) -> None:
    end = len(pieces)
    at = np.zeros(b.threads, np.int64)
    waiting = np.zeros(b.threads, bool)
    while (at < end).any():
        ready = np.where(waiting | b.spinning, end, at)
        here = int(ready.min())
        if here == end:
            _let_go(b, waiting)
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
            taken = _holds(b, piece.guard)
            at[mask & taken], at[mask & ~taken] = after, here + 1
        else:
            at[mask] = after
        if piece.waits:
            waiting[mask] = True


def _let_go(b: Batch, waiting: Array) -> None:
    """Nobody can go on but at a barrier: where nobody spins, those that wait at one are all that are left."""
    spins = np.repeat(b.spinning.reshape(-1, b.per).any(1), b.per)
    if (waiting & ~spins).any():
        b.clock.barrier(np.flatnonzero(np.repeat((waiting & ~spins).reshape(-1, b.per).any(1), b.per)))
        waiting &= spins
        return
    state = b.arrived, int(b.spinning.sum())
    if state == b.tried:
        raise PTXError(f"{b.kernel.name}: waits for what never comes")
    b.tried = state
    b.spinning[:] = False


def address(kernel: Kernel, operand: Operand, wide: bool) -> Callable[[Batch], Array]:
    """Addresses over all threads, int64."""
    assert isinstance(operand, Address)
    base = source(kernel, operand.base, np.uint64 if wide else np.uint32)

    def read(b: Batch) -> Array:
        return over(b, base).astype(np.int64) + operand.offset

    return read
