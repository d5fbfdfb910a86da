"""Instructions that load, store and copy: parameters, tensors, shared memory."""

from __future__ import annotations

import numpy as np

from ptx.machine import (
    STORED,
    TYPES,
    Array,
    Batch,
    PTXError,
    Step,
    address,
    makes,
    over,
    parts,
    source,
    target,
    widened,
)
from ptx.parse import Address, Instruction, Kernel, Number, Register, Symbol

TYPE = r"([bsu](8|16|32|64)|f(32|64))"
CACHED = r"(\.(c[agsv]|lu|wb|wt|L[12]::\w+))*"  # says where else to keep it


@makes("ld", f"param.{TYPE}")
def load_parameter(kernel: Kernel, ins: Instruction) -> Step:
    to, at, dtype = target(ins.operands[0]), ins.operands[1], TYPES[ins.modifiers[-1]]
    assert isinstance(at, Address) and isinstance(at.base, Symbol)
    name, size, skipped = at.base.name, np.dtype(dtype).itemsize, 8 * at.offset

    def run(b: Batch) -> None:
        bits = b.parameters[name] >> skipped & (1 << 8 * size) - 1
        value: Array = np.array([bits], f"u{size}").view(dtype)
        b.write(to, widened(value, STORED[kernel.registers[to]])[0])

    return run


@makes("ld", rf"(global(\.nc)?|shared(::cta)?){CACHED}(\.v[248])?\.{TYPE}")
def load(kernel: Kernel, ins: Instruction) -> Step:
    space, dtype = ins.modifiers[0].split("::")[0], TYPES[ins.modifiers[-1]]
    targets = [part.name if isinstance(part, Register) else None for part in parts(ins.operands[0])]
    where = address(kernel, ins.operands[1], space != "shared")
    size = np.dtype(dtype).itemsize * len(targets)

    def run(b: Batch) -> None:
        threads = b.active()
        at = where(b)[threads]
        b.note(space, ins, threads, at, size)
        if space == "shared":
            octets = b.shared.read(threads, b.shared.places(threads, at, size))
        else:
            octets = b.memory.read(b.clock.now(threads), at, size)
        values: Array = np.ascontiguousarray(octets).view(dtype)
        for i, name in enumerate(targets):
            if name is not None:
                kept = widened(values[:, i], STORED[kernel.registers[name]])
                full = np.zeros(b.threads, kept.dtype)
                full[threads] = kept
                b.write(name, full)

    return run


@makes("st", rf"(global|shared(::cta)?){CACHED}(\.v[248])?\.{TYPE}")
def store(kernel: Kernel, ins: Instruction) -> Step:
    space, dtype = ins.modifiers[0].split("::")[0], TYPES[ins.modifiers[-1]]
    where = address(kernel, ins.operands[0], space != "shared")
    values = [source(kernel, part, dtype) for part in parts(ins.operands[1])]

    def run(b: Batch) -> None:
        threads = b.active()
        columns = [over(b, read)[threads] for read in values]
        octets = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        at = where(b)[threads]
        b.note(space, ins, threads, at, octets.shape[1])
        if space == "shared":
            b.shared.write(threads, b.shared.places(threads, at, octets.shape[1]), octets)
        else:
            b.memory.write(b.clock.now(threads), at, octets)

    return run


@makes("cp", r"async\.c[ag]\.shared(::cta)?\.global(\.L2::\w+B)?")
def copy(kernel: Kernel, ins: Instruction) -> Step:
    """From a tensor to shared memory, zeros from `src-size` on; it is there once waited for."""
    to, come = address(kernel, ins.operands[0], False), address(kernel, ins.operands[1], True)
    size_operand = ins.operands[2]
    assert isinstance(size_operand, Number)
    size = size_operand.value
    if size not in ((16,) if "cg" in ins.modifiers else (4, 8, 16)):
        raise PTXError(f"a copy of {size} bytes")
    count = source(kernel, ins.operands[3], np.uint32) if len(ins.operands) > 3 else lambda _: np.uint32(size)

    def run(b: Batch) -> None:
        threads = b.active()
        counts, at, places = over(b, count)[threads], come(b)[threads], to(b)[threads]
        if (counts > size).any():
            raise PTXError(f"{counts.max()} bytes for {size}")
        values: Array = np.zeros((threads.size, size), np.uint8)
        for n in np.unique(counts[counts > 0]):
            some = counts == n
            values[some, :n] = b.memory.read(b.clock.now(threads[some]), at[some], int(n), size)
        b.note("global", ins, threads[counts > 0], at[counts > 0], size)
        b.note("shared", ins, threads, places, size)
        b.shared.copy(threads, b.shared.places(threads, places, size), values)

    return run


@makes("cp", r"async\.commit_group")
def commit_copies(kernel: Kernel, ins: Instruction) -> Step:
    return lambda b: b.shared.copies.commit(b.active())


@makes("cp", r"async\.(wait_all|wait_group)")
def wait_for_copies(kernel: Kernel, ins: Instruction) -> Step:
    groups = None
    if ins.operands:
        assert isinstance(ins.operands[0], Number)
        groups = ins.operands[0].value
    return lambda b: b.shared.wait_for_copies(b.active(), groups)
