"""Makes Triton's interpreter faster. Imported only if TRITON_INTERPRET=1 is set.

While a kernel is interpreted, the members of triton.language are replaced by operations on NumPy arrays.
Triton installs these at every launch and at every call of a device function, for which it looks at about a
thousand attributes, and removes them after the launch. This takes more time than everything else. Here they
stay installed: with TRITON_INTERPRET=1 nothing in the process compiles kernels.

The types and shapes of values are the next largest cost. Few different ones occur, so each is created once,
and identical objects are taken to be equal without comparing them. Then come overflow checks on every integer
sum, which no GPU makes; `unchecked` turns them off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


class _Kept:
    """Has the `restore` that the interpreter calls after a launch, and restores nothing."""

    def restore(self) -> None:
        pass


@functools.cache
def _modules(function: Any) -> frozenset[str]:
    """Which of triton.language and its core the function has among its globals."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return frozenset(module.__name__ for module in modules)


def _sizes(shape: Any) -> tuple[Any, ...]:
    return tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])


class _Shapes:
    """Keeps one object per shape, so that caches can be keyed by its identity."""

    def __init__(self) -> None:
        self.by_sizes: dict[tuple[Any, ...], Any] = {}
        self.by_id: dict[int, Any] = {}

    def holds(self, shape: Any) -> bool:
        return self.by_id.get(id(shape)) is shape

    def like(self, shape: Any) -> Any:
        """The object kept for a shape of these sizes, or None."""
        return shape if self.holds(shape) else self.by_sizes.get(_sizes(shape))

    def keep(self, shape: Any) -> Any:
        kept = self.by_sizes.setdefault(_sizes(shape), shape)
        return self.by_id.setdefault(id(kept), kept)


_shapes = _Shapes()


def _remember_block_types(init: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    known: dict[tuple[str, int], dict[str, Any]] = {}

    @functools.wraps(init)
    def remembering(self: Any, element_ty: Any, shape: Any) -> None:
        of_numbers = type(element_ty) is tl.dtype  # pointer types are too many to keep
        if of_numbers and (found := known.get((element_ty.name, id(_shapes.like(shape))))):
            vars(self).update(found)
            return
        init(self, element_ty, shape)
        self.shape = _shapes.keep(self.shape)
        if of_numbers:
            known[element_ty.name, id(self.shape)] = dict(vars(self))

    return remembering


def _remember_shapes(init: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    known: dict[int, dict[str, Any]] = {}

    @functools.wraps(init)
    def remembering(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        found = known.get(id(shape)) if shape is None or _shapes.holds(shape) else None
        if found is None:
            init(self, handle, type)
            if shape is None or _shapes.holds(shape):
                own = ("handle", "type", "dtype")
                known[id(shape)] = {name: value for name, value in vars(self).items() if name not in own}
        else:
            vars(self).update(found, handle=handle, type=type, dtype=type.scalar)

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


def _same_is_equal(eq: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(eq)
    def equal(self: Any, other: Any) -> Any:
        return True if self is other else eq(self, other)

    return equal


def _same_shape_stays(broadcast: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    @functools.wraps(broadcast)
    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        shape = getattr(lhs.type, "shape", None)  # scalars have none
        return (lhs, rhs) if getattr(rhs.type, "shape", None) is shape else broadcast(self, lhs, rhs)

    return broadcast_values


def _unwrap_at_once(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(unwrap)
    def unwrapped(o: Any) -> Any:
        kind = type(o)
        if kind is tl.tensor or kind is int or kind is tl.dtype:
            return o
        return o.value if kind is tl.constexpr else unwrap(o)

    return unwrapped


def _is_its_own_ir(to_ir: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(to_ir)
    def own(self: Any, builder: Any) -> Any:
        return self if isinstance(builder, interpreter.InterpreterBuilder) else to_ir(self, builder)

    return own


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let integers wrap silently, as on a GPU; checking every sum for overflow is slow."""
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if not hasattr(options, "sanitize_overflow"):
        yield
        return
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options


def install() -> None:
    """Replace Triton's functions. Names that this version of Triton lacks are skipped; without `_patch_lang`
    nothing is replaced."""
    patch_lang = getattr(interpreter, "_patch_lang", None)
    if patch_lang is None or hasattr(patch_lang, "in_place"):
        return
    for owner, name, remember in (
        (tl.block_type, "__init__", _remember_block_types),
        (tl.tensor, "__init__", _remember_shapes),
        (interpreter, "_get_np_dtype", _remember_np_dtypes),
        (tl.dtype, "__eq__", _same_is_equal),
        (tl.tuple, "__eq__", _same_is_equal),
        (tl.block_type, "to_ir", _is_its_own_ir),
        (tl.core, "_unwrap_if_constexpr", _unwrap_at_once),
        (semantic.TritonSemantic, "broadcast_impl_value", _same_shape_stays),
    ):
        if hasattr(owner, name):
            setattr(owner, name, remember(getattr(owner, name)))
    in_place: set[str] = set()

    def patch(function: Any) -> _Kept:
        modules = _modules(function)
        if not modules <= in_place:
            patch_lang(function)
            in_place.update(modules)
            # Triton 3.6 calls int() on an array of one element, which NumPy 2.4 rejects
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return _Kept()

    patch.in_place = in_place  # type: ignore[attr-defined]
    interpreter._patch_lang = patch
