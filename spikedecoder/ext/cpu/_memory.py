"""Memory for results.

torch asks the C library for aligned memory. glibc before 2.38 cuts such a block out of a larger one, and
small blocks then settle in the offcuts: once freed, the block is 96 bytes too short for the next tensor of
its size, which goes to the end of the heap. With large blocks on the heap (`KEEPS_FREED_MEMORY`), this made
the peak of a training step twice what its tensors take. Results of this backend come from plain malloc
instead, which is asked for 64 bytes more, and are aligned inside the block; so a freed block fits the next
result of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from spikedecoder.ext import cpu
from spikedecoder.ext.cpu import native

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
# Whether the compiled functions can read and create torch's tensors: a later torch may lack this interface.
SEES_TENSORS = native is not None and _exchange is not None and native.use_torch(_exchange, Tensor, Parameter)


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor. It cannot be resized in place, because its memory is not torch's."""
    if cpu.KEEPS_FREED_MEMORY and SEES_TENSORS:
        return native.empty(shape, _TYPES[dtype])
    return torch.empty(shape, dtype=dtype, device="cpu")


def hand_over(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a compiled function that takes tensors as they are and makes its results.

    None if it leaves them to Python, because they have to be prepared first or are an error.
    """
    return function(*arguments, cpu.KEEPS_FREED_MEMORY, torch.get_num_threads()) if SEES_TENSORS else None


def empty_like(x: Tensor) -> Tensor:
    """`empty` with x's shape and dtype; contiguous."""
    return empty(x.shape, x.dtype)
