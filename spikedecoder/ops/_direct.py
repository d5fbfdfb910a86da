"""When an operator may pass the dispatcher by, which for a small tensor takes as long as its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_PLAIN = (Tensor, nn.Parameter)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or records a call, and its tensors are what they seem, of values."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    return all(
        x is None or (type(x) in _PLAIN and x.layout == torch.strided and not x.is_meta) for x in tensors
    )


def as_tensors(like: Tensor, *found: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """What a registered operator, which gives tensors alone, says None with: empty ones."""
    return tuple(like.new_empty(0, dtype=dtype or like.dtype) if x is None else x for x in found)


def direct(
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    tensors: int | None = None,
) -> Callable[..., Any]:
    """An operator as an autograd function, for calls that nothing watches: a training step of a small model
    feels what the dispatcher takes.

    Args: what the operator is registered with, but functions in place of operators.
        tensors: so many of its arguments, the first, may be tensors; autograd, which looks at each argument,
            is handed the others as one. None: any may.
    """
    once = once_differentiable(lambda ctx, *grads: backward(ctx, *grads))

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
            # only a gradient that is to be differentiated again needs the guard against it
            found = (once if torch.is_grad_enabled() else backward)(ctx, *grads)
            if isinstance(found, Tensor):  # what `once` makes of a tuple of one
                found = (found,)
            return found if tensors is None else (*found[:tensors], None)

    if tensors is None:
        return Direct.apply
    return lambda *inputs: Direct.apply(*inputs[:tensors], inputs[tensors:])
