"""Instructions of warps and of groups of them: barriers, shuffles, and products of matrices.

Lanes hold matrices as the PTX ISA draws them for each instruction: eight rows of four lanes, two neighbours a
register. Products are exact in float64, and their sums are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

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
    reads,
    source,
    target,
)
from ptx.numbers import from_bf16
from ptx.parse import Instruction, Kernel, Number, Operand, Vector

LANES = np.arange(32)
ROW, PAIR = LANES // 4, 2 * (LANES % 4)  # of a lane in an 8 x 8 matrix of 16 bits


def full_warps(kernel: Kernel, ins: Instruction) -> Callable[[Batch], Array]:
    """The threads at this instruction, [warps, 32]. Its last operand is the mask of those that take part."""
    mask = source(kernel, ins.operands[-1], np.uint32)

    def warps(b: Batch) -> Array:
        if (over(b, mask)[b.active()] != 2**32 - 1).any():
            raise NotImplementedError(f"{ins.text}, by a part of a warp")
        return b.whole(32, ins.name)

    return warps


@makes("bar barrier", r"sync(\.aligned)?")
def barrier(kernel: Kernel, ins: Instruction) -> Step:
    if ins.operands != (Number(0),) or ins.guard is not None:
        raise NotImplementedError(ins.text)
    aligned = ins.name == "bar" or "aligned" in ins.modifiers

    def arrive(b: Batch) -> None:  # the rest is done where threads go on
        if aligned:
            b.whole(32, "bar.sync")

    return arrive


@makes("bar", r"warp\.sync")
def warp_barrier(kernel: Kernel, ins: Instruction) -> Step:
    warps = full_warps(kernel, ins)
    return lambda b: b.clock.warp_barrier(warps(b).ravel())


@makes("fence", r"proxy\.async(\.shared::cta)?")
def fence(kernel: Kernel, ins: Instruction) -> Step:
    return lambda b: b.clock.fence(b.active())


@makes("fence membar", r"(sc\.|acq_rel\.)?(cta|gpu|gl|sys)|mbarrier_init\.release\.cluster")
def nothing(kernel: Kernel, ins: Instruction) -> Step:
    return lambda b: None


@makes("shfl", r"sync\.(up|down|bfly|idx)\.b32")
def shuffle(kernel: Kernel, ins: Instruction) -> Step:
    """From another lane; the second result says whether there is one."""
    way, warps = ins.modifiers[1], full_warps(kernel, ins)
    targets = [target(part) for part in parts(ins.operands[0])]
    value, by, clamp = (source(kernel, operand, np.uint32) for operand in ins.operands[1:4])

    def run(b: Batch) -> None:
        threads = warps(b).ravel()
        x = over(b, value)
        n, c = (over(b, read).astype(np.int64)[threads] for read in (by, clamp))
        lane, segment, last = threads % 32, (c >> 8) & 31, c & 31
        n = n & 31
        low, high = lane & segment, (lane & segment) | (last & ~segment)
        other = {"up": lane - n, "down": lane + n, "bfly": lane ^ n, "idx": low | (n & ~segment)}[way]
        there = other >= high if way == "up" else other <= high
        other = np.where(there, other, lane)
        got, valid = np.zeros(b.threads, np.uint32), np.zeros(b.threads, bool)
        got[threads] = x[threads - lane + other]
        valid[threads] = there
        for name, result in zip(targets, (got, valid), strict=False):
            b.write(name, result)

    return run


def _for_all_lanes(
    kernel: Kernel, ins: Instruction, kind: type[np.generic], function: Callable[[Array], Array]
) -> Step:
    """What a function makes of the values of a warp's lanes, [warps, 32] -> [warps], in each lane."""
    to, value = target(ins.operands[0]), source(kernel, ins.operands[1], kind)
    whole = full_warps(kernel, ins)

    def run(b: Batch) -> None:
        warps = whole(b)
        out = np.zeros(b.threads, np.uint32)
        out[warps] = function(over(b, value)[warps])[:, None]
        b.write(to, out)

    return run


@makes("redux", r"sync\.add\.[su]32")
def reduce(kernel: Kernel, ins: Instruction) -> Step:
    return _for_all_lanes(kernel, ins, np.uint32, lambda values: values.sum(1, dtype=np.uint32))


@makes("vote", r"sync\.ballot\.b32")
def vote(kernel: Kernel, ins: Instruction) -> Step:
    place = np.uint32(1) << LANES.astype(np.uint32)
    return _for_all_lanes(kernel, ins, np.bool_, lambda values: (values * place).sum(1, dtype=np.uint32))


MATRICES = r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"


def _rows(b: Batch, ins: Instruction, warps: Array, at: Array, matrices: int) -> tuple[Array, Array]:
    """Threads whose addresses are rows of matrices, and where these are in shared memory: [n], [n, 16]."""
    threads = warps[:, : 8 * matrices].ravel()
    b.note("shared", ins, threads, at[threads], 16)
    return threads, b.shared.places(threads, at[threads], 16)


@makes("ldmatrix", MATRICES)
def load_matrices(kernel: Kernel, ins: Instruction) -> Step:
    count, turned = int(ins.modifiers[3][1:]), "trans" in ins.modifiers
    where = address(kernel, ins.operands[1], False)
    targets = [target(part) for part in parts(ins.operands[0])]

    def run(b: Batch) -> None:
        warps = b.whole(32, "ldmatrix")
        threads, places = _rows(b, ins, warps, where(b), count)
        octets = b.shared.read(threads, places)
        matrices = np.ascontiguousarray(octets).view(np.uint16).reshape(len(warps), count, 8, 8)
        if turned:
            matrices = matrices.transpose(0, 1, 3, 2)
        for i, name in enumerate(targets):
            low, high = matrices[:, i, ROW, PAIR], matrices[:, i, ROW, PAIR + 1]
            out = np.zeros(b.threads, np.uint32)
            out[warps] = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
            b.write(name, out)

    return run


@makes("stmatrix", MATRICES)
def store_matrices(kernel: Kernel, ins: Instruction) -> Step:
    count, turned = int(ins.modifiers[3][1:]), "trans" in ins.modifiers
    where = address(kernel, ins.operands[0], False)
    values = [source(kernel, part, np.uint32) for part in parts(ins.operands[1])]

    def run(b: Batch) -> None:
        warps = b.whole(32, "stmatrix")
        matrices = np.zeros((len(warps), count, 8, 8), np.uint16)
        for i, read in enumerate(values):
            both = over(b, read)[warps]
            matrices[:, i, ROW, PAIR] = both & np.uint32(0xFFFF)
            matrices[:, i, ROW, PAIR + 1] = both >> np.uint32(16)
        if turned:
            matrices = matrices.transpose(0, 1, 3, 2)
        threads, places = _rows(b, ins, warps, where(b), count)
        octets = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
        b.shared.write(threads, places, octets)

    return run


def as_floats(bits: Array, kind: str) -> Array:
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _halves(b: Batch, registers: list[Read], warps: Array, kind: str) -> Array:
    """Registers of two 16-bit numbers each as float32, [warps, 32, registers, 2]."""
    both = np.stack([over(b, read)[warps] for read in registers], -1)
    return as_floats(np.stack([both & np.uint32(0xFFFF), both >> np.uint32(16)], -1).astype(np.uint16), kind)


def _rows_of_registers(kernel: Kernel, operand: Operand, kind: str) -> Callable[[Batch, Array], Array]:
    """What gives the left matrix, [warps, 16, 16], from four registers a lane."""
    registers = reads(kernel, operand, np.uint32)

    def rows(b: Batch, warps: Array) -> Array:
        halves = _halves(b, registers, warps, kind)
        out = np.zeros((len(halves), 16, 16))
        for register, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            for i in range(2):
                out[:, ROW + row, PAIR + column + i] = halves[:, :, register, i]
        return out

    return rows


@makes("mma", r"sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32")
def multiply(kernel: Kernel, ins: Instruction) -> Step:
    kind = ins.modifiers[-2]
    d, a, b_, c = ins.operands
    rows, right = _rows_of_registers(kernel, a, kind), reads(kernel, b_, np.uint32)
    sums = reads(kernel, c, np.float32)

    def run(b: Batch) -> None:
        warps = b.whole(32, "mma.sync")
        halves = _halves(b, right, warps, kind)
        columns = np.zeros((len(warps), 16, 8))
        for register in range(2):
            for i in range(2):
                columns[:, PAIR + 8 * register + i, ROW] = halves[:, :, register, i]
        _add(b, warps, rows(b, warps) @ columns, d, [over(b, read) for read in sums])

    return run


def _add(b: Batch, warps: Array, product: Array, d: Operand, sums: list[Array]) -> None:
    """The sums of a product [warps, 16, n] and of what lanes hold, back to where they hold it."""
    for register, part in enumerate(parts(d)):
        row, column = ROW + 8 * (register % 4 // 2), PAIR + register % 2 + 8 * (register // 4)
        out = np.zeros(b.threads, np.float32)
        out[warps] = product[:, row, column] + sums[register][warps]
        b.put(target(part), out)


@makes("wgmma", r"mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)")
def multiply_of_four_warps(kernel: Kernel, ins: Instruction) -> Step:
    """64 rows, 16 a warp; descriptors say where operands lie in shared memory. Done at once, but until it is
    waited for, the result may not be read, nor written what it is made of."""
    kind, n = ins.modifiers[-1], int(ins.modifiers[3].removeprefix("m64n").removesuffix("k16"))
    d, a, b_, keep, *rest = ins.operands
    numbers = [part.value if isinstance(part, Number) else None for part in rest]
    if numbers[:2] != [1, 1]:
        raise NotImplementedError(ins.text)
    turned = [bool(x) for x in numbers[2:]]
    rows = _rows_of_registers(kernel, a, kind) if isinstance(a, Vector) else None
    left = None if isinstance(a, Vector) else source(kernel, a, np.uint64)
    right, keeps = source(kernel, b_, np.uint64), source(kernel, keep, np.bool_)
    names = [target(part) for part in parts(d)]
    lent = [] if rows is None else [target(part) for part in parts(a)]

    def run(b: Batch) -> None:
        groups = b.whole(128, "wgmma")
        first, warps = groups[:, 0], groups.reshape(-1, 32)
        if rows is not None:
            matrix = rows(b, warps).reshape(len(groups), 64, 16)
        else:
            assert left is not None
            matrix, places = described(first, b, left, 64, turned[0], kind)
            b.shared.lend(first, places)
        columns, places = described(first, b, right, n, turned[-1], kind)
        b.shared.lend(first, places)
        kept = over(b, keeps)
        if (kept[groups] != kept[first][:, None]).any():
            raise PTXError("threads disagree on whether sums go on")
        product = (matrix @ columns.transpose(0, 2, 1)).reshape(-1, 16, n)
        # the sums of a product before need not be waited for
        sums = [np.where(kept, b.value(name).view(np.float32), 0) for name in names]
        _add(b, warps, product, d, sums)
        b.multiply(names, lent, b.shared.products.committed[b.active()])

    return run


@makes("wgmma", r"fence\.sync\.aligned")
def fence_of_registers(kernel: Kernel, ins: Instruction) -> Step:
    """Not checked: where one is missing, ptxas puts it in and says so (C7519)."""
    return lambda b: None


@makes("wgmma", r"commit_group\.sync\.aligned")
def commit_products(kernel: Kernel, ins: Instruction) -> Step:
    return lambda b: b.shared.products.commit(b.active())


@makes("wgmma", r"wait_group\.sync\.aligned")
def wait_for_products(kernel: Kernel, ins: Instruction) -> Step:
    assert isinstance(ins.operands[0], Number)
    last = ins.operands[0].value
    return lambda b: b.wait_for_products(last)


# bytes of a line whose parts of 16 bytes change places, by the highest bits of a descriptor
SWIZZLES = {2: 128, 4: 64, 6: 32}


def described(
    first: Array, b: Batch, descriptor: Read, n: int, turned: bool, kind: str, note: bool = True
) -> tuple[Array, Array]:
    """[groups, n, 16] of 16-bit numbers where a descriptor says, and their places in shared memory;
    `turned`: they lie along n, not along k."""
    words = over(b, descriptor)[first].astype(np.int64)
    start, lead, stride = ((words >> s & 0x3FFF)[:, None, None] << 4 for s in (0, 16, 32))
    modes = set((words >> 61 & 7).tolist())
    if len(modes) != 1 or not modes <= SWIZZLES.keys() or (words >> 49 & 0xFFF).any():
        raise NotImplementedError("products of matrices that are not swizzled, or not alike")
    line = SWIZZLES[modes.pop()]
    i, j = np.meshgrid(np.arange(n), np.arange(16), indexing="ij")
    if turned:  # lines along n, eight of them along k
        at = start + i % (line // 2) * 2 + i // (line // 2) * lead + j % 8 * line + j // 8 * stride
    else:  # lines along k, eight of them along n
        at = start + j * 2 + i % 8 * line + i // 8 * stride
    at = at ^ (at >> 7) % (line // 16) << 4
    threads = np.repeat(first, n * 16)
    places = b.shared.places(threads, at.reshape(-1), 2)
    octets = b.shared.read_by_product(threads, places, note)
    values = as_floats(np.ascontiguousarray(octets).view(np.uint16), kind)
    return values.reshape(len(first), n, 16).astype(np.float64), places.reshape(len(first), -1)
