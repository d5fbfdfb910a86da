"""Shared by this backend's modules: which calls can run here, and tensors as the C++ functions take them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikedecoder.ext.cpu import missing, native
from spikedecoder.ops._dispatch import Call
from spikedecoder.params import ILIFParams, LIFParams
from spikedecoder.surrogate import SURROGATES

# The kernels' numbers for the types of an array's elements (Element in csrc/kernels.h).
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.bool: 2}
BITS = 3


def on_cpu(call: Call) -> str | None:
    """Why this backend cannot run the call, whatever its dtype; None if it can."""
    if missing() is not None:
        return missing()
    if call.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {call.device}"
    return None


def floats_on_cpu(call: Call) -> str | None:
    """Why this backend cannot run the call; None if it can."""
    if (reason := on_cpu(call)) is not None:
        return reason
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, got {call.dtype}"
    return None


def dense(x: Tensor) -> Tensor:
    """x as contiguous float32; x itself if it already is."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    return x.detach().to(torch.float32).contiguous()


def same(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x as contiguous tensor of its own dtype, or of the one given."""
    dtype = dtype or x.dtype
    if x.dtype == dtype and x.is_contiguous():
        return x
    return x.detach().to(dtype).contiguous()


def address(x: Tensor | None) -> int:
    """The address of x's data, 0 for None. The caller must keep x alive until the call has returned."""
    return 0 if x is None else x.data_ptr()


@functools.lru_cache(maxsize=64)
def neuron(p: LIFParams | ILIFParams) -> Any:
    """The parameters as the kernels take them; the threshold of a LIF is passed by itself."""
    if isinstance(p, ILIFParams):
        return native.Neuron.integer(p.levels, 1 / p.v_threshold, *p.window)
    return native.Neuron(
        p.tau, p.v_reset, p.decay_input, SURROGATES[p.surrogate].kernel_id, p.alpha, p.detach_reset
    )


class Threshold(NamedTuple):
    """A threshold as the kernels take it, and the shape in which they see one timestep: [rows, channels] if
    each channel has its own threshold, else a single row, which fills vectors even with few channels."""

    native: Any
    values: Tensor | None  # holds the memory that `native` points to
    rows: int
    channels: int


_SCALAR, _CHANNEL, _ELEMENT = 0, 1, 2


def threshold_of(threshold: Tensor | float, x: Tensor) -> Threshold:
    """From one number, one per channel (last dimension), or one per element of a timestep of x [T, ...]."""
    n = x.numel() // max(1, x.shape[0])
    if not isinstance(threshold, Tensor):
        return Threshold(_scalar(float(threshold)), None, 1, n)
    if n == 0:  # nothing is compared
        return Threshold(_scalar(0.0), None, 1, 0)
    if threshold.numel() == 1:
        return Threshold(_scalar(threshold.item()), None, 1, n)
    values, channels = dense(threshold), x.shape[-1]
    if threshold.numel() == channels == threshold.shape[-1]:
        return Threshold(native.Threshold(0.0, values.data_ptr(), _CHANNEL), values, n // channels, channels)
    values = values.expand(x.shape[1:]).contiguous()
    return Threshold(native.Threshold(0.0, values.data_ptr(), _ELEMENT), values, 1, n)


@functools.lru_cache(maxsize=64)
def _scalar(value: float) -> Any:
    return native.Threshold(value, 0, _SCALAR)


def grad_threshold_like(threshold: Tensor | float, t: Threshold) -> Tensor | None:
    """Zeros for the kernel to write dL/dthreshold to, in a shape that can be summed to the threshold's; None
    if the threshold is a number."""
    if not isinstance(threshold, Tensor):
        return None
    if t.values is None:
        return threshold.new_zeros(threshold.shape, dtype=torch.float32)
    return torch.zeros_like(t.values)
