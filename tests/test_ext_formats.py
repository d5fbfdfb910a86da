"""Fuzzing of the packed formats: random shapes, sparse and dense, on every variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder import ext, ops
from spikedecoder.params import LIFParams
from spikedecoder.reference import pack_spikes as reference

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import _cost, native, pack_spikes, spike_linear

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
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.float64):
            assert torch.equal(pack_spikes.pack((2 * spikes).to(dtype)), expected), (name, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert torch.equal(pack_spikes.unpack(words, channels, dtype), spikes.to(dtype)), name


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
        few = spike_linear.few_rows(s, weight, bias, want_words=False)
        assert (few is not None) == (0 < rows <= 32 and weight.stride() == (1, out_channels)), name
        assert few is None or (torch.equal(few[0], expected) and few[1] is None), name
        assert torch.equal(spike_linear.from_words(reference.pack(s), channels, weight, bias), expected), name
        for method in (None, *_cost.METHODS):
            y, words = spike_linear.forward(s, weight, bias, method)
            assert torch.equal(y, expected), (name, method)
            assert torch.equal(words, reference.pack(s)), (name, method)
            found = spike_linear.weight_grad(words, channels, grad, method)
            assert torch.equal(found, expected_grad), (name, method)


@FUZZ
@given(
    rows=st.integers(1, 70),
    channels=st.integers(1, 200),
    every=st.integers(1, 3),
    words_every=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_words_that_lie_apart(rows, channels, every, words_every, seed):
    """Some rows of a larger tensor, and words with others between them."""
    s = random_spikes(seed, (rows, channels), 0.2)
    packed = reference.pack(s)
    around = torch.full((rows * every, packed.shape[1], words_every), -1, dtype=torch.int64)
    words = around[::every, :, 0]
    words.copy_(packed)
    weight = torch.randint(-8, 9, (24, channels), generator=torch.Generator().manual_seed(seed)).float()
    for name in on_each_variant():
        with ops.use_backend("cpu"):
            assert torch.equal(ops.spike_linear(words, weight), s @ weight.t()), name
            assert torch.equal(ops.unpack_spikes(words, channels), s), name


@FUZZ
@given(
    steps=st.integers(1, 5),
    sequences=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    channels=st.integers(1, 70),
    rate=st.floats(0, 1),
    fused=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_attention_keeps_its_spikes_as_bits(steps, sequences, heads, length, channels, rate, fused, seed):
    """Whole numbers as incoming gradients: every order of summation gives the same floats."""
    shape = (steps, sequences, length, heads, channels)
    inputs = [random_spikes(seed + i, shape, rate).transpose(2, 3).requires_grad_() for i in range(3)]
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randint(-4, 5, inputs[0].shape, generator=generator).float()

    def results(backend):
        with ops.use_backend(backend):
            if not fused:
                out = ops.spike_attention(*inputs, 0.25)
                return out.detach(), *torch.autograd.grad(out, inputs, upstream)
            return (ops.spike_attention_lif(*inputs, LIFParams(), 0.25).detach(),)

    expected = results("reference")
    for name in on_each_variant():
        assert all(map(torch.equal, results("cpu"), expected)), name


@pytest.mark.parametrize("method", _cost.METHODS)
@pytest.mark.parametrize("shape", [(700, 40_000, 3), (5000, 70, 40), (3, 33_000, 20), (2100, 2100, 17)])
def test_spike_linear_beyond_one_block(method, shape):
    """More bits than a 16-bit number counts, more rows than one block holds, several threads."""
    check_whole_numbers(method, shape)


@pytest.mark.parametrize("method", _cost.METHODS)
@pytest.mark.parametrize("shape", [(900, 33_000, 512), (2500, 300, 1024), (4000, 100, 300), (8200, 70, 520)])
def test_spike_linear_of_copied_panels(method, shape):
    """Rows that share the cache's lines, others that are part of many sums, and a gradient of 16 MiB."""
    check_whole_numbers(method, shape)


def check_whole_numbers(method, shape):
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


def any_number(bits: int) -> _cost.Way:
    """Gathering, whatever rows are looked at first."""
    return _cost.Way(2 * bits, _cost.METHODS.index("gather"), False)


# A weight that stays in the first-level cache, in the second-level one, in neither; more bits than a list.
GATHERED = [(700, 80, 80), (300, 700, 100), (300, 1000, 512), (40, 33_000, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", GATHERED)
def test_spikes_are_packed_while_they_are_gathered(shape, dtype):
    m, k, n = shape
    s = random_spikes(1, (m, k), 0.01)
    weight, bias, unknown = torch.randn(n, k), torch.randn(n), spike_linear.UNKNOWN
    spikes = pack_spikes.packable(s.to(dtype))
    for name in on_each_variant():
        expected, words = spike_linear.forward(s, weight, bias, "gather")
        packed = torch.full_like(words, -1)
        y = spike_linear.multiply(packed, unknown, weight, bias, any_number(m * k), spikes)
        assert torch.equal(y, expected) and torch.equal(packed, words), name
        y = spike_linear.multiply(words, unknown, weight, bias, any_number(m * k))
        assert torch.equal(y, expected), name


@pytest.mark.parametrize("channels", [65_536, 65_537])
def test_a_row_of_more_channels_than_a_list_can_name(channels):
    """By columns, as weights lie in generation; the last channel alone spikes."""
    s = torch.zeros(1, channels)
    s[0, -1] = 1
    weight = torch.arange(2.0 * channels).view(channels, 2).t()
    for name in on_each_variant():
        few = spike_linear.few_rows(s, weight, None)
        assert (few is None) == (channels > 65_536)
        assert torch.equal(spike_linear.forward(s, weight, None)[0], weight[:, -1:].t()), name


@pytest.mark.parametrize("shape", [(4096, 80, 80), (4096, 700, 100)])
def test_a_few_rows_can_mislead_the_choice(shape):
    """Rows at the distance of those that are looked at first are empty, all others full."""
    m, k, n = shape
    s = torch.ones(m, k)
    s[:: m // 64] = 0
    s[:: m // 23] = 0
    weight, bias = torch.randn(n, k), torch.randn(n)
    for name in on_each_variant():
        words = reference.pack(s)
        method = spike_linear.way_of(words, weight).method(int(s.sum()))
        expected = spike_linear.forward(s, weight, bias, method)[0]
        y, packed = spike_linear.forward(s, weight, bias)
        assert torch.equal(y, expected) and torch.equal(packed, words), name
        assert torch.equal(spike_linear.from_words(words, k, weight, bias), expected), name


@pytest.mark.parametrize("shape", GATHERED)
def test_bits_beyond_the_last_channel_are_found_while_gathering(shape):
    m, k, n = shape
    words = reference.pack(random_spikes(1, (m, k), 0.01))
    words[m - 3, -1] |= -1 << k % 64
    for _ in on_each_variant():
        with pytest.raises(ValueError, match="words: bits are set beyond the last channel"):
            way = any_number(m * k)
            spike_linear.multiply(words, spike_linear.UNKNOWN, torch.randn(n, k), None, way)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("stored", ["transposed", "every other channel", "expanded", "bfloat16"])
def test_spikes_and_their_words_give_the_same_sums_however_they_are_stored(rows, by_columns, stored):
    s = random_spikes(0, (rows, 130), 0.3)
    s = {
        "transposed": lambda: s.t().contiguous().t(),
        "every other channel": lambda: s.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda: s[:1].expand(rows, 130),
        "bfloat16": s.bfloat16,
    }[stored]()
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((64, 130), (64,)))
    weight = weight.t().contiguous().t() if by_columns else weight
    y, words = spike_linear.forward(s, weight, bias)
    assert torch.equal(y, spike_linear.from_words(words, 130, weight, bias))
    torch.testing.assert_close(y, torch.nn.functional.linear(s.float(), weight, bias))


@pytest.mark.parametrize("method", ["gather", "subset_sums", "tiles", "dense"])
@pytest.mark.parametrize(("channels", "columns"), [(70, 40), (70, 900), (1100, 250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_does_not_depend_on_threads(method, channels, columns, dtype):
    """Rows are summed in slices, of which more are worked on at once with more threads."""
    s = random_spikes(1, (1501 if channels > 1000 else 5000, channels), 0.1)
    grad = torch.randn(len(s), columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    native.use_variant(native.variants()[0])
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5, 16):
            torch.set_num_threads(n)
            found.append(spike_linear.weight_grad(reference.pack(s), channels, grad, method))
    finally:
        torch.set_num_threads(threads)
    off = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0].float(), grad.float().t() @ s, rtol=off, atol=off)
    assert all(torch.equal(other, found[0]) for other in found[1:])


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


@pytest.mark.parametrize("shape", [(), (1, 1, 16)], ids=str)
def test_a_threshold_gradient_behind_attention_does_not_depend_on_which_thread_took_what(shape):
    heads = 1 if shape else 8
    q, k, v = (random_spikes(seed, (4, 32 // heads, heads, 64, 16), 0.3) for seed in (1, 2, 3))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, *(2,) * 20):
            torch.set_num_threads(n)
            threshold = torch.full(shape, 0.3, requires_grad=True)
            with ops.use_backend("cpu"):
                ops.spike_attention_lif(q, k, v, LIFParams(), threshold=threshold).backward(grad)
            found.append(threshold.grad)
    finally:
        torch.set_num_threads(before)
    assert found[0].abs().min() > 0
    assert all(torch.equal(found[0], other) for other in found[1:])


def _matrix_unit():
    if "amx" not in native.variants():
        pytest.skip("this CPU has no matrix unit")
    native.use_variant("amx")


def test_tiles_hold_all_of_a_float():
    """A spike alone gives its channel's weights to the last bit, whatever sizes they are of."""
    _matrix_unit()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 600, generator=generator) * torch.exp(
        torch.randn(70, 600, generator=generator) * 9
    )
    s, grad = torch.eye(600), weight.t().contiguous()
    y, words = spike_linear.forward(s, weight, None, "tiles")
    assert torch.equal(y, weight.t())
    assert torch.equal(spike_linear.weight_grad(words, 600, grad, "tiles"), weight)
    weight[3, 5], weight[4, 6], weight[5, 7] = torch.inf, -torch.inf, torch.nan
    y = spike_linear.forward(s, weight, None, "tiles")[0]
    assert y[5, 3] == torch.inf and y[6, 4] == -torch.inf and y[7, 5].isnan()
    assert torch.equal(y[:, 6:], weight.t()[:, 6:])


def _off(source, rate):
    """How far tiles are from s @ source, the source as a weight and as a gradient, in parts of each column's
    largest number; and how many spikes each sum has."""
    s = random_spikes(2, (100, len(source)), rate)
    expected, largest = s.double() @ source.double(), source.abs().amax(0).clamp_min(1e-30)
    y = spike_linear.forward(s, source.t().contiguous(), None, "tiles")[0]
    grad = spike_linear.weight_grad(ops.pack_spikes(s.t().contiguous()), 100, source, "tiles").t()
    return [((x.double() - expected) / largest).abs() for x in (y, grad)], s.sum(1, keepdim=True)


@pytest.mark.parametrize(("channels", "n"), [(80, 80), (600, 70), (1300, 20)])
@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_tiles_of_bytes_are_off_by_a_rounding_a_spike(channels, n, rate):
    """2^-23 of its column's largest number for each, and as much for sums as floats; of integers, none."""
    _matrix_unit()
    generator = torch.Generator().manual_seed(0)
    columns = torch.exp(torch.randn(n, generator=generator) * 9)  # of any size
    source = torch.randn(channels, n, generator=generator) * columns
    source[:, 3], source[5:, 4] = 0, 0  # no numbers, few
    source[7, 5], source[8, 6] = (2 - 2**-23) * 4 * columns[5], (-2 + 2**-23) * 4 * columns[6]
    found, spikes = _off(source, rate)
    assert all((off <= spikes * 2**-22).all() for off in found)
    whole = torch.randint(-2000, 2001, (channels, n), generator=generator).float()
    assert not any(off.any() for off in _off(whole, rate)[0])


@pytest.mark.parametrize("outlier", [1e6, -1e30])
def test_one_large_number_costs_the_others_nothing(outlier):
    """Bytes would round the rest of its column away: it is split into parts instead."""
    _matrix_unit()
    source = torch.randn(500, 70, generator=torch.Generator().manual_seed(0))
    source[17] = outlier
    y, words = spike_linear.forward(torch.eye(500), source.t().contiguous(), None, "tiles")
    assert torch.equal(y, source)
    assert torch.equal(spike_linear.weight_grad(words, 500, source, "tiles"), source.t())


@pytest.mark.parametrize("size", [1e-32, 1e30])
def test_tiles_of_the_smallest_and_the_largest_numbers(size):
    _matrix_unit()
    source = torch.randn(600, 70, generator=torch.Generator().manual_seed(0)) * size
    y = spike_linear.forward(torch.eye(600), source.t().contiguous(), None, "tiles")[0]
    torch.testing.assert_close(y, source, rtol=0, atol=2**-124 + size * 2**-20)


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_products_are_right_whoever_computes_them(monkeypatch, tiles):
    """Small whole numbers: exact in bfloat16 up to 256, and every order of summation gives them."""
    monkeypatch.setattr(_cost, "has_tiles", lambda: tiles)
    generator = torch.Generator().manual_seed(0)
    s = random_spikes(1, (40, 70), 0.3).bfloat16()
    weight, grad = (torch.randint(-2, 3, n, generator=generator).bfloat16() for n in ((50, 70), (40, 50)))
    bias = torch.ones(50).bfloat16()
    y, words = spike_linear.forward(s, weight, bias, "dense")
    expected = (s.float() @ weight.float().t() + 1).bfloat16()
    assert torch.equal(y, expected)
    way = spike_linear.way_of(words, weight, "dense")
    assert torch.equal(spike_linear.multiply(words, 0, weight, bias, way), expected)
    assert torch.equal(
        spike_linear.weight_grad(words, 70, grad, "dense"), (grad.float().t() @ s.float()).bfloat16()
    )
    grad_s, grad_bias = spike_linear.input_and_bias_grad(grad, weight)
    assert torch.equal(grad_s, (grad.float() @ weight.float()).bfloat16())
    assert torch.equal(grad_bias, grad.float().sum(0).bfloat16())


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (
            lambda o: o.unpack_spikes(torch.zeros(4, 1).long(), 1000, torch.float32, "cpu"),
            "words: got 1 a row, takes 16 for 1000 channels",
        ),
        (
            lambda o: o.spike_linear_from_words(
                torch.ones(64, 1).long(), 640, torch.ones(5, 640), None, "cpu"
            ),
            "words: got 1 a row, takes 10 for 640 channels",
        ),
        (
            lambda o: o.spike_linear_from_words(torch.ones(64, 1).long(), 64, torch.ones(5, 60), None, "cpu"),
            "channels: got 64, takes those of weight, 60",
        ),
        (
            lambda o: o.spike_linear_weight_grad(torch.ones(64, 1).long(), 64, torch.ones(4, 5), "cpu"),
            r"grad: got shape \(4, 5\), takes",
        ),
        (
            lambda o: o.lif_backward(
                *(torch.ones(1, 4), None, torch.ones(4, 400), None, None),
                *(2.0, 1.0, 0.0, True, "sigmoid", 4.0, True, "cpu"),
            ),
            r"grad_spikes: got shape \(1, 4\), takes \(4, 400\)",
        ),
    ],
)
def test_registered_operators_read_nothing_beyond_their_arguments(call, why):
    """Which `ops` checks, and these do not."""
    with pytest.raises(ValueError, match=why):
        call(torch.ops.spikedecoder)
