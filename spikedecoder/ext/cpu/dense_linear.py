"""Dense linear layer in C++ (csrc/matmul.cpp, csrc/dense_weight_grad.cpp), for CPUs on which torch's takes
much longer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikedecoder.ext.cpu import _cost, native
from spikedecoder.ext.cpu._arguments import ELEMENTS, address, floats_on_cpu, same
from spikedecoder.ext.cpu._memory import empty, hand_over
from spikedecoder.ext.cpu.spike_linear import input_and_bias_grad, matmul
from spikedecoder.ops._dispatch import Call


def why_not(call: Call) -> str | None:
    """Why this backend cannot, or had better not, run the call; None if it should."""
    if (reason := floats_on_cpu(call)) is not None:
        return reason
    if call.dtype != torch.float32:
        return f"it takes float32, got {call.dtype}"
    if not _cost.outpaces_torch(native.variant()):
        return "torch's own is as fast on this CPU"
    return None


def forward(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N]; there must be at least one row, input channel and output channel."""
    done: Tensor | None = hand_over(native.dense_linear, s, weight, bias)
    if done is not None:
        return done
    n, k = weight.shape
    s, y = same(s), empty((*s.shape[:-1], n))
    sizes = (s.numel() // k, k, n, torch.get_num_threads())
    matmul(s, same(weight.t()), None if bias is None else same(bias), y, None, sizes)
    return y


def backward(
    grad: Tensor, s: Tensor | None, weight: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (s, weight, bias) from that of y; None for those that are not wanted.

    `weight` is needed only for the gradient of s, and `s` only for the gradient of the weight.
    """
    given = (s if wanted[1] else None, weight if wanted[0] else None)
    if (done := hand_over(native.dense_linear_gradients, grad, *given, bool(wanted[2]))) is not None:
        return done
    grad = same(grad)
    grad_s = grad_weight = grad_bias = None
    if wanted[0] and weight is not None:
        grad_s, grad_bias = input_and_bias_grad(grad, weight)
    elif wanted[2]:
        grad_bias = grad.flatten(0, -2).sum(0)
    if wanted[1] and s is not None:
        n, k = grad.shape[-1], s.shape[-1]
        s, grad_weight = same(s), empty((n, k))
        sizes = (s.numel() // k, k, n, torch.get_num_threads())
        operands = (address(s), ELEMENTS[s.dtype], address(grad), ELEMENTS[grad.dtype])
        native.dense_weight_grad(*operands, address(grad_weight), *sizes)
    return grad_s, grad_weight, grad_bias if wanted[2] else None
