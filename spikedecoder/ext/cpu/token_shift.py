"""Token shift in C++ (csrc/token_shift.cpp)."""

from __future__ import annotations

from torch import Tensor

from spikedecoder.ext.cpu import native
from spikedecoder.ext.cpu._arguments import floats_on_cpu, same
from spikedecoder.ext.cpu._memory import hand_over

why_not = floats_on_cpu


def forward(x: Tensor, n: int, back: bool = False) -> Tensor | None:
    """x [..., S, C] shifted, or a gradient shifted `back`; None if x is empty or cannot be handed over."""
    found: Tensor | None = hand_over(native.token_shift, same(x), n, back)
    return found
