"""Where large results lie.

torch asks the C library for aligned memory. glibc before 2.38 cuts such a block out of a larger one, and
small blocks then live in what it cut off: once freed, the block is 96 bytes too short for the next tensor
of its size, which goes to the end of the heap. While large blocks come from the heap
(`KEEPS_FREED_MEMORY`), the peak of a training step grew to twice what its tensors take. Here a large result
comes from plain malloc, which is asked for 64 bytes more; it is aligned inside, and a freed block fits the
next result of its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from spikedecoder.ext import cpu
from spikedecoder.ext.cpu import native

LARGE = 1 << 20  # bytes; below, a microsecond more for a call counts and the memory does not
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor. A large one cannot be resized in place: its memory is not torch's."""
    shape = torch.Size(shape)
    if cpu.KEEPS_FREED_MEMORY and shape.numel() * dtype.itemsize >= LARGE and dtype in _TYPES:
        return from_dlpack(native.result(shape, _TYPES[dtype]))
    return torch.empty(shape, dtype=dtype)


def empty_like(x: Tensor) -> Tensor:
    """The same for x's shape and dtype; contiguous."""
    return empty(x.shape, x.dtype)
