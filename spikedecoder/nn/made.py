"""Whether a model still is what its config makes, in what no tensor of its state says."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.attention import AttentionLIF

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

# how a module runs or is trained, which is in no config
_OF_THE_OBJECT = {
    "training", "recompute", "unrolled", "group", "dropout", "p", "inplace", "capacity", "tokenizer",
}  # fmt: skip

Settings = dict[str, tuple[type[nn.Module], dict[str, Any]]]  # class and attributes of each module, by name


class _Unfilled(TorchFunctionMode):
    """Draws no numbers: on the meta device they would import the compiler, which takes a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def made_by(model: SpikeDecoder) -> SpikeDecoder:
    """What the model's config makes, without memory."""
    return _without_memory(type(model), model.config)


def _without_memory(kind: type[SpikeDecoder], config: SpikeDecoderConfig) -> SpikeDecoder:
    with torch.device("meta"), _Unfilled():
        return kind(config)


def changed(model: SpikeDecoder, kind: Any) -> str | None:
    """The first module that is another, or is set otherwise, than in what `kind`, the model's class or one
    that it is derived from, makes of the config, in words."""
    own, made = _settings(model), _settings_made(kind, model.config)
    for name, (module_class, expected) in made.items():
        if name not in own:
            return f"{name} is gone"
        found, settings = own[name]
        if name and found is not module_class:
            return f"{name} is a {found.__name__}, not a {module_class.__name__}"
        for key, value in expected.items():
            if key not in settings or not _same(settings[key], value):
                of = f"{name}: " if name else ""
                return f"{of}{key} is {settings.get(key)!r}, not {value!r}"
    for name, module in model.named_modules():
        if name not in made:
            return f"{name} was added"
        if "forward" in module.__dict__:
            return f"{name or 'it'} has a forward of its own"
        if isinstance(module, AttentionLIF) and not module.decays_as_made():
            return f"{name}: decay is not what the config makes"
    return None


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


@functools.lru_cache(maxsize=16)
def _settings_made(kind: Any, config: SpikeDecoderConfig) -> Settings:
    return _settings(_without_memory(kind, config))


def _settings(model: nn.Module) -> Settings:
    return {
        name: (
            type(module),
            {
                key: value
                for key, value in vars(module).items()
                if not key.startswith("_") and key not in _OF_THE_OBJECT
            },
        )
        for name, module in model.named_modules()
    }
