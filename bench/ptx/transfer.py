"""Instructions that load, store and copy: parameters, tensors, shared memory."""

from __future__ import annotations

import numpy as np

from ptx.machine import (
    STORED,
    TYPES,
    Array,
    Batch,
    Step,
    address,
    makes,
    over,
    parts,
    source,
    widened,
)  # fmt: skip
from ptx.parse import Address, Instruction, Kernel, Number, Register, Symbol


def _shape(ins: Instruction) -> tuple[str, str, int]:
    """Space, type and how many registers."""
    spaces = (m.split("::")[0] for m in ins.modifiers)
    space = next((m for m in spaces if m in ("global", "shared", "param")), "generic")
    count = next((int(m[1:]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    return space, ins.modifiers[-1], count


@makes("ld")
def load(kernel: Kernel, ins: Instruction) -> Step:
    space, kind, count = _shape(ins)
    targets = [part.name if isinstance(part, Register) else None for part in parts(ins.operands[0])]
    dtype = TYPES[kind]
    if space == "param":
        at = ins.operands[1]
        assert isinstance(at, Address) and isinstance(at.base, Symbol) and count == 1
        name, to = at.base.name, targets[0]
        assert to is not None

        def parameter(b: Batch) -> None:
            size = np.dtype(dtype).itemsize
            bits = b.parameters[name] >> 8 * at.offset & (1 << 8 * size) - 1
            value: Array = np.array([bits], f"u{size}").view(dtype)
            b.write(to, widened(value, STORED[kernel.registers[to]])[0])

        return parameter
    where = address(kernel, ins.operands[1], space != "shared")
    size = np.dtype(dtype).itemsize * count

    def run(b: Batch) -> None:
        threads = b.active()
        at = where(b)[threads]
        b.note(space, ins, threads, at, size)
        if space == "shared":
            octets = b.shared.read(threads, b.shared.places(threads, at, size))
        else:
            octets = b.memory.read(at, size)
        values: Array = np.ascontiguousarray(octets).view(dtype)
        for i, name in enumerate(targets):
            if name is not None:
                kept = widened(values[:, i], STORED[kernel.registers[name]])
                full = np.zeros(b.threads, kept.dtype)
                full[threads] = kept
                b.write(name, full)

    return run


@makes("st")
def store(kernel: Kernel, ins: Instruction) -> Step:
    space, kind, _ = _shape(ins)
    where = address(kernel, ins.operands[0], space != "shared")
    dtype = TYPES[kind]
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
            b.memory.write(at, octets)

    return run


@makes("cp")
def copy(kernel: Kernel, ins: Instruction) -> Step:
    """cp.async: from a tensor to shared memory, zeros from `src-size` on; it is there once waited for."""
    if ins.modifiers[0] != "async" or "bulk" in ins.modifiers:
        raise NotImplementedError(ins.text)
    if "commit_group" in ins.modifiers:
        return lambda b: b.shared.commit(b.active())
    if "wait_all" in ins.modifiers:
        return lambda b: b.shared.wait(b.active(), None)
    if "wait_group" in ins.modifiers:
        groups = ins.operands[0]
        assert isinstance(groups, Number)
        return lambda b: b.shared.wait(b.active(), groups.value)
    to, come = address(kernel, ins.operands[0], False), address(kernel, ins.operands[1], True)
    size_operand = ins.operands[2]
    assert isinstance(size_operand, Number)
    size = size_operand.value
    count = source(kernel, ins.operands[3], np.uint32) if len(ins.operands) > 3 else lambda _: np.uint32(size)

    def run(b: Batch) -> None:
        threads = b.active()
        counts = over(b, count)[threads]
        values: Array = np.zeros((threads.size, size), np.uint8)
        at = come(b)[threads]
        for n in np.unique(counts[counts > 0]):
            some = counts == n
            if (at[some] % size).any():
                raise ValueError(f"cp.async of {size} bytes from an address that is no multiple of them")
            values[some, :n] = b.memory.read(at[some], int(n))
        b.note("global", ins, threads[counts > 0], at[counts > 0], size)
        b.note("shared", ins, threads, to(b)[threads], size)
        b.shared.copy(threads, b.shared.places(threads, to(b)[threads], size), values)

    return run
