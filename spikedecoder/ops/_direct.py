"""When an operator may pass the dispatcher by, which for a small tensor takes as long as its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
# Asked for each call of an operator: looked up once.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or records a call, and its tensors are what they seem, of values.

    Raises:
        NotImplementedError: a tensor has a tangent (forward-mode differentiation), which torch's custom
            operators lose without a word.
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
    """What a registered operator, which gives tensors alone, says None with: empty ones."""
    return tuple(like.new_empty(0, dtype=dtype or like.dtype) if x is None else x for x in found)


class _Final(torch.autograd.Function):
    """What `compute` gives, as a function of tensors by which it cannot be differentiated. (torch's
    once_differentiable looks at incoming gradients alone, and says nothing to torch.autograd.grad.)"""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], *tensors: Any) -> Any:
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("the gradient of a spiking operator cannot be differentiated again")


class _Kept:
    """A ctx whose saved tensors are read once, as activation checkpointing wants it."""

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
    """An operator as an autograd function, for calls that nothing watches: a training step of a small model
    feels what the dispatcher takes.

    Args: what the operator is registered with, but functions in place of operators.
        tensors: so many of its arguments, the first, may be tensors; autograd, which looks at each argument,
            is handed the others as one. None: any may.
        twice: backward can be differentiated itself, where gradients are on in it.
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
            if torch.is_grad_enabled() and not twice:  # the gradient may be differentiated again
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
