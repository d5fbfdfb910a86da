"""Backend "cuda": packing and the spike matmul in CUDA, for float32, float16 and bfloat16 on a GPU.

The compiled module is loaded only if torch sees a GPU. All other operators run on Triton.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from spikedecoder.ext import CUDA_NOT_BUILT, STALE, is_cuda_built, is_stale

NO_GPU = "it needs a CUDA device and driver"


def _load() -> tuple[Any, str | None]:
    """(the compiled module, None), or (None, why not)."""
    if not is_cuda_built():
        return None, CUDA_NOT_BUILT
    if not torch.cuda.is_available():
        return None, NO_GPU
    module = importlib.import_module("spikedecoder._C_cuda")
    if is_stale(module):
        warnings.warn(STALE, stacklevel=2)  # as in ext/cpu: "auto" would silently do without
        return None, STALE
    return module, None


native, _missing = _load()


def missing() -> str | None:
    """Why the compiled module is not loaded; None if it is."""
    return _missing
