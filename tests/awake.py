"""Models that fire before they have learned anything."""

from __future__ import annotations

import torch
from torch import nn


def awake(model: nn.Module, bias: float) -> nn.Module:
    """The model, its norms moved by `bias` on the average, so that every layer fires, and its embeddings."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.bias"):
                parameter.add_(torch.randn_like(parameter) * 0.7 + bias)
            if "embedding" in name:
                parameter.add_(torch.randn_like(parameter))
    return model
