"""Backend "cuda": packing and the spike matmul in CUDA, for float32, float16 and bfloat16 on a GPU.

The compiled module is loaded only where torch sees a GPU. The operators that are not here run on Triton.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from spikedecoder.ext import CUDA_NOT_BUILT, is_cuda_built

NO_GPU = "it needs a CUDA device and driver"

# The compiled module, or None.
native: Any = (
    importlib.import_module("spikedecoder._C_cuda") if is_cuda_built() and torch.cuda.is_available() else None
)


def missing() -> str | None:
    """Why the compiled module is not loaded; None where it is."""
    if native is not None:
        return None
    return NO_GPU if is_cuda_built() else CUDA_NOT_BUILT
