"""Adds up, in float32, the sums that separate programs have made: the last step of every weight gradient.

P parts of n sums each are read once, and n sums are written in their own dtype. The order of additions is
fixed, so the result is the same in every run. P is some tens to hundreds, n is 80 to about 100 000. Few sums
are bound by latency, so the threads of a program divide the parts among themselves; many are bound by memory,
mostly by the cache to which the parts have just been written.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import alignment, cdiv, family, kernel, launch, power_of_2


@kernel
def add_parts(
    parts_ptr, first_ptr, second_ptr, parts, size, split,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Sums over dim 0 of parts [parts, size]: those before `split` go to first, the others to second."""
    size = size.to(tl.int64) * ALIGN
    split = split.to(tl.int64) * ALIGN
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for begin in range(0, parts, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
        inside = (p < parts) & (n < size)[None, :]
        total += tl.load(parts_ptr + p * size + n[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 0)
    tl.store(first_ptr + n, sums.to(first_ptr.dtype.element_ty), mask=n < split)
    if second_ptr is not None:
        to = second_ptr + (n - split)
        tl.store(to, sums.to(second_ptr.dtype.element_ty), mask=(n >= split) & (n < size))


def _tile(size: int, device: torch.device) -> dict[str, int]:
    """Enough programs to fill a GPU if there are enough sums; at least 32 bytes of each part per program.

    16 values per thread, so that four 128-bit loads are in flight. Under the interpreter, few programs.
    """
    if not family(device):
        return {"BLOCK_P": 4, "BLOCK_N": min(2048, power_of_2(size)), "num_warps": 4}
    block_n = min(128, max(8, power_of_2(cdiv(size, 256))))
    warps = 8 if block_n <= 16 else 4
    return {"BLOCK_P": 512 * warps // block_n, "BLOCK_N": block_n, "num_warps": warps}


def sum_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Sum parts [P, ...], float32, over dim 0; write the sums in order, to `first` and then `second`."""
    size, split = parts[0].numel(), first.numel()
    align = alignment(size, split)
    tile = _tile(size, parts.device)
    launch(
        add_parts, (cdiv(size, tile["BLOCK_N"]),), parts_ptr=parts, first_ptr=first,
        second_ptr=second, parts=parts.shape[0], size=size // align, split=split // align, ALIGN=align,
        **tile,
    )  # fmt: skip
