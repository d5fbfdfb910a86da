"""Sums over very many rows, of the compiled CPU backend beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikedecoder import ext
from spikedecoder.params import LIFParams

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import lif, native, norm_lif, spike_linear

ROWS = 1 << 20
P = LIFParams()


@pytest.fixture(params=["avx512", "avx2", "baseline"], autouse=True)
def variant(request):
    before = native.variant()
    if request.param not in native.variants():
        pytest.skip(f"this CPU has no {request.param}")
    native.use_variant(request.param)
    yield
    native.use_variant(before)


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=0)


def test_gradients_of_a_norm_and_of_thresholds():
    """All of one sign, and of one size: what float32 adds one by one is soon too small for the sum."""
    x = torch.randn(1, ROWS, 8).clamp(-1, 1)
    ones, zeros, threshold = torch.ones(8), torch.zeros(8), torch.ones(8)
    _, mean, rstd = norm_lif.forward(x, ones, zeros, None, None, 1e-5, threshold, P)
    grad = torch.full_like(x, 0.3)
    _, weight, bias, limit = norm_lif.backward_layer(grad, x, ones, zeros, mean, rstd, threshold, P)
    z = (x.double() - mean.double().unsqueeze(-1)) * rstd.double().unsqueeze(-1)
    slope = torch.sigmoid(P.alpha * (z / 2 - 1))
    slope = 0.3 * P.alpha * slope * (1 - slope)
    close(bias, (slope / 2).sum((0, 1)))
    close(limit, -slope.sum((0, 1)))
    torch.testing.assert_close(
        weight.double(),
        (slope / 2 * z).sum((0, 1)),
        rtol=0,
        atol=2e-6 * float((slope / 2 * z.abs()).sum((0, 1))[0]),
    )
    close(lif.backward(grad, None, z.float(), threshold, None, P)[1], -slope.sum((0, 1)))


def test_moments_of_channels_whose_mean_moves():
    rows = 4 * ROWS
    x = torch.randn(rows, 8) * 0.1
    x[: rows // 2] += 100
    x[rows // 2 :] += 101
    mean, var = norm_lif.moments(x, True)
    close(mean, x.double().mean(0))
    torch.testing.assert_close(var.double(), x.double().var(0, correction=0), rtol=3e-4, atol=0)


def test_the_bias_of_a_product():
    grad = torch.full((ROWS, 8), 0.1)
    _, bias = spike_linear.input_and_bias_grad(grad, torch.ones(8, 4))
    close(bias, grad.double().sum(0))
