"""The table of surrogate gradients, which replace the derivative of a spike.

A neuron fires where its membrane potential h reaches the threshold,

    s = 1 if u >= 0 else 0,   u = h - v_threshold,

whose derivative is 0 almost everywhere. In the backward pass ds/du is replaced by g'(u), the derivative of
a smooth or piecewise step g(u) from 0 to 1 (fast sigmoid: from -1 / alpha to 1 / alpha). Each row of the
table holds g, g' and the number that identifies them in compiled kernels.

In float32 the sigmoid's g' = alpha s (1 - s) loses its digits where s is nearly 1: for alpha u > 10, where it
is less than 5e-5 alpha. So it does in Triton; in C++ it is computed from exp(-alpha |u|), which does not.

Sources: sigmoid and ATan as in SpikingJelly (Fang et al., 2023, Science Advances 9, eadi1480) and PLIF
(Fang et al., 2021); rectangular: Wu et al., 2018 (STBP); triangle: Esser et al., 2016; fast sigmoid:
Zenke & Ganguli, 2018 (SuperSpike).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def heaviside(u: Tensor) -> Tensor:
    """1 where u >= 0, else 0, in u's dtype. NaN >= 0 is false, so NaN never fires."""
    return (u >= 0).to(u.dtype)


@dataclass(frozen=True)
class Surrogate:
    """One row of the table: ``primitive(u, alpha)`` is g, ``derivative(u, alpha)`` is g', both elementwise.

    u: membrane potential minus threshold. alpha: sharpness of the step, > 0.
    """

    name: str
    kernel_id: int
    default_alpha: float
    formula: str
    primitive: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _sigmoid(u: Tensor, alpha: float) -> Tensor:
    return torch.sigmoid(alpha * u)


def _sigmoid_grad(u: Tensor, alpha: float) -> Tensor:
    g = torch.sigmoid(alpha * u)
    return alpha * g * (1 - g)


def _atan(u: Tensor, alpha: float) -> Tensor:
    return torch.atan(math.pi / 2 * alpha * u) / math.pi + 0.5


def _atan_grad(u: Tensor, alpha: float) -> Tensor:
    return alpha / 2 / (1 + (math.pi / 2 * alpha * u).square())


def _rectangular(u: Tensor, alpha: float) -> Tensor:
    return (alpha * u + 0.5).clamp(0, 1)


def _rectangular_grad(u: Tensor, alpha: float) -> Tensor:
    return alpha * (u.abs() * alpha <= 0.5).to(u.dtype)


def _triangle(u: Tensor, alpha: float) -> Tensor:
    w = (alpha * u).clamp(-1, 1)
    return 0.5 + w - 0.5 * w * w.abs()


def _triangle_grad(u: Tensor, alpha: float) -> Tensor:
    return alpha * (1 - alpha * u.abs()).clamp(min=0)


def _fast_sigmoid(u: Tensor, alpha: float) -> Tensor:
    return u / (1 + alpha * u.abs())


def _fast_sigmoid_grad(u: Tensor, alpha: float) -> Tensor:
    return 1 / (1 + alpha * u.abs()).square()


SURROGATES: dict[str, Surrogate] = {
    row.name: row
    for row in (
        Surrogate("sigmoid", 0, 4.0, "g' = alpha s (1 - s), s = sigmoid(alpha u)", _sigmoid, _sigmoid_grad),
        Surrogate("atan", 1, 2.0, "g' = (alpha / 2) / (1 + (pi / 2 alpha u)^2)", _atan, _atan_grad),
        Surrogate(
            "rectangular", 2, 1.0, "g' = alpha where alpha |u| <= 1/2", _rectangular, _rectangular_grad
        ),
        Surrogate("triangle", 3, 1.0, "g' = alpha max(0, 1 - alpha |u|)", _triangle, _triangle_grad),
        Surrogate("fast_sigmoid", 4, 25.0, "g' = 1 / (1 + alpha |u|)^2", _fast_sigmoid, _fast_sigmoid_grad),
    )
}


def get_surrogate(name: str) -> Surrogate:
    """The surrogate called `name`; ValueError listing the choices if there is none."""
    try:
        return SURROGATES[name]
    except (KeyError, TypeError):
        raise ValueError(f"surrogate: got {name!r}, takes one of {', '.join(SURROGATES)}") from None
