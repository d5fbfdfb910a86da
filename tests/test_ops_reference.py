"""The operators on the reference backend against their specification, differentiated by autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spikedecoder import ops
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.reference import binarize as binarize_spec
from spikedecoder.reference import ilif as ilif_spec
from spikedecoder.reference import lif as lif_spec
from spikedecoder.reference import spike_attention as attention_spec
from spikedecoder.testing import cases, flipped, leaves, make_inputs, run

_PARAMS = ("tau", "v_reset", "decay_input", "surrogate", "alpha", "detach_reset")


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


def _by_autograd(spec, inputs, seed=1):
    outs = spec(**inputs)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
    wanted = leaves(inputs)
    found = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs])
    results = {("out" if i == 0 else f"out.{i}"): o.detach() for i, o in enumerate(outs)}
    return results | {f"grad.{n}": g for n, g in zip(wanted, found, strict=True)}


def _lif(x, v_threshold=1.0, v_init=None, return_state=False, **params):
    p = LIFParams(v_threshold=1.0 if isinstance(v_threshold, torch.Tensor) else v_threshold, **params)
    spikes, v = lif_spec.lif(x, v_threshold, v_init, p)
    return (spikes, v) if return_state else (spikes,)


def _attention(q, k, v, scale, decay=None, state=None, return_state=False, levels=1):
    out = attention_spec.quadratic(q, k, v, scale, decay, state)
    return (
        (out, attention_spec.recurrent(q, k, v, scale, decay, state)[1].detach()) if return_state else (out,)
    )


@pytest.mark.parametrize("case", cases("lif"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lif_is_its_specification(case, dtype):
    actual = run(case, make_inputs(case, dtype))
    expected = _by_autograd(_lif, make_inputs(case, dtype))
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual["out"], expected["out"], rtol=0, atol=0)
    tight = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], **tight, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", cases("lif"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lif_in_half_precision_keeps_the_membrane_in_float32(case, dtype):
    inputs = make_inputs(case, dtype)
    outs = run(case, inputs)
    assert outs["out"].dtype == dtype
    wide = {n: t.detach().float() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    expected = _lif(**wide)
    torch.testing.assert_close(outs["out"].float(), expected[0], rtol=0, atol=0)
    if "out.1" in outs:
        assert outs["out.1"].dtype == torch.float32


@pytest.mark.parametrize("case", cases("spike_attention"), ids=str)
def test_attention_is_its_specification(case):
    actual = run(case, make_inputs(case, torch.float64))
    expected = _by_autograd(_attention, make_inputs(case, torch.float64))
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", [c for c in cases("spike_attention") if c.exact], ids=str)
def test_three_forms_of_attention_are_equal_bit_for_bit(case):
    inputs = make_inputs(case)
    args = [inputs[n].detach() for n in ("q", "k", "v")] + [inputs["scale"], None, inputs.get("state")]
    quadratic = attention_spec.quadratic(*args)
    chunked = attention_spec.chunked(*args)
    recurrent, _ = attention_spec.recurrent(*args)
    assert torch.equal(quadratic, chunked) and torch.equal(quadratic, recurrent)


def test_attention_is_causal_and_carries_its_state():
    generator = torch.Generator().manual_seed(3)
    q, k, v = ((torch.rand(2, 1, 2, 150, 16, generator=generator) < 0.3).float() for _ in range(3))
    decay = torch.tensor([0.9, 1.0])
    whole, end = ops.spike_attention(q, k, v, decay=decay, return_state=True)
    for split in (1, 63, 64, 65, 149):
        left, state = ops.spike_attention(
            *(x[..., :split, :] for x in (q, k, v)), decay=decay, return_state=True
        )
        right, last = ops.spike_attention(
            *(x[..., split:, :] for x in (q, k, v)), decay=decay, state=state, return_state=True
        )
        torch.testing.assert_close(torch.cat([left, right], -2), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


@pytest.mark.triton_interpreter
@pytest.mark.parametrize("learn_qkv", [True, False], ids=["", "state-alone"])
@pytest.mark.parametrize("decay", [None, torch.tensor([0.9, 0.5, 1.0])], ids=["", "decay"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_attention_gives_its_initial_state_a_gradient(backend, decay, learn_qkv):
    inputs = make_inputs(next(c for c in cases("spike_attention") if c.name == "state"))
    q, k, v, state = (inputs[name].detach() for name in ("q", "k", "v", "state"))
    leaves_ = [x.requires_grad_() for x in ((q, k, v, state) if learn_qkv else (state,))]
    want = attention_spec.quadratic(q, k, v, 0.3, decay, state)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    with ops.use_backend(backend):
        got = ops.spike_attention(q, k, v, 0.3, decay, state)
    found, expected = (torch.autograd.grad(out, leaves_, grad) for out in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.triton_interpreter
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_attention_of_no_tokens(backend):
    q = torch.ones(2, 1, 3, 0, 8, requires_grad=True)
    state = torch.rand(2, 1, 3, 8, 8)
    with ops.use_backend(backend):
        out, last = ops.spike_attention(q, q, q, state=state, return_state=True)
        spikes = ops.spike_attention_lif(q, q, q, LIFParams())
        assert torch.autograd.grad(out.sum() + spikes.sum(), q)[0].shape == q.shape
    assert out.shape == spikes.shape == q.shape and torch.equal(last, state)


def test_linear_takes_spikes_of_another_dtype_than_the_weights():
    s, weight = (torch.rand(5, 8) < 0.5).float(), torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(ops.spike_linear(s, weight), s.double() @ weight.T)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_linear_takes_a_bias_of_another_dtype_than_the_weights(backend):
    s, weight = torch.ones(3, 4), torch.ones(2, 4)
    bias = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with ops.use_backend(backend):
        y = ops.spike_linear(s, weight, bias)
    (gradient,) = torch.autograd.grad(y.sum(), bias)
    assert y.dtype == torch.float32 and y.tolist() == [[5.0, 5.0]] * 3
    assert gradient.dtype == torch.float64 and gradient.tolist() == [3.0, 3.0]


def test_attention_result_merges_heads_for_free():
    q = torch.ones(2, 1, 3, 10, 8)
    assert ops.spike_attention(q, q, q).transpose(2, 3).is_contiguous()


@pytest.mark.parametrize("decay", [None, torch.tensor([0.5, 0.75])], ids=["", "decay"])
def test_attention_with_dropout_drops_scores(decay):
    """As good as none is attention; half of them is the product with the same mask; no state."""
    q, k, v = (
        (torch.rand(2, 1, 2, 9, 4, generator=torch.Generator().manual_seed(i)) < 0.5)
        .double()
        .requires_grad_()
        for i in range(3)
    )
    want = ops.spike_attention(q, k, v, decay=decay)
    got = ops.spike_attention(q, k, v, decay=decay, dropout=1e-9)
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(1)
    dropped = ops.spike_attention(q, k, v, decay=decay, dropout=0.5)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(torch.ones(2, 1, 2, 9, 9, dtype=torch.float64), 0.5)
    power = torch.arange(9)[:, None] - torch.arange(9)
    factor = (power >= 0) * (torch.ones(2) if decay is None else decay)[:, None, None] ** power.clamp(min=0)
    torch.testing.assert_close(dropped, (q @ k.transpose(-1, -2) * factor * kept) @ v * 0.125)
    with pytest.raises(ValueError, match="dropout: takes 0 where the state"):
        ops.spike_attention(q, k, v, decay=decay, dropout=0.5, return_state=True)


@pytest.mark.parametrize("case", cases("spike_attention_lif"), ids=str)
def test_attention_lif_is_attention_then_lif(case):
    actual = run(case, make_inputs(case))

    def composed(p, threshold=1.0, **attention):
        return (lif_spec.lif(_attention(**attention)[0], threshold, None, p)[0],)

    expected = _by_autograd(composed, make_inputs(case))
    if case.exact:
        assert torch.equal(actual["out"], expected["out"])
    if torch.equal(actual["out"], expected["out"]):
        for name in expected.keys() - {"out"}:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    else:
        assert flipped(actual["out"], expected["out"]) < 1e-3


@pytest.mark.parametrize("case", cases("ilif"), ids=str)
def test_ilif(case):
    actual = run(case, make_inputs(case, torch.float64))
    expected = _by_autograd(
        lambda x, **p: (ilif_spec.ilif(x, ILIFParams(**p)),), make_inputs(case, torch.float64)
    )
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 4, 15])
def test_ilif_is_a_binary_neuron(levels):
    """Without leak, from half a unit on, all current at once, a threshold that halves, soft reset."""
    x = torch.randint(-40, 200, (3, 200), generator=torch.Generator().manual_seed(0)) / 16  # ties among them
    counts = ops.ilif(x, levels=levels, v_threshold=0.5)
    v, spikes = (x + 0.25).clamp(max=0.5 * (levels + 0.5)), []
    for worth in ops.spike_worths(levels):
        # no leak is tau without bound: what leaks is 0; nothing comes after the first timestep
        p = {"tau": 1e30, "decay_input": False, "v_threshold": 0.5 * worth, "v_reset": None}
        fired, v = ops.lif(torch.zeros(1, *x.shape), v_init=v, return_state=True, **p)
        spikes.append(fired[0])
    planes = ops.spike_planes(counts, levels)
    assert torch.equal(torch.stack(spikes), planes) and len(planes) == levels.bit_length()
    assert torch.equal(sum(w * s for w, s in zip(ops.spike_worths(levels), planes, strict=True)), counts)
    assert torch.equal(ops.spike_counts(counts, levels), planes.sum(0))
    assert set(counts.unique().tolist()) == set(range(levels + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_digits_of_every_integer(dtype):
    for levels in range(1, 16):
        integers = torch.arange(levels + 1, dtype=dtype)
        planes = ops.spike_planes(integers, levels)
        digits = [[n >> bit & 1 for n in range(levels + 1)] for bit in reversed(range(levels.bit_length()))]
        assert planes.dtype == dtype and planes.tolist() == digits
        assert ops.spike_counts(integers, levels).tolist() == [n.bit_count() for n in range(levels + 1)]
    assert ops.spike_planes(torch.tensor([float("nan")], dtype=dtype), 15).isnan().all()
    assert ops.spike_counts(torch.tensor([float("nan")], dtype=dtype), 15).isnan().all()


@pytest.mark.parametrize("case", cases("binarize"), ids=str)
def test_binarize(case):
    actual = run(case, make_inputs(case))
    expected = _by_autograd(lambda x: (binarize_spec.binarize(x, 2.0),), make_inputs(case))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", cases("pack_spikes"), ids=str)
def test_pack_and_unpack(case):
    spikes = make_inputs(case)["spikes"]
    words = ops.pack_spikes(spikes)
    assert words.shape == (*spikes.shape[:-1], -(-spikes.shape[-1] // 64))
    assert torch.equal(ops.unpack_spikes(words, spikes.shape[-1]), spikes)
    for channel in range(spikes.shape[-1]):  # the format itself: bit i of word w is channel 64 w + i
        bit = (words[..., channel // 64] >> (channel % 64)) & 1
        assert torch.equal(bit.float(), spikes[..., channel])


@pytest.mark.parametrize("case", cases("norm_lif", "norm_ilif"), ids=str)
def test_norm_lif_is_norm_then_lif(case):
    actual = run(case, make_inputs(case, torch.float64))

    def composed(x, n, p, threshold=1.0):
        if isinstance(p, ILIFParams):
            return (ilif_spec.ilif(ops.norm(x, n), p),)
        return (lif_spec.lif(ops.norm(x, n), threshold, None, p)[0],)

    expected = _by_autograd(composed, make_inputs(case, torch.float64))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in cases("norm_lif", "norm_ilif") if c.name not in ("one", "empty")], ids=str
)
def test_norm_lif_with_parameters_in_half_precision_computes_in_float32(case, dtype):
    inputs = make_inputs(case, dtype)
    actual = run(case, inputs)
    wide = make_inputs(case, dtype)
    n = wide["n"]
    tensors = {"weight": n.weight.detach().float(), "bias": n.bias.detach().float()}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    wide["n"] = dataclasses.replace(n, **tensors, running=tuple(t.float() for t in n.running))
    expected = run(case, wide)
    assert flipped(actual["out"], expected["out"]) < 0.02
    for name in ("grad.x", "grad.n.weight", "grad.n.bias"):
        assert actual[name].dtype == dtype and actual[name].isfinite().all()
        error = (actual[name].float() - expected[name].float()).norm() / expected[name].float().norm()
        assert error < 0.05, f"{name}: {error:.3f}"


def test_power_norm_after_its_warm_up_uses_the_running_moment():
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    phi, ema, weight, bias = (
        torch.full((3,), 4.0).double(),
        torch.zeros(3).double(),
        torch.ones(3).double(),
        torch.zeros(3).double(),
    )
    n = NormParams("power", weight, bias, running=(phi, ema, torch.tensor(10_000)))
    torch.testing.assert_close(ops.norm(x, n), x / (4 + 1e-5) ** 0.5)
    torch.testing.assert_close(phi, 0.9 * 4 + 0.1 * x.square().mean((0, 1)))


def test_batch_and_layer_norm_match_torch():
    from spikedecoder.nn.norm import Norm

    x = torch.randn(4, 3, 5, 16, dtype=torch.float64)
    ours, theirs = Norm("batch", 16).double(), torch.nn.BatchNorm1d(16).double()
    for _ in range(3):
        torch.testing.assert_close(ours(x).reshape(-1, 16), theirs(x.reshape(-1, 16)))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    torch.testing.assert_close(ours.eval()(x).reshape(-1, 16), theirs.eval()(x.reshape(-1, 16)))
    torch.testing.assert_close(Norm("layer", 16).double()(x), torch.nn.LayerNorm(16).double()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "batch"])
@pytest.mark.parametrize("parameters", ["as x", "float32"])
@pytest.mark.parametrize("with_linear", [False, True])
def test_gradients_of_norms_of_many_rows_in_half_precision_are_summed_in_float32(
    dtype, kind, parameters, with_linear
):
    """A sum of 8192 ones in bfloat16 would end at 256."""
    x, eye = (torch.arange(8192 * 8) % 3 % 2).to(dtype).reshape(8192, 8), torch.eye(8, dtype=dtype)
    own = dtype if parameters == "as x" else torch.float32
    weight, bias = torch.ones(8, dtype=own, requires_grad=True), torch.zeros(8, dtype=own, requires_grad=True)
    running = () if kind == "layer" else (torch.zeros(8), torch.ones(8))
    n = NormParams(kind, weight, bias, running=running)
    y = ops.linear_norm(x, eye, None, n) if with_linear else ops.norm(x, n)
    found = torch.autograd.grad(y, (weight, bias), torch.ones_like(y))
    wide = NormParams(kind, weight.double(), bias.double(), running=tuple(r.double() for r in running))
    expected = torch.autograd.grad(ops.norm(x.double(), wide).sum(), (weight, bias))
    assert torch.equal(found[1].double(), expected[1].double()) and found[1][0] == 8192
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=0.02, atol=2)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_reads_the_strides_of_what_it_is_given(training):
    x = torch.randn(6, 7, requires_grad=True)
    columns = torch.rand(7, 4) + 0.5  # weight, bias and the running statistics
    found = []
    for weight, bias, *running in (columns.clone().unbind(1), columns.t().contiguous().unbind(0)):
        leaves = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
        y = ops.norm(x, NormParams("batch", *leaves, training=training, running=tuple(running)))
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *leaves)), *running))
    torch.testing.assert_close(*found)


def test_lif_propagates_nan_and_fires_on_infinity():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf")], [0.0, 0.0, 0.0]])
    spikes, v = ops.lif(x, return_state=True)
    assert spikes.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert v[0].isnan() and v[1] == 0 and v[2].isnan()  # -inf + inf


@pytest.mark.parametrize("levels", [1, 15])
def test_autocast_leaves_the_sums_of_attention_exact(levels):
    q, k, v = (torch.full((1, 1, 1, 70, 16), float(levels)) for _ in range(3))
    expected = ops.spike_attention(q, k, v, 1.0, levels=levels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.spike_attention(q, k, v, 1.0, levels=levels), expected)
    assert expected.max() == 70 * 16 * levels**3


def test_attention_with_dropout_sums_in_float32():
    """As without: decays, their powers and sums beyond 16 bits; also under autocast."""
    q, k, v = (
        (torch.rand(1, 1, 1, 400, 16, generator=torch.Generator().manual_seed(i)) < 0.3).float()
        for i in range(3)
    )
    decay = torch.tensor([0.998])
    want = ops.spike_attention(q, k, v, 1.0, decay)
    for dtype in (torch.float16, torch.bfloat16):
        got = ops.spike_attention(q.to(dtype), k.to(dtype), v.to(dtype), 1e-3, decay, dropout=1e-12)
        assert got.dtype == dtype
        torch.testing.assert_close(got, (want * 1e-3).to(dtype), rtol=2**-7, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.spike_attention(q, k, v, 1.0, decay, dropout=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.triton_interpreter
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_threshold_of_a_wider_dtype_is_rounded_to_the_potentials(backend):
    limit = torch.tensor([0.7, 0.7], dtype=torch.float64)
    with ops.use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.full((1, 1, 2), 1.4, dtype=dtype)
            spikes, v = ops.lif(x, v_threshold=limit, v_reset=None, return_state=True)
            assert v.dtype == torch.float32 and spikes.dtype == dtype
            h = x.float() / 2
            assert torch.equal(spikes.float(), (h >= limit.float()).float())


def test_autocast_leaves_float64_alone():
    s, weight = torch.ones(2, 3, dtype=torch.float64), torch.full((4, 3), 1 / 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.spike_linear(s, weight), torch.nn.functional.linear(s, weight))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["batch", "power"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_frozen_norms_in_half_precision_compute_in_float32(dtype, kind, backend):
    """After model.half() the running statistics have 16 bits, too: what is made of them has not."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 16, 80, generator=generator) * 2 + 1).to(dtype)
    values = (torch.rand(80, generator=generator) + 0.5).to(dtype)
    running = {"batch": (values, values * 2), "power": (values, values, torch.tensor(3))}[kind]
    up = torch.randn(x.shape, generator=generator).to(dtype)
    p = LIFParams(v_threshold=0.5, surrogate="rectangular", alpha=1.0)
    found = []
    for statistics in (running, tuple(r.float() if r.is_floating_point() else r for r in running)):
        own = [
            a.clone().requires_grad_() for a in (x, torch.ones(80, dtype=dtype), torch.zeros(80, dtype=dtype))
        ]
        n = NormParams(kind, own[1], own[2], training=False, running=statistics)
        with ops.use_backend(backend):
            spikes = ops.norm_lif(own[0], n, p)
        found.append([spikes, *torch.autograd.grad(spikes, own, up)])
    for of_16_bits, of_32_bits in zip(*found, strict=True):
        torch.testing.assert_close(of_16_bits, of_32_bits, rtol=0, atol=0)
    if kind == "batch":  # and the gradient is that of the membrane which fired
        y = (x.float() - values.float()) * (values.float() * 2 + 1e-5).rsqrt()
        with ops.use_backend("reference"):
            y.requires_grad_()
            spikes = ops.lif_params(y, p)
            (grad_y,) = torch.autograd.grad(spikes, y, up.float())
        expected = grad_y * (values.float() * 2 + 1e-5).rsqrt()
        torch.testing.assert_close(found[0][1].float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_torchs_default_dtype(default):
    x = torch.rand(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    phi = torch.full((50,), 0.3)

    def results(dtype):
        spikes, v = ops.lif(x.to(dtype), v_threshold=0.3, v_reset=None, return_state=True)
        running = (phi.to(dtype, copy=True), torch.zeros(50, dtype=dtype), torch.tensor(0))
        n = NormParams("power", torch.ones(50, dtype=dtype), torch.zeros(50, dtype=dtype), running=running)
        for _ in range(30):
            ops.norm_lif(x.to(dtype), n, LIFParams())
        return spikes, v, *running

    expected = {dtype: results(dtype) for dtype in (torch.float32, torch.float64)}
    threshold = torch.tensor(0.3, dtype=torch.float64)
    of_tensor = ops.lif(x, v_threshold=threshold, v_reset=None, return_state=True)
    torch.testing.assert_close(expected[torch.float64][1], of_tensor[1], rtol=0, atol=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = {dtype: results(dtype) for dtype in expected}
    finally:
        torch.set_default_dtype(before)
    for dtype in expected:
        torch.testing.assert_close(found[dtype], expected[dtype], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_neuron_with_an_infinite_threshold_never_fires(backend):
    x = (torch.rand(4, 3, 40, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    threshold = torch.ones(40).index_fill(0, torch.tensor([7]), torch.inf)
    with ops.use_backend(backend):
        spikes, v = ops.lif(x, v_threshold=threshold, v_reset=None, return_state=True)
    (grad,) = torch.autograd.grad(spikes.sum() + v.sum(), x)
    assert spikes[..., 7].sum() == 0 < spikes.sum() and v.isfinite().all() and grad.isfinite().all()
    by_autograd, _ = lif_spec.lif(x, threshold, None, LIFParams(v_reset=None))
    torch.testing.assert_close(by_autograd, spikes)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_attention_state_in_half_precision_gets_a_gradient_computed_in_float32(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.rand(1, 1, 1, 400, 8, generator=generator) < 0.3).to(dtype) for _ in range(3))
    up = torch.rand(1, 1, 1, 400, 8, generator=generator).to(dtype)
    state = torch.randint(0, 9, (1, 1, 1, 8, 8), generator=generator).to(dtype).requires_grad_()
    with ops.use_backend(backend):
        out = ops.spike_attention(q, k, v, 1.0, torch.tensor([0.99]), state)
    (grad,) = torch.autograd.grad(out, state, up)
    powers = 0.99 ** torch.arange(1, 401, dtype=torch.float64)
    expected = (q.double() * powers[:, None]).transpose(-1, -2) @ up.double()
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
