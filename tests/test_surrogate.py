"""The table of surrogates: by finite differences, and at the threshold itself."""

from __future__ import annotations

import math

import pytest
import torch

from spikedecoder.reference.lif import spike
from spikedecoder.surrogate import SURROGATES, get_surrogate, heaviside

rows = pytest.mark.parametrize("row", SURROGATES.values(), ids=lambda r: r.name)
alphas = pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])


@rows
@alphas
def test_derivative_is_that_of_the_primitive(row, alpha):
    u = torch.linspace(-3, 3, 1201, dtype=torch.float64) + 1.37e-4  # off the kinks
    step = 1e-6
    finite = (row.primitive(u + step, alpha) - row.primitive(u - step, alpha)) / (2 * step)
    torch.testing.assert_close(row.derivative(u, alpha), finite, rtol=1e-6, atol=1e-6)


@rows
@alphas
def test_primitive_is_a_rising_step(row, alpha):
    u = torch.linspace(-50, 50, 2001, dtype=torch.float64)
    g = row.primitive(u, alpha)
    assert (g.diff() >= 0).all()
    if row.name != "fast_sigmoid":  # snnTorch's form: its primitive is a softsign around 0
        assert g[0] < 0.02 and g[-1] > 0.98
        assert math.isclose(row.primitive(torch.zeros((), dtype=torch.float64), alpha).item(), 0.5)


@rows
def test_derivative_at_the_threshold(row):
    at_zero = {
        "sigmoid": lambda a: a / 4,
        "atan": lambda a: a / 2,
        "rectangular": lambda a: a,
        "triangle": lambda a: a,
        "fast_sigmoid": lambda a: 1.0,
    }[row.name]
    for alpha in (0.5, 2.0, 4.0):
        slope = row.derivative(torch.zeros(1, dtype=torch.float64), alpha).item()
        assert math.isclose(slope, at_zero(alpha))


@rows
def test_spike_fires_at_the_threshold_and_has_the_surrogate_gradient(row):
    u = torch.tensor([-1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, float("nan"), float("inf")], requires_grad=True)
    s = spike(u, row.name, row.default_alpha)
    assert s.tolist() == [0, 0, 1, 1, 1, 1, 0, 1]
    (grad,) = torch.autograd.grad(s.sum(), u)
    expected = row.derivative(u.detach(), row.default_alpha)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


def test_heaviside_keeps_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert heaviside(torch.zeros(2, dtype=dtype)).dtype == dtype


def test_kernel_ids_are_distinct():
    assert len({row.kernel_id for row in SURROGATES.values()}) == len(SURROGATES)


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"surrogate: got 'step', takes one of sigmoid, atan"):
        get_surrogate("step")
