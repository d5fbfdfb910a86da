"""What warps move, in sectors of tensors and wavefronts of shared memory, beside the least possible."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SECTOR, BANKS = 32, 32  # bytes; words of 32 bits


class Traffic:
    """`counts`: of each kernel and kind of access the requests of warps, what they took, and the least."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Array] = {}

    def _add(self, kernel: str, kind: str, requests: int, taken: int, least: int) -> None:
        self.counts.setdefault((kernel, kind), np.zeros(3, np.int64))
        self.counts[kernel, kind] += (requests, taken, least)

    def tensors(self, kernel: str, kind: str, threads: Array, addresses: Array, size: int) -> None:
        """Sectors: each request takes those that its lanes' bytes lie in."""
        warp = threads // 32
        least = np.unique(_pairs(warp, addresses // size)[:, 0], return_counts=True)[1] * size
        taken = len(_pairs(warp, addresses // SECTOR))
        self._add(kernel, kind, len(least), taken, int((-(-least // SECTOR)).sum()))

    def shared(self, kernel: str, kind: str, threads: Array, addresses: Array, size: int) -> None:
        """Wavefronts: each takes a word from every bank, of as many lanes as 128 bytes are for."""
        words = max(1, size // 4)
        part = threads * words // 32
        at = _pairs(np.repeat(part, words), (addresses[:, None] // 4 + np.arange(words)).ravel())
        parts, first = np.unique(at[:, 0], return_inverse=True)
        in_bank = np.zeros((len(parts), BANKS), np.int64)
        np.add.at(in_bank, (first, at[:, 1] % BANKS), 1)
        least = -(-in_bank.sum(1) // BANKS)
        self._add(kernel, kind, len(np.unique(threads // 32)), int(in_bank.max(1).sum()), int(least.sum()))


def _pairs(a: Array, b: Array) -> Array:
    """Each pair once, [n, 2]."""
    return np.unique(np.stack([a, b], 1), axis=0)
