"""Whether a model still is what its config makes, in all that its state dict does not show."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.attention import AttentionLIF
from spikedecoder.params import ILIFParams, LIFParams

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

_PLAIN = (bool, int, float, str, type(None), LIFParams, ILIFParams, SpikeDecoderConfig)
# attributes that say how a module runs or is trained, not what it is
_OF_THE_OBJECT = {"training", "recompute", "unrolled", "group", "dropout", "capacity", "tokenizer"}


class _Unfilled(TorchFunctionMode):
    """Skips random initialisation: on the meta device it would import the compiler, which takes a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@functools.lru_cache(maxsize=16)
def made(kind: Any, config: SpikeDecoderConfig) -> SpikeDecoder:
    """The model that `kind`, SpikeDecoder or a subclass, makes of the config; on the meta device, cached."""
    with torch.device("meta"), _Unfilled():
        model: SpikeDecoder = kind(config)
    return model


def changed(model: SpikeDecoder, kind: Any) -> str | None:
    """How the first module that differs from `made(kind, model.config)` does so, in words; else None."""
    own = dict(model.named_modules(remove_duplicate=False))
    expected = dict(made(kind, model.config).named_modules(remove_duplicate=False))
    for name, module in own.items():
        if name not in expected:
            return f"{name} was added"
        same = expected[name]
        if name and type(module) is not type(same):  # the model itself may be of a subclass of `kind`
            return f"{name} is a {type(module).__name__}, not a {type(same).__name__}"
        if "forward" in vars(module) and "forward" not in vars(same):
            return f"{name or 'it'} has a forward of its own"
        for key, value in _settings(same).items():
            if (found := vars(module).get(key)) != value:
                return f"{name}: {key} is {found!r}, not {value!r}"
        if isinstance(module, AttentionLIF) and not module.decays_as_made():
            return f"{name}: decay is not what the config makes"
    return next((f"{name} is gone" for name in expected if name not in own), None)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module of this package that are set by the config."""
    if not type(module).__module__.startswith("spikedecoder."):
        return {}
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _OF_THE_OBJECT and isinstance(value, _PLAIN)
    }
