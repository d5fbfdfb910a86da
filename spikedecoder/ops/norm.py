"""Normalisation over channels."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.params import NormParams
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.norm import norm as _reference


@torch.library.custom_op("spikedecoder::moments", mutates_args=())
def _moments(x: Tensor, center: bool, backend: str) -> tuple[Tensor, Tensor]:
    return select("norm_lif", Call(x.device, x.dtype, tuple(x.shape), {"rows": False}), backend).moments(
        x, center
    )


@_moments.register_fake
def _(x, center, backend):
    mean = x.new_empty(x.shape[-1], dtype=compute_dtype(x.dtype))
    return mean, torch.empty_like(mean)


@torch.no_grad()
def batch_statistics(x: Tensor, n: NormParams) -> tuple[Tensor, Tensor]:
    """BatchNorm's (mean, 1 / sqrt(var + eps)) [C] of this pass; moves the running ones in training.

    running = (1 - momentum) running + momentum batch, the variance unbiased there (torch's convention).
    """
    running_mean, running_var = n.running
    if not n.training:
        return running_mean.clone(), (running_var + n.eps).rsqrt()
    mean, var = _moments(x.detach(), True, requested_backend())
    rows = x.numel() // x.shape[-1]
    running_mean.lerp_(mean.to(running_mean.dtype), n.momentum)
    running_var.lerp_((var * (rows / (rows - 1))).to(running_var.dtype), n.momentum)
    return mean, (var + n.eps).rsqrt()


@torch.no_grad()
def power_statistics(x: Tensor, n: NormParams) -> tuple[Tensor, Tensor | None]:
    """PowerNorm's (scale of z [C], 1 / sqrt(E[x^2] + eps) of the batch); see `reference.norm`."""
    phi, _, iters = n.running
    if not n.training:
        return (phi + n.eps).rsqrt(), None
    _, var = _moments(x.detach(), False, requested_backend())
    iters += 1
    scale = torch.where(iters <= n.warmup, var, phi).add(n.eps).rsqrt()
    mean_so_far = phi * ((iters - 1) / iters) + var / iters
    phi.copy_(torch.lerp(torch.where(iters < n.warmup, mean_so_far, phi), var, n.momentum))
    return scale, (var + n.eps).rsqrt()


def check_norm(x: Tensor, n: NormParams) -> None:
    """x [..., C] against the norm's C channels."""
    _check.floating("x", x, min_dims=2)
    if n.weight.shape != x.shape[-1:]:
        raise ValueError(f"x: got {x.shape[-1]} channels (shape {tuple(x.shape)}), takes {n.weight.shape[0]}")
    if n.kind == "batch" and n.training and x.numel() < 2 * x.shape[-1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, takes at least two rows for batch statistics in training"
        )


def norm(x: Tensor, n: NormParams) -> Tensor:
    """LayerNorm, BatchNorm or PowerNorm of x [..., C] over its channels; see `NormParams`.

    Updates the running statistics in ``n.running`` in training. Batch and power statistics run over all
    of T, B and S, so in training a position's output depends on later positions: choose "layer" where a
    strictly causal training loss matters (in evaluation all three are causal).
    """
    check_norm(x, n)
    return _reference(x, n)
