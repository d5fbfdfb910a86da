"""LayerNorm, BatchNorm and PowerNorm over channels. Equations: `spikedecoder.params.NormParams`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder.params import NormParams

ALPHA_BACKWARD = 0.9


class _PowerNorm(torch.autograd.Function):
    """Training pass of PowerNorm (Shen et al., 2020, arXiv 2003.07845), without group scaling.

    Pass i over rows x [N, C]:   var = mean(x^2);  z = x / sqrt(var + eps) while i <= warmup, then
    z = x / sqrt(running_phi + eps);  y = weight z + bias.  Before pass `warmup` running_phi is the mean
    of all var so far, and in every pass it moves to alpha running_phi + (1 - alpha) var.
    Backward: g = dy weight;  ga = g - (1 - alpha) ema_gz z;  ema_gz += mean(ga z);
    dx = ga / sqrt(var + eps).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_phi, ema_gz, iters, eps, alpha, warmup):
        rows = x.reshape(-1, x.shape[-1])
        iters += 1
        var = rows.square().mean(0)
        z_scale = torch.where(iters <= warmup, var, running_phi).add(eps).rsqrt()
        mean_so_far = running_phi * ((iters - 1) / iters) + var / iters
        phi = torch.where(iters < warmup, mean_so_far, running_phi)
        running_phi.copy_(alpha * phi + (1 - alpha) * var)
        ctx.save_for_backward(x, weight, z_scale, (var + eps).rsqrt())
        ctx.ema_gz = ema_gz
        return x * (z_scale * weight) + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight, z_scale, rstd = ctx.saved_tensors
        rows = tuple(range(x.dim() - 1))
        z = x * z_scale
        ga = grad * weight - (1 - ALPHA_BACKWARD) * ctx.ema_gz * z
        ctx.ema_gz += (ga * z).mean(rows)
        return ga * rstd, (grad * z).sum(rows), grad.sum(rows), None, None, None, None, None, None


def norm(x: Tensor, p: NormParams) -> Tensor:
    """y [..., C] for x [..., C]; updates ``p.running`` in training."""
    if p.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], p.weight, p.bias, p.eps)
    if p.kind == "batch":
        rows = x.reshape(-1, x.shape[-1])
        y = F.batch_norm(rows, p.running[0], p.running[1], p.weight, p.bias, p.training, p.momentum, p.eps)
        return y.view_as(x)
    running_phi, ema_gz, iters = p.running
    if p.training:
        return _PowerNorm.apply(
            x, p.weight, p.bias, running_phi, ema_gz, iters, p.eps, 1 - p.momentum, p.warmup
        )
    return x * (running_phi + p.eps).rsqrt() * p.weight + p.bias
