"""Blackwell's tensor memory (tcgen05), and the barriers in shared memory that say when its products are done.

A program has 128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. Each warp reaches a
quarter of the lanes. A product's row is a lane; of 64 rows each quarter has 16. Products are done at once.
"""

from __future__ import annotations

import numpy as np

from ptx.machine import (
    Array,
    Batch,
    PTXError,
    Read,
    Step,
    address,
    makes,
    over,
    parts,
    source,
    target,
)  # fmt: skip
from ptx.parse import Address, Instruction, Kernel, Number
from ptx.warps import LANES, as_floats, described


@makes("elect")
def elect(kernel: Kernel, ins: Instruction) -> Step:
    """The first lane of each warp."""
    leader, chosen = (target(part) for part in parts(ins.operands[0]))

    def run(b: Batch) -> None:
        b.whole(32, "elect.sync")
        b.write(leader, np.uint32(0))
        b.write(chosen, b.every % 32 == 0)

    return run


@makes("mbarrier")
def barrier(kernel: Kernel, ins: Instruction) -> Step:
    """Of each only how often it was arrived at: all that wait for one arrival."""
    if ins.modifiers[0] in ("init", "inval"):
        if ins.modifiers[0] == "init" and ins.operands[1] != Number(1):
            raise NotImplementedError(ins.text)
        where = address(kernel, ins.operands[0], False)
        start = 0 if ins.modifiers[0] == "init" else None

        def begin(b: Batch) -> None:
            for thread in b.active():
                key = thread // b.per, where(b)[thread]
                if start is None:
                    del b.arrivals[key]
                else:
                    b.arrivals[key] = start

        return begin
    if ins.modifiers[:2] != ("try_wait", "parity"):
        raise NotImplementedError(ins.text)
    done, where = target(ins.operands[0]), address(kernel, ins.operands[1], False)
    parity = source(kernel, ins.operands[2], np.uint32)

    def wait(b: Batch) -> None:
        ready, at, wanted = np.zeros(b.threads, bool), where(b), over(b, parity)
        for thread in b.active():
            arrivals = b.arrivals.get((thread // b.per, at[thread]))
            if arrivals is None:
                raise PTXError("no such barrier")
            ready[thread] = arrivals % 2 != wanted[thread]
        if not ready[b.active()].any():
            raise PTXError("waits for what never comes")  # products are done at once
        b.write(done, ready)

    return wait


@makes("tcgen05")
def tensor(kernel: Kernel, ins: Instruction) -> Step:
    kind = ins.modifiers[0]
    if kind in ("wait::ld", "wait::st", "relinquish_alloc_permit"):
        return lambda b: None
    if kind in MAKERS:
        return MAKERS[kind](kernel, ins)
    raise NotImplementedError(ins.text)


def _allocate(kernel: Kernel, ins: Instruction) -> Step:
    where, columns = address(kernel, ins.operands[0], False), source(kernel, ins.operands[1], np.uint32)

    def run(b: Batch) -> None:
        warps = b.whole(32, "tcgen05.alloc")
        first = warps[:, 0]
        start = np.array([b.tensor.allocate(t // b.per, int(over(b, columns)[t])) for t in first], np.uint32)
        octets = np.ascontiguousarray(start[:, None]).view(np.uint8)
        b.shared.write(first, b.shared.places(first, where(b)[first], 4), octets)

    return run


def _free(kernel: Kernel, ins: Instruction) -> Step:
    def run(b: Batch) -> None:
        for thread in b.whole(32, "tcgen05.dealloc")[:, 0]:
            b.tensor.used[thread // b.per] = 0

    return run


def _cells(kernel: Kernel, ins: Instruction, operand: int) -> tuple[Read, int]:
    """(lanes and columns [2, warps * 32, n] of what each thread moves, where the registers are)."""
    shape, count = ins.modifiers[3], int(ins.modifiers[4][1:])
    where = address(kernel, ins.operands[operand], False)
    behind = operand + 1
    split = 0
    if shape == "16x32bx2":
        offset = ins.operands[behind]
        assert isinstance(offset, Number)
        split, behind = offset.value, behind + 1
    elif shape != "32x32b":
        raise NotImplementedError(ins.text)

    def cells(b: Batch) -> Array:
        warps = b.whole(32, "tcgen05").reshape(-1, 32)
        at = where(b)[warps]
        quarter = warps[:, 0] % b.per // 32 % 4
        lanes = at >> 16
        if (lanes // 32 != quarter[:, None]).any():
            raise PTXError("a warp reaches another's lanes of tensor memory")
        lanes = lanes + (LANES % 16 if shape == "16x32bx2" else LANES)
        columns = (at & 0xFFFF) + LANES // 16 * split
        columns = columns[..., None] + np.arange(count)
        return np.stack([np.broadcast_to(lanes[..., None], columns.shape), columns]).reshape(2, -1, count)

    return cells, behind


def _load(kernel: Kernel, ins: Instruction) -> Step:
    cells, _ = _cells(kernel, ins, 1)
    targets = [target(part) for part in parts(ins.operands[0])]

    def run(b: Batch) -> None:
        threads = b.active()
        values = b.tensor.read(threads // b.per, *cells(b))
        for i, name in enumerate(targets):
            out = np.zeros(b.threads, np.uint32)
            out[threads] = values[:, i]
            b.write(name, out)

    return run


def _store(kernel: Kernel, ins: Instruction) -> Step:
    cells, behind = _cells(kernel, ins, 0)
    registers = [source(kernel, part, np.uint32) for part in parts(ins.operands[behind])]

    def run(b: Batch) -> None:
        threads = b.active()
        values = np.stack([over(b, read)[threads] for read in registers], 1)
        lanes, columns = cells(b)
        b.tensor.write(threads // b.per, lanes, columns, values)

    return run


def _rows(n: int) -> Array:
    """The lane of each row."""
    return np.arange(n) if n == 128 else np.arange(n) // 16 * 32 + np.arange(n) % 16


def _product(kernel: Kernel, ins: Instruction) -> Step:
    """One thread's, for all rows of its program."""
    if ins.modifiers[1:] != ("cta_group::1", "kind::f16"):
        raise NotImplementedError(ins.text)
    d, a, b_, shape, keep = ins.operands
    to = address(kernel, d, False)
    in_lanes = address(kernel, a, False) if isinstance(a, Address) else None
    left = None if isinstance(a, Address) else source(kernel, a, np.uint64)
    right = source(kernel, b_, np.uint64)
    form, keeps = source(kernel, shape, np.uint32), source(kernel, keep, np.bool_)

    def run(b: Batch) -> None:
        for thread in b.active():
            bits = int(over(b, form)[thread])
            rows, columns = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
            kinds = {bits >> 7 & 7, bits >> 10 & 7}
            if bits & 0x6F or bits >> 4 & 3 != 1 or len(kinds) > 1 or rows not in (64, 128):
                raise NotImplementedError(f"a product described by {bits:#x}")
            kind = "bf16" if kinds == {1} else "f16"
            first, program = np.array([thread]), thread // b.per
            if in_lanes is not None:
                at = int(in_lanes(b)[thread])
                lanes = (_rows(rows) + (at >> 16))[:, None]
                words = b.tensor.read(program, lanes, (at & 0xFFFF) + np.arange(8))
                pairs = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], -1).astype(np.uint16)
                matrix = as_floats(pairs, kind).reshape(rows, 16).astype(np.float64)
            else:
                assert left is not None
                matrix = described(first, b, left, rows, bool(bits >> 15 & 1), kind, False)[0]
            other = described(first, b, right, columns, bool(bits >> 16 & 1), kind, False)[0]
            at = int(to(b)[thread])
            lanes, places = (_rows(rows) + (at >> 16))[:, None], (at & 0xFFFF) + np.arange(columns)
            total = matrix @ other.T
            if over(b, keeps)[thread]:
                total = total + b.tensor.read(program, lanes, places).view(np.float32)
            b.tensor.write(program, lanes, places, total.astype(np.float32).view(np.uint32))

    return run


def _commit(kernel: Kernel, ins: Instruction) -> Step:
    where = address(kernel, ins.operands[0], False)

    def run(b: Batch) -> None:
        for thread in b.active():
            b.arrivals[thread // b.per, where(b)[thread]] += 1

    return run


MAKERS = {
    "alloc": _allocate, "dealloc": _free, "ld": _load, "st": _store, "mma": _product, "commit": _commit,
}  # fmt: skip
