"""Normalisation over channels."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.params import NormParams
from spikedecoder.reference.norm import norm as _reference


def check_norm(x: Tensor, n: NormParams) -> None:
    """x [..., C] against the norm's C channels."""
    _check.floating("x", x, min_dims=2)
    if n.weight.shape != x.shape[-1:]:
        raise ValueError(f"x: got {x.shape[-1]} channels (shape {tuple(x.shape)}), takes {n.weight.shape[0]}")
    if n.kind == "batch" and n.training and x[..., 0].numel() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes at least two rows for batch statistics in training")


def norm(x: Tensor, n: NormParams) -> Tensor:
    """LayerNorm, BatchNorm or PowerNorm of x [..., C] over its channels; see `NormParams`.

    Updates the running statistics in ``n.running`` in training. Batch and power statistics run over all
    of T, B and S, so in training a position's output depends on later positions: choose "layer" where a
    strictly causal training loss matters (in evaluation all three are causal).
    """
    check_norm(x, n)
    return _reference(x, n)
