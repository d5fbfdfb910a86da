"""The compiled extension: backends "cpu" (C++) and "cuda" (C++/CUDA), built from csrc/ when installing.

Nothing here is needed: without it every operator runs on the reference backend. `info` says what is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from spikedecoder.ext import _sources

NOT_BUILT = "the compiled extension is not built: pip install . in a checkout, with a C++ compiler"
CUDA_NOT_BUILT = (
    "the CUDA module is not built: SPIKEDECODER_BUILD=cuda pip install . in a checkout, with nvcc"
)

STALE = (
    "the compiled extension was built from other sources than csrc/ holds now: "
    "pip install --no-build-isolation -e . builds it anew"
)


def is_built() -> bool:
    """Whether `spikedecoder._C` was built; it is not loaded to find out."""
    return importlib.util.find_spec("spikedecoder._C") is not None


def is_cuda_built() -> bool:
    """Whether `spikedecoder._C_cuda` was built; it is not loaded to find out."""
    return importlib.util.find_spec("spikedecoder._C_cuda") is not None


def is_stale(module: ModuleType) -> bool:
    """Whether a compiled module was built from other sources than the checkout that it runs in holds."""
    sources = _sources.fingerprint()
    return sources is not None and getattr(module, "sources", None) != sources


def asked_for() -> dict[str, str]:
    """What setup.py was asked for: "build" (SPIKEDECODER_BUILD) and "cuda_archs"; and the "nvcc" that it
    found, or "". Empty where it has compiled nothing, and so noted nothing, or the note cannot be read."""
    try:
        return json.loads(Path(__file__).parent.with_name("_build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def info() -> dict[str, Any]:
    """What the extension consists of here, for `spikedecoder doctor`.

    Keys: "cpu" and "cuda", each a dict with "built" (bool) and, if something is missing, "mend" (a sentence
    with the command). Built, "cpu" has "stale" (built from other sources, and so not used) and, if it is not,
    "variants" (those that this CPU can run, best first), "variant" (the one in force), "vendor" (of this CPU:
    "intel", "amd" or "other"), "family" (its number; 0 if it has none), "features" (of it, as far as kernels
    ask for them), "compiler", "openmp" (version date or None), "bfloat16_products", "threads" and
    "keeps_freed_memory"; "cuda" has "stale", "compiler", "architectures" (of machine code, and PTX as
    "NN-virtual") and "loaded" (there is a GPU), and, built or not, "asked" (SPIKEDECODER_BUILD of the build,
    where one was noted).
    """
    cpu: dict[str, Any] = {"built": is_built()}
    if cpu["built"]:
        import torch

        from spikedecoder.ext import cpu as backend

        native = backend.native
        cpu["stale"] = native is None
        if native is None:
            return {"cpu": {**cpu, "mend": STALE}, "cuda": _cuda_info()}
        cpu |= native.build()
        cpu |= {
            "variants": native.variants(),
            "variant": native.variant(),
            "threads": torch.get_num_threads(),
            "keeps_freed_memory": backend.KEEPS_FREED_MEMORY,
        }
        if cpu["openmp"] is None:
            cpu["mend"] = (
                "built without OpenMP: one thread only. With GCC: CXX=g++ pip install . in a checkout"
            )
    else:
        cpu["mend"] = NOT_BUILT
    return {"cpu": cpu, "cuda": _cuda_info()}


def _cuda_info() -> dict[str, Any]:
    found: dict[str, Any] = {"built": is_cuda_built()}
    found |= {"asked": asked["build"]} if (asked := asked_for()) else {}
    if not found["built"]:
        return {**found, "mend": CUDA_NOT_BUILT}
    import torch

    module = importlib.import_module("spikedecoder._C_cuda")
    found |= {"compiler": module.compiler, "architectures": module.architectures.split()}
    found["stale"] = is_stale(module)
    if found["stale"]:
        return {**found, "loaded": False, "mend": STALE}
    if not torch.cuda.is_available():
        return {**found, "loaded": False, "mend": "torch sees no GPU here"}
    return {**found, "loaded": True}
