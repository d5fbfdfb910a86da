"""When an operator may pass the dispatcher by, which for a small tensor takes as long as its kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or records a call, and its tensors are what they seem."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    return all(x is None or (type(x) in _PLAIN and x.layout == torch.strided) for x in tensors)
