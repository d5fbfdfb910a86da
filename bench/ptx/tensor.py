"""Blackwell's tensor memory (tcgen05), and the barriers in shared memory that say when its products are done.

A program has 128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. Each warp reaches a
quarter of the lanes. A product's row is a lane; of 64 rows each quarter has 16. Products are done at once,
but until they are waited for, nobody may read the result nor write what they read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.machine import (
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
)
from ptx.memory import MULTIPLIED, Product
from ptx.parse import Address, Instruction, Kernel, Number
from ptx.warps import LANES, as_floats, described, full_warps

ALONE = r"cta_group::1\.sync\.aligned"


@makes("elect", "sync")
def elect(kernel: Kernel, ins: Instruction) -> Step:
    """The first lane of each warp."""
    leader, chosen = (target(part) for part in parts(ins.operands[0]))
    warps = full_warps(kernel, ins)

    def run(b: Batch) -> None:
        warps(b)
        b.write(leader, np.uint32(0))
        b.write(chosen, b.every % 32 == 0)

    return run


@makes("mbarrier", r"init\.shared(::cta)?\.b64")
def begin_barrier(kernel: Kernel, ins: Instruction) -> Step:
    """Of each only how often it was arrived at: all that wait for one arrival."""
    if ins.operands[1] != Number(1):
        raise NotImplementedError(ins.text)
    where = address(kernel, ins.operands[0], False)

    def begin(b: Batch) -> None:
        threads = b.active()
        at = where(b)[threads]
        b.shared.write(threads, b.shared.places(threads, at, 8), np.zeros((len(threads), 8), np.uint8))
        b.arrivals.update(
            {(thread // b.per, barrier): 0 for thread, barrier in zip(threads, at, strict=True)}
        )

    return begin


@makes("mbarrier", r"inval\.shared(::cta)?\.b64")
def end_barrier(kernel: Kernel, ins: Instruction) -> Step:
    where = address(kernel, ins.operands[0], False)

    def end(b: Batch) -> None:
        for thread in b.active():
            del b.arrivals[thread // b.per, where(b)[thread]]

    return end


@makes("mbarrier", r"try_wait\.parity\.shared(::cta)?\.b64")
def wait(kernel: Kernel, ins: Instruction) -> Step:
    passed, where = target(ins.operands[0]), address(kernel, ins.operands[1], False)
    parity = source(kernel, ins.operands[2], np.uint32)

    def run(b: Batch) -> None:
        threads, ready = b.active(), np.zeros(b.threads, bool)
        at = where(b)[threads]
        b.shared.read(threads, b.shared.places(threads, at, 8), note=False)
        keys = [*zip((threads // b.per).tolist(), at.tolist(), strict=True)]
        if not b.arrivals.keys() >= set(keys):
            raise PTXError("no such barrier")
        ready[threads] = np.array([b.arrivals[key] % 2 for key in keys]) != over(b, parity)[threads]
        b.spinning[threads] = ~ready[threads]
        for program, barrier in {key for key, done in zip(keys, ready[threads], strict=True) if done}:
            b.tensor.wait_for_products(program, barrier, b.arrivals[program, barrier], b.shared)
        b.write(passed, ready)

    return run


@makes("tcgen05", rf"alloc\.{ALONE}\.shared::cta\.b32")
def allocate(kernel: Kernel, ins: Instruction) -> Step:
    where, columns = address(kernel, ins.operands[0], False), source(kernel, ins.operands[1], np.uint32)

    def run(b: Batch) -> None:
        first = b.whole(32, "tcgen05.alloc")[:, 0]
        start = np.array([b.tensor.allocate(t // b.per, int(over(b, columns)[t])) for t in first], np.uint32)
        octets = np.ascontiguousarray(start[:, None]).view(np.uint8)
        b.shared.write(first, b.shared.places(first, where(b)[first], 4), octets)

    return run


@makes("tcgen05", rf"dealloc\.{ALONE}\.b32")
def free(kernel: Kernel, ins: Instruction) -> Step:
    where, columns = (source(kernel, operand, np.uint32) for operand in ins.operands)

    def run(b: Batch) -> None:
        for thread in b.whole(32, "tcgen05.dealloc")[:, 0]:
            b.tensor.free(thread // b.per, int(over(b, where)[thread]), int(over(b, columns)[thread]))

    return run


@makes(
    "tcgen05", rf"relinquish_alloc_permit\.{ALONE}|fence::(before|after)_thread_sync|wait::ld\.sync\.aligned"
)
def nothing(kernel: Kernel, ins: Instruction) -> Step:
    """Code of Triton uses registers before the load was waited for (wait::ld): ptxas makes each use wait."""
    return lambda b: None


def _cells(kernel: Kernel, ins: Instruction, operand: int) -> tuple[Callable[[Batch], Array], int]:
    """(cells [threads, n] that each thread at the instruction moves, which operand comes next)."""
    shape, count = ins.modifiers[3], int(ins.modifiers[4][1:])
    where = address(kernel, ins.operands[operand], False)
    behind = operand + 1
    split = 0
    if shape == "16x32bx2":
        offset = ins.operands[behind]
        assert isinstance(offset, Number)
        split, behind = offset.value, behind + 1

    def cells(b: Batch) -> Array:
        warps = b.whole(32, "tcgen05")
        at = where(b)[warps]
        if (at != at[:, :1]).any():
            raise PTXError("lanes disagree on the address")
        lanes = (at >> 16) + (LANES % 16 if shape == "16x32bx2" else LANES)
        if (lanes // 32 != (warps % b.per // 32 % 4)).any():
            raise PTXError("a warp reaches another's lanes of tensor memory")
        columns = (at & 0xFFFF) + LANES // 16 * split
        columns = columns.reshape(-1, 1) + np.arange(count)
        return b.tensor.places(warps.ravel() // b.per, lanes.reshape(-1, 1), columns)

    return cells, behind


@makes("tcgen05", r"ld\.sync\.aligned\.(32x32b|16x32bx2)\.x\d+\.b32")
def load(kernel: Kernel, ins: Instruction) -> Step:
    cells, _ = _cells(kernel, ins, 1)
    targets = [target(part) for part in parts(ins.operands[0])]

    def run(b: Batch) -> None:
        threads = b.active()
        values = b.tensor.read(threads, cells(b))
        for i, name in enumerate(targets):
            out = np.zeros(b.threads, np.uint32)
            out[threads] = values[:, i]
            b.write(name, out)

    return run


@makes("tcgen05", r"st\.sync\.aligned\.(32x32b|16x32bx2)\.x\d+\.b32")
def store(kernel: Kernel, ins: Instruction) -> Step:
    cells, behind = _cells(kernel, ins, 0)
    registers = [source(kernel, part, np.uint32) for part in parts(ins.operands[behind])]

    def run(b: Batch) -> None:
        threads = b.active()
        values = np.stack([over(b, read)[threads] for read in registers], 1)
        b.tensor.store(threads, cells(b), values)

    return run


@makes("tcgen05", r"wait::st\.sync\.aligned")
def wait_for_stores(kernel: Kernel, ins: Instruction) -> Step:
    return lambda b: b.tensor.wait_for_stores(b.active())


def _rows(n: int) -> Array:
    """The lane of each row."""
    return np.arange(n) if n == 128 else np.arange(n) // 16 * 32 + np.arange(n) % 16


def _form(bits: int) -> tuple[int, int, str, bool, bool]:
    """(rows, columns, kind of the numbers, whether the left and the right matrix are turned) of a product."""
    rows, columns = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
    kind = {0: "f16", 1 << 7 | 1 << 10: "bf16"}.get(bits & 0x1F80)
    known = 1 << 4 | 0x1F80 | 3 << 15 | 63 << 17 | 31 << 24  # the sums are float32, nothing is negated
    if bits & ~known or not bits & 1 << 4 or kind is None or rows not in (64, 128):
        raise NotImplementedError(f"a product described by {bits:#x}")
    return rows, columns, kind, bool(bits >> 15 & 1), bool(bits >> 16 & 1)


@makes("tcgen05", r"mma\.cta_group::1\.kind::f16")
def multiply(kernel: Kernel, ins: Instruction) -> Step:
    """One thread's, for all rows of its program."""
    d, a, b_, shape, keep = ins.operands
    to = address(kernel, d, False)
    in_lanes = address(kernel, a, False) if isinstance(a, Address) else None
    left = None if isinstance(a, Address) else source(kernel, a, np.uint64)
    right = source(kernel, b_, np.uint64)
    form, keeps = source(kernel, shape, np.uint32), source(kernel, keep, np.bool_)

    def cells(b: Batch, thread: int, address: int, rows: int, columns: int) -> Array:
        lanes, places = _rows(rows)[:, None] + (address >> 16), (address & 0xFFFF) + np.arange(columns)
        return b.tensor.places(np.array([thread // b.per]), lanes, places[None])

    def run(b: Batch) -> None:
        for thread in b.active():
            rows, n, kind, turned_left, turned_right = _form(int(over(b, form)[thread]))
            first = np.array([thread])
            other, places = described(first, b, right, n, turned_right, kind, False)
            inputs: Array = np.zeros((0, 8), np.int64)
            if in_lanes is not None:
                inputs = cells(b, thread, int(in_lanes(b)[thread]), rows, 8)
                words = b.tensor.read(first, inputs)
                pairs = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], -1).astype(np.uint16)
                matrix = as_floats(pairs, kind).reshape(rows, 16).astype(np.float64)
            else:
                assert left is not None
                (matrix,), more = described(first, b, left, rows, turned_left, kind, False)
                places = np.concatenate([places, more], 1)
            at = cells(b, thread, int(to(b)[thread]), rows, n)
            total = matrix @ other[0].T
            if over(b, keeps)[thread]:
                total = total + b.tensor.read(first, at, MULTIPLIED).view(np.float32)
            product = Product(thread, at, inputs, places)
            b.tensor.multiply(product, total.astype(np.float32).view(np.uint32), b.shared)

    return run


@makes("tcgen05", r"commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64")
def commit(kernel: Kernel, ins: Instruction) -> Step:
    where = address(kernel, ins.operands[0], False)

    def run(b: Batch) -> None:
        for thread in b.active():
            program, barrier = thread // b.per, where(b)[thread]
            b.arrivals[program, barrier] += 1
            b.arrived += 1
            b.tensor.commit(thread, barrier, b.arrivals[program, barrier])

    return run
