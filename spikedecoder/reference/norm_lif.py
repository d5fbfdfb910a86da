"""Normalisation, then LIF or I-LIF: y = (x - mean) * rstd * weight + bias, spikes = LIF(y).

Row statistics (LayerNorm) are computed here; channel statistics (BatchNorm, PowerNorm) are passed in.
Kept for backward: x and the statistics; y and the membrane potentials are recomputed. The argument
`threshold` is for LIF neurons; I-LIF neurons have their own, and no timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.reference import ilif as _ilif
from spikedecoder.reference import lif as _lif
from spikedecoder.reference.norm import moments, norm

__all__ = ["backward_apply", "backward_layer", "backward_reduce", "forward", "moments", "norm_lif"]

Threshold = Tensor | float
Neurons = LIFParams | ILIFParams


def norm_lif(x: Tensor, n: NormParams, threshold: Threshold, p: LIFParams) -> Tensor:
    """Spikes [T, ..., C] for x [T, ..., C], differentiable by autograd."""
    return _lif.lif(norm(x, n), threshold, None, p)[0]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    threshold: Threshold,
    p: Neurons,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, mean, rstd); the statistics are those passed in or, without any, those of each row."""
    x_ = x.to(_lif.compute_dtype(x.dtype))
    weight, bias = weight.to(x_.dtype), bias.to(x_.dtype)
    if mean is None or rstd is None:
        y, mean, rstd = torch.native_layer_norm(x_, x.shape[-1:], weight, bias, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    else:
        y = torch.addcmul(bias, (x_ - mean) * rstd, weight)
    if isinstance(p, ILIFParams):
        return _ilif.forward(y, p, want_mask=False)[0].to(x.dtype), mean, rstd
    return _lif.forward(y, threshold, None, p)[0].to(x.dtype), mean, rstd


def _gradient_of_y(
    grad_spikes: Tensor, z: Tensor, weight: Tensor, bias: Tensor, threshold: Threshold, p: Neurons
) -> tuple[Tensor, Tensor]:
    y = torch.addcmul(bias.to(z.dtype), z, weight.to(z.dtype))
    if isinstance(p, ILIFParams):
        mask = _ilif.forward(y, p, want_mask=True)[1]
        assert mask is not None
        return _ilif.backward(grad_spikes.to(z.dtype), mask, p), z.new_zeros(())
    grad_y, grad_threshold, _ = _lif.backward(grad_spikes.to(z.dtype), None, y, threshold, None, p)
    return grad_y, grad_threshold


def backward_layer(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Threshold,
    p: Neurons,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the threshold, for row statistics.

    With g = dL/dy, z = (x - mean) rstd and <.> the mean over channels:
        dx = rstd (g weight - <g weight> - z <g weight z>),  dweight = sum g z,  dbias = sum g.
    """
    x_, weight, bias = (a.to(mean.dtype) for a in (x, weight, bias))
    z = (x_ - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    g, grad_threshold = _gradient_of_y(grad_spikes, z, weight, bias, threshold, p)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        g, x_, x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), weight, bias, [True, True, True]
    )
    return grad_x.to(x.dtype), grad_weight, grad_bias, grad_threshold


def backward_reduce(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Threshold,
    p: Neurons,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight = sum g z, dbias = sum g, dthreshold), for channel statistics."""
    z = (x.to(mean.dtype) - mean) * rstd
    g, grad_threshold = _gradient_of_y(grad_spikes, z, weight, bias, threshold, p)
    rows = tuple(range(x.dim() - 1))
    return (g * z).sum(rows), g.sum(rows), grad_threshold


def backward_apply(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: Threshold,
    p: Neurons,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> Tensor:
    """dx = a g + b z + c with coefficients per channel, for channel statistics."""
    z = (x.to(mean.dtype) - mean) * rstd
    g, _ = _gradient_of_y(grad_spikes, z, weight, bias, threshold, p)
    return (a * g + b * z + c).to(x.dtype)
