"""Binarisation of embeddings: s = 1 where x >= 0, with the ATan surrogate in backward."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.reference.lif import spike
from spikedecoder.surrogate import SURROGATES, heaviside


def binarize(x: Tensor, alpha: float) -> Tensor:
    """Spikes of x, differentiable by autograd."""
    return spike(x, "atan", alpha)


def forward(x: Tensor, alpha: float) -> Tensor:
    return heaviside(x)


def backward(grad: Tensor, x: Tensor, alpha: float) -> Tensor:
    return grad * SURROGATES["atan"].derivative(x, alpha)
