"""What threads read and write: tensors, each within its bounds, shared memory, and Blackwell's tensor memory.

Barriers order accesses. Every cell keeps who wrote and who read it last, so that a missing barrier is found
whatever order the threads happen to run in here.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class MemoryFault(ValueError):
    """An access beside all tensors, misaligned, too early, or in no order to another."""


@dataclass(frozen=True)
class Moment:
    """Some threads [n, 1], by their number in the launch, and how far they have come."""

    thread: Array
    spell: Array  # barriers of the program behind them
    warp_spell: Array  # and of the warp
    per: int  # threads of a program

    def of(self, which: Array) -> Moment:
        return Moment(self.thread[which], self.spell[which], self.warp_spell[which], self.per)


class Clock:
    """How many barriers each thread of a batch has passed, and how many fences before products."""

    def __init__(self, first: int, threads: int, per: int) -> None:
        self.first, self.per = first, per
        self._number = np.arange(first, first + threads, dtype=np.int32)
        self._spell, self._warp_spell = np.zeros(threads, np.int32), np.zeros(threads, np.int32)
        self.fences = np.zeros(threads, np.int32)
        self.fenced_in = np.full(threads, -1, np.int32)  # the spell of the last one

    def barrier(self, threads: Array) -> None:
        self._spell[threads] += 1

    def warp_barrier(self, threads: Array) -> None:
        self._warp_spell[threads] += 1

    def fence(self, threads: Array) -> None:
        self.fences[threads] += 1
        self.fenced_in[threads] = self._spell[threads]

    def now(self, threads: Array) -> Moment:
        number, spell, warp_spell = self._number[threads], self._spell[threads], self._warp_spell[threads]
        return Moment(number[:, None], spell[:, None], warp_spell[:, None], self.per)


WARP, PROGRAM, LAUNCH = 1, 2, 3  # what two threads have in common at the least; 0: they are the same


class _Last:
    """The last accesses to each of some cells that no barrier lies between: one of the threads, what it has
    in common with the others, and when it was."""

    def __init__(self, cells: int) -> None:
        self.thread = np.zeros(cells, np.int32)  # its number + 1; 0: there was none
        self.spread = np.zeros(cells, np.int8)
        self.spell, self.warp_spell = np.zeros(cells, np.int32), np.zeros(cells, np.int32)

    def _apart(self, now: Moment, at: Array) -> Array:
        other = self.thread[at] - 1
        apart = (other != now.thread).astype(np.int8)
        apart[other >> 5 != now.thread >> 5] = PROGRAM
        apart[other // now.per != now.thread // now.per] = LAUNCH
        return apart

    def unordered(self, now: Moment, at: Array) -> Array:
        """Where another thread's access lies behind no barrier: what it has in common; elsewhere 0."""
        apart = np.maximum(self._apart(now, at), self.spread[at])
        together = (self.spell[at] == now.spell) & ((apart > WARP) | (self.warp_spell[at] == now.warp_spell))
        return np.where((self.thread[at] > 0) & (together | (apart == LAUNCH)), apart, 0)

    def note(self, now: Moment, at: Array) -> None:
        spread = self.unordered(now, at)
        self.replace(now, at)
        self.spread[at] = spread
        apart = self._apart(now, at)  # of several threads at once, one was kept
        for common in (WARP, PROGRAM, LAUNCH) if apart.any() else ():
            some = at[apart == common]
            self.spread[some] = np.maximum(self.spread[some], common)

    def replace(self, now: Moment, at: Array) -> None:
        self.thread[at] = now.thread + 1
        self.spell[at], self.warp_spell[at] = now.spell, now.warp_spell


class Order:
    """Whether barriers lie between the accesses to some cells."""

    def __init__(self, cells: int, what: str) -> None:
        self.wrote, self.what = _Last(cells), what
        self._read = _Last(cells)

    def note_read(self, now: Moment, at: Array) -> None:
        self.check_read(now, at)
        self._read.note(now, at)

    def check_read(self, now: Moment, at: Array) -> None:
        if self.wrote.unordered(now, at).any():
            raise MemoryFault(f"{self.what} is read with no barrier behind another thread's write")

    def note_write(self, now: Moment, at: Array, changed: Array | bool = True) -> None:
        """`changed`: where a cell does not have these values already; two threads may write the same."""
        if (changed & (self.wrote.unordered(now, at) > 0)).any():
            raise MemoryFault(f"{self.what} is written by two threads with no barrier between")
        if self._read.unordered(now, at).any():
            raise MemoryFault(f"{self.what} is written with no barrier behind another thread's read")
        self.wrote.replace(now, at)


@dataclass
class _Block:
    base: int
    data: Array  # bytes
    unit: int  # bytes of a number
    order: Order


class Globals:
    """The memory of some tensors, by address, during one launch."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []

    def add(self, base: int, data: Array, unit: int = 1) -> None:
        """Bytes that lie at an address, of numbers of `unit` bytes; `data` is what is read and written."""
        self.blocks.append(_Block(base, data, unit, Order(-(-data.size // unit), "a tensor")))

    def _find(self, addresses: Array, size: int, alignment: int) -> list[tuple[_Block, Array, Array, Array]]:
        """(block, which of the addresses are in it, their bytes [n, size], their numbers) of each block."""
        if (addresses % alignment).any():
            at = int(addresses[(addresses % alignment).argmax()])
            raise MemoryFault(f"address {at:#x} is no multiple of {alignment}")
        left, found = np.arange(addresses.size), []
        for block in self.blocks:
            offsets = addresses[left] - block.base
            inside = (offsets >= 0) & (offsets + size <= block.data.size)
            if inside.any():
                start = offsets[inside][:, None]
                numbers = start // block.unit + np.arange(-(-size // block.unit))
                found.append((block, left[inside], start + np.arange(size), numbers))
                left = left[~inside]
            if not left.size:
                return found
        if left.size:
            at = int(addresses[left[0]])
            away = [
                (max(b.base - at, at - b.base - b.data.size), at - b.base, b.data.size) for b in self.blocks
            ]
            _, offset, length = min(away, default=(0, 0, 0))
            raise MemoryFault(f"{size} bytes are in no tensor: {offset} bytes into one of {length}")
        return found

    def read(self, now: Moment, addresses: Array, size: int, alignment: int | None = None) -> Array:
        """Bytes [n, size] at addresses [n], which are multiples of `alignment`, or else of `size`."""
        out = np.empty((addresses.size, size), np.uint8)
        for block, which, at, numbers in self._find(addresses, size, alignment or size):
            block.order.note_read(now.of(which), numbers)
            out[which] = block.data[at]
        return out

    def write(self, now: Moment, addresses: Array, values: Array) -> None:
        """Bytes [n, size]. Where no barrier lies between two threads, they must write the same."""
        size = values.shape[1]
        for block, which, at, numbers in self._find(addresses, size, size):
            changed = (block.data[at] != values[which]).reshape(*numbers.shape, -1).any(2)
            block.order.note_write(now.of(which), numbers, changed)
            block.data[at] = values[which]
            if (block.data[at] != values[which]).any():
                raise MemoryFault("threads write different values to the same place of a tensor at once")


class Pending:
    """What threads have begun, in groups, and not waited for yet."""

    def __init__(self, threads: int) -> None:
        self.committed = np.zeros(threads, np.int64)
        self._begun: list[tuple[Array, Array, tuple[Array, ...]]] = []  # threads, groups, and rows of each

    def begin(self, threads: Array, *rows: Array) -> None:
        self._begun.append((threads, self.committed[threads], rows))

    def commit(self, threads: Array) -> None:
        self.committed[threads] += 1

    def done(self, threads: Array, groups: int | None) -> list[tuple[Array, tuple[Array, ...]]]:
        """(threads, rows) of all groups but the last `groups`; None: also of what is in no group yet."""
        here = np.zeros(self.committed.size, bool)
        here[threads] = True
        left, done = [], []
        for who, group, rows in self._begun:
            now = here[who]
            if groups is not None:
                now &= group < self.committed[who] - groups
            if now.any():
                done.append((who[now], tuple(row[now] for row in rows)))
            if not now.all():
                left.append((who[~now], group[~now], tuple(row[~now] for row in rows)))
        self._begun = left
        return done

    def rows(self) -> list[tuple[Array, ...]]:
        return [rows for _, _, rows in self._begun]


class Shared:
    """Shared memory of some programs, `size` bytes each."""

    def __init__(self, clock: Clock, programs: int, size: int) -> None:
        self.clock, self.size = clock, size
        total = programs * size
        self.data = np.zeros(total, np.uint8)
        self.written = np.zeros(total, bool)
        self.coming = np.zeros(total, bool)  # cp.async has not been waited for
        self.lent = np.zeros(total, bool)  # to products that were not waited for
        self.fences = np.zeros(total, np.int32)  # of the thread that wrote it, before it did; -1: needs none
        self.order = Order(total, "shared memory")
        self.copies, self.products = Pending(programs * clock.per), Pending(programs * clock.per)

    def places(self, threads: Array, addresses: Array, size: int) -> Array:
        """[n, size] into `data`."""
        if (addresses % size).any():
            raise MemoryFault(f"shared addresses are no multiples of {size}")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise MemoryFault(f"{size} bytes at {int(addresses.max())} of {self.size} bytes of shared memory")
        return (threads // self.clock.per * self.size + addresses)[:, None] + np.arange(size)

    def read(self, threads: Array, at: Array, note: bool = True) -> Array:
        """`note`: whether a barrier must come before another thread's next write."""
        if self.coming[at].any():
            raise MemoryFault("shared memory is read before cp.async was waited for")
        if not self.written[at].all():
            raise MemoryFault("shared memory is read that nobody wrote")
        now = self.clock.now(threads)
        (self.order.note_read if note else self.order.check_read)(now, at)
        return self.data[at]

    def read_by_product(self, threads: Array, at: Array, note: bool) -> Array:
        """What threads wrote themselves must be fenced off, by them or by those whose product reads it."""
        values = self.read(threads, at, note)
        writer = np.maximum(self.order.wrote.thread[at] - 1 - self.clock.first, 0)
        fenced = self.clock.fences[writer] > self.fences[at]
        if not (fenced | (self.clock.fenced_in[threads][:, None] > self.order.wrote.spell[at])).all():
            raise MemoryFault("a product reads shared memory with no fence.proxy.async behind the write")
        return values

    def _check_free(self, at: Array) -> None:
        if self.coming[at].any():
            raise MemoryFault("shared memory is written before cp.async was waited for")
        if self.lent[at].any():
            raise MemoryFault("shared memory is written before a product that reads it was waited for")

    def write(self, threads: Array, at: Array, values: Array) -> None:
        self._check_free(at)
        self.order.note_write(self.clock.now(threads), at, self.data[at] != values)
        self._put(at, values)
        self.fences[at] = self.clock.fences[threads][:, None]

    def _put(self, at: Array, values: Array) -> None:
        self.data[at] = values
        if (self.data[at] != values).any():
            raise MemoryFault("threads write different values to the same shared memory at once")
        self.written[at] = True

    def copy(self, threads: Array, at: Array, values: Array) -> None:
        """cp.async: the bytes are there once their group was waited for."""
        self._check_free(at)
        self.order.note_write(self.clock.now(threads), at, self.data[at] != values)
        self.coming[at] = True
        self.copies.begin(threads, at, values)

    def wait_for_copies(self, threads: Array, groups: int | None) -> None:
        """All groups but the last `groups` of these threads have arrived; None: also what no group holds."""
        for who, (at, values) in self.copies.done(threads, groups):
            self.coming[at] = False
            self.order.wrote.replace(self.clock.now(who), at)
            self._put(at, values)
            self.fences[at] = -1

    def lend(self, threads: Array, at: Array) -> None:
        """To products of these threads, [n, bytes]."""
        self.lent[at] = True
        self.products.begin(threads, at)

    def wait_for_products(self, threads: Array, groups: int) -> None:
        done = self.products.done(threads, groups)
        for who, (at,) in done:
            self.lent[at] = False
            self.order.note_read(self.clock.now(who), at)
        if done:
            for (at,) in self.products.rows():
                self.lent[at] = True


STORED, MULTIPLIED, LENT = 1, 2, 4  # a cell is on its way from tcgen05.st, or from a product, or to one


@dataclass
class Product:
    """What a thread has begun: cells that it writes, cells and bytes of shared memory that it reads, and
    (barrier, arrivals) from which on it is done."""

    thread: int
    cells: Array
    inputs: Array
    places: Array
    until: list[tuple[int, int]] = field(default_factory=list)


class TensorMemory:
    """Blackwell's, of some programs: cells of 32 bits."""

    LANES, COLUMNS = 128, 512

    def __init__(self, clock: Clock, programs: int) -> None:
        total = programs * self.LANES * self.COLUMNS
        self.clock = clock
        self.cells, self.written = np.zeros(total, np.uint32), np.zeros(total, bool)
        self.busy = np.zeros(total, np.uint8)
        self.order = Order(total, "tensor memory")
        self.used: list[list[int]] = [[] for _ in range(programs)]  # columns of each allocation
        self._stores = Pending(programs * clock.per)
        self._products: dict[int, list[Product]] = collections.defaultdict(list)  # by program

    def allocate(self, program: int, columns: int) -> int:
        """The first column."""
        first = sum(self.used[program])
        if columns not in (32, 64, 128, 256, 512) or first + columns > self.COLUMNS:
            raise MemoryFault(f"{columns} columns of tensor memory, of which {first} are in use")
        self.used[program].append(columns)
        return first

    def free(self, program: int, first: int, columns: int) -> None:
        """The last allocation."""
        if sum(self.used[program][:-1]) != first or self.used[program][-1:] != [columns]:
            raise MemoryFault(
                f"{columns} columns of tensor memory from {first} on are not the last allocated"
            )
        size = self.LANES * self.COLUMNS
        if self.busy[program * size : (program + 1) * size].any():
            raise MemoryFault("tensor memory is freed before all was waited for")
        self.used[program].pop()

    def places(self, programs: Array, lanes: Array, columns: Array) -> Array:
        """Cells of programs [n], of lanes and columns [n, ...]."""
        ends = np.array([sum(columns) for columns in self.used])[programs]
        others = (1,) * (np.ndim(columns) - 1)
        if (columns >= ends.reshape(-1, *others)).any() or (lanes >= self.LANES).any():
            raise MemoryFault("a cell of tensor memory that is not the program's")
        return (programs.reshape(-1, *others) * self.LANES + lanes) * self.COLUMNS + columns

    def _check_arrived(self, at: Array, allowed: int = 0) -> None:
        """`allowed`: what may be on the way still, since it comes before all the same."""
        if (self.busy[at] & np.uint8((STORED | MULTIPLIED) & ~allowed)).any():
            raise MemoryFault("tensor memory is used before what writes it was waited for")

    def read(self, threads: Array, at: Array, allowed: int = 0) -> Array:
        self._check_arrived(at, allowed)
        if not self.written[at].all():
            raise MemoryFault("tensor memory is read that nobody wrote")
        self.order.note_read(self.clock.now(threads), at)
        return self.cells[at]

    def store(self, threads: Array, at: Array, values: Array) -> None:
        self._check_arrived(at)
        if (self.busy[at] & LENT).any():
            raise MemoryFault("tensor memory is written before a product that reads it was waited for")
        self.order.note_write(self.clock.now(threads), at, self.cells[at] != values)
        self.cells[at], self.written[at], self.busy[at] = values, True, STORED
        self._stores.begin(threads, at)

    def wait_for_stores(self, threads: Array) -> None:
        for who, (at,) in self._stores.done(threads, None):
            self.busy[at] = 0
            self.order.wrote.replace(self.clock.now(who), at)

    def multiply(self, product: Product, values: Array, shared: Shared) -> None:
        at = product.cells
        self._check_arrived(at, MULTIPLIED)
        self.order.note_write(self.clock.now(np.array([product.thread])), at)
        self.order.wrote.thread[at] = 0  # whoever waits for the product comes behind it
        self.cells[at], self.written[at] = values, True
        self._products[product.thread // self.clock.per].append(product)
        self._occupy(product, shared)

    def _occupy(self, product: Product, shared: Shared) -> None:
        self.busy[product.inputs] |= LENT
        self.busy[product.cells] = MULTIPLIED
        shared.lent[product.places] = True

    def commit(self, thread: int, barrier: int, arrivals: int) -> None:
        """All that the thread has begun is done as soon as so many arrived at the barrier, an address."""
        for product in self._products[thread // self.clock.per]:
            if product.thread == thread:
                product.until.append((barrier, arrivals))

    def wait_for_products(self, program: int, barrier: int, arrivals: int, shared: Shared) -> None:
        left: list[Product] = []
        done: list[Product] = []
        for product in self._products[program]:
            arrived = any(where == barrier and count <= arrivals for where, count in product.until)
            (done if arrived else left).append(product)
        for product in done:
            self.busy[product.cells] = self.busy[product.inputs] = 0
            shared.lent[product.places] = False
        for product in left if done else ():
            self._occupy(product, shared)
        self._products[program] = left
