"""Backend "cpu": the operators in C++, for float32 and bfloat16 tensors on the CPU.

Importing this package chooses the best variant that the CPU supports: AVX-512 with the matrix unit AMX,
AVX-512, AVX2 or plain code. SPIKEDECODER_CPU=amx, avx512, avx2 or baseline selects one; a variant that the
CPU lacks raises ValueError. The number of threads is that of `torch.set_num_threads`.

Memory: with glibc's default settings each large tensor is mapped afresh and faulted in page by page, which
makes a training step on the CPU two to three times slower. Importing this package therefore tells malloc to
serve large blocks from the heap and to keep freed memory for reuse (`mallopt`: M_MMAP_MAX = 0,
M_TRIM_THRESHOLD = -1, M_TOP_PAD = 64 MiB), and asks Linux for huge pages there (`madvise`). A process thus
keeps its peak memory until it ends. Large results of this backend are allocated such that the heap does not
fragment (`_memory`). Tensors that torch allocates are not: where many of different sizes come and go, the
heap may grow to several times what is alive at once. SPIKEDECODER_TUNE_MALLOC=0 leaves malloc alone, and all
results to torch.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

# before the extension: torch loads the OpenMP runtime, which both then share
import torch  # noqa: F401

from spikedecoder.ext import NOT_BUILT, STALE, is_built, is_stale

_VARIANT = "SPIKEDECODER_CPU"
_TUNE_MALLOC = "SPIKEDECODER_TUNE_MALLOC"


def _load() -> tuple[Any, str | None]:
    """(the compiled module, None), or (None, why not). One that was built but cannot be loaded raises."""
    if not is_built():
        return None, NOT_BUILT
    module = importlib.import_module("spikedecoder._C")
    if is_stale(module):
        # its functions may take other arguments; without the warning, "auto" would silently run the reference
        warnings.warn(STALE, stacklevel=2)
        return None, STALE
    return module, None


native, _missing = _load()


def missing() -> str | None:
    """Why the compiled module is not used; None if it is."""
    return _missing


def _choose_variant() -> None:
    asked = os.environ.get(_VARIANT)
    if native is None or not asked:
        return
    if asked not in native.variants():
        raise ValueError(
            f"{_VARIANT}: got {asked!r}, takes what this CPU has: {', '.join(native.variants())}"
        )
    native.use_variant(asked)


def _tune_malloc() -> bool:
    asked = os.environ.get(_TUNE_MALLOC, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{_TUNE_MALLOC}: got {asked!r}, takes 0 or 1")
    return native is not None and asked == "1" and native.keep_freed_memory()


_choose_variant()
KEEPS_FREED_MEMORY = _tune_malloc()
