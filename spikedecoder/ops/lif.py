"""Multi-timestep leaky integrate-and-fire neuron over dim 0."""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.fields import switch
from spikedecoder.ops import _check
from spikedecoder.ops._direct import as_tensors, direct, unwatched
from spikedecoder.ops._dispatch import Call, requested_backend, select
from spikedecoder.ops.pack_spikes import _pack
from spikedecoder.params import LIFParams
from spikedecoder.reference.lif import compute_dtype
from spikedecoder.reference.pack_spikes import WORD


def _run(
    x: Tensor, threshold: Tensor | None, v_init: Tensor | None, p: LIFParams, backend: str, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    impl = select("lif", Call(x.device, x.dtype, tuple(x.shape)), backend)
    # not every backend can skip writing the state, a fifth of all bytes at T = 4 in bfloat16
    options = {"want_v": return_state} if getattr(impl, "STATES_ON_REQUEST", False) else {}
    spikes, v = impl.forward(x, p.v_threshold if threshold is None else threshold, v_init, p, **options)
    return spikes, v.contiguous() if return_state else None


def _forward(
    x: Tensor,
    threshold: Tensor | None,
    v_init: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    spikes, v = _run(x, threshold, v_init, p, backend, return_state)
    return as_tensors(x, spikes, v, dtype=compute_dtype(x.dtype))


_lif = torch.library.custom_op("spikedecoder::lif", _forward, mutates_args=())


@_lif.register_fake
def _(x, threshold, v_init, *rest):
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    return_state = rest[8] if len(rest) > 8 else True
    return spikes, x.new_empty(x.shape[1:] if return_state else (0,), dtype=compute_dtype(x.dtype))


@torch.library.custom_op("spikedecoder::lif_packed", mutates_args=())
def _lif_packed(
    x: Tensor,
    threshold: Tensor | None,
    v_init: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """(spikes as words, v), without gradients."""
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    impl = select("lif", Call(x.device, x.dtype, tuple(x.shape)), backend)
    if hasattr(impl, "forward_packed"):
        limit = p.v_threshold if threshold is None else threshold
        words, v = impl.forward_packed(x, limit, v_init, p, want_v=return_state)
        return as_tensors(x, words, v if return_state else None, dtype=compute_dtype(x.dtype))
    spikes, v = _lif(x, threshold, v_init, *p.flat(), backend, return_state)
    return _pack(spikes, backend), v


@_lif_packed.register_fake
def _(x, threshold, v_init, *rest):
    words = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // WORD), dtype=torch.int64)
    return words, x.new_empty(x.shape[1:] if rest[8] else (0,), dtype=compute_dtype(x.dtype))


def _run_back(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor | None,
    v_init: Tensor | None,
    p: LIFParams,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    impl = select("lif", Call(x.device, x.dtype, tuple(x.shape)), backend)
    options = {"want_grad_v_init": v_init is not None} if getattr(impl, "STATES_ON_REQUEST", False) else {}
    grad_x, grad_threshold, grad_v_init = impl.backward(
        grad_spikes, grad_v, x, p.v_threshold if threshold is None else threshold, v_init, p, **options
    )
    if threshold is None:
        grad_threshold = None
    else:
        grad_threshold = grad_threshold.sum_to_size(threshold.shape).to(threshold.dtype)
    return grad_x, grad_threshold, None if v_init is None else grad_v_init.contiguous()


def _backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor | None,
    v_init: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    surrogate: str,
    alpha: float,
    detach_reset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    p = LIFParams.of(tau, v_threshold, v_reset, decay_input, surrogate, alpha, detach_reset)
    grads = _run_back(grad_spikes, grad_v, x, threshold, v_init, p, backend)
    return as_tensors(x, *grads, dtype=compute_dtype(x.dtype))


_lif_backward = torch.library.custom_op("spikedecoder::lif_backward", _backward, mutates_args=())


@_lif_backward.register_fake
def _(grad_spikes, grad_v, x, threshold, v_init, *_):
    dtype = compute_dtype(x.dtype)
    grad_threshold = x.new_empty(0, dtype=dtype) if threshold is None else torch.empty_like(threshold)
    grad_v_init = x.new_empty(0 if v_init is None else x.shape[1:], dtype=dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_threshold, grad_v_init


def _setup_context(ctx, inputs, output):
    x, threshold, v_init, *ctx.neuron, return_state = inputs
    ctx.save_for_backward(x, threshold, v_init)
    ctx.set_materialize_grads(False)
    if not return_state and output[1] is not None:
        ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_spikes, grad_v, backward):
    """Gradients of (x, threshold, v_init)."""
    x, threshold, v_init = ctx.saved_tensors
    if grad_spikes is None and grad_v is None:
        return None, None, None
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(x)
    grads = backward(grad_spikes, grad_v, x, threshold, v_init, *ctx.neuron)
    wanted = (True, threshold is not None, v_init is not None)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


def _autograd(ctx, grad_spikes, grad_v):
    return *_gradients(ctx, grad_spikes, grad_v, _lif_backward), *(None,) * (len(ctx.neuron) + 1)


_lif.register_autograd(_autograd, setup_context=_setup_context)
_direct = direct(
    _run, _setup_context, lambda ctx, grad, grad_v=None: _gradients(ctx, grad, grad_v, _run_back), tensors=3
)


def lif(
    x: Tensor,
    *,
    tau: float = 2.0,
    v_threshold: float | Tensor = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    surrogate: str = "sigmoid",
    alpha: float = 4.0,
    detach_reset: bool = True,
    v_init: Tensor | None = None,
    return_state: bool = False,
    packed: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Spikes of a layer of LIF neurons driven for T timesteps.

    Equations: `spikedecoder.params.LIFParams`; surrogates: `spikedecoder.surrogate.SURROGATES`.
    Source: the multi-step LIF of SpikingJelly (Fang et al., 2023), whose values it reproduces.

    Args:
        x: input current [T, ...], float; T >= 1.
        tau: membrane time constant in timesteps, >= 1.
        v_threshold: a number, or a tensor that broadcasts against one timestep (a scalar, or one value
            per channel); a tensor gets a gradient.
        v_reset: potential after a spike; None for a soft reset (subtract the threshold).
        decay_input: whether the input is divided by tau, as the leak is.
        surrogate, alpha: name (sigmoid, atan, rectangular, triangle or fast_sigmoid) and sharpness (> 0) of
            the surrogate gradient. For the same width they need different alphas: `Surrogate.default_alpha`.
        detach_reset: block the gradient through the spike in the reset.
        v_init: membrane potential before the first timestep, shape of one timestep; zeros if None.
        return_state: also return the membrane potential after the last timestep.
        packed: return the spikes of x [T, ..., C] as bits, as ``pack_spikes(lif(x))`` does; Triton then
            writes nothing else. Bits carry no gradient, so this is for inference: ValueError if a gradient
            would be recorded, i.e. if a tensor requires one and `torch.no_grad` is not in force.

    Returns:
        spikes [T, ...] of 0 and 1 in x's dtype, or int64 words [T, ..., ceil(C / 64)] if packed; with
        return_state, (spikes, v [...]) with v in float32 for half-precision x. Kept for backward: x (and
        v_init); the potentials are recomputed.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.floating("x", x)
    _check.timesteps("x", x)
    threshold = v_threshold if isinstance(v_threshold, Tensor) else None
    fixed = 1.0 if isinstance(v_threshold, Tensor) else v_threshold
    p = LIFParams(tau, fixed, v_reset, decay_input, surrogate, alpha, detach_reset)
    return lif_params(x, p, threshold=threshold, v_init=v_init, return_state=return_state, packed=packed)


def lif_params(
    x: Tensor,
    p: LIFParams,
    *,
    threshold: Tensor | None = None,
    v_init: Tensor | None = None,
    return_state: bool = False,
    packed: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lif` with its parameters in one object; same errors. `threshold` overrides ``p.v_threshold``."""
    _check.of_type("p", p, LIFParams)
    switch("return_state", return_state)
    switch("packed", packed)
    _check.floating("x", x)
    _check.timesteps("x", x)
    for name, given in (("v_threshold", threshold), ("v_init", v_init)):
        if given is not None:
            _check.floating(name, given, min_dims=0)
    _check.same_device(x=x, v_threshold=threshold, v_init=v_init)
    if threshold is not None:
        _check.broadcasts("v_threshold", threshold, x.shape[1:])
    if v_init is not None and v_init.shape != x.shape[1:]:
        raise ValueError(
            f"v_init: got shape {tuple(v_init.shape)}, takes that of a timestep, {tuple(x.shape[1:])}"
        )
    if packed:
        _check.floating("x", x, min_dims=2)
        _check.no_gradient("packed", x=x, v_threshold=threshold, v_init=v_init)
    tensors = (x, threshold, v_init)
    if not packed and unwatched(*tensors):
        spikes, v = _direct(*tensors, p, requested_backend(), return_state)
    else:
        operator = _lif_packed if packed else _lif
        spikes, v = operator(*tensors, *p.flat(), requested_backend(), return_state)
    return (spikes, v) if return_state else spikes
