"""What threads read and write: tensors, each within its bounds, and shared memory, ordered by barriers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NOBODY, MANY = -1, -2


class MemoryFault(ValueError):
    """An access beside all tensors, misaligned, or in no order to another."""


class Globals:
    """The memory of some tensors, by address."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, Array]] = []

    def add(self, base: int, data: Array) -> None:
        """Bytes that lie at an address; `data` is what is read and written."""
        self._blocks.append((base, data))

    def _find(self, addresses: Array, size: int) -> list[tuple[Array, Array, Array]]:
        """(bytes, which of the addresses, offsets) of each block that they are in."""
        if (addresses % size).any():
            at = int(addresses[(addresses % size).argmax()])
            raise MemoryFault(f"address {at:#x} is no multiple of {size}")
        left, found = np.arange(addresses.size), []
        for base, data in self._blocks:
            inside = (addresses[left] >= base) & (addresses[left] + size <= base + data.size)
            if inside.any():
                some = left[inside]
                found.append((data, some, addresses[some] - base))
                left = left[~inside]
            if not left.size:
                return found
        if left.size:
            at = int(addresses[left[0]])
            away = [
                (max(base - at, at - base - data.size), at - base, data.size) for base, data in self._blocks
            ]
            _, offset, length = min(away, default=(0, 0, 0))
            raise MemoryFault(f"{size} bytes are in no tensor: {offset} bytes into one of {length}")
        return found

    def read(self, addresses: Array, size: int) -> Array:
        """Bytes [n, size] at aligned addresses [n]."""
        out = np.empty((addresses.size, size), np.uint8)
        for data, which, offsets in self._find(addresses, size):
            out[which] = data[offsets[:, None] + np.arange(size)]
        return out

    def write(self, addresses: Array, values: Array) -> None:
        for data, which, offsets in self._find(addresses, values.shape[1]):
            data[offsets[:, None] + np.arange(values.shape[1])] = values[which]


@dataclass
class _Copy:
    """A part of what cp.async brings: threads, their group, where to, and the bytes."""

    threads: Array
    group: Array
    at: Array  # [n, size] into all programs' bytes
    values: Array


class Shared:
    """Shared memory of some programs of `per` threads, `size` bytes each.

    Each byte keeps who wrote and who read it last, and in which spell between two barriers. Of several
    threads that read it at once one is kept, so not every missing barrier before a write is found.
    """

    def __init__(self, programs: int, per: int, size: int) -> None:
        self.per, self.size = per, size
        total = programs * size
        self.data = np.zeros(total, np.uint8)
        self.written = np.zeros(total, bool)
        self.coming = np.zeros(total, bool)  # cp.async has not been waited for
        self.writer, self.reader = np.full(total, NOBODY, np.int32), np.full(total, NOBODY, np.int32)
        self.write_spell, self.read_spell = np.zeros(total, np.int32), np.zeros(total, np.int32)
        self.write_warp_spell, self.read_warp_spell = np.zeros(total, np.int32), np.zeros(total, np.int32)
        threads = programs * per
        self.spell = np.zeros(threads, np.int32)  # of each thread: barriers of the program
        self.warp_spell = np.zeros(threads, np.int32)  # and of the warp
        self.committed = np.zeros(threads, np.int64)
        self.copies: list[_Copy] = []

    def barrier(self, threads: Array) -> None:
        self.spell[threads] += 1

    def warp_barrier(self, threads: Array) -> None:
        self.warp_spell[threads] += 1

    def places(self, threads: Array, addresses: Array, size: int, alignment: int | None = None) -> Array:
        """[n, size] into `data`."""
        if (addresses % (alignment or size)).any():
            raise MemoryFault(f"shared addresses are no multiples of {alignment or size}")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise MemoryFault(f"{size} bytes at {int(addresses.max())} of {self.size} bytes of shared memory")
        return (threads // self.per * self.size + addresses)[:, None] + np.arange(size)

    def _unordered(self, threads: Array, at: Array, who: Array, spell: Array, warp_spell: Array) -> Array:
        """Whether an access before is by another thread and no barrier lies between."""
        other = who[at]
        known = (other != NOBODY) & (spell[at] == self.spell[threads][:, None])
        warp = threads[:, None] // 32
        across = np.where(other < 0, True, other // 32 != warp) & known
        within = (other >= 0) & (other // 32 == warp) & (other != threads[:, None]) & known
        return across | (within & (warp_spell[at] == self.warp_spell[threads][:, None]))

    def read(self, threads: Array, at: Array, note: bool = True) -> Array:
        """`note`: whether a barrier of the program must come before the next write."""
        if self.coming[at].any():
            raise MemoryFault("shared memory is read before cp.async was waited for")
        if not self.written[at].all():
            raise MemoryFault("shared memory is read that nobody wrote")
        if self._unordered(threads, at, self.writer, self.write_spell, self.write_warp_spell).any():
            raise MemoryFault("shared memory is read with no barrier behind another thread's write")
        if not note:
            return self.data[at]
        who = np.broadcast_to(threads[:, None], at.shape)
        same = (self.read_spell[at] == self.spell[threads][:, None]) & (self.reader[at] != NOBODY)
        several = same & ((self.reader[at] == MANY) | (self.reader[at] // 32 != who // 32))
        self.reader[at] = np.where(several, MANY, who)
        self.read_spell[at] = self.spell[threads][:, None]
        self.read_warp_spell[at] = self.warp_spell[threads][:, None]
        return self.data[at]

    def _note_write(self, threads: Array, at: Array) -> None:
        if self._unordered(threads, at, self.reader, self.read_spell, self.read_warp_spell).any():
            raise MemoryFault("shared memory is written with no barrier behind another thread's read")
        self.writer[at] = threads[:, None]
        self.write_spell[at] = self.spell[threads][:, None]
        self.write_warp_spell[at] = self.warp_spell[threads][:, None]

    def write(self, threads: Array, at: Array, values: Array) -> None:
        clash = self._unordered(threads, at, self.writer, self.write_spell, self.write_warp_spell)
        if (clash & (self.data[at] != values)).any():
            raise MemoryFault("shared memory is written by two threads with no barrier between")
        self._note_write(threads, at)
        self.data[at] = values
        if (self.data[at] != values).any():
            raise MemoryFault("threads write different values to the same shared memory at once")
        self.written[at] = True

    def copy(self, threads: Array, at: Array, values: Array) -> None:
        """cp.async: the bytes are there once their group was waited for."""
        self._note_write(threads, at)
        self.coming[at] = True
        self.copies.append(_Copy(threads, self.committed[threads], at, values))

    def commit(self, threads: Array) -> None:
        self.committed[threads] += 1

    def wait(self, threads: Array, groups: int | None) -> None:
        """All groups but the last `groups` of these threads have arrived; None: also what no group holds."""
        here = np.zeros(self.spell.size, bool)
        here[threads] = True
        left = []
        for copy in self.copies:
            arrived = here[copy.threads]
            if groups is not None:
                arrived &= copy.group < self.committed[copy.threads] - groups
            if arrived.any():
                at, who = copy.at[arrived], copy.threads[arrived]
                self.data[at] = copy.values[arrived]
                self.written[at], self.coming[at] = True, False
                self._note_write(who, at)
            if not arrived.all():
                rest = ~arrived
                left.append(_Copy(copy.threads[rest], copy.group[rest], copy.at[rest], copy.values[rest]))
        self.copies = left


class TensorMemory:
    """Blackwell's, of some programs."""

    LANES, COLUMNS = 128, 512

    def __init__(self, programs: int) -> None:
        self.cells = np.zeros((programs, self.LANES, self.COLUMNS), np.uint32)
        self.written = np.zeros(self.cells.shape, bool)
        self.used = np.zeros(programs, np.int64)

    def allocate(self, program: int, columns: int) -> int:
        """The first column."""
        first = int(self.used[program])
        if first + columns > self.COLUMNS:
            raise MemoryFault(f"{first + columns} columns of tensor memory")
        self.used[program] += columns
        return first

    def _inside(self, programs: Array, columns: Array) -> None:
        used = np.reshape(self.used[programs], (-1, *(1,) * (columns.ndim - 1)))
        if (columns >= used).any():
            raise MemoryFault("a column of tensor memory that is not the program's")

    def read(self, programs: Array, lanes: Array, columns: Array) -> Array:
        self._inside(programs, columns)
        programs = np.reshape(programs, (-1, 1))
        if not self.written[programs, lanes, columns].all():
            raise MemoryFault("tensor memory is read that nobody wrote")
        return self.cells[programs, lanes, columns]

    def write(self, programs: Array, lanes: Array, columns: Array, values: Array) -> None:
        self._inside(programs, columns)
        programs = np.reshape(programs, (-1, 1))
        self.cells[programs, lanes, columns] = values
        self.written[programs, lanes, columns] = True
