"""What an operator says of its results before there are any (fakes) is how they lie, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spikedecoder import ext, ops, use_backend
from spikedecoder.params import ILIFParams, LIFParams, NormParams

BACKENDS = ("reference", "cpu") if ext.is_built() else ("reference",)


def strided(*shape: int) -> Tensor:
    return torch.rand(shape).transpose(0, -1).requires_grad_()


def norm_of(kind: str, training: bool) -> NormParams:
    weight, bias, mean, var = (torch.full((6,), value) for value in (1.0, 0.0, 0.0, 1.0))
    running = {"batch": (mean, var), "power": (var, mean, torch.zeros(())), "layer": ()}[kind]
    return NormParams(kind, weight, bias, 1e-5, training, running)


def attention(**options: Any) -> list[Any]:
    q, k, v = ((torch.rand(2, 2, 3, 4, 5) < 0.5).float().transpose(0, 1).requires_grad_() for _ in range(3))
    state = torch.rand(2, 2, 3, 5, 5).transpose(-1, -2).requires_grad_()
    return [*ops.spike_attention(q, k, v, 1.0, None, state, True, **options), q, k, v, state]


def norms(operator: Callable[..., Tensor], neuron: Any, kind: str, training: bool) -> list[Tensor]:
    x = strided(6, 5, 4)
    return [operator(x, norm_of(kind, training), neuron), x]


def lif() -> list[Any]:
    x, v_init = strided(3, 5, 4), strided(3, 5)
    return [*ops.lif(x, v_init=v_init, return_state=True), x, v_init]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "binarize": lambda: [ops.binarize(x := strided(6, 5, 4)), x],
    "binarize of repeats": lambda: [ops.binarize(x := torch.rand(1, 4).expand(3, 4).requires_grad_()), x],
    "lif": lif,
    "spike_attention": attention,
    "spike_attention of integers": lambda: attention(levels=3),
    "ilif": lambda: [ops.ilif(x := strided(6, 5, 4), levels=3), x],
    "spike_linear": lambda: [ops.spike_linear((x := strided(6, 5, 4)).round(), torch.rand(3, 6)), x],
    "norm": lambda: [ops.norm(x := strided(6, 5, 4), norm_of("layer", True)), x],
    **{
        f"{operator.__name__} {kind} {training}": (
            lambda operator=operator, neuron=neuron, kind=kind, training=training: norms(
                operator, neuron, kind, training
            )
        )
        for operator, neuron in ((ops.norm_lif, LIFParams()), (ops.norm_ilif, ILIFParams(4)))
        for kind in ("layer", "batch", "power")
        for training in (True, False)
    },
}


def layouts(call: Callable[[], list[Tensor]]) -> list[Any]:
    """Of results, and of the gradients of what `call` lists behind them."""
    torch.manual_seed(0)
    listed = call()
    inputs = [x for x in listed if x.is_leaf and x.requires_grad]
    results = [x for x in listed if not x.is_leaf and x.requires_grad]
    # not backward(), which lays out the gradients of leaves as these are
    gradients = torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results], allow_unused=True)
    found = [*listed, *(x for x in gradients if x is not None)]
    return [(tuple(x.shape), x.stride(), x.dtype) for x in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_fakes_lie_as_results_do(name: str, backend: str) -> None:
    with use_backend(backend):
        real = layouts(CALLS[name])
        with FakeTensorMode():
            fake = layouts(CALLS[name])
    assert fake == real
