"""LayerNorm, BatchNorm and PowerNorm over channels. Equations: `spikedecoder.params.NormParams`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder import sync
from spikedecoder.params import NormParams, repeats_a_pass
from spikedecoder.reference.lif import compute_dtype


def alpha_backward() -> float:
    """PowerNorm's alpha in backward. A function, since with dynamic shapes torch.compile turns a global float
    into an input of the graph, and fails if only a backward pass reads it."""
    return 0.9


def moments(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) [C] over all rows of x [..., C]; (0, E[x^2]) without `center`; 0 of no rows."""
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x.dtype))
    if x.numel() == 0:
        return rows.new_zeros(x.shape[-1]), rows.new_zeros(x.shape[-1])
    if center:
        var, mean = torch.var_mean(rows, 0, correction=0)
        return mean, var
    return rows.new_zeros(x.shape[-1]), rows.square().mean(0)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x [..., C]: (y in `dtype`, mean, rstd), statistics [..., 1]."""
    if x.dtype != dtype:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    x, weight, bias = _alike(x, weight, bias)
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _as(y, dtype), mean.to(compute_dtype(dtype)), rstd.to(compute_dtype(dtype))


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm: (grad_x in x's dtype, grad_weight, grad_bias)."""
    wide = x.to(grad.dtype)
    if x.dtype != grad.dtype:
        weight = weight.to(grad.dtype)
    wide, weight, _ = _alike(wide, weight, weight)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(  # of a bias only the shape
        grad.contiguous().to(wide.dtype), wide, x.shape[-1:], mean, rstd, weight, weight, [True, True, True]
    )
    return grad_x.to(x.dtype), grad_weight, grad_bias


def mean_so_far(running_phi: Tensor, var: Tensor, iters: Tensor) -> Tensor:
    """PowerNorm's mean of var over `iters` passes, with running_phi as the mean of all but the last."""
    passes = iters.to(var.dtype)  # a quotient of integers would be in torch's default dtype
    return running_phi * ((passes - 1) / passes) + var / passes


def power_scale(var: Tensor, running_phi: Tensor, iters: Tensor, eps: float, warmup: int) -> Tensor:
    """PowerNorm's factor in training: 1 / sqrt(var + eps) in the first `warmup` passes, then 1 / sqrt of
    running_phi + eps, before this pass updates it.

    Raises:
        RuntimeError: the pass is repeated inside a backward pass, after running_phi was updated.
    """
    if repeats_a_pass():
        raise RuntimeError(
            "power norm in training: got a forward pass inside a backward pass, as activation checkpointing "
            "repeats it, where running_phi has moved on since; use SpikeDecoder.recompute_activations() in "
            "place of torch.utils.checkpoint"
        )
    return torch.where(iters <= warmup, var, running_phi).add(eps).rsqrt()


# Registered as an operator: torch.compile may repeat torch's own operations in backward, when running_phi,
# which they read, has been updated.
traced_power_scale = torch.library.custom_op("spikedecoder::power_scale", power_scale, mutates_args=())
traced_power_scale.register_fake(
    lambda var, running_phi, *_: var.new_empty(
        var.shape, dtype=torch.promote_types(var.dtype, running_phi.dtype)
    )
)


def _alike(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and parameters in the dtype that LayerNorm computes in, or on CUDA unchanged if all dtypes are the
    same. On CPUs torch would sum a 16-bit gradient over the rows in 16 bits."""
    if x.is_cuda and weight.dtype == bias.dtype == x.dtype:
        return x, weight, bias
    dtype = compute_dtype(x.dtype)
    return _as(x, dtype), _as(weight, dtype), _as(bias, dtype)


def layer_dtype(x: Tensor) -> torch.dtype:
    """The dtype of LayerNorm's result: float32 under autocast on CUDA, else that of x."""
    wide = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if wide else x.dtype


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype. (With torch 2.11, a compiled autograd function that ends in `to` has no gradient if
    `to` returns x itself.)"""
    return x if x.dtype == dtype else x.to(dtype)


class _PowerNorm(torch.autograd.Function):
    """Training pass of PowerNorm (Shen et al., 2020, arXiv 2003.07845), without group scaling.

    Pass i over rows x [N, C]:   var = mean(x^2);  z = x / sqrt(var + eps) while i <= warmup, then
    z = x / sqrt(running_phi + eps);  y = weight z + bias.  Before pass `warmup`, running_phi becomes
    running_phi (i - 1) / i + var / i; then, in every pass, alpha running_phi + (1 - alpha) var.
    Backward, with the alpha of `alpha_backward`: g = dy weight;  ga = g - (1 - alpha) ema_gz z;
    ema_gz += mean(ga z);  dx = ga / sqrt(var + eps).  Means are over the rows of all processes of `group`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_phi, ema_gz, iters, eps, alpha, warmup, group):
        iters += 1
        mean, var = moments(x, center=False)
        ctx.count = None
        if group is not None:
            _, var, ctx.count = sync.moments_over(mean, var, x.numel() // x.shape[-1], group)
        z_scale = traced_power_scale(var, running_phi, iters, eps, warmup)
        phi = torch.where(iters < warmup, mean_so_far(running_phi, var, iters), running_phi)
        running_phi.copy_(alpha * phi + (1 - alpha) * var)
        ctx.save_for_backward(x, weight, z_scale, (var + eps).rsqrt())
        ctx.ema_gz, ctx.group = ema_gz, group
        y = x * (z_scale * weight) + bias  # z_scale is wider than 16 bits
        return _as(y, torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, z_scale, rstd = ctx.saved_tensors
        rows = tuple(range(x.dim() - 1))
        z = x * z_scale
        ga = grad * weight - (1 - alpha_backward()) * ctx.ema_gz * z
        moved = (ga * z).sum(rows)
        if ctx.group is not None:
            moved = sync.sum_over(moved, ctx.group)
        ctx.ema_gz += moved / (x.numel() // x.shape[-1] if ctx.count is None else ctx.count)
        return ga * rstd, (grad * z).sum(rows), grad.sum(rows), *(None,) * 7


class _SyncedBatchNorm(torch.autograd.Function):
    """y = weight (x - mean) rstd + bias, with statistics over the N rows of all processes.

    With z = (x - mean) rstd and sums over all processes:
    dx = weight rstd (dy - sum dy / N - z sum(dy z) / N);
    dweight = sum dy z and dbias = sum dy over this process's rows.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, rstd, count, group):
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.group = group
        return _as((x.to(mean.dtype) - mean) * rstd * weight + bias, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd, count = ctx.saved_tensors
        rows = tuple(range(x.dim() - 1))
        grad = grad.to(mean.dtype)
        z = (x.to(mean.dtype) - mean) * rstd
        sum_gz, sum_g = (grad * z).sum(rows), grad.sum(rows)
        all_gz, all_g = sync.sum_over(torch.stack([sum_gz, sum_g]), ctx.group) / count
        grad_x = (weight * rstd * (grad - all_g - z * all_gz)).to(x.dtype)
        return grad_x, sum_gz.to(weight.dtype), sum_g.to(weight.dtype), None, None, None, None


def move_running(n: NormParams, mean: Tensor, var: Tensor, rows: Tensor | int) -> None:
    """BatchNorm: running = (1 - momentum) running + momentum batch, with the unbiased variance, as torch."""
    running_mean, running_var = n.running
    running_mean.lerp_(mean.to(running_mean.dtype), n.momentum)
    running_var.lerp_((var * (rows / (rows - 1))).to(running_var.dtype), n.momentum)


def norm(x: Tensor, p: NormParams) -> Tensor:
    """y [..., C] for x [..., C]; updates ``p.running`` in training."""
    if p.kind == "layer":
        alike, weight, bias = _alike(x, p.weight, p.bias)
        return _as(F.layer_norm(alike, x.shape[-1:], weight, bias, p.eps), layer_dtype(x))
    if p.kind == "batch" and p.synced is not None:
        with torch.no_grad():
            mean, var = moments(x, center=True)
            mean, var, count = sync.moments_over(mean, var, x.numel() // x.shape[-1], p.synced)
            move_running(p, mean, var, count)
        return _SyncedBatchNorm.apply(x, p.weight, p.bias, mean, (var + p.eps).rsqrt(), count, p.synced)
    if p.kind == "batch":
        rows = x.reshape(-1, x.shape[-1])
        # torch's backward ignores strides of the weight and, in evaluation, of the statistics
        mean, var = p.running if p.training else (r.contiguous() for r in p.running)
        # statistics are wider than the parameters if only those are cast, as FSDP does
        weight, bias = p.weight.to(mean.dtype).contiguous(), p.bias.to(mean.dtype)
        return F.batch_norm(rows, mean, var, weight, bias, p.training, p.momentum, p.eps).view_as(x)
    running_phi, ema_gz, iters = p.running
    if p.training:
        return _PowerNorm.apply(
            x, p.weight, p.bias, running_phi, ema_gz, iters, p.eps, 1 - p.momentum, p.warmup, p.synced
        )
    y = x * (running_phi.to(compute_dtype(running_phi.dtype)) + p.eps).rsqrt() * p.weight + p.bias
    return y.to(torch.promote_types(x.dtype, p.weight.dtype))
