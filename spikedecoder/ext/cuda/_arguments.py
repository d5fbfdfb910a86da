"""Shared by this backend's modules: which calls can run here, and tensors as the C++ functions take them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spikedecoder.ext.cuda import missing
from spikedecoder.ops._dispatch import Call

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3, torch.uint8: 3}


def on_a_gpu(call: Call, *, bytes_too: bool = False) -> str | None:
    """Why this backend cannot run the call; None if it can."""
    reason = missing()
    if reason is not None:
        return reason
    if call.device.type != "cuda":
        return f"it runs on a GPU, the tensors are on {call.device}"
    if call.dtype not in TYPES or (not bytes_too and TYPES[call.dtype] == 3):
        return f"it takes float32, float16 or bfloat16, got {call.dtype}"
    return None


def address(x: Tensor | None) -> int:
    """The address of x's data, 0 for None. The caller must keep x alive until the work is queued; after that,
    the allocator reuses the memory in the stream's order."""
    return 0 if x is None else x.data_ptr()


def launch(kernel: Callable[..., None], x: Tensor, *arguments: int) -> None:
    """Queue a kernel on x's device, in the current stream there. The caller's current device is unchanged."""
    with torch.cuda.device(x.device):
        kernel(*arguments, x.get_device(), torch.cuda.current_stream(x.device).cuda_stream)
