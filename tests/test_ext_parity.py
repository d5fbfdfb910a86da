"""Every operator and variant of the compiled CPU backend against the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, ext, ops
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.surrogate import SURROGATES
from spikedecoder.testing import Case, cases, flipped, make_inputs, run, spikes

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import native, norm_lif

pytestmark = pytest.mark.poison_empty
VARIANTS = ("amx", "avx512", "avx2", "baseline")


@pytest.fixture(params=VARIANTS)
def variant(request):
    before = native.variant()
    if request.param not in native.variants():
        pytest.skip(f"this CPU has no {request.param}")
    native.use_variant(request.param)
    yield request.param
    native.use_variant(before)


class Watched(torch.Tensor):
    """A tensor that may be more than its values."""


def both(case: Case, seed: int = 0) -> tuple[dict, dict]:
    with ops.use_backend("cpu"):
        actual = run(case, make_inputs(case, seed=seed))
    with ops.use_backend("reference"):
        expected = run(case, make_inputs(case, seed=seed))
    assert actual.keys() == expected.keys()
    return actual, expected


def assert_gradients(actual, expected, atol=2e-6):
    for name in actual:
        if name != "out":
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", cases("lif", "ilif", "binarize", "pack_spikes"), ids=str)
def test_elementwise(case, variant):
    actual, expected = both(case)
    assert torch.equal(actual["out"], expected["out"])
    assert_gradients(actual, expected)


@pytest.mark.parametrize("tau", [1.0, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("decay_input", [True, False])
def test_lif_is_bit_equal_on_any_input(variant, tau, v_reset, decay_input):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 31, 37, generator=generator) * 2
    options = {"tau": tau, "v_reset": v_reset, "decay_input": decay_input, "return_state": True}
    options["v_init"] = torch.randn(31, 37, generator=generator)
    for threshold in (0.77, torch.rand(37, generator=generator), torch.rand(31, 37, generator=generator)):
        with ops.use_backend("cpu"):
            actual = ops.lif(x, v_threshold=threshold, **options)
        with ops.use_backend("reference"):
            expected = ops.lif(x, v_threshold=threshold, **options)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_lif_takes_strided_and_expanded_input(variant):
    x = torch.randn(5, 1, 12, 9).transpose(2, 3).expand(5, 3, 9, 12)
    with ops.use_backend("cpu"):
        actual = ops.lif(x, v_threshold=torch.full((9, 1), 0.5))
    with ops.use_backend("reference"):
        assert torch.equal(actual, ops.lif(x, v_threshold=torch.full((9, 1), 0.5)))


def test_an_infinite_gradient_ends_where_an_ilif_is_saturated(variant):
    x = torch.tensor([100.0, 0.5] * 20, requires_grad=True)
    with ops.use_backend("cpu"):
        ops.ilif_params(x, ILIFParams(4)).backward(torch.full_like(x, float("inf")))
    assert x.grad.tolist() == [0.0, float("inf")] * 20


@pytest.mark.parametrize("threshold", [(4,), (3, 4)], ids=str)
def test_no_neurons_of_learned_thresholds(threshold, variant):
    gradients = []
    for shape, operator in (
        ((2, 0, *threshold), lambda x, t: ops.lif(x, v_threshold=t)),
        ((2, 0, 3, 5, 4), lambda x, t: ops.spike_attention_lif(x, x, x, LIFParams(), threshold=t)),
    ):
        x = torch.zeros(shape, requires_grad=True)
        of_heads = (3, 1, 4) if len(shape) == 5 and len(threshold) == 2 else threshold
        leaf = torch.ones(of_heads, requires_grad=True)
        with ops.use_backend("cpu"):
            spikes_of_none = operator(x, leaf)
        assert spikes_of_none.shape == shape
        gradients += torch.autograd.grad(spikes_of_none.sum(), (x, leaf))
    assert all((g == 0).all() for g in gradients)


def test_lif_gradients_of_many_neurons(variant):
    """Enough for several threads and for the blocks that sum the scalar threshold's gradient."""
    case = Case("lif", "large", (4, 40, 1000), {"threshold": (), "surrogate": "atan"})
    actual, expected = both(case)
    assert torch.equal(actual["out"], expected["out"])
    torch.testing.assert_close(actual["grad.x"], expected["grad.x"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["grad.v_threshold"], expected["grad.v_threshold"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", cases("norm_lif", "norm_ilif", "spike_attention_lif"), ids=str)
def test_sums_then_lif(case, variant):
    """Sums in another order may move a spike: few, and for some seed none, where gradients are compared."""
    compared = False
    for seed in range(4):
        actual, expected = both(case, seed)
        assert flipped(actual["out"], expected["out"]) < 1e-3
        assert not case.exact or torch.equal(actual["out"], expected["out"])
        if torch.equal(actual["out"], expected["out"]):
            compared = True
            # gradients of attention are sums over all tokens before or after
            assert_gradients(actual, expected, atol=2e-5 if case.operator == "spike_attention_lif" else 2e-6)
    assert compared


@pytest.mark.parametrize("case", cases("spike_linear"), ids=str)
def test_spike_linear(case, variant):
    actual, expected = both(case)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["s weight bias", "weight bias", "bias"])
@pytest.mark.parametrize(
    "shape", [((70,), 5), ((0,), 3), ((4, 0), 3), ((4, 70), 0), ((2, 0, 70), 5)], ids=str
)
def test_spike_linear_of_one_vector_and_of_no_channels(shape, wanted, variant):
    (*lead, k), n = shape
    generator = torch.Generator().manual_seed(0)
    given = {"s": spikes((*lead, k), generator, 0.3), "weight": torch.randn(n, k, generator=generator)}
    given["bias"] = torch.randn(n, generator=generator)
    found = []
    for backend in ("cpu", "reference"):
        leaves = {name: x.clone().requires_grad_(name in wanted.split()) for name, x in given.items()}
        with ops.use_backend(backend):
            y = ops.spike_linear(**leaves)
            packed = ops.spike_linear(ops.pack_spikes(given["s"]), given["weight"], given["bias"])
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted.split()], torch.ones_like(y))
        found.append((y.detach(), packed, *gradients))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases("spike_attention"), ids=str)
def test_attention(case, variant):
    actual, expected = both(case)
    for name in actual:
        # integers times the scale, but for decays and gradients
        exact = case.exact and not name.startswith("grad")
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(actual[name], expected[name], **close, msg=lambda m, n=name: f"{n}: {m}")
    assert actual["out"].transpose(2, 3).is_contiguous()


@pytest.mark.parametrize("s", [0, 1, 31, 33, 300])
@pytest.mark.parametrize("d", [1, 7, 17, 24, 33, 63, 80])
def test_attention_of_integers(s, d, variant):
    """Every cut of the state into parts, strided tensors, heads that keep all of their past to none of it."""
    generator = torch.Generator().manual_seed(s + d)
    decay = torch.tensor([1.0, 0.97, 0.5, 1e-3, 1e-30])
    shape = (2, 1, len(decay), s, d)

    def integers():
        return torch.randint(0, 16, shape[::-1], generator=generator).float().permute(4, 3, 2, 1, 0)

    q, k, v, grad = integers(), integers(), integers(), torch.randn(shape, generator=generator)
    state = torch.randint(0, 99, (*shape[:3], d, d), generator=generator).float()

    def run_on(backend, dtype, grad=grad):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, state)]
        with ops.use_backend(backend):
            out, final = ops.spike_attention(
                *inputs[:3], 0.125, decay.to(dtype), state=inputs[3], return_state=True, levels=15
            )
            return out, final, *torch.autograd.grad(out, inputs, grad.to(dtype))

    threads = torch.get_num_threads()
    results = []
    for n in (1, 3):
        torch.set_num_threads(n)
        results.append(run_on("cpu", torch.float32))
    torch.set_num_threads(threads)
    expected = run_on("reference", torch.float64)
    sizes = run_on("reference", torch.float64, grad.abs())  # what is summed, without signs
    for one, three, e, size in zip(*results, expected, sizes, strict=True):
        assert one.shape == e.shape and torch.equal(one, three)
        assert ((one - e).abs() <= 2e-6 * size + 1e-37).all()


@pytest.mark.parametrize(
    "options", [{}, {"v_reset": None, "detach_reset": False}, {"surrogate": "atan", "tau": 3.0}], ids=str
)
def test_attention_lif_of_other_neurons(variant, options):
    generator = torch.Generator().manual_seed(0)
    p = LIFParams(**options)

    def run_on(backend):
        q, k, v = (
            spikes((3, 2, 20, 3, 18), torch.Generator().manual_seed(i), 0.3).transpose(2, 3).requires_grad_()
            for i in range(3)
        )
        threshold = torch.tensor(0.75).requires_grad_()
        with ops.use_backend(backend):
            out = ops.spike_attention_lif(q, k, v, p, 0.25, threshold=threshold)
            return out, *torch.autograd.grad(out, (q, k, v, threshold), upstream)

    upstream = torch.randn(3, 2, 3, 20, 18, generator=generator)
    actual, expected = run_on("cpu"), run_on("reference")
    assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


def test_every_case_from_several_threads_at_once():
    """Each thread begins with another case; sums may be taken in another order than alone."""
    table = cases()
    with ops.use_backend("cpu"):
        expected = [run(case, make_inputs(case)) for case in table]

        def work(first: int) -> None:
            for i in range(first, first + len(table)):
                case, wanted = table[i % len(table)], expected[i % len(table)]
                for name, value in run(case, make_inputs(case)).items():
                    close = (
                        {"rtol": 1e-5, "atol": 1e-5} if value.is_floating_point() else {"rtol": 0, "atol": 0}
                    )
                    torch.testing.assert_close(value, wanted[name], msg=f"{case} {name}", **close)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, (0, 25, 50, 75)))


@pytest.mark.parametrize(
    "case", cases("lif", "ilif", "binarize", "spike_attention", "spike_attention_lif"), ids=str
)
def test_bfloat16(case, variant):
    """Gradients, and outputs that are no spikes, differ by the rounding of what is read and written.

    Spikes are the same: of dyadic inputs, which fit, as the reference has them; of others as this backend has
    them in float32, from the same numbers.
    """
    inputs = make_inputs(case, torch.bfloat16)
    with ops.use_backend("cpu"):
        actual = run(case, inputs)
    with ops.use_backend("reference" if case.exact else "cpu"):
        expected = run(case, {name: widened(value) for name, value in inputs.items()})
    assert actual["out"].dtype == torch.bfloat16
    if case.exact or case.operator != "spike_attention":
        assert torch.equal(actual["out"], expected["out"].bfloat16())
    for name in actual.keys() - {"out"} if case.exact else actual:
        largest = expected[name].abs().max().item() if expected[name].numel() else 0
        torch.testing.assert_close(actual[name].float(), expected[name], rtol=0, atol=1e-2 * largest)


def widened(value):
    if not torch.is_tensor(value):
        return value
    return (
        value.detach().to(torch.promote_types(value.dtype, torch.float32)).requires_grad_(value.requires_grad)
    )


@pytest.mark.parametrize("case", cases("norm_lif", "norm_ilif"), ids=str)
def test_bfloat16_norm_lif(case, variant):
    """Against the same operator in float32 on the same numbers: only results are rounded."""

    def run_in(dtype):
        inputs = make_inputs(case, torch.bfloat16)
        inputs["x"] = inputs["x"].detach().to(dtype).requires_grad_()
        with ops.use_backend("cpu"):
            return run(case, inputs)

    actual, expected = run_in(torch.bfloat16), run_in(torch.float32)
    assert actual["out"].dtype == torch.bfloat16
    assert torch.equal(actual["out"].float(), expected["out"])
    atol = 1e-2 / make_inputs(case)["p"].v_threshold  # what gradients are multiples of, with I-LIF
    for name in actual:
        torch.testing.assert_close(actual[name].float(), expected[name].float(), rtol=1e-2, atol=atol)


@pytest.mark.parametrize("kind", ["layer", "batch", "power"])
@pytest.mark.parametrize("shape", [(1030, 96), (3, 40, 50), (257, 600)], ids=str)
def test_norm_ilif_beside_norm_and_ilif(shape, kind, variant):
    """An integer moves by one, and only where rounding moves its current over a border between two."""
    p, channels = ILIFParams(15, 0.3), shape[-1]
    random = torch.Generator().manual_seed(0)
    x, grad = (2 * torch.randn(shape, generator=random) + 1 for _ in range(2))
    weight, bias = torch.rand(channels, generator=random) + 0.5, torch.randn(channels, generator=random)

    def run_of(operator):
        running = {"layer": (), "batch": (torch.zeros(channels), torch.ones(channels))}
        running["power"] = (torch.ones(channels), torch.zeros(channels), torch.tensor(0))
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with ops.use_backend("cpu"):
            out = operator(leaves[0], NormParams(kind, *leaves[1:], running=running[kind]))
            return out.detach(), torch.autograd.grad(out, leaves, grad), running[kind]

    current = run_of(ops.norm)[0].double() / p.v_threshold
    counts, gradients, running = run_of(lambda x, n: ops.norm_ilif(x, n, p))
    expected, wanted, moved = run_of(lambda x, n: ops.ilif_params(ops.norm(x, n), p))
    near = (current - current.floor() - 0.5).abs() < 4e-7 * (4 / p.v_threshold + current.abs())
    assert near.double().mean() < 1e-4
    assert torch.equal(counts[~near], expected[~near]) and (counts - expected).abs().max() <= 1
    assert len(counts.unique()) == 16
    if shape == (3, 40, 50):
        assert torch.equal(counts, expected)
    if torch.equal(counts, expected):
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    torch.testing.assert_close(running, moved, rtol=1e-5, atol=1e-6)


def test_norm_ilif_takes_what_is_strided_and_what_is_no_number(variant):
    x = torch.randn(6, 7, 40, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    x[2, 3, 4:7] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    running = (torch.zeros(40), torch.ones(40))
    n = NormParams("batch", torch.ones(40), torch.zeros(40), training=False, running=running)
    found = {}
    for backend in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        with ops.use_backend(backend), torch.no_grad():
            alone = ops.norm_ilif(leaf, n, ILIFParams(4))
        with ops.use_backend(backend):
            out = ops.norm_ilif(leaf, n, ILIFParams(4))
        assert not alone.requires_grad and torch.equal(alone.isnan(), out.isnan())
        upstream = torch.full((40, 6, 7), 2.0).permute(2, 1, 0)
        found[backend] = out.detach(), *torch.autograd.grad(out, leaf, upstream)
    torch.testing.assert_close(found["cpu"], found["reference"], rtol=0, atol=1e-5, equal_nan=True)
    assert found["cpu"][0][2, 3, 4:7].tolist()[1:] == [4, 0] and found["cpu"][0][2, 3, 4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["as a rule", "double", "apart", "watched"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_running_statistics_move_as_in_the_reference(variant, momentum, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 5, 7, 37, generator=generator) * 1.5 + 0.3).to(dtype)

    def run_of(backend):
        running = [torch.full((37,), 0.5), torch.full((37,), 2.0)]
        if kind == "double":
            running = [r.double() for r in running]
        elif kind == "apart":
            running = [torch.stack([r, r], 1)[:, 0] for r in running]
            assert not running[0].is_contiguous()
        elif kind == "watched":
            running = [r.as_subclass(Watched) for r in running]
        n = NormParams("batch", torch.ones(37), torch.zeros(37), running=tuple(running), momentum=momentum)
        versions = [r._version for r in running]
        with ops.use_backend(backend):
            out = ops.norm_lif(x, n, LIFParams())
        assert all(r._version > v for r, v in zip(running, versions, strict=True))
        return out, [r.as_subclass(torch.Tensor) for r in running]

    actual, moved = run_of("cpu")
    expected, moved_reference = run_of("reference")
    assert flipped(actual, expected) < 1e-3
    torch.testing.assert_close(moved, moved_reference, rtol=1e-5, atol=1e-6)


def test_channels_whose_mean_has_no_square_in_float32(variant):
    x = 1e20 * (1 + 1e-3 * torch.randn(1000, 37, generator=torch.Generator().manual_seed(0)))
    mean, var = norm_lif.moments(x, True)
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(var, x.double().var(0, correction=0).float(), rtol=1e-4, atol=0.0)


def test_channels_that_never_change_have_no_variance(variant):
    """Where nothing fires, a Linear gives its bias in every row."""
    bias = torch.randn(77, generator=torch.Generator().manual_seed(0))
    mean, var = norm_lif.moments(bias.expand(1000, 77).contiguous(), True)
    torch.testing.assert_close(mean, bias, rtol=0, atol=0)
    assert (var == 0).all()


@pytest.mark.parametrize("alpha", [1e-60, 1e-30, 1e30, 1e38])
def test_a_gradient_outlives_any_alpha(alpha, variant):
    """Far from the threshold the slope is 0, or as good as that, and never NaN."""
    x = torch.tensor([0.5, 3.0, -2.0, 1.2]).repeat(3, 5).requires_grad_()
    found = {}
    for backend in ("reference", "cpu"):
        with ops.use_backend(backend):
            found[backend] = torch.autograd.grad(ops.lif(x, alpha=alpha).sum(), x)[0]
    torch.testing.assert_close(found["cpu"], found["reference"], rtol=1e-5, atol=1e-12)


def test_rows_whose_variance_overflows_do_not_look_sound(variant):
    x = torch.randn(4, 6, 80, generator=torch.Generator().manual_seed(0))
    x[1, 2] *= 1e20
    n = NormParams("layer", torch.ones(80).requires_grad_(), torch.zeros(80).requires_grad_())
    with ops.use_backend("cpu"):
        spikes = ops.norm_lif(x.requires_grad_(), n, LIFParams())
    of_x, *of_parameters = torch.autograd.grad(spikes.sum(), [x, n.weight, n.bias])
    assert of_x[:, 2].isnan().any() and of_x[:, 1].isfinite().all()
    assert all(grad.isnan().all() for grad in of_parameters)


@pytest.mark.parametrize("surrogate", list(SURROGATES))
@pytest.mark.parametrize("options", [{}, {"v_reset": None}, {"detach_reset": False}], ids=str)
def test_what_is_no_number_stays_so_in_gradients(options, surrogate, variant):
    """A run that diverged must not look sound."""
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).repeat_interleave(9, 1)
    x[:, :7] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-42, 0.0])
    x[1, 0] = x[0, 30] = 1.0
    found = {}
    for backend in ("cpu", "reference"):
        leaf, threshold = x.clone().requires_grad_(), torch.full((63,), 0.75, requires_grad=True)
        with ops.use_backend(backend):
            out = ops.lif(leaf, v_threshold=threshold, surrogate=surrogate, **options)
        found[backend] = out.detach(), *torch.autograd.grad(out.sum(), (leaf, threshold))
    for got, want in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    if surrogate != "rectangular":  # 0 there, by its definition
        assert found["cpu"][1][:, 0].isnan().any()


@pytest.mark.parametrize("shape", [(70, 33, 20), (300, 80, 130), (40, 2100, 40), (5, 64, 16)], ids=str)
@pytest.mark.parametrize("method", ["gather", "subset_sums", "tiles", "dense"])
def test_bfloat16_spike_linear(shape, method, variant):
    """Sums in float32 on every path, rounded when they are stored."""
    from spikedecoder.ext.cpu import spike_linear

    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    s = spikes((m, k), generator, 0.2)
    weight = torch.randn(n, k, generator=generator).bfloat16()
    bias = torch.randn(n, generator=generator).bfloat16()
    grad = torch.randn(m, n, generator=generator).bfloat16()
    y, words = spike_linear.forward(s.bfloat16(), weight, bias, method)
    grad_s, grad_bias = spike_linear.input_and_bias_grad(grad, weight)
    wide, wide_grad = weight.double(), grad.double()
    for actual, expected in (
        (y, torch.nn.functional.linear(s.double(), wide, bias.double())),
        (spike_linear.weight_grad(words, k, grad, method), wide_grad.t() @ s.double()),
        (grad_s, wide_grad @ wide),
        (grad_bias, wide_grad.sum(0)),
    ):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize(
    "shape", [(0, 20, 30), (70, 33, 20), (9, 1300, 64), (300, 80, 1), (20, 3, 300)], ids=str
)
def test_dense_gradients(shape, variant):
    """Whole numbers: every order of summation gives the same floats."""
    from spikedecoder.ext.cpu import spike_linear

    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    grad = torch.randint(-8, 9, (m, n), generator=generator).float()
    weight = torch.randint(-8, 9, (n, k), generator=generator).float()
    grad_s, grad_bias = spike_linear.input_and_bias_grad(grad, weight)
    assert torch.equal(grad_s, grad @ weight)
    assert torch.equal(grad_bias, grad.sum(0))


def test_autocast_trains_the_model_in_bfloat16(variant):
    """The same loss and nearly the same gradients as in float32; the weights' own gradients stay float32."""
    model = SpikeDecoder(SpikeDecoderConfig.preset("original-char", blocks=1, max_len=16, mlp_ratio=2))
    tokens = torch.randint(0, 30, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients, losses = [], []
    for enabled in (False, True):
        model.zero_grad()
        with ops.use_backend("auto"), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(tokens, tokens.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


def test_outputs_too_large_for_the_caches(variant):
    """From 16 MiB on they are written past the caches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1024, 1056, generator=generator)
    s = spikes((4096, 80), generator, 0.1)
    weight = torch.randint(-8, 9, (1280, 80), generator=generator).float()
    norm = NormParams("layer", torch.ones(1056), torch.zeros(1056))

    def run_on(backend):
        wanted = x.clone().requires_grad_()
        with ops.use_backend(backend):
            fired = ops.lif(wanted)
            (grad,) = torch.autograd.grad(fired, wanted, x)
            return fired, grad, ops.norm_lif(x, norm, LIFParams()), ops.spike_linear(s, weight)

    actual, expected = run_on("cpu"), run_on("reference")
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)
    assert flipped(actual[2], expected[2]) < 1e-5
    assert torch.equal(actual[3], expected[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("threshold", [(), (40,), (3, 7, 1)], ids=str)
def test_linear_norm_lif_is_its_parts_bit_for_bit(threshold, by_row, dtype, variant, monkeypatch):
    """Five rows at a time, the last ones fewer, and never more of the product than that."""
    from spikedecoder.ext.cpu import linear_norm_lif, norm_lif, spike_linear

    most, held = 5 * 4 * 40 * dtype.itemsize, []
    monkeypatch.setattr(linear_norm_lif, "NEAR", most)
    forward = norm_lif.forward

    def recorded(current, *rest):
        held.append(current.nbytes)
        return forward(current, *rest)

    monkeypatch.setattr(norm_lif, "forward", recorded)
    random = torch.Generator().manual_seed(0)
    s = spikes((4, 3, 7, 70), random, 0.2).to(dtype)
    linear = [torch.randn(40, 70, generator=random).to(dtype), torch.randn(40, generator=random).to(dtype)]
    weight, bias, mean, var = (torch.randn(40, generator=random) for _ in range(4))
    limit = 0.5 + torch.rand(threshold, generator=random)
    rest = (weight, bias, *((None, None) if by_row else (mean, var.abs())), 1e-5, limit, LIFParams())
    *actual, words = linear_norm_lif.forward(s, *linear, *rest)
    assert held == [most] * 4 + [most // 5]
    current, expected_words = spike_linear.forward(s, *linear)
    assert torch.equal(words, expected_words)
    assert 0.05 < actual[0].float().mean() < 0.95
    for got, expected in zip(actual, forward(current, *rest), strict=True):
        assert torch.equal(got, expected)
