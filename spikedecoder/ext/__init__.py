"""The compiled extension: backends "cpu" (C++) and "cuda" (C++/CUDA), built from csrc/ when installing.

Nothing here is needed: without it every operator runs on the reference backend. `info` says what is there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

NOT_BUILT = "the compiled extension is not built: pip install . with a C++ compiler"


def is_built() -> bool:
    """Whether `spikedecoder._C` was built; it is not loaded to find out."""
    return importlib.util.find_spec("spikedecoder._C") is not None


def info() -> dict[str, Any]:
    """What the extension consists of here, for `spikedecoder doctor`.

    Keys: "cpu" and "cuda", each a dict with "built" (bool) and, if something is missing, "mend" (a sentence
    with the command). Built, "cpu" has "variants" (those that this CPU can run, best first), "variant" (the
    one in force), "compiler", "openmp" (version date or None), "threads" and "keeps_freed_memory".
    """
    cpu: dict[str, Any] = {"built": is_built()}
    if cpu["built"]:
        import torch

        from spikedecoder.ext import cpu as backend

        native = backend.native
        cpu |= native.build()
        cpu |= {
            "variants": native.variants(),
            "variant": native.variant(),
            "threads": torch.get_num_threads(),
            "keeps_freed_memory": backend.KEEPS_FREED_MEMORY,
        }
        if cpu["openmp"] is None:
            cpu["mend"] = "built without OpenMP: one thread only. Install libomp or GCC, then pip install ."
    else:
        cpu["mend"] = NOT_BUILT
    return {"cpu": cpu, "cuda": {"built": False, "mend": "the CUDA module is not built"}}
