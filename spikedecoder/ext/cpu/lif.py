"""LIF in C++ (csrc/lif.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import (
    ELEMENTS,
    address,
    dense,
    floats_on_cpu,
    grad_threshold_like,
    neuron,
    same,
    threshold_of,
)
from spikedecoder.ext.cpu._memory import empty, empty_like, hand_over
from spikedecoder.params import LIFParams

why_not = floats_on_cpu

STATES_ON_REQUEST = True  # forward takes want_v, backward want_grad_v_init


def forward(
    x: Tensor, threshold: Tensor | float, v_init: Tensor | None, p: LIFParams, want_v: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Spikes [T, ...] and the final membrane potential [...], None if not wanted."""
    if (done := hand_over(native.lif, neuron(p), threshold, x, v_init, want_v)) is not None:
        return done
    x = same(x)
    v_init = None if v_init is None else dense(v_init)
    spikes = empty_like(x)
    v = empty(x.shape[1:]) if want_v else None
    t = threshold_of(threshold, x)
    native.lif_forward(
        *(neuron(p), t.native, ELEMENTS[x.dtype], address(x), address(v_init), address(spikes)),
        *(address(v), x.shape[0], t.rows, t.channels, torch.get_num_threads()),
    )
    return spikes, v


def backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor | float,
    v_init: Tensor | None,
    p: LIFParams,
    want_grad_v_init: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, of the threshold (None for a number), and of v_init (None without one, or unwanted)."""
    tensors = (grad_spikes, grad_v, x, v_init)
    done = hand_over(native.lif_gradients, neuron(p), threshold, *tensors, want_grad_v_init)
    if done is not None:
        return done
    if grad_spikes.shape != x.shape:
        raise ValueError(f"grad_spikes: got shape {tuple(grad_spikes.shape)}, takes {tuple(x.shape)}")
    x = same(x)
    grad_spikes = same(grad_spikes, x.dtype)
    v_init = None if v_init is None else dense(v_init)
    grad_v = None if grad_v is None else dense(grad_v)
    t = threshold_of(threshold, x)
    grad_x = empty_like(x)
    grad_threshold = grad_threshold_like(threshold, t)
    grad_v_init = None if v_init is None or not want_grad_v_init else empty_like(v_init)
    native.lif_backward(
        *(
            neuron(p),
            t.native,
            ELEMENTS[x.dtype],
            address(grad_spikes),
            address(grad_v),
            address(x),
            address(v_init),
        ),
        *(address(grad_x), address(grad_threshold), address(grad_v_init)),
        *(x.shape[0], t.rows, t.channels, torch.get_num_threads()),
    )
    return grad_x, grad_threshold, grad_v_init
