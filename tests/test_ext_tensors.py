"""The compiled functions that take torch's tensors: their results, and what they leave to be prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spikedecoder import ext
from spikedecoder.params import ILIFParams, LIFParams, NormParams

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import _memory, dense_linear, ilif, lif, native, norm_lif
from spikedecoder.ext.cpu._arguments import neuron

HOW = (True, 2)
LIF, SOFT, ILIF = LIFParams(), LIFParams(v_reset=None, surrogate="atan"), ILIFParams(15, 0.2)
C = 40


class Subclass(Tensor):
    pass


def flat(found: Any) -> list[Tensor | None]:
    return [found] if isinstance(found, Tensor) or found is None else [y for x in found for y in flat(x)]


def both_ways(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
    """The same, bit for bit, whether tensors are inspected in C++ or in Python."""
    results = []
    for sees in (True, False):
        monkeypatch.setattr(_memory, "SEES_TENSORS", sees)
        results.append(flat(call()))
    for first, second in zip(*results, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            assert first.dtype == second.dtype and first.stride() == second.stride()
            assert torch.equal(first, second)


def currents(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def of_channels(x: Tensor) -> tuple[Tensor, ...]:
    return 1 + 0.1 * torch.randn(C), torch.randn(C), torch.randn(C), 1 + torch.rand(C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [LIF, SOFT, ILIF], ids=["lif", "soft", "ilif"])
def test_norms_and_neurons(monkeypatch, dtype, p):
    x, grad = currents(dtype, 4, 3, 5, C), currents(dtype, 5, 3, 4, C).view(4, 3, 5, C)
    weight, bias, mean, rstd = of_channels(x)
    both_ways(monkeypatch, lambda: norm_lif.forward(x, weight, bias, None, None, 1e-5, 1.0, p))
    both_ways(monkeypatch, lambda: norm_lif.forward(x, weight, bias, mean, rstd, 1e-5, 1.0, p))
    _, *of_rows = norm_lif.forward(x, weight, bias, None, None, 1e-5, 1.0, p)
    both_ways(monkeypatch, lambda: norm_lif.backward_layer(grad, x, weight, bias, *of_rows, 1.0, p))
    given = (grad, x, weight, bias, mean, rstd, 1.0, p)
    for part in (norm_lif.backward_reduce, norm_lif.backward_batch):
        both_ways(monkeypatch, lambda part=part: part(*given))
    for part in (norm_lif.backward_apply, norm_lif.backward_known):
        both_ways(monkeypatch, lambda part=part: part(*given, rstd, bias, mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [LIF, SOFT], ids=["lif", "soft"])
def test_neurons_and_their_states(monkeypatch, dtype, p):
    x, grad = currents(dtype, 3, 7, C), currents(dtype, 7, 3, C).view(3, 7, C)
    v, grad_v = torch.randn(7, C), torch.randn(7, C)
    for start, wanted in ((None, True), (v, True), (v, False)):
        both_ways(monkeypatch, lambda start=start, wanted=wanted: lif.forward(x, 1.0, start, p, wanted))
        for last in (None, grad_v):
            given = (grad, last, x, 1.0, start, p, wanted)
            both_ways(monkeypatch, lambda given=given: lif.backward(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integer_neurons(monkeypatch, dtype):
    x, grad = currents(dtype, 5, C), currents(dtype, C, 5).view(5, C)
    for want_mask in (True, False):
        both_ways(monkeypatch, lambda want_mask=want_mask: ilif.forward(x, ILIF, want_mask))
    mask = ilif.forward(x, ILIF, True)[1]
    both_ways(monkeypatch, lambda: ilif.backward(grad, mask, ILIF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_a_batch(monkeypatch, dtype):
    x = currents(dtype, 3, 7, C)
    weight, bias, mean, var = of_channels(x)
    versions = []

    def found() -> Any:
        running = mean.clone(), var.clone()
        norm = NormParams("batch", weight, bias, training=True, running=running, momentum=0.3)
        statistics = norm_lif.batch_statistics(x, norm)
        versions.append([r._version for r in running])
        return *statistics, *running

    both_ways(monkeypatch, found)
    assert versions[0] == versions[1] != [0, 0]


@pytest.mark.parametrize("rows", [(1,), (3, 50), (2, 1, 40)])
def test_dense_products(monkeypatch, rows):
    s, weight, bias = torch.randint(0, 16, (*rows, C)).float(), torch.randn(24, C), torch.randn(24)
    grad = torch.randn(*rows, 24)
    for b in (bias, None):
        both_ways(monkeypatch, lambda b=b: dense_linear.forward(s, weight, b))
    for n in range(8):
        wanted = (bool(n & 1), bool(n & 2), bool(n & 4))
        both_ways(monkeypatch, lambda wanted=wanted: dense_linear.backward(grad, s, weight, wanted))
    torch.testing.assert_close(
        dense_linear.forward(s, weight, bias), s @ weight.t() + bias, rtol=1e-4, atol=1e-3
    )


def odd(x: Tensor) -> list[Any]:
    """What has to be prepared, or is an error, in place of a float32 tensor."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    return [
        wide[..., ::2],
        wide,
        x.double(),
        x.half(),
        x.to("meta"),
        x.to_sparse(),
        x.as_subclass(Subclass),
        x[:0],
        torch._neg_view(x),
        x.tolist(),
        3,
    ]


def leaves(function: Callable[..., Any], *given: Any) -> None:
    """The function takes `given` and, with any of its tensors replaced, leaves the call to Python."""
    assert function(*given) is not None
    for i, x in enumerate(given):
        if isinstance(x, Tensor):
            for other in odd(x):
                assert function(*given[:i], other, *given[i + 1 :]) is None, (i, other)


def test_whatever_has_to_be_prepared_is_left_to_python():
    x, grad, v = torch.randn(3, 7, C), torch.randn(3, 7, C), torch.randn(7, C)
    weight, bias, mean, rstd = of_channels(x)
    p, t = neuron(LIF), 1.0
    leaves(native.lif, p, t, x, v, True, *HOW)
    leaves(native.lif_gradients, p, t, grad, v, x, v, True, *HOW)
    leaves(native.norm_lif, p, t, x, weight, bias, mean, rstd, 1e-5, *HOW)
    leaves(native.norm_lif, p, t, x, weight, bias, None, None, 1e-5, *HOW)
    rows = (x.mean(-1), x.std(-1))
    leaves(native.norm_lif_gradients, p, t, 0, 0, grad, x, weight, bias, *rows, (), *HOW)
    leaves(native.norm_lif_gradients, p, t, 1, 4, grad, x, weight, bias, mean, rstd, (), *HOW)
    known = (p, t, 1, 3, grad, x, weight, bias, mean, rstd)
    assert native.norm_lif_gradients(*known, (mean, rstd, bias), *HOW) is not None
    for coefficients in ((), (mean, rstd), *((mean, rstd, other) for other in odd(bias))):
        assert native.norm_lif_gradients(*known, coefficients, *HOW) is None
    leaves(native.statistics_of_batch, x, mean.clone(), rstd.clone(), 0.1, 1e-5, *HOW)
    assert native.statistics_of_batch(x[0, :1], mean, rstd, 0.1, 1e-5, *HOW) is None
    (strided, _, *others) = odd(x)  # the second is a shape like any other here
    assert all(native.ilif(neuron(ILIF), other, True, *HOW) is None for other in (strided, *others))
    assert all(native.token_shift(other, 3, False, *HOW) is None for other in (strided, *others))
    assert native.token_shift(x, 0, False, *HOW) is None
    mask = native.ilif(neuron(ILIF), x, True, *HOW)[1]
    for g, passes in ((grad, grad), (grad, mask[:, :1]), (grad, mask.bool()), (grad.double(), mask)):
        assert native.ilif_gradient(neuron(ILIF), g, passes, *HOW) is None
    for wrong in (mask[:, :1], mask.float()):
        with pytest.raises(ValueError, match="mask: got"):
            ilif.backward(grad, wrong, ILIF)
    spread = mask.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(ilif.backward(grad, spread, ILIF), ilif.backward(grad, mask, ILIF))
    assert native.lif(p, t, x[:, 0, 0], None, True, *HOW) is None  # no channels beside the timesteps
    s, w, b = torch.rand(6, C), torch.randn(24, C), torch.randn(24)
    leaves(native.dense_linear, s, w, b, *HOW)
    leaves(native.dense_linear_gradients, torch.rand(6, 24), s, w, True, *HOW)
    assert native.dense_linear_gradients(torch.rand(6, 24), s, None, True, *HOW) is None
    for threshold in (torch.tensor(1.0), torch.ones(C), 1, None):
        assert native.lif(p, threshold, x, None, True, *HOW) is None
        assert native.norm_lif(p, threshold, x, weight, bias, mean, rstd, 1e-5, *HOW) is None


def test_what_is_prepared_gives_the_same():
    x, weight, bias = torch.randn(4, 6, C), torch.rand(C), torch.randn(C)
    spread = torch.stack([x, x], -1)[..., 0]
    assert not spread.is_contiguous()
    for given in (x, spread):
        spikes, mean, rstd = norm_lif.forward(given, weight.double(), bias, None, None, 1e-5, 1.0, LIF)
        expected = norm_lif.forward(x, weight, bias, None, None, 1e-5, torch.tensor(1.0), LIF)
        assert all(map(torch.equal, (spikes, mean, rstd), expected))
        assert torch.equal(lif.forward(given, 1.0, None, LIF)[0], lif.forward(x, torch.ones(C), None, LIF)[0])


def test_bad_numbers_are_refused():
    x, weight, bias = torch.randn(3, 7, C), torch.rand(C), torch.randn(C)
    with pytest.raises(ValueError, match="threads"):
        native.lif(neuron(LIF), 1.0, x, None, True, True, 0)
    for kind, part in ((0, 4), (1, 0), (1, 5), (0, -1)):
        with pytest.raises(ValueError, match="part"):
            native.norm_lif_gradients(
                neuron(LIF), 1.0, kind, part, x, x, weight, bias, weight, bias, (), *HOW
            )
