"""Triton's interpreter made faster; imported where TRITON_INTERPRET=1 only.

While a kernel is interpreted, the members of triton.language stand for operations on NumPy arrays. Triton
puts them there anew at every launch and every call of a device function, looking at some thousand attributes,
which takes more time than all else, and takes them away after the launch. Here they stay: with
TRITON_INTERPRET=1 nothing in the process compiles kernels.

What then takes longest are the types and shapes of values, of which there are few: each is worked out once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def _sizes(shape: Any) -> tuple[Any, ...]:
    return tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])


def _remember_block_types(init: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    known: dict[tuple[object, ...], dict[str, Any]] = {}

    @functools.wraps(init)
    def remembering(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.dtype:  # of pointers there is no end
            init(self, element_ty, shape)
            return
        key = (element_ty.name, *_sizes(shape))
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return remembering


def _remember_shapes(init: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    @functools.wraps(init)
    def remembering(self: Any, handle: Any, type: Any) -> None:
        key = _sizes(type.shape) if type.is_block() else ()
        if key not in known:
            init(self, handle, type)
            known[key] = {n: value for n, value in vars(self).items() if n not in ("handle", "type", "dtype")}
        vars(self).update(known[key], handle=handle, type=type, dtype=type.scalar)

    return remembering


def _remember_np_dtypes(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    @functools.wraps(np_dtype)
    def remembering(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        if type(scalar) is not tl.dtype:
            return np_dtype(tt_dtype)
        if scalar.name not in known:
            known[scalar.name] = np_dtype(scalar)
        return known[scalar.name]

    return remembering


def install() -> None:
    """Replace Triton's functions; a Triton that has none of these names is left as it is."""
    patch_lang = getattr(interpreter, "_patch_lang", None)
    if patch_lang is None or hasattr(patch_lang, "in_place"):
        return
    for owner, name, remember in (
        (tl.block_type, "__init__", _remember_block_types),
        (tl.tensor, "__init__", _remember_shapes),
        (interpreter, "_get_np_dtype", _remember_np_dtypes),
    ):
        if hasattr(owner, name):
            setattr(owner, name, remember(getattr(owner, name)))
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
