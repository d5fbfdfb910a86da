"""Linear layer whose input is spikes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from spikedecoder.ops import _check


def spike_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = s W^T + b for spikes s [..., K], weight [N, K], bias [N]: a sum of the weight's active columns.

    Returns y [..., N]. Gradients to s, weight and bias. s may hold any real numbers; what is 0 or 1 is
    what sparse backends make use of.
    """
    _check.floating("s", s)
    _check.floating("weight", weight, dims=2)
    if s.shape[-1] != weight.shape[1]:
        raise ValueError(f"s: got {s.shape[-1]} channels (shape {tuple(s.shape)}), takes {weight.shape[1]}")
    _check.same_device(s=s, weight=weight, bias=bias)
    return F.linear(s, weight, bias)
