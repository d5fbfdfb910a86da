"""Token shift: channels that come from previous tokens, without parameters or multiplications."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikedecoder.ops import _check
from spikedecoder.ops._direct import direct, unwatched
from spikedecoder.ops._dispatch import module, own_or_reference, resolve
from spikedecoder.reference import token_shift as reference


def _run(x: Tensor, n: int, back: bool, backend: str) -> Tensor:
    found: Tensor | None = module(backend, "token_shift").forward(x, n, back)
    return reference.forward(x, n, back) if found is None else found


def _forward(x: Tensor, n: int, backend: str) -> Tensor:
    return _run(x, n, False, backend)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.n, ctx.backend = inputs


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() or not (unwatched() and unwatched(grad)):  # such as for a second derivative
        return reference.forward(grad, ctx.n, back=True), None, None
    return _run(grad, ctx.n, True, ctx.backend), None, None


_direct = direct(_forward, _setup_context, _gradients, twice=True)


def token_shift(x: Tensor, n: int) -> Tensor:
    """Channel group i of n takes its values from the token i places back (zeros before the first).

        y[s, c] = x[s - i, c] for s >= i, else 0; c in group i

    Group widths differ by at most 1, the first ones being wider. Spikes stay spikes.

    Args:
        x: [..., S, C], float, two dimensions or more.
        n: number of groups, >= 1; groups beyond the channels are empty.

    Returns:
        y in x's shape and dtype. Nothing is kept for backward, and gradients can be differentiated again.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: the token shift of RWKV (Peng et al., 2023), made binary and longer.
    """
    _check.floating("x", x, min_dims=2)
    _check.integer("n", n)
    if n < 1:
        raise ValueError(f"n: got {n}, takes at least 1")
    if n == 1:
        return x
    # the first is False under forward-mode differentiation, where the second would raise
    if unwatched() and unwatched(x):
        backend = resolve("token_shift", x.device.type, x.dtype, own_or_reference("token_shift"))
        if backend != "reference":
            return _direct(x, n, backend)
    return reference.forward(x, n)
