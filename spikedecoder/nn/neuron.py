"""Layers of neurons."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from spikedecoder import ops
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.norm import Norm
from spikedecoder.params import ILIFParams, LIFParams, NormParams

# those of the torch modules that this package builds on
_PARTS = (nn.Linear.forward, nn.Embedding.forward, nn.Dropout.forward)


def foreign(module: nn.Module) -> bool:
    """Whether it is neither this package's nor a torch module it builds on: an adapter, for example."""
    # taken from the class: with torch 2.11, __module__ of a bound method cannot be traced
    of_class = type(module).forward
    ours = getattr(of_class, "__module__", "").startswith("spikedecoder.")
    return "forward" in module.__dict__ or not (ours or of_class in _PARTS)


def watched(*modules: nn.Module) -> bool:
    """Whether one of them has a hook or is foreign, so that the modules have to be called separately."""
    return bool(_has_any_global_hook()) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or foreign(m)
        for m in modules
    )


def followed(model: nn.Module) -> bool:
    """Whether the forward of any of its modules has a hook."""
    return bool(_has_any_global_hook()) or any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


class LIF(nn.Module):
    """Multi-timestep LIF over dim 0; stateless: every call starts at rest.

    With `learn_threshold`, the threshold is a scalar parameter that starts at ``params.v_threshold``.
    """

    levels = 1  # the largest output
    fused = True  # some operators fuse it with what comes before
    params: LIFParams

    def __init__(self, params: LIFParams, learn_threshold: bool = False) -> None:
        super().__init__()
        self.params = params
        self.v_threshold = nn.Parameter(torch.tensor(params.v_threshold)) if learn_threshold else None

    def forward(self, x: Tensor) -> Tensor:
        spikes = ops.lif_params(x, self.params, threshold=self.v_threshold)
        assert isinstance(spikes, Tensor)
        return spikes

    def of_norm(self, x: Tensor, n: NormParams) -> Tensor:
        """self(norm(x))."""
        return ops.norm_lif(x, n, self.params, threshold=self.v_threshold)

    def extra_repr(self) -> str:
        return f"{self.params}, learn_threshold={self.v_threshold is not None}"


class ILIF(LIF):
    """Integer LIF: integers 0 to `levels`, in one step; x of any shape."""

    fused = False
    params: ILIFParams  # type: ignore[assignment]

    def __init__(self, params: ILIFParams) -> None:
        nn.Module.__init__(self)
        self.params, self.levels, self.v_threshold = params, params.levels, None

    def forward(self, x: Tensor) -> Tensor:
        return ops.ilif_params(x, self.params)

    def of_norm(self, x: Tensor, n: NormParams) -> Tensor:
        return ops.norm_ilif(x, n, self.params)


def fire(lif: LIF, norm: Norm, x: Tensor) -> Tensor:
    """lif(norm(x)) in x's dtype (under autocast, some norms return float32). In one operator, unless a hook
    has to see norm or neurons separately, or one of them is foreign."""
    if watched(norm, lif):
        spikes: Tensor = lif(norm(x))
        return spikes.to(x.dtype)
    return lif.of_norm(x, norm.params())


def neurons(c: SpikeDecoderConfig) -> LIF:
    """A layer of the neurons that the configuration specifies."""
    params = c.neurons
    return ILIF(params) if isinstance(params, ILIFParams) else LIF(params, c.learn_threshold)
