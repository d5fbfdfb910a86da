"""Train and run GPT-style language models whose every activation is a spike."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from spikedecoder._version import __version__
from spikedecoder._waiting import one_thread_in_forks, spins

if TYPE_CHECKING:
    from spikedecoder import ops
    from spikedecoder.checkpoint import CheckpointError
    from spikedecoder.config import SpikeDecoderConfig
    from spikedecoder.model import SpikeDecoder
    from spikedecoder.ops import BackendError, use_backend

# GNU OpenMP reads it when torch loads
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = spins()
one_thread_in_forks()

__all__ = [
    "BackendError",
    "CheckpointError",
    "SpikeDecoder",
    "SpikeDecoderConfig",
    "__version__",
    "ops",
    "use_backend",
]

_HOMES = {
    "BackendError": "spikedecoder.ops",
    "CheckpointError": "spikedecoder.checkpoint",
    "SpikeDecoder": "spikedecoder.model",
    "SpikeDecoderConfig": "spikedecoder.config",
    "use_backend": "spikedecoder.ops",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: the command line's help and Ctrl-C must not wait for it
    if name == "ops":
        return importlib.import_module("spikedecoder.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
