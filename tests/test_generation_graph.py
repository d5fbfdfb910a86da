"""A token as one CUDA graph: on a GPU for real, elsewhere all of it but the capture."""

from __future__ import annotations

import sys

import pytest
import torch
from test_decode import DEFAULT
from test_model import _model

from spikedecoder.generation import Graph, Recurrent, StaticStep, open_source
from spikedecoder.generation.graph import BEFORE, why_not
from spikedecoder.nn.state import DecoderState
from spikedecoder.ops import use_backend

TOKENS = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(5))
VARIANTS = [
    {},
    {"token_shift": 3, "mlp_token_shift": 2, "decay_fastest": 0.7, "decay_slowest": 0.98},
    {"position_encoding": "learned", "norm": "batch", "attention_norm": True},
    {"spike_degree": 2, "spiking_residuals": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_static_steps_are_the_models_and_stay_in_place(variant):
    model = _model(variant).eval()
    _, state = model.prefill(TOKENS[:, :4])
    step = StaticStep(model, state)
    expected_state = state.clone()
    places = {name: t.data_ptr() for name, t in step.state.tensors().items()}
    for i in range(4, 12):
        assert step.fits(state)
        expected, expected_state = model.step(TOKENS[:, i], expected_state)
        actual, state = step(TOKENS[:, i], state)
        assert torch.equal(actual, expected) and state is step.state
        assert state.longest == expected_state.longest
        if i == 7:  # a state from elsewhere is copied in
            state = state.clone()
    assert places == {name: t.data_ptr() for name, t in step.state.tensors().items()}
    for a, b in zip(state.tensors().values(), expected_state.tensors().values(), strict=True):
        assert torch.equal(a, b)


def test_fits():
    model = _model({}).eval()
    _, state = model.prefill(TOKENS[:, :4])
    step = StaticStep(model, state)
    assert not step.fits(state.select([0]))
    assert not step.fits(DecoderState.empty(model.config, 3, torch.device("cpu")))
    state.longest = 2**24 // 12  # the next sums would not fit float32
    assert not step.fits(state)


def test_what_does_not_fit_is_refused():
    model, other = _model({}).eval(), _model({"decay_fastest": 0.5, "decay_slowest": 0.9}).eval()
    _, state = model.prefill(TOKENS[:, :4])
    step = StaticStep(model, state)
    for wrong in (state.select([0]), other.prefill(TOKENS[:, :4])[1]):
        with pytest.raises(ValueError, match=r"state: got one of . sequences behind 4 tokens"):
            step(TOKENS[:, 4], wrong)
    with pytest.raises(ValueError, match=r"token: got shape \(1,\), takes \(3,\)"):
        step(TOKENS[:1, 4], state)
    _, own = step(TOKENS[:, 4], state)
    own.longest = 2**24 // 12
    with pytest.raises(ValueError, match="while float32 holds their sums"):
        step(TOKENS[:, 5], own)
    softmax = _model({"spike_degree": 0}).eval()
    nothing = DecoderState.empty(model.config, 3, torch.device("cpu"))
    for of, state in ((model, nothing), (softmax, softmax.prefill(TOKENS)[1])):
        with pytest.raises(ValueError, match="state: got one without sums of attention"):
            StaticStep(of, state)


@pytest.mark.parametrize(
    ("variant", "unrolled"),
    [*((v, False) for v in VARIANTS), (DEFAULT, False), (DEFAULT, True)],
    ids=lambda x: "default" if x is DEFAULT else str(x),
)
def test_a_step_reads_and_copies_no_value_on_the_host(variant, unrolled, monkeypatch):
    model = _model(variant).eval()
    model.unroll(unrolled)
    _, state = model.prefill(TOKENS[:, :4])
    expected, _ = model.step(TOKENS[:, 4], state.clone())

    def refuse(*_):
        raise AssertionError("a value was read on the host, or copied from there")

    # what looks at values on the CPU only: ids, decays
    monkeypatch.setattr(model, "_check", lambda *_: None)
    attention = sys.modules["spikedecoder.ops.spike_attention"]  # the operator hides its module
    monkeypatch.setattr(attention, "_check_decay", lambda *_: None)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    with use_backend("reference"):
        logits, state = model.step(TOKENS[:, 4], state)
    monkeypatch.undo()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="on the host"), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__int__", refuse)
        _model({"spike_degree": 0}).eval().prefill(TOKENS)


def test_why_not():
    model = _model({}).eval()
    assert why_not(model) == "it runs on a GPU, the model is on cpu"
    with pytest.raises(ValueError, match="model: it runs on a GPU"):
        Graph(model)
    for degree, why in ((0, "softmax attention's cache of keys and values grows"), (4, "forward hooks")):
        other = _model({"spike_degree": degree}).eval()
        other.register_forward_hook(lambda *_: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(other), "device", torch.device("cuda"))
            assert why in why_not(other)
            assert why_not(model) is None


def test_a_step_is_made_where_the_next_token_fits_it(monkeypatch):
    """Not of a state whose sums float32 does not hold behind it: the modules go on in float64."""
    monkeypatch.setattr("spikedecoder.generation.graph.why_not", lambda model: None)
    ilif = {"neuron": "ilif", "timesteps": 1, "levels": 15, "max_len": 512}
    model = _model(ilif).eval()
    limit = int(model.config.exact_tokens)
    for length in range(limit - BEFORE - 2, limit + 1):
        prompt = [i % 7 for i in range(length)]
        graph, recurrent = Graph(model), Recurrent(model)
        assert torch.equal(graph.add([prompt]), recurrent.add([prompt]))
        for token in range(BEFORE + 3):
            assert torch.equal(graph.step([token]), recurrent.step([token]))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_graphs_give_the_logits_of_steps(variant):
    model = _model(variant).to("cuda").eval()
    graph, recurrent = open_source(model, keep=5), Recurrent(model, keep=5)
    assert type(graph) is Graph
    for source in (graph, recurrent):
        source.add(TOKENS[:, :3].tolist())
    for i in range(20):
        if i == 14:
            for source in (graph, recurrent):
                source.select([2, 0])
        tokens = [i % 11] * len(graph.windows)
        torch.testing.assert_close(graph.step(tokens), recurrent.step(tokens), rtol=1e-5, atol=1e-5)
    assert set(graph._steps) == {3, 2}


@pytest.mark.gpu
def test_an_unrolled_model_is_captured():
    model = _model(DEFAULT).to("cuda").eval()
    model.unroll()
    graph, recurrent = open_source(model), Recurrent(model)
    assert type(graph) is Graph
    for source in (graph, recurrent):
        source.add(TOKENS[:, :3].tolist())
    for i in range(BEFORE + 4):
        torch.testing.assert_close(graph.step([i] * 3), recurrent.step([i] * 3), rtol=1e-5, atol=1e-5)
    assert set(graph._steps) == {3}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_is_captured_where_its_model_is():
    model = _model({}).to("cuda:1").eval()
    graph, recurrent = Graph(model), Recurrent(model)
    for source in (graph, recurrent):
        source.add(TOKENS[:, :3].tolist())
    for i in range(BEFORE + 4):
        torch.testing.assert_close(graph.step([i] * 3), recurrent.step([i] * 3), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_replay_does_not_wait_for_the_device():
    model = _model({}).to("cuda").eval()
    source = Graph(model)
    source.add(TOKENS[:, :3].tolist())
    for _ in range(BEFORE + 2):
        source.step([1, 2, 3])
    step, token = source._steps[3], torch.tensor([1, 2, 3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(token, step.state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
