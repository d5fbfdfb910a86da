"""The compiled extension: backends "cpu" (C++) and "cuda" (C++/CUDA), built from csrc/ when installing.

It is optional: without it every operator runs on the reference backend, or on Triton where there is a GPU.
`info` says what is installed.
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
    """Whether `spikedecoder._C` was built; does not load it."""
    return importlib.util.find_spec("spikedecoder._C") is not None


def is_cuda_built() -> bool:
    """Whether `spikedecoder._C_cuda` was built; does not load it."""
    return importlib.util.find_spec("spikedecoder._C_cuda") is not None


def is_stale(module: ModuleType) -> bool:
    """Whether a compiled module was built from other sources than those of the checkout that it runs in."""
    sources = _sources.fingerprint()
    return sources is not None and getattr(module, "sources", None) != sources


def asked_for() -> dict[str, str]:
    """What setup.py recorded of its build: "build" (the SPIKEDECODER_BUILD asked for), "cuda_archs", and
    "nvcc" (the path found, or ""; with "cpu" it is not looked for). Empty if nothing was compiled or the
    record cannot be read."""
    try:
        return json.loads(Path(__file__).parent.with_name("_build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def info() -> dict[str, Any]:
    """What is installed of the extension, for `spikedecoder doctor`.

    Returns {"cpu": dict, "cuda": dict}. Both have "built" (bool), "stale" if built (compiled from other
    sources, and so not used) and, if something is missing, "mend" (a sentence with the command).

    cpu, if built and not stale: "variants" (those that this CPU can run, best first), "variant" (the one in
        use), "vendor" (of the CPU: "intel", "amd" or "other"), "family" (its number, 0 if it has none),
        "halves_vectors" (whether it computes AVX2's in two halves), "features" (of the CPU, those that
        kernels ask for), "compiler", "openmp" (version date, or None),
        "bfloat16_products", "threads" and "keeps_freed_memory".
    cuda, if built: "compiler", "architectures" (of machine code, and of PTX as "NN-virtual") and "loaded"
        (usable: not stale, and there is a GPU). Always, if setup.py recorded it: "asked", the
        SPIKEDECODER_BUILD of the build.
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
