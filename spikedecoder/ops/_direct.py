"""Calls that bypass torch's dispatcher, which for a small tensor takes as long as the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
# Needed at every call of an operator, so looked up once.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or intercepts this call, and its tensors are plain, dense and hold
    values.

    Raises:
        NotImplementedError: a tensor has a tangent (forward-mode differentiation), which torch's custom
            operators would drop silently.
    """
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError("this operator has no forward-mode derivative, and its input has a tangent")
    if (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.layout != torch.strided or x.is_meta or x.is_neg()):
            return False
    return True


def as_tensors(like: Tensor, *found: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """`found` with empty tensors in place of None: a registered operator can return only tensors."""
    return tuple(like.new_empty(0, dtype=dtype or like.dtype) if x is None else x for x in found)


class _Final(torch.autograd.Function):
    """The result of `compute`, which raises when it is differentiated with respect to `tensors`. (torch's
    once_differentiable looks only at incoming gradients, and raises nothing under torch.autograd.grad.)"""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], *tensors: Any) -> Any:
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("the gradient of a spiking operator cannot be differentiated again")


class _Kept:
    """A ctx whose saved tensors are read only once, as activation checkpointing requires."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def direct(
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    tensors: int | None = None,
    twice: bool = False,
) -> Callable[..., Any]:
    """An operator as an autograd function, for calls that nothing watches (see `unwatched`): in a training
    step of a small model, the time of the dispatcher matters.

    Args:
        forward, setup_context, backward: what the operator is registered with, calling functions instead of
            operators.
        tensors: only this many of the first arguments may be tensors. The others are passed through autograd
            as one object, because it inspects every argument. None: any argument may be a tensor.
        twice: whether backward can itself be differentiated when gradients are enabled in it.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            if tensors is not None:
                inputs = (*inputs[:tensors], *inputs[tensors])
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            grads = tuple(grad if grad is None else grad.resolve_neg() for grad in grads)
            if torch.is_grad_enabled() and not twice:  # someone may differentiate the gradient
                kept = _Kept(ctx)
                found = _Final.apply(lambda: backward(kept, *grads), *grads, *kept.saved_tensors)
            else:
                found = backward(ctx, *grads)
            return found if tensors is None else (*found[:tensors], None)

    def call(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if tensors is None:
            return Direct.apply(*inputs)
        return Direct.apply(*inputs[:tensors], inputs[tensors:])

    return call
