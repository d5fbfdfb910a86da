"""The Triton kernels of norms, alone and before neurons, beyond the table of cases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_parity import DEVICE, DTYPES, TOLERANCE, compare, random

from spikedecoder import ops
from spikedecoder.params import LIFParams, NormParams
from spikedecoder.reference import norm_lif as norm_reference
from spikedecoder.testing import Case, flipped, make_inputs

pytest.importorskip("triton")
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.triton_interpreter]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (7, 36), (1000, 20), (3, 300)], ids=str)
def test_moments(shape: tuple[int, int], center: bool) -> None:
    from spikedecoder.kernels import norm_lif

    x = random(*shape, scale=0.5, shift=100.0)  # a mean far from 0 would show sums of squares subtracted
    for got, want in zip(
        norm_lif.moments(x, center), norm_reference.moments(x.double(), center), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (7, 36), (1000, 20)], ids=str)
def test_moments_of_a_mean_whose_square_is_no_float(shape: tuple[int, int]) -> None:
    """What has no rows yet has no part in a variance, however far its mean of 0 is from theirs."""
    from spikedecoder.kernels import norm_lif

    x = random(*shape, scale=1e17, shift=3e19)
    for got, want in zip(norm_lif.moments(x, True), norm_reference.moments(x.double(), True), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def test_moments_of_rows_whose_mean_squared_is_no_float() -> None:
    """Of x and of a product, in rows of several tiles."""
    from spikedecoder.kernels import linear_norm_lif
    from spikedecoder.kernels._norm import row_moments

    def check(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> None:
        want = norm_reference.moments(x[0].double().t(), True)
        for got, wanted in zip((mean[0].double(), rstd[0].double() ** -2), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)

    x = random(1, 3, 2500, scale=1e17, shift=3e19)
    mean, rstd = x.new_empty(1, 3), x.new_empty(1, 3)
    row_moments(x, 1e-5, mean, rstd)
    check(x, mean, rstd)

    s, weight, channel = torch.ones(1, 3, 1), random(300, 1, scale=1e17, shift=3e19), torch.ones(300)
    on_device = (t.to(DEVICE) for t in (s, weight, channel))
    s, weight, channel = on_device
    _, mean, rstd, _ = linear_norm_lif.forward(
        s, weight, None, channel, channel, None, None, 1e-5, 1.0, LIFParams()
    )
    check((s @ weight.t()), mean, rstd)


@pytest.mark.parametrize("to", [torch.float32, None], ids=["to float32", "to its own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(67, 80), (5, 300), (1, 36), (3, 0, 36), (2, 2050)], ids=str)
def test_layer_norm_with_float32_parameters(
    shape: tuple[int, ...], dtype: torch.dtype, to: torch.dtype | None
) -> None:
    """As under autocast; a mean far from 0 would show sums of squares subtracted."""
    from spikedecoder.kernels import norm as k
    from spikedecoder.reference import norm as reference

    to = to or dtype
    x, weight, bias = (
        random(*shape, shift=50.0).to(dtype),
        random(shape[-1], seed=1),
        random(shape[-1], seed=2),
    )
    grad = random(*shape, seed=3, shift=0.2).to(to)
    y, mean, rstd = k.forward(x, weight, bias, 1e-5, to)
    want, want_mean, want_rstd = reference.forward(x.float(), weight, bias, 1e-5, torch.float32)
    assert y.dtype == to and mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, want_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd, want_rstd, rtol=1e-5, atol=1e-5)
    limit = TOLERANCE[to]
    torch.testing.assert_close(y.float(), want, rtol=limit, atol=limit)
    got_x, *got = k.backward(grad, x, mean, rstd, weight)
    want_x, *wanted = reference.backward(grad.float(), x.float(), want_mean, want_rstd, weight)
    assert got_x.dtype == dtype
    torch.testing.assert_close(got_x.float(), want_x, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_layer_norm_leaves_wide_rows_to_torch() -> None:
    x, channel = random(2, 3, 4097), torch.ones(4097, device=DEVICE)
    n = NormParams("layer", channel, channel)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="rows of 4097 channels"):
        ops.norm(x, n)
    assert torch.equal(ops.norm(x, n), torch.nn.functional.layer_norm(x, (4097,), channel, channel, n.eps))


@pytest.mark.gpu
def test_layer_norm_under_autocast_keeps_16_bits() -> None:
    """... of x, and gives float32, as torch's does."""
    n = make_inputs(Case("norm", "", (5, 80), {"norm": "layer"}), device="cuda")["n"]
    found, saved = {}, []
    for backend in ("reference", "auto"):
        x = random(5, 80).bfloat16().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
        with hooks, ops.use_backend(backend), torch.autocast("cuda", torch.bfloat16):
            saved.clear()
            y = ops.norm(x, n)
        assert y.dtype == torch.float32
        found[backend] = (y, *torch.autograd.grad(y, (x, n.weight, n.bias), random(5, 80, seed=1)))
    assert {t.dtype for t in saved if t.shape == (5, 80)} == {torch.bfloat16}
    torch.testing.assert_close(found["auto"], found["reference"], rtol=2e-2, atol=2e-2)


def test_layer_norm_takes_16_bits_and_float32_parameters_without_autocast() -> None:
    """On CUDA torch's own takes one dtype."""
    n = make_inputs(Case("norm", "", (5, 80), {"norm": "layer"}), device=DEVICE)["n"]
    found = {}
    for backend in ("reference", "triton"):
        x = random(5, 80).bfloat16().requires_grad_()
        with ops.use_backend(backend):
            y = ops.norm(x, n)
        assert y.dtype == torch.bfloat16
        grad = random(5, 80, seed=1).bfloat16()
        found[backend] = (y, *torch.autograd.grad(y, (x, n.weight, n.bias), grad))
    torch.testing.assert_close(found["triton"], found["reference"], rtol=2e-2, atol=2e-2)
    wide = torch.ones(2, 4097, device=DEVICE)  # rows that Triton leaves to torch
    y = ops.norm(wide.bfloat16(), NormParams("layer", *wide))
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize("T", [1, 6, 17, 64])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norm_lif_walks_every_number_of_timesteps(T: int, norm: str) -> None:
    compare(Case("norm_lif", f"{norm}-T{T}", (T, 3, 20), {"norm": norm}, exact=False), torch.float32)


@pytest.mark.parametrize("channels", [2050, 4096])
@pytest.mark.parametrize("T", [4, 6])
def test_norm_lif_takes_the_widest_rows_of_a_tile(T: int, channels: int) -> None:
    """They ask for most of a GPU's shared memory."""
    compare(Case("norm_lif", "widest", (T, 2, channels), {"norm": "layer"}, exact=False), torch.float32)


@pytest.mark.parametrize("T", [1, 4, 6, 9])
@pytest.mark.parametrize("channels", [38, 48, 70, 80])
@pytest.mark.parametrize("threshold", ["none", "scalar", "channel", "full"])
def test_norm_lif_takes_rows_of_three_or_five_slices(channels: int, T: int, threshold: str) -> None:
    """... which they fill or not, with a threshold of any kind."""
    from spikedecoder.kernels import norm_lif

    assert norm_lif.slices(channels)[0] in (3, 5)
    shape = {"none": None, "scalar": (), "channel": (channels,), "full": (3, channels)}[threshold]
    for norm in ("layer", "batch"):  # with statistics of channels in tiles of 32 or 64
        options = {"norm": norm, **({} if shape is None else {"threshold": shape})}
        compare(Case("norm_lif", "slices", (T, 3, channels), options, exact=False), torch.float32)
        if threshold == "none":
            options = {"norm": norm, "levels": 4}
            compare(Case("norm_ilif", "slices", (T, 3, channels), options, exact=False), torch.float32)


def test_columns_reach_little_beyond_the_channels() -> None:
    from spikedecoder.kernels import _norm

    found = {channels: _norm.columns(channels) for channels in (3, 30, 36, 80, 96, 320, 384, 512, 5000)}
    assert found == {3: 16, 30: 32, 36: 64, 80: 32, 96: 32, 320: 64, 384: 128, 512: 256, 5000: 256}


def test_slices_leave_as_few_lanes_as_one_three_or_five_can() -> None:
    from spikedecoder.kernels import norm_lif

    found = {channels: norm_lif.slices(channels) for channels in (3, 16, 38, 80, 96, 120, 384, 512, 1280)}
    assert found == {
        3: (1, 16), 16: (1, 16), 38: (3, 16), 80: (5, 16), 96: (3, 32), 120: (1, 128), 384: (3, 128),
        512: (1, 512), 1280: (5, 256),
    }  # fmt: skip
    for channels in range(1, norm_lif.MAX_ROW + 1):
        many, width = norm_lif.slices(channels)
        assert channels <= many * width <= min(norm_lif.MAX_ROW, max(48, 4 / 3 * channels))


@pytest.mark.parametrize("T", [3, 7])
@pytest.mark.parametrize("threshold", [None, (300,), (3, 300)], ids=str)
def test_norm_lif_takes_rows_wider_than_its_registers(
    T: int, threshold: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikedecoder.kernels import norm_lif

    monkeypatch.setattr(norm_lif, "MAX_ROW", 256)
    options = {"norm": "layer", **({"threshold": threshold} if threshold else {})}
    compare(Case("norm_lif", "wide", (T, 3, 300), options, exact=False), torch.float32)
    compare(
        Case("norm_ilif", "wide", (T, 3, 300), {"norm": "layer", "levels": 4}, exact=False), torch.float32
    )


@pytest.mark.parametrize("outputs", [36, 300])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("p", [LIFParams(), LIFParams(v_reset=None, tau=3.0)], ids=lambda p: f"tau{p.tau}")
def test_linear_norm_lif_is_its_parts_bit_for_bit(outputs: int, by_row: bool, p: LIFParams) -> None:
    """In a tile, in rows wider than one, and with statistics handed in, the only three ways it runs."""
    from spikedecoder.kernels import _launch, linear_norm_lif, norm_lif, spike_linear

    s = (random(2, 2, 35, 70) > 1.5).float()
    linear_weight, linear_bias = random(outputs, 70, scale=0.5, shift=0.0), random(outputs, seed=1)
    weight, bias, threshold = (random(outputs, seed=seed, scale=0.2) for seed in (2, 3, 4))
    given = (None, None) if by_row else (random(outputs, seed=5), random(outputs, seed=6).abs() + 0.2)
    with _recorded() as names:
        *found, words = linear_norm_lif.forward(
            s, linear_weight, linear_bias, weight, bias, *given, 1e-5, threshold, p
        )
    tile, _ = linear_norm_lif.tile(outputs, torch.float32, s.device)
    wide = ["linear_moments"] if by_row and outputs > tile else []
    apart = ["linear_forward", "norm_lif_forward"]
    one = [*wide, "linear_norm_lif_forward"]
    assert names == ["pack_kernel", *(apart if _launch.family(s.device) == 9 else one)]
    current, expected_words = spike_linear.forward(s, linear_weight, linear_bias)
    expected = norm_lif.forward(current, weight, bias, *given, 1e-5, threshold, p)
    assert torch.equal(words, expected_words)
    # on a GPU tiles of another shape may add in another order
    assert flipped(found[0], expected[0]) <= (2e-3 if DEVICE == "cuda" else 0)
    assert 0.05 < found[0].mean() < 0.95
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@contextlib.contextmanager
def _recorded() -> Iterator[list[str]]:
    """The names of the kernels that run."""
    from spikedecoder.kernels import linear_norm_lif, norm_lif, pack_spikes, spike_linear

    names: list[str] = []
    modules = (linear_norm_lif, norm_lif, pack_spikes, spike_linear)

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.__name__)
        real(kernel, *args, **kwargs)

    real = modules[0].launch
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "launch", launch)
        yield names


def test_linear_norm_lif_runs_its_parts_where_that_moves_less() -> None:
    from spikedecoder.kernels import linear_norm_lif

    s, weight = (random(2, 3, 140) > 1.5).float(), random(130, 140)
    channel = torch.ones(130, device=DEVICE)
    with _recorded() as names:
        linear_norm_lif.forward(s, weight, None, channel, channel, None, None, 1e-5, 1.0, LIFParams())
    assert names == ["pack_kernel", "linear_forward", "norm_lif_forward"]


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("threshold", [(20,), (3, 1), (3, 20)], ids=str)
def test_norm_lif_takes_any_threshold_that_broadcasts(norm: str, threshold: tuple[int, ...]) -> None:
    compare(
        Case("norm_lif", "threshold", (5, 3, 20), {"norm": norm, "threshold": threshold}, exact=False),
        torch.float32,
    )


@pytest.mark.parametrize(
    "neuron",
    [
        {"v_reset": None},
        {"v_reset": -0.5},
        {"detach_reset": False},
        {"decay_input": False, "tau": 3.0},
        {"tau": 3, "alpha": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norm_lif_takes_every_neuron(norm: str, neuron: dict[str, object]) -> None:
    results = {}
    for backend in ("reference", "triton"):
        inputs = make_inputs(Case("norm_lif", "neuron", (5, 3, 20), {"norm": norm}), torch.float32, DEVICE)
        with ops.use_backend(backend):
            out = ops.norm_lif(inputs["x"], inputs["n"], LIFParams(**neuron))  # type: ignore[arg-type]
        results[backend] = (
            out,
            *torch.autograd.grad(out, (inputs["x"], inputs["n"].weight), torch.ones_like(out)),
        )
    torch.testing.assert_close(results["triton"], results["reference"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("T", [4, 6])
def test_gradients_of_norm_lif_where_the_mean_is_a_hundred_deviations(T: int) -> None:
    from spikedecoder.kernels import norm_lif

    x, grad = random(T, 40, 48, scale=0.5, shift=50.0), random(T, 40, 48, seed=1, shift=0.0)
    weight, bias = random(48, seed=2, scale=0.3), random(48, seed=3, scale=0.3)
    exact = x.double()
    mean, rstd = exact.mean(-1), (exact.var(-1, correction=0) + 1e-5).rsqrt()
    args = (1.0, LIFParams())
    want = norm_reference.backward_layer(
        grad.double(), exact, weight.double(), bias.double(), mean, rstd, *args
    )[:3]
    got = norm_lif.backward_layer(grad, x, weight, bias, mean.float(), rstd.float(), *args)[:3]
    for value, reference in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2e-4, atol=2e-4)
