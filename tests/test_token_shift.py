"""`token_shift`: the values of previous tokens, by torch and by the compiled function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder import ext, ops, use_backend
from spikedecoder.nn.shift import token_shift
from spikedecoder.reference.token_shift import forward as by_torch

needs_extension = pytest.mark.skipif(not ext.is_built(), reason=ext.NOT_BUILT)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_group_i_comes_from_i_places_back(backend, n):
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    with use_backend(backend):
        shifted = ops.token_shift(x, n)
    grad = torch.randn(2, 3, 6, 7)
    (found,) = torch.autograd.grad(shifted, x, grad)
    sizes = [len(g) for g in torch.arange(7).tensor_split(n)]
    for s in range(6):
        channel = 0
        for i, size in enumerate(sizes):
            own = slice(channel, channel + size)
            expected = x[:, :, s - i, own] if s >= i else 0
            assert (shifted[:, :, s, own] == expected).all()
            came = grad[:, :, s + i, own] if s + i < 6 else 0
            assert (found[:, :, s, own] == came).all()
            channel += size


@pytest.fixture
def own(monkeypatch):
    """The shapes that the compiled function shifts."""
    if not ext.is_built():
        pytest.skip(ext.NOT_BUILT)
    from spikedecoder.ext.cpu import token_shift

    shapes = []

    def forward(x, n, back=False, forward=token_shift.forward):
        found = forward(x, n, back)
        if found is not None:
            shapes.append(tuple(x.shape))
        return found

    monkeypatch.setattr(token_shift, "forward", forward)
    return shapes


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    s=st.integers(1, 40),
    channels=st.integers(1, 80),
    n=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_variant_equals_torch(lead, s, channels, n, dtype):
    from spikedecoder.ext.cpu import native
    from spikedecoder.ext.cpu.token_shift import forward

    x = torch.randn(*lead, s, channels).to(dtype)
    x[..., 0] = torch.nan
    before = native.variant()
    try:
        for name in native.variants():
            native.use_variant(name)
            for back in (False, True):
                for threads in (1, 3):
                    found = native.token_shift(x, n, back, True, threads)
                    assert torch.equal(found.nan_to_num(7), by_torch(x, n, back).nan_to_num(7)), name
                    assert torch.equal(found.isnan(), forward(x, n, back).isnan()), name
    finally:
        native.use_variant(before)


def test_what_is_shifted_by_torch(own):
    x = torch.randn(2, 5, 8)
    expected = by_torch(x, 3)
    assert torch.equal(ops.token_shift(x, 3), expected) and own == [(2, 5, 8)]
    own.clear()
    for backend in ("reference", "cuda"):
        with use_backend(backend):
            assert torch.equal(ops.token_shift(x, 3), expected)
    for other in (x.double(), x.half()):
        assert torch.equal(ops.token_shift(other, 3), by_torch(other, 3))
    assert ops.token_shift(x.to("meta"), 3).is_meta
    assert ops.token_shift(x[:, :0], 3).shape == (2, 0, 8) and ops.token_shift(x[:0], 3).shape == (0, 5, 8)
    assert not ops.token_shift(torch._efficientzerotensor(x.shape), 3).any()
    assert torch.equal(torch.vmap(lambda x: ops.token_shift(x, 3))(x[None])[0], expected)
    compiled = torch.compile(lambda x: ops.token_shift(x, 3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    assert not own
    spread = torch.stack([x, x], -1)[..., 0]
    with use_backend("cpu"):
        assert not spread.is_contiguous() and torch.equal(ops.token_shift(spread, 3), expected)
    assert own == [(2, 5, 8)]


def test_derivatives_of_every_kind_are_those_of_torch(own):
    x, grad = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    results = []
    for shift in (ops.token_shift, by_torch):
        learned = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(shift(learned, 3).square().sum(), learned, create_graph=True)
        (again,) = torch.autograd.grad(first.square().sum(), learned)
        y = shift(learned, 3)
        incoming = torch.stack([grad, -grad])
        batched = torch.autograd.grad(y, learned, incoming, is_grads_batched=True, retain_graph=True)
        others = (grad.transpose(0, 1).contiguous().transpose(0, 1), torch._neg_view(grad))
        found = [torch.autograd.grad(y, learned, g, retain_graph=True)[0] for g in others]
        forward_mode = torch.func.jvp(lambda x, shift=shift: shift(x, 3), (x,), (grad,))
        results.append((first, again, *batched, *found, *forward_mode))
    assert own
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_state_continues_the_sequence(n):
    x, layer = torch.randn(2, 9, 6), {}
    whole = ops.token_shift(x, n)
    found = [token_shift(part, n, layer, "shift") for part in x.split([1, 1, 5, 2], dim=1)]
    assert torch.equal(torch.cat(found, 1), whole)
    assert n == 1 or torch.equal(layer["shift"], x[:, -(n - 1) :])


def test_bad_input_is_named():
    x = torch.randn(2, 5, 8)
    for bad, error, message in (
        ((x, 0), ValueError, "n: got 0, takes at least 1"),
        ((x, 2.0), TypeError, "n: got 2.0, takes an integer"),
        ((x[0, 0], 2), ValueError, r"x: got shape \(8,\), takes at least 2 dimensions"),
        ((x.long(), 2), TypeError, "x: got dtype torch.int64"),
        (([1.0], 2), TypeError, "x: got list"),
    ):
        with pytest.raises(error, match=message):
            ops.token_shift(*bad)
