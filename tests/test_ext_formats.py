"""Fuzzing of the packed formats: random shapes, sparse and dense, on every variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder import ext, ops
from spikedecoder.reference import pack_spikes as reference

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import _cost, calibrate, native, pack_spikes, spike_linear

FUZZ = settings(max_examples=60, deadline=None)


def on_each_variant():
    before = native.variant()
    for name in native.variants():
        native.use_variant(name)
        yield name
    native.use_variant(before)


def random_spikes(seed: int, shape: tuple[int, ...], rate: float) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


@FUZZ
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    channels=st.integers(1, 300),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_pack_and_unpack(shape, channels, rate, seed):
    spikes = random_spikes(seed, (*shape, channels), rate)
    expected = reference.pack(spikes)
    for name in on_each_variant():
        words, count = pack_spikes.pack_and_count(spikes)
        assert torch.equal(words, expected), name
        assert count == spikes.sum()
        assert torch.equal(pack_spikes.pack(spikes.bool()), expected), name
        assert torch.equal(pack_spikes.unpack(words, channels, torch.float32), spikes), name


@FUZZ
@given(
    rows=st.integers(0, 150),
    channels=st.integers(1, 300),
    out_channels=st.integers(1, 150),
    rate=st.floats(0, 1),
    with_bias=st.booleans(),
    by_columns=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_spike_linear(rows, channels, out_channels, rate, with_bias, by_columns, seed):
    """Small whole numbers as weights: every order of summation gives the same floats."""
    generator = torch.Generator().manual_seed(seed)
    s = random_spikes(seed, (rows, channels), rate)
    weight = torch.randint(-8, 9, (out_channels, channels), generator=generator).float()
    bias = torch.randint(-8, 9, (out_channels,), generator=generator).float() if with_bias else None
    grad = torch.randint(-8, 9, (rows, out_channels), generator=generator).float()
    expected = torch.nn.functional.linear(s, weight, bias)
    expected_grad = grad.t() @ s
    if by_columns:
        weight = weight.t().contiguous().t()
    for name in on_each_variant():
        assert torch.equal(spike_linear.product(s, weight, bias), expected), name
        for method in (None, *_cost.METHODS):
            y, words = spike_linear.forward(s, weight, bias, method)
            assert torch.equal(y, expected), (name, method)
            assert torch.equal(words, reference.pack(s)), (name, method)
            found = spike_linear.weight_grad(words, channels, grad, method)
            assert torch.equal(found, expected_grad), (name, method)


@pytest.mark.parametrize("method", ["gather", "subset_sums"])
@pytest.mark.parametrize("shape", [(700, 40_000, 3), (5000, 70, 40), (3, 33_000, 20), (2100, 2100, 17)])
def test_spike_linear_beyond_one_block(method, shape):
    """More bits than a 16-bit number counts, more rows than one block holds, several threads."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    s = random_spikes(1, (m, k), 0.02)
    weight = torch.randint(-8, 9, (n, k), generator=generator).float()
    grad = torch.randint(-8, 9, (m, n), generator=generator).float()
    expected, expected_grad = s @ weight.t(), grad.t() @ s
    for name in on_each_variant():
        y, words = spike_linear.forward(s, weight, None, method)
        assert torch.equal(y, expected), name
        assert torch.equal(spike_linear.weight_grad(words, k, grad, method), expected_grad), name


@pytest.mark.parametrize("method", ["gather", "subset_sums"])
def test_a_weight_gradient_does_not_depend_on_threads(method):
    """Rows are summed in slices, of which more are worked on at once with more threads."""
    s = random_spikes(1, (5000, 70), 0.1)
    grad = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0))
    native.use_variant(native.variants()[0])
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(spike_linear.weight_grad(reference.pack(s), 70, grad, method))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], grad.t() @ s, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_a_bias_gradient_does_not_depend_on_which_thread_took_what():
    s, weight = random_spikes(1, (4000, 70), 0.1), torch.randn(40, 70)
    grad = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 2):
            torch.set_num_threads(n)
            bias = torch.zeros(40, requires_grad=True)
            with ops.use_backend("cpu"):
                ops.spike_linear(s.clone().requires_grad_(), weight, bias).backward(grad)
            found.append(bias.grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], grad.sum(0), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_cost_model_chooses_by_rate():
    native.use_variant(native.variants()[0])
    shape = (8192, 1280, 80)
    sparse, full = (_cost.fastest(*shape, int(rate * 8192 * 1280)) for rate in (0.01, 1.0))
    assert sparse == "gather"
    assert full != "gather"


def test_bfloat16_is_dense_sooner_where_the_cpu_multiplies_it():
    native.use_variant(native.variants()[0])
    if native.variant() != "avx512" or not native.build()["bfloat16_products"]:
        pytest.skip("this CPU multiplies no bfloat16")
    case = (8192, 80, 1280, int(0.5 * 8192 * 80))
    assert _cost.fastest(*case, dtype=torch.bfloat16) == "dense"
    assert _cost.fastest(*case) != "dense"


def test_a_broken_cost_file_is_named(monkeypatch, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text("{}")
    monkeypatch.setenv("SPIKEDECODER_SPIKE_LINEAR_COST", str(path))
    _cost.costs.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"SPIKEDECODER_SPIKE_LINEAR_COST.*costs\.json"):
            _cost.costs(native.variant())
    finally:
        monkeypatch.undo()
        _cost.costs.cache_clear()


def test_calibration_finds_the_constants_again():
    """Points made from known constants give these constants back, and choices without regret."""
    true = _cost.Costs(0.05, 0.3, 0.1, 0.2, 0.01, 0.7, 0.4, 0.03, 0.05)
    points = []
    for m, k, n in calibrate.SHAPES:
        for rate in calibrate.RATES:
            for weight_grad in (False, True):
                case = (m, k, n, int(rate * m * k), weight_grad)
                points += [calibrate.Point(w, *case, true.of(w, *case)) for w in _cost.METHODS]
    found = calibrate.fit(points)
    for point in points:
        assert found.of(point.method, *point.case) == pytest.approx(point.nanoseconds, rel=0.05)
    assert max(ratio for _, _, ratio in calibrate.regrets(points, found).values()) < 1.05


def test_calibration_writes_what_the_model_reads(monkeypatch, tmp_path, capsys):
    real = calibrate.measure
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 80, 80), (128, 80, 160)))
    monkeypatch.setattr(calibrate, "measure", lambda: real(budget=0.002))
    path = tmp_path / "costs.json"
    assert calibrate.main([str(path)]) == 0
    assert "its time" in capsys.readouterr().out
    monkeypatch.setenv("SPIKEDECODER_SPIKE_LINEAR_COST", str(path))
    _cost.costs.cache_clear()
    try:
        assert isinstance(_cost.costs(native.variant()), _cost.Costs)
    finally:
        monkeypatch.undo()
        _cost.costs.cache_clear()
