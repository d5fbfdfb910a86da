"""Temporary forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def watching(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on `model`'s modules inside the block.

    Modules that were compiled in place (`nn.Module.compile`) run uncompiled meanwhile, as torch does not call
    hooks that were added after the first compiled call.
    """
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    handles = []
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, call in compiled:
            module._compiled_call_impl = call
