"""Triton's interpreter made faster; imported where TRITON_INTERPRET=1 only.

While a kernel is interpreted, the members of triton.language stand for operations on NumPy arrays. Triton
puts them there anew at every launch and every call of a device function, looking at some thousand attributes,
which takes more time than all else, and takes them away after the launch. Here they stay: with
TRITON_INTERPRET=1 nothing in the process compiles kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """What the interpreter calls after a launch."""

    def restore(self) -> None:
        pass


@functools.cache
def _modules(function: Any) -> frozenset[str]:
    """Of triton.language and its core, what a function sees as a global."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return frozenset(module.__name__ for module in modules)


def install() -> None:
    """Replace Triton's function; a Triton that has none of this name is left as it is."""
    patch_lang = getattr(interpreter, "_patch_lang", None)
    if patch_lang is None or hasattr(patch_lang, "in_place"):
        return
    in_place: set[str] = set()

    def patch(function: Any) -> _Kept:
        modules = _modules(function)
        if not modules <= in_place:
            patch_lang(function)
            in_place.update(modules)
            # Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return _Kept()

    patch.in_place = in_place  # type: ignore[attr-defined]
    interpreter._patch_lang = patch
