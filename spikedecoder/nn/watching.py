"""Forward hooks for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def watching(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks of `model`'s modules inside.

    Modules that were compiled in place (`nn.Module.compile`) run as they are meanwhile: torch does not call
    hooks that come after the first compiled call.
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
