"""Bridges to other code: the original SpikeDecoder's checkpoints and names.

`convert` reads the original's checkpoints. `model`, `utils` and `trainer` have the original's module names
and are thin shims over this package: a script written for the original runs with these imports instead:

    from spikedecoder.compat import model
    from spikedecoder.compat.utils import Reader, charDataset, wordDataset
    from spikedecoder.compat.trainer import Trainer

`accelerate` runs this package's LIF operator inside other libraries' models. Each module is imported on first
access.
"""

from importlib import import_module
from types import ModuleType

__all__ = ["accelerate", "convert", "model", "trainer", "utils"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
