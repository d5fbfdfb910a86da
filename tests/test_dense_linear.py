"""`dense_linear`: torch's product, and the compiled one where it takes its place."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spikedecoder import ext, ops, use_backend
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.ops._dispatch import Call

needs_extension = pytest.mark.skipif(not ext.is_built(), reason=ext.NOT_BUILT)


def exact(seed: int, rows: int, channels: int, outputs: int) -> list[torch.Tensor]:
    """s, weight, bias and dL/dy of small whole numbers: every order of summation gives the same floats."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, channels), (outputs, channels), (outputs,), (rows, outputs)
    return [torch.randint(-8, 9, shape, generator=generator).float() for shape in shapes]


def whole(s, weight, bias, grad):
    """y and all gradients, by torch."""
    learned = [x.clone().requires_grad_() for x in (s, weight, bias)]
    y = torch.nn.functional.linear(*learned)
    return (y.detach(), *torch.autograd.grad(y, learned, grad))


@needs_extension
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 1500),
    channels=st.integers(1, 150),
    outputs=st.integers(1, 150),
    seed=st.integers(0, 2**32),
)
def test_every_variant_is_exact(rows, channels, outputs, seed):
    from spikedecoder.ext.cpu import dense_linear, native

    s, weight, bias, grad = exact(seed, rows, channels, outputs)
    expected = whole(s, weight, bias, grad)
    before = native.variant()
    try:
        for name in native.variants():
            native.use_variant(name)
            y = dense_linear.forward(s, weight, bias)
            found = dense_linear.backward(grad, s, weight, (True, True, True))
            for a, b in zip((y, *found), expected, strict=True):
                assert torch.equal(a, b), name
            assert torch.equal(dense_linear.forward(s, weight, None), expected[0] - bias), name
            for wanted in ((True, False, False), (False, True, False), (False, False, True)):
                for i, a in enumerate(dense_linear.backward(grad, s, weight, wanted)):
                    assert (a is not None) == wanted[i] and (a is None or torch.equal(a, expected[1 + i])), (
                        name
                    )
    finally:
        native.use_variant(before)


@needs_extension
def test_threads_change_nothing():
    from spikedecoder.ext.cpu import dense_linear

    s, weight, bias, grad = (
        torch.randn(1300, 200),
        torch.randn(110, 200),
        torch.randn(110),
        torch.randn(1300, 110),
    )
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = dense_linear.forward(s, weight, bias)
            results.append((y, *dense_linear.backward(grad, s, weight, (True, True, True))))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.fixture
def own(monkeypatch):
    """The compiled product, whatever CPU this is; what it was called with."""
    if not ext.is_built():
        pytest.skip(ext.NOT_BUILT)
    from spikedecoder.ext.cpu import dense_linear
    from spikedecoder.ops import _dispatch

    shapes = []

    def forward(s, weight, bias, forward=dense_linear.forward):
        shapes.append(tuple(s.shape))
        return forward(s, weight, bias)

    monkeypatch.setattr(dense_linear, "forward", forward)
    monkeypatch.setattr(dense_linear, "why_not", lambda call: None if call.dtype == torch.float32 else "no")
    _dispatch._resolve.cache_clear()
    yield shapes
    _dispatch._resolve.cache_clear()


@pytest.mark.parametrize("shape", [(300,), (3, 50), (2, 3, 30)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_torch(own, shape, with_bias):
    rows = torch.Size(shape).numel()
    s, weight, bias, grad = exact(0, rows, 20, 30)
    expected = whole(s, weight, bias if with_bias else torch.zeros(30), grad)
    learned = [x.requires_grad_() for x in (s.view(*shape, 20), weight, bias)][: 2 + with_bias]
    y = ops.dense_linear(*learned)
    assert own == [(*shape, 20)]
    assert torch.equal(y.view(rows, 30), expected[0])
    for a, b in zip(torch.autograd.grad(y, learned, grad.view(y.shape)), expected[1:], strict=False):
        assert torch.equal(a.reshape(b.shape), b)


def test_what_does_not_lie_in_order_is_read_as_it_is(own):
    s, weight, bias, _ = exact(0, 20, 300, 25)
    weight = torch.randint(-8, 9, (25, 40)).float()[:, ::2].requires_grad_()
    y = ops.dense_linear(s.t().requires_grad_(), weight, bias.expand(2, 25)[1])
    assert own and torch.equal(y, s.t() @ weight.t() + bias)
    (grad,) = torch.autograd.grad(y.sum(), weight)  # dL/dy has strides of 0
    assert torch.equal(grad, s.sum(1).expand(25, 20))


def test_where_the_product_is_torchs(own):
    s, weight, bias, _ = exact(0, 300, 20, 30)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    expected = ops.dense_linear(s, weight, bias)
    assert own == [(300, 20)]
    own.clear()
    ops.dense_linear(s[:128], weight, bias)
    ops.dense_linear(s[:0], weight, bias)
    assert ops.dense_linear(s, weight[:0]).shape == (300, 0)
    assert ops.dense_linear(s.double(), weight.double()).dtype == torch.float64
    assert ops.dense_linear(s.to("meta"), weight.to("meta")).is_meta
    with torch.autocast("cpu"):
        assert ops.dense_linear(s, weight).dtype == torch.bfloat16
    for backend in ("reference", "triton", "cuda"):
        with use_backend(backend):
            assert torch.equal(ops.dense_linear(s, weight, bias), expected)
    with Watch():
        assert torch.equal(ops.dense_linear(s, weight, bias), expected)
    assert torch.equal(torch.vmap(lambda x: ops.dense_linear(x, weight, bias))(s[None])[0], expected)
    compiled = torch.compile(ops.dense_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(s, weight, bias), expected)
    assert not own
    with use_backend("cpu"):
        ops.dense_linear(s, weight, bias)
    assert own == [(300, 20)]


@needs_extension
def test_it_is_left_to_torch_where_that_is_as_fast(monkeypatch):
    from spikedecoder.ext.cpu import _cost, dense_linear, native

    cpus = (("amd", 26), ("amd", 25), ("intel", 6), ("other", 0))
    for vendor, family in cpus:
        built = {**native.build(), "vendor": vendor, "family": family}
        monkeypatch.setattr(_cost, "native", type("", (), {"build": lambda b=built: b}))
        found = {name for name in ("amx", "avx512", "avx2", "baseline") if _cost.outpaces_torch(name)}
        assert found == ({"avx512"} if family == 26 else set())
    monkeypatch.setattr(_cost, "outpaces_torch", lambda variant: variant != native.variant())
    call = Call(torch.device("cpu"), torch.float32, ())
    assert dense_linear.why_not(call) == "torch's own is as fast on this CPU"
    monkeypatch.setattr(_cost, "outpaces_torch", lambda variant: variant == native.variant())
    assert dense_linear.why_not(call) is None
    assert "takes float32" in dense_linear.why_not(Call(torch.device("cpu"), torch.bfloat16, ()))
    assert "on cuda" in dense_linear.why_not(Call(torch.device("cuda"), torch.float32, ()))


def test_what_the_product_cannot_read_is_torchs(own):
    s, weight, bias, grad = exact(0, 300, 20, 30)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=rf"bias: got dtype {dtype}, takes that of s, torch.float32"):
            ops.dense_linear(s, weight, bias.to(dtype))
    expected = whole(s, weight, bias, grad)
    odd = torch.frombuffer(bytearray(b"0" + s.numpy().tobytes()), dtype=torch.float32, offset=1).view(300, 20)
    assert torch.equal(ops.dense_linear(odd, weight, bias), expected[0])
    assert not ops.dense_linear(torch._efficientzerotensor(s.shape), weight).any()
    assert not own
    learned = [x.clone().requires_grad_() for x in (s, weight, bias)]
    for incoming, factor in ((torch._neg_view(grad), -1), (torch._efficientzerotensor(grad.shape), 0)):
        found = torch.autograd.grad(ops.dense_linear(*learned), learned, incoming)
        assert all(torch.equal(a, factor * b) for a, b in zip(found, expected[1:], strict=True))


def test_only_what_a_gradient_needs_is_kept(own):
    kept = []

    def pack(x):
        kept.append(tuple(x.shape))
        return x

    shapes = {"s": (300, 20), "weight": (30, 20)}
    for learns, needs in (
        ((1, 0, 0), ["weight"]),
        ((0, 1, 0), ["s"]),
        ((0, 0, 1), []),
        ((1, 1, 0), ["s", "weight"]),
    ):
        s, weight, bias, grad = exact(0, 300, 20, 30)
        given = [x.requires_grad_(bool(on)) for x, on in zip((s, weight, bias), learns, strict=True)]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = ops.dense_linear(*given)
        assert kept == [shapes[name] for name in needs]
        learned = [x for x in given if x.requires_grad]
        expected = [g for g, on in zip(whole(s, weight, bias, grad)[1:], learns, strict=True) if on]
        found = torch.autograd.grad(y, learned, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(own) == 4


def test_derivatives_of_every_kind_are_those_of_torch(own):
    s, weight, bias, grad = (x / 8 for x in exact(0, 300, 20, 30))
    results = []
    for linear in (ops.dense_linear, torch.nn.functional.linear):
        learned = [x.clone().requires_grad_() for x in (s, weight, bias)]
        first = torch.autograd.grad(linear(*learned).square().sum(), learned[:2], create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in first), learned)
        y = linear(*learned)
        batched = torch.autograd.grad(y, learned, torch.stack([grad, -grad]), is_grads_batched=True)
        forward_mode = torch.func.jvp(functools.partial(linear, weight=weight), (s,), (s,))
        results.append((*first, *again, *batched, *forward_mode))
    assert len(own) == 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_bad_input_is_named():
    s, weight, bias, _ = exact(0, 5, 20, 30)
    with pytest.raises(ValueError, match="s: got 19 channels"):
        ops.dense_linear(s[:, :-1], weight)
    with pytest.raises(ValueError, match="bias: got shape"):
        ops.dense_linear(s, weight, bias[1:])
    with pytest.raises(TypeError, match="weight: got int"):
        ops.dense_linear(s, 3)
    with pytest.raises(TypeError, match=r"weight: got dtype torch\.bfloat16, takes that of s"):
        ops.dense_linear(s, weight.bfloat16())


def test_counts_go_through_it(own):
    s, weight, _, _ = exact(0, 300, 20, 30)
    layer = SpikeLinear(20, 30, bias=False, levels=4)
    layer.weight.data = weight
    assert torch.equal(layer(s.abs() // 2), (s.abs() // 2) @ weight.t()) and own == [(300, 20)]
