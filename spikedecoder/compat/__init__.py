"""Bridges to other code: the original SpikeDecoder's checkpoints and names.

`convert` reads the original's checkpoints. `model`, `utils` and `trainer` are the original's modules by name,
as thin shims over this package: a script of the original's users runs after

    from spikedecoder.compat import model
    from spikedecoder.compat.utils import Reader, charDataset, wordDataset
    from spikedecoder.compat.trainer import Trainer

They are imported when first asked for.
"""

from importlib import import_module
from types import ModuleType

__all__ = ["accelerate", "convert", "model", "trainer", "utils"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
