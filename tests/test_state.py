"""The recurrent form: prefill and steps equal the parallel forward, for every variant and split."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_model import SMALL, VARIANTS, _model

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.nn.state import DecoderState
from spikedecoder.ops import use_backend

TOKENS = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_steps_equal_the_parallel_forward(variant):
    model = _model(variant).double()
    model(TOKENS)  # running statistics that are not the initial ones
    model.eval()
    with torch.no_grad():
        whole = model(TOKENS)
    for split in (1, 5, 11):
        logits, state = model.prefill(TOKENS[:, :split])
        parts = [logits]
        middle = (split + 12) // 2
        if middle > split:
            logits, state = model.prefill(TOKENS[:, split:middle], state)
            parts.append(logits)
        for i in range(middle, 12):
            logits, state = model.step(TOKENS[:, i], state)
            parts.append(logits[:, None])
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
        assert state.longest == 12 and state.position.tolist() == [12, 12, 12]


@settings(max_examples=50, deadline=None)
@given(
    base=st.sampled_from([v.values[0] for v in VARIANTS]),
    degree=st.integers(0, 4),
    timesteps=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 4]),
    shifts=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    position=st.sampled_from(["static", "learned"]),
    residuals=st.integers(0, 2),
    splits=st.lists(st.integers(1, 11), max_size=4),
    seed=st.integers(0, 100),
)
def test_random_configs_and_splits(base, degree, timesteps, heads, shifts, position, residuals, splits, seed):
    variant = {
        "spike_degree": degree,
        "timesteps": timesteps,
        "heads": heads,
        "token_shift": shifts[0],
        "mlp_token_shift": shifts[1],
        "position_encoding": position,
        "spiking_residuals": residuals,
        **base,  # every encoding, norm, threshold, head and decay with all of the above
    }
    try:
        model = _model(variant, seed).double().eval()
    except ValueError:  # options that exclude each other
        assume(False)
    with torch.no_grad():
        whole = model(TOKENS)
    cuts = sorted({0, 12, *splits})
    state, parts = None, []
    for a, b in itertools.pairwise(cuts):
        logits, state = model.prefill(TOKENS[:, a:b], state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


def test_sequences_of_unequal_length_in_one_batch():
    for degree in (0, 4):
        model = _model({"spike_degree": degree, "token_shift": 3}).double().eval()
        states = [model.prefill(TOKENS[i : i + 1, : 3 + 2 * i])[1] for i in range(3)]
        logits, state = model.step(torch.tensor([1, 2, 3]), DecoderState.stack(states))
        for i in range(3):
            alone = model(torch.cat([TOKENS[i, : 3 + 2 * i], torch.tensor([i + 1])])[None])[0, -1]
            torch.testing.assert_close(logits[i], alone, rtol=1e-9, atol=1e-9)
        one = state.select([1])
        assert one.longest == 6 and one.batch_size == 1


def test_fork_and_select():
    model = _model({"spike_degree": 0}).double().eval()
    _, state = model.prefill(TOKENS[:1, :6])
    saved = state.clone()
    first, _ = model.step(torch.tensor([3]), state)
    model.step(torch.tensor([4]), saved.clone())
    again, _ = model.step(torch.tensor([3]), saved)
    assert torch.equal(first, again)
    _, state = model.prefill(TOKENS[:1, :6])
    logits, _ = model.step(torch.tensor([3, 4, 3]), state.select([0, 0, 0]))
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    "variant", [{}, {"spike_degree": 0}, {"token_shift": 3, "mlp_token_shift": 2}], ids=str
)
def test_states_that_have_read_nothing_join_others(variant):
    model = _model(variant).double().eval()
    _, read = model.prefill(TOKENS[:2, :6])
    empty = DecoderState.empty(model.config, 1, torch.device("cpu"))
    next_tokens = torch.tensor([3, 4])
    first, _ = model.step(next_tokens[:1], empty.clone())
    others, _ = model.step(next_tokens, read.clone())
    for states, tokens, expected in (
        ([empty, read], [3, 3, 4], [first, others]),
        ([read, empty], [3, 4, 3], [others, first]),
        ([empty, empty], [3, 3], [first, first]),
    ):
        logits, state = model.step(torch.tensor(tokens), DecoderState.stack([s.clone() for s in states]))
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-9, atol=1e-9)
        assert state.longest == max(s.longest for s in states) + 1


def test_truth_values_and_negative_numbers_are_no_rows():
    _, state = _model({}).eval().prefill(TOKENS)
    for rows in (torch.tensor([True, False, True]), [True, False, True]):
        with pytest.raises(TypeError, match="rows: got truth values, takes the numbers of rows"):
            state.select(rows)
    with pytest.raises(ValueError, match="rows: got -1, takes 0 to 2"):
        state.select([0, -1])
    assert state.select(torch.tensor([2, 0])).batch_size == 2


@pytest.mark.parametrize("degree", [0, 1, 4])
def test_a_state_of_inference_mode_goes_on_outside_of_it(degree):
    model = _model({"spike_degree": degree}).eval()
    with torch.inference_mode():
        _, state = model.prefill(TOKENS)
    expected, _ = model.step(TOKENS[:, 0], model.prefill(TOKENS)[1])
    logits, state = model.step(TOKENS[:, 0], state)
    torch.testing.assert_close(logits, expected)
    model.step(TOKENS[:, 0], state)


def test_state_of_spiking_attention_has_a_bounded_size():
    model = _model({"token_shift": 2}).eval()
    _, state = model.prefill(TOKENS[:1, :4])
    size = state.nbytes
    for _ in range(30):
        _, state = model.step(torch.tensor([1]), state)
    assert state.nbytes == size and state.longest == 34


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_says_how_many_bytes(variant):
    model = _model(variant).eval()
    for tokens in (TOKENS[:, :5], TOKENS):
        _, state = model.prefill(tokens)
        assert state.nbytes == 3 * DecoderState.bytes_of(model.config)
    _, state = model.double().prefill(TOKENS[:, :5])
    assert state.nbytes == 3 * DecoderState.bytes_of(model.config, itemsize=8)


def test_softmax_cache_grows_past_the_context():
    model = _model({"spike_degree": 0}).double().eval()
    tokens = torch.randint(0, 11, (1, 30))
    _, state = model.prefill(tokens[:, :10])
    for i in range(10, 30):
        logits, state = model.step(tokens[:, i], state)
    torch.testing.assert_close(logits, model(tokens)[:, -1], rtol=1e-9, atol=1e-9)


def test_counts_stay_exact_past_float32(monkeypatch):
    model = _model({}).eval()
    _, state = model.prefill(TOKENS[:1, :4])
    for layer in state.layers:
        layer["attention.state"] += 2**24  # as if millions of tokens had been read
    state.longest = 2**24
    before = [layer["attention.state"].double() for layer in state.layers]
    _, state = model.step(torch.tensor([1]), state)
    for layer, old in zip(state.layers, before, strict=True):
        assert layer["attention.state"].dtype == torch.float64
        added = layer["attention.state"] - old
        assert ((added == 0) | (added == 1)).all() and torch.equal(added, added.round())


def test_integers_reach_the_limit_of_float32_sooner():
    model = _model({"neuron": "ilif", "levels": 4, "timesteps": 1}).eval()
    for more, dtype in ((0, torch.float32), (1, torch.float64)):
        _, state = model.prefill(TOKENS[:1, :4])
        state.longest = 2**24 // (12 * 4**3) - 1 + more  # head size 12
        _, state = model.step(torch.tensor([1]), state)
        assert state.layers[0]["attention.state"].dtype == dtype
    forgets = model.config.replace(decay_fastest=0.5, decay_slowest=0.9)
    assert forgets.exact_tokens == float("inf") and model.config.exact_tokens == 2**24 / (12 * 4**3)


def test_saved_and_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    model = _model({"token_shift": 2}).eval()
    _, state = model.prefill(TOKENS[:, :5])
    save_file(state.tensors(), tmp_path / "state.safetensors")
    loaded = DecoderState.from_tensors(model.config, load_file(tmp_path / "state.safetensors"))
    expected, _ = model.step(TOKENS[:, 5], state)
    actual, _ = model.step(TOKENS[:, 5], loaded)
    assert torch.equal(actual, expected)
    empty = DecoderState.empty(model.config, 2, torch.device("cpu"))
    assert DecoderState.from_tensors(model.config, empty.tensors()).longest == 0


def _less(name):
    return lambda tensors: tensors.pop(name)


def _as(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _more(name):
    return lambda tensors: tensors.update({name: torch.ones(1)})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_less("position"), "position: got none"),
        (_less("1.attention.state"), "got no '1.attention.state'"),
        (_less("0.attention.shift"), "got no '0.attention.shift'"),
        (_as("position", torch.Tensor.int), "position: got .*int32, takes .*int64"),
        (_as("position", torch.Tensor.bool), "position: got .*bool, takes .*int64"),
        (_as("position", lambda t: t[0]), r"position: got \(\) "),
        (_as("position", lambda t: t[:0]), r"position: got \(0,\) "),
        (_as("position", lambda t: t[:2]), r"0.attention.state: got \(4, 3, 2, 12, 12\) .*takes \(4, 2, 2"),
        (_as("position", torch.Tensor.neg), "position: got -5, takes"),
        (_as("1.attention.state", torch.Tensor.half), "1.attention.state: got .*float16 on cpu, takes"),
        (_as("1.attention.shift", torch.Tensor.long), "1.attention.shift: got .*int64 on cpu, takes"),
        (_more("2.attention.state"), "got '2.attention.state', takes"),
        (_more("-1.attention.state"), "got '-1.attention.state', takes"),
        (_more("0"), "got '0', takes"),
    ],
)  # fmt: skip
def test_what_is_no_saved_state_of_this_config(damage, why):
    model = _model({"token_shift": 2}).eval()
    tensors = model.prefill(TOKENS[:, :5])[1].tensors()
    damage(tensors)
    with pytest.raises(ValueError, match=why):
        DecoderState.from_tensors(model.config, tensors)


@pytest.mark.parametrize("name", ["attention.k", "attention.v"])
def test_a_saved_cache_is_whole_and_long_enough(name):
    model = _model({"spike_degree": 0}).eval()
    tensors = model.prefill(TOKENS[:, :5])[1].tensors()
    for cut in (_less(f"0.{name}"), _as(f"0.{name}", lambda t: t[:, :, :4])):
        with pytest.raises(ValueError, match=f"0.{name}"):
            damaged = dict(tensors)
            cut(damaged)
            DecoderState.from_tensors(model.config, damaged)
    longer = _as(f"0.{name}", lambda t: torch.cat([t, t], 2))
    longer(tensors)
    assert DecoderState.from_tensors(model.config, tensors).longest == 5


@pytest.mark.parametrize("degree", [0, 4])
def test_a_state_goes_on_under_autocast_and_after_it(degree):
    """Of another dtype than what comes: a cache is written to, a shift's past is joined."""
    model = _model({"spike_degree": degree, "token_shift": 2}).eval()
    _, state = model.prefill(TOKENS[:, :4])
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model.prefill(TOKENS[:, 4:8], state)
    logits, state = model.prefill(TOKENS[:, 8:], state)
    assert logits.isfinite().all() and state.longest == TOKENS.shape[1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sixteen_bits_spike_alike_in_both_forms(autocast, backend):
    """With a decay the currents are no integers: neither form rounds them before the neurons."""
    torch.manual_seed(0)
    model = _model({"decay_fastest": 0.75, "decay_slowest": 0.98, "v_threshold": 0.5, "max_len": 64}).eval()
    model = model if autocast else model.bfloat16()
    tokens = torch.randint(0, 11, (2, 64))
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        expected = model(tokens).float()
        first, state = model.prefill(tokens[:, :20])
        logits = [first]
        for i in range(20, 64):
            step, state = model.step(tokens[:, i], state)
            logits.append(step[:, None])
    moved = (torch.cat(logits, 1).float() - expected).abs().amax(-1) > 1e-2
    assert moved.float().mean() < 0.01


def test_a_threshold_a_channel_for_the_attention_in_both_forms():
    model = _model({"learn_threshold": True}).double().eval()
    for block in model.blocks:
        lif = block.attention.attention_lif.lif
        lif.v_threshold = torch.nn.Parameter(
            torch.linspace(0.5, 1.5, model.config.embed_dim, dtype=torch.float64)
        )
    torch.testing.assert_close(model.prefill(TOKENS)[0], model(TOKENS), rtol=1e-9, atol=1e-9)


def test_bad_input():
    model = _model({"position_encoding": "learned"})
    with pytest.raises(ValueError, match=r"prefill: the model is in training mode; call model.eval\(\)"):
        model.prefill(TOKENS)
    model.eval()
    _, state = model.prefill(TOKENS[:, :10])
    with pytest.raises(ValueError, match="state: got 3 sequences, takes 1"):
        model.step(torch.tensor([1]), state)
    with pytest.raises(ValueError, match="tokens: got ids from 0 to 11"):
        model.step(torch.tensor([11, 0, 0]), state)
    with pytest.raises(ValueError, match=r"token: got shape .*, takes \[B\]"):
        model.step(TOKENS, state)
    with pytest.raises(TypeError, match="token: got int, takes an int64 or int32 tensor"):
        model.step(3, state)
    with pytest.raises(ValueError, match="tokens: got 13 positions, takes at most max_len = 12"):
        model.prefill(TOKENS[:, :3], state)
    other = SpikeDecoder(SpikeDecoderConfig.from_dict({**SMALL, "blocks": 1})).eval()
    with pytest.raises(ValueError, match="state: got one of another model"):
        other.step(torch.tensor([1, 2, 3]), state)
