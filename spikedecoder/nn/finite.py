"""Search for NaN and infinite values: a neuron that receives NaN never fires, and its spikes hide that."""

from __future__ import annotations

from itertools import chain

from torch import nn


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold NaN or infinite values."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    # a sum is faster to check, and is finite only if all values are
    return [name for name, x in tensors if not (bool(x.sum().isfinite()) or bool(x.isfinite().all()))]


def check_finite(model: nn.Module) -> None:
    """Raise ValueError naming the first of `not_finite`, if any."""
    if names := not_finite(model):
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(
            f"model: {names[0]}{more} holds NaN or infinite values, so there is nothing to count or show"
        )
