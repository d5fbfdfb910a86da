"""The measured table that `auto` asks on a GPU, with made-up entries and on the CPU."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from spikedecoder import ops, use_backend
from spikedecoder.ops import _crossover, _dispatch
from spikedecoder.params import LIFParams, NormParams
from spikedecoder.reference import pack_spikes as packing
from spikedecoder.reference import spike_linear as reference

CUDA = torch.device("cuda")
CACHES = (
    *(_crossover._find, _dispatch._load, _dispatch._resolve),
    importlib.import_module("spikedecoder.ops.spike_linear")._few_rows,
)
PRODUCT = {"operator": "spike_linear", "rows": 8192, "channels": 512, "outputs": 2048}
FEW = {**PRODUCT, "rows": 4}
GRADIENT = {**PRODUCT, "operator": "spike_linear_weight_grad"}
PACKING = {**PRODUCT, "operator": "pack_spikes", "outputs": None}


def entry(of, below=0.2, **changes):
    return {
        **of,
        "capability": "9.0",
        "dtype": "bfloat16",
        "below_triton": below,
        "below_dense": 0.0,
        **changes,
    }


@pytest.fixture
def table(monkeypatch):
    """Sets the entries; the GPU is of 9.0, and all its backends can run everything."""
    monkeypatch.setattr(_crossover, "capability", lambda device: "9.0")
    monkeypatch.setattr(_dispatch, "why_not", lambda backend, operator, call: None)

    def put(*entries):
        monkeypatch.setattr(_crossover, "entries", lambda: entries)
        _crossover._find.cache_clear()

    put()
    yield put
    for cached in CACHES:
        cached.cache_clear()


def order(operator="spike_linear", shape=(4, 2048, 512), dtype=torch.bfloat16, **options):
    options = {"outputs": 2048, **options}
    return [
        backend for backend, _ in _dispatch.explain(operator, _dispatch.Call(CUDA, dtype, shape, options))
    ]


ORDER = ["triton", "cuda", "reference"]
CUDA_FIRST = ["cuda", "triton", "reference"]


def test_the_committed_table_is_one_that_can_be_read():
    for found in _crossover.entries():
        assert found.keys() == entry(PRODUCT).keys()
        assert found["operator"] in (
            "spike_linear", "spike_linear_weight_grad", "pack_spikes", "unpack_spikes"
        )  # fmt: skip
        assert hasattr(torch, found["dtype"]) and 0 <= found["below_triton"] <= 1


def test_no_entry_changes_nothing(table):
    assert order() == ORDER
    assert order(shape=()) == ORDER
    assert not _dispatch.goes_by_shape("spike_linear", "cuda:0")


def test_an_entry_changes_the_choice_for_what_it_stands_for(table):
    table(
        entry(PRODUCT), entry(FEW, below=_crossover.ASSUMED_RATE), entry(GRADIENT, below=0.05), entry(PACKING)
    )
    assert _dispatch.goes_by_shape("spike_linear", "cuda:0") and not _dispatch.goes_by_shape("norm", "cuda:0")
    for rows, chosen in (
        (1, True),
        (8, True),
        (9, False),
        (4095, False),
        (4096, True),
        (1 << 20, True),
        (0, False),
    ):
        assert order(shape=(rows, 512)) == (CUDA_FIRST if chosen else ORDER), rows
    for channels, outputs, chosen in (
        (257, 2048, True), (256, 2048, False), (1023, 4095, True), (1024, 2048, False), (512, 4096, False)
    ):  # fmt: skip
        assert order(shape=(8192, channels), outputs=outputs) == (CUDA_FIRST if chosen else ORDER)
    assert order(dtype=torch.float32) == ORDER
    assert order(part="spike_linear_weight_grad") == ORDER  # faster only at rates below the assumed one
    packed = _dispatch.Call(CUDA, torch.bfloat16, (8192, 512))
    assert _dispatch.explain("pack_spikes", packed)[0][0] == "cuda"
    unpacked = _dispatch.Call(CUDA, torch.bfloat16, (8192, 512), {"part": "unpack_spikes"})
    assert _dispatch.explain("pack_spikes", unpacked)[0][0] == "triton"


def test_an_entry_stands_for_its_gpu_only_and_no_backend_runs_that_cannot(table, monkeypatch):
    table(entry(PRODUCT, capability="10.0"))
    assert order() == ORDER and not _dispatch.goes_by_shape("spike_linear", "cuda:0")
    table(entry(PRODUCT))
    call = _dispatch.Call(CUDA, torch.bfloat16, (8192, 512), {"outputs": 2048})
    assert _dispatch.select("spike_linear", call, "auto").__name__ == "spikedecoder.ext.cuda.spike_linear"
    monkeypatch.setattr(
        _dispatch, "why_not", lambda backend, *_: "it is not built" if backend == "cuda" else None
    )
    assert _dispatch.select("spike_linear", call, "auto").__name__ == "spikedecoder.kernels.spike_linear"
    assert _dispatch.explain("spike_linear", call)[0] == ("cuda", "it is not built")


@pytest.fixture
def recorded(table, monkeypatch):
    """Backends on the CPU, in a GPU's order: both the reference, noting what they are asked for."""
    calls = []

    def noted(name, function):
        def call(*arguments):
            calls.append((name, function.__name__))
            return function(*arguments)

        return call

    def backend(name):
        package = ModuleType(name)
        package.__path__ = []
        for operator, source in (("spike_linear", reference), ("pack_spikes", packing)):
            module = ModuleType(f"{name}.{operator}")
            module.__spec__ = torch.__spec__  # there is one
            for function in ("forward", "from_words", "weight_grad", "pack", "unpack"):
                if hasattr(source, function):
                    setattr(module, function, noted(name, getattr(source, function)))
            monkeypatch.setitem(sys.modules, f"{name}.{operator}", module)
        package.__spec__ = torch.__spec__
        monkeypatch.setitem(sys.modules, name, package)

    for name in ("triton", "cuda"):
        backend(f"fake_{name}")
        monkeypatch.setitem(_dispatch.BACKENDS, name, f"fake_{name}")
    monkeypatch.setattr(_dispatch, "_PREFERENCE", {"cpu": ("triton", "cuda", "reference")})
    there = ("spike_linear", "pack_spikes")
    monkeypatch.setattr(
        _dispatch,
        "why_not",
        lambda backend, operator, _: None if operator in there or backend == "reference" else "it has none",
    )
    for cached in CACHES:
        cached.cache_clear()
    return calls


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_gradient_choose_each_for_itself(table, recorded, compiled):
    s = (torch.rand(6, 40) < 0.3).float()
    weight = torch.randn(16, 40, requires_grad=True)
    sizes = {"rows": 4, "channels": 40, "outputs": 16, "dtype": "float32"}

    def run(call):
        recorded.clear()
        torch._dynamo.reset()
        with use_backend("auto"):
            y = call(s, weight)
        with use_backend("reference"):  # a gradient is of its forward's choice
            (grad,) = torch.autograd.grad(y.square().sum(), weight)
        torch.testing.assert_close(y, s @ weight.T)
        torch.testing.assert_close(grad, (2 * y).T @ s)
        return list(recorded)

    call = (
        torch.compile(ops.spike_linear, fullgraph=True, backend="aot_eager") if compiled else ops.spike_linear
    )
    assert run(call) == [("fake_triton", "forward"), ("fake_triton", "weight_grad")]
    table(entry({**GRADIENT, **sizes}, dtype="float32"))
    assert run(call) == [("fake_triton", "forward"), ("fake_cuda", "weight_grad")]
    table(entry({**PRODUCT, **sizes}, dtype="float32"))
    assert run(call) == [("fake_cuda", "forward"), ("fake_triton", "weight_grad")]
    with use_backend("triton"):  # by name: nothing is looked up
        recorded.clear()
        ops.spike_linear(s, weight)
    assert recorded == [("fake_triton", "forward")]


def test_what_recomputes_a_linear_chooses_alike(table, recorded):
    s = (torch.rand(4, 6, 40) < 0.3).float()
    weight = torch.randn(16, 40, requires_grad=True)
    layer, neuron = NormParams("layer", torch.ones(16), torch.zeros(16)), LIFParams()
    sizes = {"rows": 24, "channels": 40, "outputs": 16, "dtype": "float32"}
    for entries, chosen in (
        ((), "fake_triton"),
        ((entry({**PRODUCT, **sizes}, dtype="float32"),), "fake_cuda"),
    ):
        table(*entries)
        for call in (
            lambda: ops.linear_norm_lif(s, weight, None, layer, neuron),
            lambda: ops.linear_norm(s, weight, None, layer),
        ):
            recorded.clear()
            y = call()
            y.backward(torch.ones_like(y))
            assert recorded == [(chosen, "forward"), (chosen, "from_words"), ("fake_triton", "weight_grad")]


def test_words_of_more_channels_pick_no_column_that_there_is_not(monkeypatch):
    """The extension's own product, on a GPU that is not there: what its kernel is given."""
    from spikedecoder.ext.cuda import spike_linear as extension

    given = []
    monkeypatch.setattr(extension, "native", SimpleNamespace(gather=None))
    monkeypatch.setattr(extension, "launch", lambda kernel, words, *sizes: given.append((words, *sizes[-3:])))
    words = torch.full((3, 2), -1, dtype=torch.int64)
    for channels in (70, 127, 128):
        extension.from_words(words, channels, torch.ones(5, channels), None)
        found, *sizes = given.pop()
        assert sizes == [3, channels, 5]
        assert torch.equal(
            packing.unpack(found, 128, torch.float32).sum(-1), torch.full((3,), float(channels))
        )
    assert (words == -1).all()
