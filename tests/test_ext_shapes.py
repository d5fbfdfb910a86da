"""The compiled CPU backend on tensors of any shape, also of one dimension, one element or none, beside the
reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder import ext, ops
from spikedecoder.testing import Case, make_inputs, run

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

pytestmark = [pytest.mark.poison_empty, pytest.mark.usefixtures("one_thread")]

SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65])
STEPS = st.integers(1, 6)


def shapes(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(SIZES, min_size=least, max_size=most).map(tuple)


def beginning_with(first: st.SearchStrategy[int], rest: st.SearchStrategy[tuple[int, ...]]):
    return st.tuples(first, rest).map(lambda drawn: (drawn[0], *drawn[1]))


def both(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    found = []
    for backend in ("cpu", "reference"):
        with ops.use_backend(backend):
            found.append(run(case, make_inputs(case)))
    return found[0], found[1]


def check(case: Case, tolerance: float = 1e-5) -> None:
    actual, expected = both(case)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape and actual[name].dtype == wanted.dtype, (case, name)
    if case.exact:
        assert torch.equal(actual["out"], expected["out"]), case
    elif not torch.allclose(actual["out"], expected["out"], rtol=1e-4, atol=1e-4):
        # a potential within rounding of its threshold, whose spike reaches every gradient
        assert (actual["out"] != expected["out"]).float().mean() < 0.2, case
        return
    for name, wanted in expected.items():
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() and wanted.isfinite().all() else 1.0
        atol = tolerance * scale
        torch.testing.assert_close(actual[name], wanted, rtol=1e-3, atol=atol, equal_nan=True)


LIF = st.sampled_from(
    [{}, {"v_reset": None}, {"v_reset": None, "detach_reset": False}, {"v_init": True, "return_state": True}]
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=beginning_with(STEPS, shapes(0, 3)), options=LIF)
def test_lif(shape: tuple[int, ...], options: dict) -> None:
    check(Case("lif", "drawn", shape, options))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=shapes(1, 4), name=st.sampled_from(["binarize", "ilif", "pack_spikes"]))
def test_elementwise(shape: tuple[int, ...], name: str) -> None:
    check(Case(name, "drawn", shape, {"levels": 4} if name == "ilif" else {}))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes(2, 4), n=st.integers(1, 6))
def test_token_shift(shape: tuple[int, ...], n: int) -> None:
    check(Case("token_shift", "drawn", shape, {"n": n}))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=beginning_with(STEPS, shapes(1, 3)),
    name=st.sampled_from(["norm", "norm_lif", "norm_ilif"]),
    kind=st.sampled_from(["layer", "batch", "power"]),
    training=st.booleans(),
)
def test_norms(shape: tuple[int, ...], name: str, kind: str, training: bool) -> None:
    rows = torch.Size(shape[:-1]).numel()
    if not shape[-1] or (training and rows < {"layer": 0, "batch": 2, "power": 1}[kind]):
        return  # refused
    options = {"norm": kind, "training": training, **({"levels": 4} if name == "norm_ilif" else {})}
    # without variance, what is left of a gradient is rounding times 1 / sqrt(eps) = 316
    check(
        Case(name, "drawn", shape, options, exact=False), tolerance=1e-3 if 1 in (shape[-1], rows) else 1e-5
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=st.tuples(SIZES, SIZES, SIZES), rate=st.sampled_from([0.0, 0.1, 0.6, 1.0]), bias=st.booleans())
def test_spike_linear(shape: tuple[int, ...], rate: float, bias: bool) -> None:
    if shape[1] and shape[2]:
        check(Case("spike_linear", "drawn", shape, {"rate": rate, "bias": bias}, exact=False))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(STEPS, st.integers(0, 2), st.integers(1, 3), SIZES, SIZES.filter(bool)),
    name=st.sampled_from(["spike_attention", "spike_attention_lif"]),
    decay=st.booleans(),
)
def test_attention(shape: tuple[int, ...], name: str, decay: bool) -> None:
    check(Case(name, "drawn", shape, {"decay": decay}, exact=not decay))
