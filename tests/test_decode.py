"""One token in one call of the extension: the logits, the states and the texts of `SpikeDecoder.step`.

A membrane potential within rounding of its threshold may spike in one order of summation and not in another;
what is compared are runs in which none comes so close.
"""

from __future__ import annotations

import itertools
import mmap
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_model import VARIANTS, _config, _model

import spikedecoder.reference.ilif as reference_ilif
import spikedecoder.reference.lif as reference_lif
from spikedecoder import SpikeDecoder, SpikeDecoderConfig, ext
from spikedecoder.generation import (
    Batch,
    Continuation,
    Native,
    Recurrent,
    SamplingParams,
    Window,
    open_source,
)
from spikedecoder.generation.native import why_not
from spikedecoder.nn.state import DecoderState
from spikedecoder.ops import use_backend
from spikedecoder.params import LIFParams

pytestmark = [pytest.mark.skipif(not ext.is_built(), reason=ext.NOT_BUILT), pytest.mark.poison_empty]
if ext.is_built():
    from spikedecoder.ext.cpu import decode as decode_module
    from spikedecoder.ext.cpu import native
    from spikedecoder.ext.cpu.decode import Decoder

TOKENS = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(5))
SPIKING = [
    v for v in VARIANTS if v.values[0].get("spike_degree", 4) >= 3 and "attention_only" not in v.values[0]
]
OTHER = [v for v in VARIANTS if v not in SPIKING]
SIZES = {"vocab_size": 11, "max_len": 12, "token_dim": 23, "heads": 2, "blocks": 2, "mlp_ratio": 2}
ILIF = {"neuron": "ilif", "levels": 5, "timesteps": 1}
DEFAULT = {**SpikeDecoderConfig.preset("default").to_dict(), **SIZES}  # I-LIF with 15 levels


def nearest_threshold(model: SpikeDecoder, tokens: torch.Tensor) -> float:
    """The smallest distance of a membrane potential from its threshold; of currents that are sums of numbers
    of a few bits, which are exact, the smallest but 0.

    Of I-LIF neurons, whose potentials have far more thresholds, in tenths of a unit.
    """
    nearest, forward = [float("inf")], reference_lif.forward

    def watched(x, threshold, v_init, p):
        v = torch.zeros_like(x[0])
        for x_t in x:
            v = reference_lif.charge(x_t, v, p)
            distance = (v - threshold).abs()
            if torch.equal(x_t * 256, (x_t * 256).round()):
                distance = distance[distance > 0]
            nearest.append(float(distance.min()) if distance.numel() else float("inf"))
            fired = v >= threshold
            v = v - fired * threshold if p.v_reset is None else v.masked_fill(fired, p.v_reset)
        return forward(x, threshold, v_init, p)

    def count(u, p):
        at = u + 0.5
        distance = (at - at.round().clamp(1, p.levels)).abs() / 10
        nearest.append(float(distance[distance > 0].min()))
        return at.floor().clamp(0, p.levels)

    with pytest.MonkeyPatch.context() as patch, use_backend("reference"), torch.no_grad():
        patch.setattr(reference_lif, "forward", watched)
        patch.setattr(reference_ilif, "_count", count)
        model(tokens)
    assert len(nearest) > 1
    return min(nearest)


def same_states(actual: DecoderState, expected: DecoderState) -> None:
    assert actual.longest == expected.longest and torch.equal(actual.position, expected.position)
    for a, e in zip(actual.layers, expected.layers, strict=True):
        assert a.keys() == e.keys()
        for name in e:  # spikes, and sums of spikes
            torch.testing.assert_close(a[name], e[name], rtol=1e-6, atol=0)


def same_steps(model: SpikeDecoder, tokens: torch.Tensor, split: int) -> None:
    """Read `split` tokens, natively and in PyTorch, then step side by side."""
    decoder = Decoder(model)
    expected, expected_state = model.prefill(tokens[:, :split])
    actual, state = decoder.prefill(tokens[:, :split])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    same_states(state, expected_state)
    for i in range(split, tokens.shape[1]):
        expected, expected_state = model.step(tokens[:, i], expected_state)
        actual, state = decoder.step(tokens[:, i], state)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        same_states(state, expected_state)


@pytest.mark.parametrize("variant", [*SPIKING, pytest.param(DEFAULT, id="default")])
def test_steps_equal_the_models(variant):
    if "float_embedding" in variant:  # a cosine of almost 1 brings a neuron almost to its threshold of 1/2
        variant = {**variant, "position_bias": 0.01}
    for seed in range(10):
        model = _model(variant, seed)
        model(TOKENS)  # running statistics that are not the initial ones
        model.eval()
        if nearest_threshold(model, TOKENS) > 1e-6:
            break
    else:
        pytest.fail("a potential within 1e-6 of its threshold for every seed")
    same_steps(model, TOKENS[:, :8], 1)
    same_steps(model, TOKENS, 7)


@settings(max_examples=48, deadline=None)
@given(
    degree=st.integers(3, 4),
    levels=st.sampled_from([None, None, 1, 3, 15]),
    timesteps=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3, 4]),
    head_size=st.sampled_from([1, 3, 7, 8, 16, 20, 40, 70]),
    ratio=st.integers(1, 5),
    shifts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    position=st.sampled_from(["static", "learned", "linear", "binary"]),
    residuals=st.integers(0, 2),
    norm=st.sampled_from(["layer", "batch", "power"]),
    reunite=st.sampled_from(["average", "accumulate", "concatenate", "final"]),
    options=st.fixed_dictionaries(
        {
            "attention_norm": st.booleans(),
            "first_block_residual_lif": st.booleans(),
            "float_embedding": st.booleans(),
        }
    ),
    lif=st.fixed_dictionaries(
        {
            "learn_threshold": st.booleans(),
            "decay_input": st.booleans(),
            "tau": st.sampled_from([1.0, 1.5, 2.0]),
            "v_reset": st.sampled_from([None, 0.0, -0.25]),
        }
    ),
    decay=st.sampled_from([1.0, 0.8]),
    vocab=st.integers(1, 40),
    batch=st.integers(1, 5),
    split=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_random_configs_and_splits(
    degree, levels, timesteps, heads, head_size, ratio, shifts, position, residuals, norm, reunite, options,
    lif, decay, vocab, batch, split, seed,
):  # fmt: skip
    channels = {"learned": 5, "static": 5, "linear": 12, "binary": 4}[position]
    token_dim = -(-(channels + 4) // (heads * head_size)) * heads * head_size - channels
    ilif = {"neuron": "ilif", "levels": levels, "timesteps": 1}
    variant = {
        **options,
        **({**lif, "timesteps": timesteps} if levels is None else ilif),
        **{"decay_fastest": decay, "decay_slowest": decay},
        **{"spike_degree": degree, "heads": heads, "mlp_ratio": ratio},
        **{"token_dim": token_dim, "position_dim": 5, "position_encoding": position, "vocab_size": vocab},
        **{"token_shift": shifts[0], "mlp_token_shift": shifts[1], "spiking_residuals": residuals},
        **{"norm": norm, "reunite": reunite},
    }
    model = _model(variant, seed).eval()
    tokens = torch.randint(0, vocab, (batch, 9), generator=torch.Generator().manual_seed(seed))
    assume(nearest_threshold(model, tokens) > 2e-6)
    same_steps(model, tokens, split)


@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_every_variant_of_the_cpu(name):
    if name not in native.variants():
        pytest.skip(f"this CPU has no {name}")
    before = native.variant()
    native.use_variant(name)
    try:
        wide = {"token_dim": 150, "attention_norm": True}
        for variant in ({}, {"token_shift": 3, "norm": "batch"}, wide, {**DEFAULT, "token_dim": 159}):
            same_steps(_model(variant).eval(), TOKENS, 4)
    finally:
        native.use_variant(before)


@pytest.mark.parametrize(
    "batch, length, neuron", [(40, 6, {}), (1, 75, {}), (2, 75, {}), (40, 6, ILIF), (2, 75, ILIF)]
)
def test_any_number_of_threads_gives_the_same_bits(batch, length, neuron):
    """Several sequences to a thread, and chunks of one sequence that threads take in turn."""
    options = {"token_dim": 150, "blocks": 4, "mlp_ratio": 8, "token_shift": 3, "mlp_token_shift": 2}
    model = _model({**options, **neuron, "max_len": 80}).eval()
    tokens = torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            read, state = Decoder(model).prefill(tokens)
            last, _ = Decoder(model).prefill(tokens, last_only=True)
            assert torch.equal(last, read[:, -1])
            logits, state = Decoder(model).step(tokens[:, 0].contiguous(), state)
            results.append((torch.cat([read, logits[:, None]], 1), state.layers[-1]["attention.state"]))
    finally:
        torch.set_num_threads(before)
    for logits, sums in results[1:]:
        assert torch.equal(logits, results[0][0]) and torch.equal(sums, results[0][1])


@pytest.mark.parametrize("neuron", [{"timesteps": 7}, ILIF], ids=("lif", "ilif"))
def test_tokens_one_by_one_or_together_give_the_same_bits(neuron):
    """The order of a token's sums depends on its own spikes only: not on how many are read with it."""
    model = _model({"token_shift": 3, "mlp_token_shift": 2, "norm": "batch", **neuron}).eval()
    decoder = Decoder(model)
    whole, end = decoder.prefill(TOKENS)
    part, state = decoder.prefill(TOKENS[:, :5])
    parts = [part]
    for i in range(5, 12):
        part, state = decoder.step(TOKENS[:, i], state)
        parts.append(part[:, None])
    assert torch.equal(torch.cat(parts, 1), whole)
    for a, b in zip(state.layers, end.layers, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_sequence_does_not_depend_on_its_neighbours():
    """Sequences of unequal length join and leave; each has the logits that it has alone, to the bit."""
    model = _model({"token_shift": 3, "mlp_token_shift": 2}).eval()
    decoder = Decoder(model)
    states = [model.prefill(TOKENS[i : i + 1, : 3 + 2 * i])[1] for i in range(3)]
    alone = [state.clone() for state in states]
    state = DecoderState.stack(states)
    for rows, token in (([0, 1, 2], 4), ([2, 0], 7), ([0, 2, 0], 1), ([2], 9)):
        state = state.select([min(r, state.batch_size - 1) for r in rows])
        alone = [alone[min(r, len(alone) - 1)].clone() for r in rows]
        logits, state = decoder.step(torch.full((len(rows),), token), state)
        for i, one in enumerate(alone):
            expected, alone[i] = decoder.step(torch.tensor([token]), one)
            assert torch.equal(logits[i], expected[0])
    same_states(state, DecoderState.stack(alone))


@pytest.mark.parametrize(
    "variant", [{"token_shift": 4, "decay_fastest": 0.7, "decay_slowest": 0.98}, DEFAULT], ids=("lif", "ilif")
)
def test_states_pass_between_the_two_forms(variant):
    """Prefill, native steps, prefill, PyTorch steps, native steps: the whole parallel forward's logits."""
    model = _model(variant).eval()
    decoder = Decoder(model)
    with torch.no_grad():
        whole = model(TOKENS)
    _, state = model.prefill(TOKENS[:, :2])
    for i in range(2, 12):
        if i == 5:
            logits, state = model.prefill(TOKENS[:, 5:6], state)
            logits = logits[:, 0]
        else:
            logits, state = (model if i in (6, 9) else decoder).step(TOKENS[:, i], state)
        torch.testing.assert_close(logits, whole[:, i], rtol=1e-5, atol=1e-5)
    restored = DecoderState.from_tensors(model.config, state.tensors())
    assert torch.equal(*(decoder.step(TOKENS[:, 0], s.clone())[0] for s in (state, restored)))


def test_from_an_empty_state():
    model = _model({"token_shift": 2}).eval()
    state = DecoderState.empty(model.config, 3, torch.device("cpu"))
    actual, state = Decoder(model).step(TOKENS[:, 0], state)
    expected, expected_state = model.prefill(TOKENS[:, :1])
    torch.testing.assert_close(actual, expected[:, 0], rtol=1e-5, atol=1e-5)
    same_states(state, expected_state)


@pytest.mark.parametrize(
    "variant", [{"tau": 1.5}, {"position_encoding": "learned", "token_shift": 3}, DEFAULT]
)
def test_the_same_greedy_text(variant):
    model = _model(variant).eval()
    texts = []
    for source in (open_source(model, keep=5), Recurrent(model, keep=5), Window(model, keep=5)):
        batch, drawn = Batch(source), {i: [] for i in range(4)}
        batch.add(Continuation(i, [i + 1] * (i + 1), 40 - 9 * i, SamplingParams(0), 0) for i in range(3))
        while batch:
            for token in batch.step():
                drawn[token.sequence].append(token.token)
            if len(drawn[0]) == 6:  # joins the others under way
                batch.add([Continuation(3, [4, 2], 30, SamplingParams(0), 0)])
        texts.append(drawn)
    assert type(open_source(model)) is Native
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0][0]) == 40 and len(texts[0][3]) == 30


def test_positions_beyond_the_context(monkeypatch):
    """A stretch of positions is held, and moved; a batch that it cannot hold is embedded without."""
    monkeypatch.setattr(decode_module, "_POSITIONS", 5)
    model = _model({}).eval()
    sources = [Native(model, past="continue"), Recurrent(model, past="continue")]
    for source in sources:
        source.add([[1, 2, 3], [4] * 9])
    for i in range(30):
        if i == 9:
            for source in sources:
                source.select([1])
        actual, expected = (source.step([i % 11] * len(source.state.position)) for source in sources)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert len(sources[0].decoder._embedding._far) == 5


def test_memory_is_the_same_after_1_000_and_after_20_000_steps():
    psutil = pytest.importorskip("psutil", reason="needs psutil to read resident memory")
    model = _model({"token_shift": 2, "blocks": 1}).eval()
    source, process, at = Native(model, past="continue"), psutil.Process(), []
    source.add([[1, 2, 3]])
    while source.state.longest < 20_000:
        source.step([source.state.longest % 11])
        if source.state.longest in (1000, 20_000):
            places = {name: t.data_ptr() for name, t in source.state.layers[0].items()}
            at.append((source.state.nbytes, places, process.memory_info().rss))
    assert at[0][:2] == at[1][:2]  # the very same tensors
    assert at[1][2] - at[0][2] < 2**20


@pytest.mark.parametrize("levels", [None, 15])
def test_sums_that_float32_does_not_hold_go_on_in_pytorch(levels):
    model = _model({**ILIF, "levels": levels} if levels else {}).eval()
    sources = [Native(model, past="continue"), Recurrent(model, past="continue")]
    for source in sources:
        source.add([[1, 2, 3]])
        for layer in source.state.layers:
            layer["attention.state"] += 2**24 - 8
        # two more tokens of 12 channels a head fit
        source.state.longest = 2**24 // (12 * (levels or 1) ** 3) - 2
    for token in range(5):
        actual, expected = (source.step([token]) for source in sources)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        dtypes = {source.state.layers[0]["attention.state"].dtype for source in sources}
        assert dtypes == {torch.float32 if token < 2 else torch.float64}


@pytest.mark.parametrize("source", [Native, Recurrent])
def test_a_first_read_of_more_than_float32_holds(source):
    model = _model({**ILIF, "levels": 15, "max_len": 512}).eval()
    tokens = [i % 7 for i in range(int(model.config.exact_tokens) + 5)]
    assert 256 < len(tokens) < 512
    source = source(model)
    logits = source.add([tokens])
    assert source.state.layers[0]["attention.state"].dtype == torch.float64
    expected = SpikeDecoder(model.config).double().eval()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        logits[0].double(), expected(torch.tensor([tokens]))[0, -1], rtol=1e-4, atol=1e-4
    )


def test_takes_a_copy_of_the_weights():
    model = _model({"norm": "batch"})
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    decoder = Decoder(model)  # in training mode: nothing moves
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    _, state = model.eval().prefill(TOKENS)
    before, _ = decoder.step(TOKENS[:, 0], state.clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3
    after, _ = decoder.step(TOKENS[:, 0], state.clone())
    fresh, _ = Decoder(model).step(TOKENS[:, 0], state.clone())
    assert torch.equal(before, after) and not torch.equal(before, fresh)


def test_large_weights_lie_in_huge_pages():
    parts = [torch.arange(600_000.0), torch.ones(5)]
    whole = decode_module._in_huge_pages(parts)
    assert torch.equal(whole, torch.cat(parts))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert whole.data_ptr() % 2**21 == 0
    assert torch.equal(decode_module._in_huge_pages(parts[1:]), parts[1])


def test_from_several_threads():
    model = _model({}).eval()
    decoder = Decoder(model)
    _, start = model.prefill(TOKENS[:, :6])
    expected = decoder.step(TOKENS[:, 0], start.clone())[0]
    results = []

    def work() -> None:
        for _ in range(30):
            results.append(decoder.step(TOKENS[:, 0], start.clone())[0])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 120 and all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("variant", OTHER)
def test_other_models_are_refused_and_generated_in_pytorch(variant):
    model = _model(variant).eval()
    with pytest.raises(ValueError, match=r"model: it takes spiking attention and MLP"):
        Decoder(model)
    assert type(open_source(model)) is Recurrent


def test_why_not():
    model = _model({}).eval()
    assert why_not(model) is None
    assert why_not(_model({}).double()) == "it takes float32, the model is in torch.float64"
    wide = SpikeDecoder(_config(mlp_ratio=3000, blocks=1))
    assert why_not(wide) == "it takes at most 65536 channels, the model has 72000"
    with use_backend("reference"):
        assert why_not(model) == "backend 'reference' was asked for"
        assert type(open_source(model)) is Recurrent
    with use_backend("cpu"):
        assert type(open_source(model)) is Native


def test_a_model_that_it_does_not_know_is_refused(monkeypatch):
    model = _model({}).eval()
    monkeypatch.setattr(decode_module, "_OPTIONS", decode_module._OPTIONS - {"heads", "pad_id"})
    assert why_not(model) == "it does not know the option heads=2"
    monkeypatch.undo()
    for change, said in (
        (
            lambda block: setattr(block.mlp.fc1.lif, "params", LIFParams(v_threshold=0.3)),
            "fc1.lif: params is LIF",
        ),
        (
            lambda block: setattr(block.attention.attention_lif, "scale", 0.5),
            "attention_lif: scale is 0.5, not",
        ),
        (lambda block: block.attention.attention_lif.decay.mul_(0.5), "attention_lif: decay is not what"),
        (lambda block: setattr(block.attention, "shift", 2), "attention: shift is 2, not 1"),
    ):
        other = _model({"decay_fastest": 0.5, "decay_slowest": 0.9}).eval()
        assert why_not(other) is None
        change(other.blocks[1])
        assert why_not(other).startswith("it knows what the config makes alone: blocks.1.")
        assert said in why_not(other) and type(open_source(other)) is Recurrent
    model.blocks[0].mlp.fc1.lif.v_threshold = torch.nn.Parameter(torch.ones(48))
    assert why_not(model) == "it takes one threshold a layer"
    assert type(open_source(model)) is Recurrent


def test_bad_input():
    model = _model({"position_encoding": "learned", "token_shift": 2}).eval()
    decoder = Decoder(model)
    _, state = model.prefill(TOKENS[:, :10])
    with pytest.raises(TypeError, match=r"token: takes an int64 tensor \[B\] on the CPU"):
        decoder.step(TOKENS[:, 0].float(), state)
    with pytest.raises(ValueError, match=r"token: got shape \(2,\), takes \[3\] as the state has"):
        decoder.step(TOKENS[:2, 0], state)
    for wrong in (11, -1):
        with pytest.raises(ValueError, match=f"tokens: got {wrong}, takes 0 to 10"):
            decoder.step(torch.tensor([0, wrong, 0]), state)
    with pytest.raises(ValueError, match="state: got one of another model"):
        Decoder(_model({}).eval()).step(TOKENS[:, 0], state)
    for name, bad in itertools.product(("attention.state", "attention.shift"), (torch.ones(3), None)):
        broken = state.clone()
        broken.layers[1][name] = broken.layers[1][name].double() if bad is None else bad
        with pytest.raises(ValueError, match=f"state: {name}: got .*, takes .* torch.float32 on the CPU"):
            decoder.step(TOKENS[:, 0], broken)
    for _ in range(2):
        _, state = decoder.step(TOKENS[:, 0], state)
    with pytest.raises(ValueError, match="state: got one of 12 tokens, takes one of at most 11 where 1 more"):
        decoder.step(TOKENS[:, 0], state)
    with pytest.raises(ValueError, match="state: got one of 0 tokens, takes one of at most -1 where 13 more"):
        decoder.prefill(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tokens: takes an int64 tensor \[B, S\] on the CPU"):
        decoder.prefill([[1, 2]])
    with pytest.raises(ValueError, match=r"tokens: got shape \(3,\), takes \[3, S\] as the state has"):
        decoder.prefill(TOKENS[:, 0])
    with pytest.raises(ValueError, match="tokens: got ids from 0 to 11, takes 0 to 10"):
        decoder.prefill(torch.tensor([[0, 11]]))


def test_a_watched_model_is_stepped_module_by_module():
    model = _model({}).eval()
    assert why_not(model) is None
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert "forward hooks" in why_not(model)
    handle.remove()
    assert why_not(model) is None
