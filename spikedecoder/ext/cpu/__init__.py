"""Backend "cpu": the operators in C++, for float32 tensors on the CPU.

The best variant that the CPU has (AVX-512 with the matrix unit AMX, AVX-512, AVX2 or plain code) is chosen
when this package is imported; SPIKEDECODER_CPU=amx, avx512, avx2 or baseline asks for one, and one that the
CPU lacks is an error. Threads are those of `torch.set_num_threads`.

Memory: with glibc's default settings each large tensor is mapped afresh and faulted in page by page, which
makes a training step on the CPU two to three times slower. Importing this package therefore tells malloc to
serve large blocks from the heap and to keep freed memory for reuse (`mallopt`: M_MMAP_MAX = 0,
M_TRIM_THRESHOLD = -1, M_TOP_PAD = 64 MiB), so a process keeps the memory of its peak until it ends, and to
ask Linux for huge pages there (`madvise`). Large results lie in blocks of our own, which keeps the heap whole
(`_memory`); torch's own do not, so that where many of other sizes come and go the heap may grow to several
times what is alive at once. SPIKEDECODER_TUNE_MALLOC=0 leaves malloc alone and all results to torch.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

# before the extension: torch brings the OpenMP runtime that both then share
import torch  # noqa: F401

from spikedecoder.ext import NOT_BUILT, STALE, is_built, is_stale

_VARIANT = "SPIKEDECODER_CPU"
_TUNE_MALLOC = "SPIKEDECODER_TUNE_MALLOC"


def _load() -> tuple[Any, str | None]:
    """The compiled module, or None and the reason. Built and not loadable is an error of its own."""
    if not is_built():
        return None, NOT_BUILT
    module = importlib.import_module("spikedecoder._C")
    if is_stale(module):
        # its functions may take other arguments; "auto" would run the reference without a word
        warnings.warn(STALE, stacklevel=2)
        return None, STALE
    return module, None


native, _missing = _load()


def missing() -> str | None:
    """Why the compiled module is not used; None where it is."""
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
