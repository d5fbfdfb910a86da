"""Multi-timestep leaky integrate-and-fire neuron. Equations: `spikedecoder.params.LIFParams`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.params import LIFParams
from spikedecoder.surrogate import SURROGATES, Surrogate, heaviside


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, surrogate: Surrogate, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return heaviside(u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(u, ctx.alpha), None, None


def spike(u: Tensor, surrogate: str, alpha: float) -> Tensor:
    """Heaviside step of u, with the derivative of the named surrogate in backward."""
    return _Spike.apply(u, SURROGATES[surrogate], alpha)


def charge(x: Tensor, v: Tensor, p: LIFParams) -> Tensor:
    """Membrane potential after one timestep's input, before firing."""
    leak = v if not p.v_reset else v - p.v_reset
    return v + over_tau(x - leak, p) if p.decay_input else v + x - over_tau(leak, p)


def after(h: Tensor, fired: Tensor, threshold: Tensor | float, p: LIFParams) -> Tensor:
    """Membrane potential after firing. (No product, as 0 times an infinite threshold would be NaN.)"""
    return h.masked_fill(fired, p.v_reset) if p.v_reset is not None else torch.where(fired, h - threshold, h)


def over_tau(x: Tensor, p: LIFParams) -> Tensor:
    """x / tau, rounded once. (On a GPU, PyTorch would multiply by 1 / tau, which is rounded itself.)"""
    return x / (torch.full((), p.tau, dtype=x.dtype, device=x.device) if x.is_cuda else p.tau)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of membrane potentials and sums: float32 for half-precision inputs, else the inputs'."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def limit_of(threshold: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """The threshold in `dtype`, that of the potentials."""
    return threshold.to(dtype) if isinstance(threshold, Tensor) else threshold


def lif(x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams) -> tuple[Tensor, Tensor]:
    """Spikes [T, ...] and the final membrane potential [...] for input x [T, ...], by autograd.

    `threshold` broadcasts against one timestep; v_init is the initial membrane potential (zeros if None).
    """
    x_ = x.to(compute_dtype(x.dtype))
    threshold = limit_of(threshold, x_.dtype)
    v = torch.zeros_like(x_[0]) if v_init is None else v_init.to(x_.dtype)
    spikes = []
    for x_t in x_.unbind(0):
        h = charge(x_t, v, p)
        s = spike(h - threshold, p.surrogate, p.alpha)
        s_reset = s.detach() if p.detach_reset else s
        if p.detach_reset:
            v = after(h, s_reset > 0, threshold, p)
        elif p.v_reset is None:
            v = h - s_reset * threshold
        else:
            v = h + s_reset * (p.v_reset - h)
        spikes.append(s)
    return torch.stack(spikes).to(x.dtype), v


def forward(
    x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams
) -> tuple[Tensor, Tensor]:
    """`lif` without autograd, writing into one tensor instead of a list: the fast eager form."""
    dtype = compute_dtype(x.dtype)
    threshold = limit_of(threshold, dtype)
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    v = torch.zeros_like(x[0], dtype=dtype) if v_init is None else v_init.to(dtype)
    for t in range(x.shape[0]):
        v = charge(x[t].to(dtype), v, p)
        fired = v - threshold >= 0
        spikes[t] = fired
        v = after(v, fired, threshold, p)
    return spikes, v


def backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor | float,
    v_init: Tensor | None,
    p: LIFParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the threshold (in the shape of one timestep, to be summed to its own) and of v_init.

    Recomputes h from x, then goes back in time. With e = dL/dv[t] and u = h - v_threshold:

        dL/dh[t] = dL/ds[t] g'(u) + e dv[t]/dh[t],      dL/dthreshold = -sum_t dL/ds[t] g'(u) + (reset)
        dL/dx[t] = dL/dh[t] dh/dx,                      dL/dv[t-1]    = dL/dh[t] (1 - 1/tau)
    """
    dtype = compute_dtype(x.dtype)
    threshold = limit_of(threshold, dtype)
    derivative = SURROGATES[p.surrogate].derivative
    v = torch.zeros_like(x[0], dtype=dtype) if v_init is None else v_init.to(dtype)
    hs: list[Tensor] = []
    for t in range(x.shape[0]):
        h = charge(x[t].to(dtype), v, p)
        hs.append(h)
        fired = h - threshold >= 0
        v = after(h, fired, threshold, p)

    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_threshold = torch.zeros_like(v)
    carry = torch.zeros_like(v) if grad_v is None else grad_v.to(dtype)
    for t in range(x.shape[0] - 1, -1, -1):
        h = hs.pop()
        u = h - threshold
        fired = u >= 0
        slope = derivative(u, p.alpha)
        grad_s = grad_spikes[t].to(dtype)
        if p.v_reset is None:
            grad_threshold -= carry * fired
            through_reset = carry
            if not p.detach_reset:
                grad_s = grad_s - carry * threshold
        else:
            through_reset = carry.masked_fill(fired, 0)
            if not p.detach_reset:
                grad_s = grad_s + carry * (p.v_reset - h)
        grad_u = grad_s * slope
        grad_threshold -= grad_u
        grad_h = grad_u + through_reset
        grad_x[t] = over_tau(grad_h, p) if p.decay_input else grad_h
        carry = grad_h * (1 - 1 / p.tau)
    return grad_x, grad_threshold, carry
