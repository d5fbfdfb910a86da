"""Every Triton kernel against the reference, over the table of cases: forward and all gradients.

Without a GPU the kernels run under Triton's interpreter, where bfloat16 is cut off instead of rounded: one
unit in the last place is allowed for there. With one, the tests marked `gpu` run larger shapes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_parity import DEVICE, DTYPES, TOLERANCE, compare, larger, random

from spikedecoder import ops
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.reference import lif as lif_reference
from spikedecoder.testing import Case, cases, make_inputs, run

pytest.importorskip("triton")
OPERATORS = (
    "lif", "ilif", "binarize", "token_shift", "pack_spikes", "norm", "norm_lif", "norm_ilif",
    "spike_attention", "spike_attention_lif", "spike_linear", "linear_norm", "linear_norm_lif",
)  # fmt: skip
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.triton_interpreter]


def compares(case: Case, dtype: torch.dtype) -> bool:
    """Currents rounded to 16 bits, from sums in another order, move spikes: its parts are compared there.

    BatchNorm and PowerNorm without neurons are torch's on every backend.
    """
    if case.operator == "norm":
        return bool(case.options["norm"] == "layer")
    return case.operator != "linear_norm_lif" or dtype == torch.float32


def is_quick(case: Case, dtype: torch.dtype) -> bool:
    """The interpreter is slow with attention: not every case in every dtype."""
    if case.operator == "spike_attention":
        return dtype == torch.float32 or case.name in ("S70-d64", "state-decay")
    if case.operator == "spike_attention_lif":
        return (
            dtype == torch.float16
            or "threshold" in case.options
            or case.name == "S70-d64"
            or (dtype == torch.float32 and case.name in ("decay", "S65-d18"))
        )
    return True


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for case in cases(*OPERATORS)
        for dtype in DTYPES
        if compares(case, dtype) and (DEVICE == "cuda" or is_quick(case, dtype))
    ],
)
def test_triton_is_the_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [larger(c) for c in cases(*OPERATORS[:-2]) if len(c.shape) > 2], ids=str)
def test_triton_is_the_reference_on_larger_shapes(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "cuda")


@pytest.mark.parametrize("T", [17, 37])
def test_lif_walks_many_timesteps_in_pieces(T: int) -> None:
    from spikedecoder.kernels import lif

    p = LIFParams()
    x, v_init, threshold = random(T, 3, 33), random(3, 33, seed=1), random(33, seed=2, scale=0.1)
    grad, grad_v = random(T, 3, 33, seed=3), random(3, 33, seed=4)
    for got, want in zip(
        lif.forward(x, threshold, v_init, p), lif_reference.forward(x, threshold, v_init, p), strict=True
    ):
        assert torch.equal(got, want)
    expected = lif_reference.backward(grad, grad_v, x, threshold, v_init, p)
    for got, want in zip(lif.backward(grad, grad_v, x, threshold, v_init, p), expected, strict=True):
        torch.testing.assert_close(got, want.sum_to_size(got.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [(1, 5, 1), (3, 5, 33), (5, 33)], ids=str)
def test_lif_takes_any_threshold_that_broadcasts(threshold: tuple[int, ...]) -> None:
    results = {}
    for backend in ("reference", "triton"):
        x = random(4, 3, 5, 33).requires_grad_()
        limit = random(*threshold, seed=1, scale=0.2).requires_grad_()
        with ops.use_backend(backend):
            spikes = ops.lif(x, v_threshold=limit)
        results[backend] = (spikes, *torch.autograd.grad(spikes, (x, limit), random(4, 3, 5, 33, seed=2)))
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(18, 5, 1), (18, 5, 130), (3, 2, 3, 33), (1, 64), (2, 0, 70)], ids=str)
def test_lif_writes_packed_spikes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = LIFParams(v_reset=None)
    x, v_init = random(*shape).to(dtype), random(*shape[1:], seed=1)
    for threshold in (None, torch.tensor(0.5, device=DEVICE), random(shape[-1], seed=2, scale=0.1)):
        spikes, v = lif_reference.forward(x, 1.0 if threshold is None else threshold, v_init, p)
        with ops.use_backend("reference"):
            expected = ops.pack_spikes(spikes)
        with ops.use_backend("triton"):
            words, last = ops.lif_params(
                x, p, threshold=threshold, v_init=v_init, return_state=True, packed=True
            )
            alone = ops.lif_params(x, p, threshold=threshold, v_init=v_init, packed=True)
        assert torch.equal(words, expected) and torch.equal(alone, words)
        assert torch.equal(last, v)


def test_lif_of_single_neurons_with_a_learned_threshold() -> None:
    """x of shape [T] has no channels."""
    results = {}
    for backend in ("reference", "triton"):
        x, limit = (torch.full(s, a, device=DEVICE, requires_grad=True) for s, a in (((3,), 1.0), ((), 0.5)))
        with ops.use_backend(backend):
            spikes = ops.lif(x, v_threshold=limit)
        results[backend] = (spikes, *torch.autograd.grad(spikes.sum(), (x, limit)))
    torch.testing.assert_close(results["triton"], results["reference"])


def test_words_of_any_stride() -> None:
    """A dimension of size 1 may have any, and the tensor is contiguous all the same."""
    words = torch.tensor([[1, 2, 3]], device=DEVICE).t()
    assert words.is_contiguous() and words.stride(-1) != 1
    weight = random(4, 10).requires_grad_()
    found = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            y = ops.spike_linear(words, weight)
            grad = torch.autograd.grad(y, weight, random(3, 4, seed=1))
            found[backend] = (y.detach(), *grad, ops.unpack_spikes(words, 10))
    torch.testing.assert_close(found["triton"], found["reference"])


@pytest.mark.parametrize("channels", [20, 64, 100])
def test_spike_linear_of_words_is_that_of_their_spikes(channels: int) -> None:
    s, grad = (random(9, channels) > 0.5).float(), random(9, 33, seed=1)
    found = []
    with ops.use_backend("triton"):
        for spikes in (s, ops.pack_spikes(s)):
            leaves = [random(33, channels, seed=2).requires_grad_(), random(33, seed=3).requires_grad_()]
            y = ops.spike_linear(spikes, *leaves)
            found.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lif_takes_strides_repeats_and_what_is_not_a_number() -> None:
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0], [0.0, 0.0, 0.0, 1e38]])
    for x in (
        random(4, 5, 6).transpose(1, 2),
        random(4, 3, 40)[..., 1:],
        random(3, 8)[None].expand(5, 3, 8),
        special.to(DEVICE),
    ):
        with ops.use_backend("triton"):
            spikes, v = ops.lif(x, return_state=True)
        expected, expected_v = lif_reference.forward(x, 1.0, None, LIFParams())
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(v, expected_v, rtol=0, atol=0, equal_nan=True)


def test_lif_leaves_out_states_that_nobody_asked_for() -> None:
    from spikedecoder.kernels import lif

    for x in (random(4, 3, 8), random(4, 0, 8)):
        assert lif.forward(x, 1.0, None, LIFParams(), want_v=False)[1] is None
        gradients = lif.backward(x, None, x, 1.0, None, LIFParams(), want_grad_v_init=False)
        assert gradients[0].shape == x.shape and gradients[1:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool], ids=str)
def test_pack_takes_every_dtype(dtype: torch.dtype) -> None:
    spikes = random(5, 70) > 1
    with ops.use_backend("reference"):
        expected = ops.pack_spikes(spikes)
    with ops.use_backend("triton"):
        assert torch.equal(ops.pack_spikes(spikes.to(dtype)), expected)
        if dtype != torch.bool:
            back = ops.unpack_spikes(expected, 70, dtype)
            assert back.dtype == dtype and torch.equal(back, spikes.to(dtype))


def awkward(kind: str, *shape: int) -> torch.Tensor:
    """Spikes whose memory is not what a kernel likes best."""
    if kind == "misaligned":  # by one element, so that no access of 128 bits is aligned
        flat = (random(1 + math.prod(shape)) > 1.5).float()
        return flat[1:].view(shape)
    if kind == "sliced":
        return (random(*shape[:-1], 2 * shape[-1]) > 1.5).float()[..., ::2]
    if kind == "transposed":
        return (random(*shape[:-2], shape[-1], shape[-2]) > 1.5).float().transpose(-1, -2)
    if kind == "expanded":
        return (random(1, *shape[1:]) > 1.5).float().expand(shape)
    return torch.zeros(shape[0], 0, *shape[2:], device=DEVICE)  # empty


AWKWARD = ("misaligned", "sliced", "transposed", "expanded", "empty")


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("operator", [*(o for o in OPERATORS if "attention" not in o), "attention"])
def test_awkward_memory_gives_the_reference(operator: str, kind: str) -> None:
    shape = (2, 3, 2, 5, 16) if operator == "attention" else (2, 3, 32)
    weight, channel = random(16, 32, seed=1), torch.linspace(0.5, 1.5, 32, device=DEVICE)
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "lif": lambda x: ops.lif(x * 3),  # type: ignore[dict-item, return-value]
        "norm": lambda x: ops.norm(x, NormParams("layer", channel, channel)),
        "norm_lif": lambda x: ops.norm_lif(x, NormParams("layer", channel, channel), LIFParams()),
        "norm_ilif": lambda x: ops.norm_ilif(x, NormParams("layer", channel, channel), ILIFParams(4)),
        "ilif": lambda x: ops.ilif(x * 3, levels=2),
        "binarize": lambda x: ops.binarize(x - 0.5),
        "token_shift": lambda x: ops.token_shift(x, 4),
        "pack_spikes": lambda x: ops.unpack_spikes(ops.pack_spikes(x.detach()), 32) * x,
        "spike_linear": lambda x: ops.spike_linear(x, weight, weight[:, 0].clone()),
        "linear_norm": lambda x: ops.linear_norm(
            x, weight, None, NormParams("layer", channel[:16], channel[16:])
        ),
        "linear_norm_lif": lambda x: ops.linear_norm_lif(
            x, weight, None, NormParams("layer", channel[:16], channel[16:]), LIFParams()
        ),
        "attention": lambda x: ops.spike_attention_lif(x, x, x, LIFParams(), 1.0),
    }
    results = {}
    for backend in ("reference", "triton"):
        x = awkward(kind, *shape).requires_grad_()
        with ops.use_backend(backend):
            out = calls[operator](x)
            results[backend] = (out, *torch.autograd.grad(out, x, torch.ones_like(out)))
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-4)


def test_what_triton_cannot_run_it_says() -> None:
    x = random(4, 3, 8).double()
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="float64"):
        ops.lif(x)
    wide = random(1, 1, 1, 3, 130)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="head size 130"):
        ops.spike_attention(wide, wide, wide)


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from spikedecoder.kernels import _launch
    from spikedecoder.ops import _dispatch

    for operator in OPERATORS:  # whose kernels are what they are from import on
        _dispatch._load("triton", operator)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    _dispatch._resolve.cache_clear()
    yield
    _dispatch._resolve.cache_clear()


@pytest.mark.parametrize(
    "case",
    [
        *{case.operator: case for case in cases()}.values(),
        *(Case("norm", f"{kind}-statistics", (3, 5, 36), {"norm": kind}) for kind in ("batch", "power")),
    ],
    ids=str,
)
def test_without_a_gpu_or_the_interpreter_it_says_what_is_missing(case: Case, not_interpreted: None) -> None:
    with (
        ops.use_backend("triton"),
        pytest.raises(ops.BackendError, match=r"no CUDA device.*TRITON_INTERPRET"),
    ):
        run(case, make_inputs(case))


@pytest.mark.parametrize("operator", ["spike_attention", "spike_attention_lif"])
def test_nor_does_dropout_run_elsewhere_without_them(operator: str, not_interpreted: None) -> None:
    case = Case(operator, "dropout", (2, 1, 2, 5, 8), {"dropout": 0.5})
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="no CUDA device"):
        run(case, make_inputs(case))


@pytest.mark.parametrize("operator", ["binarize", "ilif"])
def test_a_single_neuron_has_no_channels(operator: str) -> None:
    options = {"levels": 4} if operator == "ilif" else {}
    compare(Case(operator, "one", (), options), torch.float32)


@pytest.fixture
def many_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device so wide that work is cut in pieces even at the sizes of a test."""
    from spikedecoder.kernels import _norm, norm, norm_lif, spike_attention, spike_linear

    for module in (_norm, norm, norm_lif, spike_attention, spike_linear):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(spike_attention, "SEGMENT", 64)


@pytest.mark.parametrize("options", [{}, {"state": True, "return_state": True, "decay": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_in_segments(
    options: dict[str, object], dtype: torch.dtype, many_multiprocessors: None
) -> None:
    from spikedecoder.kernels import spike_attention

    assert spike_attention.segmentation(2, 200, torch.device("cpu")) == (4, 64)
    compare(Case("spike_attention", "segments", (1, 1, 2, 200, 16), options, exact=not options), dtype)


@pytest.mark.parametrize("options", [{}, {"state": True, "return_state": True, "decay": True}], ids=str)
@pytest.mark.parametrize("d", [18, 64])
def test_attention_with_columns_in_parts(
    d: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float32 heads wider than 64 are taken on sm_80 and sm_90, with d both padded and not."""
    from spikedecoder.kernels import spike_attention

    size = spike_attention.Blocks(16, 64 if d == 64 else 32, 32, parts=4 if d == 64 else 2)
    monkeypatch.setattr(spike_attention, "blocks", lambda *_: size)
    compare(Case("spike_attention", "parts", (1, 1, 1, 37, d), options, exact=not options), torch.float32)


def test_sums_in_pieces(many_multiprocessors: None) -> None:
    compare(Case("spike_linear", "pieces", (600, 40, 24), exact=False), torch.float32)
    compare(Case("norm", "pieces", (601, 36), {"norm": "layer"}, exact=False), torch.float32)
    compare(
        Case("norm_lif", "pieces", (2, 300, 36), {"norm": "batch", "threshold": (36,)}, exact=False),
        torch.float32,
    )
    compare(
        Case("norm_ilif", "pieces", (601, 36), {"norm": "batch", "levels": 15}, exact=False), torch.float32
    )


@pytest.mark.parametrize("largest", [1 << 8, 1 << 15, 1 << 20])
def test_attention_is_exact_with_large_states(largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.rand(1, 1, 2, 70, 16, generator=generator) < 0.3).float().to(DEVICE) for _ in range(3))
    state = torch.randint(0, largest, (1, 1, 2, 16, 16), generator=generator).float().to(DEVICE)
    results = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            results[backend] = ops.spike_attention(q, k, v, 1.0, state=state, return_state=True)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert torch.equal(got, want)


NEURONS = (LIFParams(), LIFParams(v_reset=None, tau=3.0), LIFParams(v_threshold=0.5, decay_input=False))


@pytest.mark.parametrize(
    ("T", "d", "dtype"),
    [
        (1, 16, torch.float16),
        (6, 16, torch.float16),
        (3, 20, torch.bfloat16),
        (5, 20, torch.float16),
        (3, 20, torch.float32),
        (2, 130, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("p", NEURONS, ids=lambda p: f"tau{p.tau}")
def test_attention_lif_is_attention_then_lif_bit_for_bit(
    T: int, d: int, dtype: torch.dtype, p: LIFParams
) -> None:
    """In one kernel or two, and for heads wider than the kernels take."""
    generator = torch.Generator().manual_seed(0)
    made = ((torch.rand(T, 1, 30, 2, d, generator=generator) < 0.3) for _ in range(3))
    q, k, v = (x.to(dtype).to(DEVICE).transpose(2, 3).requires_grad_() for x in made)
    threshold = torch.tensor(0.6, device=DEVICE, requires_grad=True)
    grad = random(T, 1, 2, 30, d, shift=0.0).to(dtype)
    with ops.use_backend("triton"):
        spikes = ops.spike_attention_lif(q, k, v, p, threshold=threshold)
        found = torch.autograd.grad(spikes, (q, k, v, threshold), grad)
    with ops.use_backend("reference"):
        current = ops.spike_attention(q, k, v)
        expected = ops.lif_params(current, p, threshold=threshold)
        want = torch.autograd.grad(expected, (q, k, v, threshold), grad)
    assert torch.equal(spikes, expected)
    assert spikes.transpose(2, 3).is_contiguous()
    for a, b in zip(found, want, strict=True):
        limit = TOLERANCE[dtype] * b.float().abs().max()
        assert (a.float() - b.float()).abs().max() <= limit


def test_dropout_before_neurons_is_the_references_of_the_same_seed() -> None:
    case = Case("spike_attention_lif", "dropout", (4, 2, 2, 20, 16), {"dropout": 0.5, "threshold": (16,)})
    found = {}
    for backend in ("reference", "triton", "none"):
        inputs = make_inputs(case, device=DEVICE) | ({"dropout": 0.0} if backend == "none" else {})
        torch.manual_seed(2)
        with ops.use_backend("triton" if backend == "none" else backend):
            found[backend] = run(case, inputs)
    assert torch.equal(found["triton"]["out"], found["reference"]["out"])
    assert (found["triton"]["out"] != found["none"]["out"]).double().mean() > 0.05
    for name, want in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "d"), [(1, 16), (6, 16), (5, 20), (2, 130)])
def test_attention_lif_is_copied_for_no_one(T: int, d: int) -> None:
    """In one kernel or two: a view of another shape would be, to be no view of the result."""
    from spikedecoder.kernels import spike_attention_lif
    from spikedecoder.ops.spike_attention import by_token

    q = (random(T, 1, 30, 2, d) > 1).bfloat16().transpose(2, 3)
    spikes = spike_attention_lif.forward(q, q, q, 1.0, None, 0.6, LIFParams())
    assert by_token(spikes).data_ptr() == spikes.data_ptr()


def test_linear_takes_weights_of_another_dtype_than_the_spikes() -> None:
    from spikedecoder.kernels import spike_linear

    s = (random(33, 70) > 1).float()
    weight, bias = random(24, 70), random(24)
    for dtype in DTYPES:
        y, words = spike_linear.forward(s, weight.to(dtype), bias.to(dtype))
        want = s.double() @ weight.to(dtype).double().T + bias.to(dtype).double()
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        grad = random(33, 24, shift=0.0).to(dtype)
        found = spike_linear.weight_grad(words, 70, grad)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), grad.double().T @ s.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
        again, of_bias = spike_linear.weight_and_bias_grad(words, 70, grad)
        assert of_bias.dtype == dtype and torch.equal(again, found)
        torch.testing.assert_close(
            of_bias.double(), grad.double().sum(0), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("parts", "sizes"), [(1, (1,)), (528, (80, 80)), (65, (6400, 80)), (3, (33001, 7))])
def test_parts_are_added(parts: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    from spikedecoder.kernels._sum import sum_parts

    values = random(parts, sum(sizes), shift=0.0)
    found = [torch.full((n,), float("nan"), device=DEVICE, dtype=dtype) for n in sizes]
    sum_parts(values, *found)
    for sums, want in zip(found, values.double().sum(0).split(sizes), strict=True):
        torch.testing.assert_close(sums.double(), want.to(dtype).double(), rtol=TOLERANCE[dtype], atol=1e-5)
