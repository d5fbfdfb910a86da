"""NaN and infinity in the Triton kernels: values, gradients and statistics end as in the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_parity import DEVICE, random

from spikedecoder import ops
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.surrogate import SURROGATES

pytest.importorskip("triton")
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.triton_interpreter]


def special(value: float) -> torch.Tensor:
    x = random(3, 4, 8)
    x[1, 2, 3] = value
    return x


def norm_of(kind: str, training: bool) -> NormParams:
    """Of 8 channels, fresh."""
    channel = torch.linspace(0.5, 1.5, 8, device=DEVICE)
    running = {"layer": (), "batch": (0 * channel, channel.clone())}.get(
        kind, (channel.clone(), 0.1 * channel, torch.tensor(NormParams.warmup, device=DEVICE))
    )
    weight, bias = channel.clone().requires_grad_(), (0.5 * channel).requires_grad_()
    return NormParams(kind, weight, bias, training=training, running=running)


NORMS = [("layer", True), *((kind, training) for kind in ("batch", "power") for training in (True, False))]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "training"), NORMS)
def test_what_is_no_number_ends_as_in_the_reference(kind: str, training: bool, value: float) -> None:
    """In spikes, in gradients, and in statistics."""
    for p in (LIFParams(), LIFParams(v_reset=None, detach_reset=False), ILIFParams(4)):
        found = {}
        for backend in ("reference", "triton"):
            x, n = special(value).requires_grad_(), norm_of(kind, training)
            with ops.use_backend(backend):
                s = ops.norm_lif(x, n, p) if isinstance(p, LIFParams) else ops.norm_ilif(x, n, p)
                gradients = torch.autograd.grad(s, (x, n.weight, n.bias), random(3, 4, 8, seed=1))
            # torch's mean of an infinity is one or no number, by what takes it
            running = (r if kind == "power" else r.where(r.isfinite(), math.nan) for r in n.running)
            found[backend] = (s, *gradients, *running)
        torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert found["reference"][1].isnan().any() or kind == "power" or not training


@pytest.mark.parametrize("alpha", [1e-60, 1e-30, 1e30, 1e38])
def test_a_gradient_of_the_potential_outlives_any_alpha(alpha: float) -> None:
    found = {}
    for backend in ("reference", "triton"):
        x, v = random(3, 4, 8).requires_grad_(), random(4, 8, seed=1).requires_grad_()
        with ops.use_backend(backend):
            _, last = ops.lif(x, v_init=v, alpha=alpha, return_state=True)
        found[backend] = torch.autograd.grad(last, (x, v), 1e6 * random(4, 8, seed=2))
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5)
    assert found["reference"][1].abs().max() > 1e4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_what_is_no_number_ends_as_in_the_reference_without_a_norm(surrogate: str, value: float) -> None:
    neurons: list[dict[str, Any]] = [{}, {"v_reset": None}, {"v_reset": 0.5, "detach_reset": False}]
    calls: list[Callable[[torch.Tensor], Any]] = [
        *(lambda x, p=p: ops.lif(x, surrogate=surrogate, **p) for p in neurons),
        ops.binarize,
        lambda x: ops.ilif(x, levels=4),
    ]
    for call in calls:
        found = {}
        for backend in ("reference", "triton"):
            x = special(value).requires_grad_()
            with ops.use_backend(backend):
                s = call(x)
                found[backend] = (s, *torch.autograd.grad(s, x, random(3, 4, 8, seed=1)))
        torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5, equal_nan=True)
    words = []
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            words.append(ops.pack_spikes(special(value)))
    assert torch.equal(*words)
