"""A layer of LIF neurons."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.params import LIFParams


class LIF(nn.Module):
    """Multi-timestep LIF over dim 0; stateless: every call starts at rest.

    With `learn_threshold`, the threshold is a scalar parameter that starts at ``params.v_threshold``.
    """

    def __init__(self, params: LIFParams, learn_threshold: bool = False) -> None:
        super().__init__()
        self.params = params
        self.v_threshold = nn.Parameter(torch.tensor(params.v_threshold)) if learn_threshold else None

    def forward(self, x: Tensor) -> Tensor:
        spikes = ops.lif_params(x, self.params, threshold=self.v_threshold)
        assert isinstance(spikes, Tensor)
        return spikes

    def extra_repr(self) -> str:
        return f"{self.params}, learn_threshold={self.v_threshold is not None}"
