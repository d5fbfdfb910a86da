"""Temporary evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside the block, then each module's own mode again. Takes a model or its modules."""
    modules = model.modules() if isinstance(model, nn.Module) else model
    training = [m for m in modules if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
