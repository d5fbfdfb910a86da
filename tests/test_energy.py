"""The energy ledger: what it watches, baselines, what comes out of it, bad input."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest
import torch
from awake import awake
from torch import nn

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy, viz
from spikedecoder.energy.rows import KINDS
from spikedecoder.nn.finite import not_finite
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.nn.neuron import LIF
from spikedecoder.params import LIFParams

SMALL = {
    "vocab_size": 7,
    "max_len": 6,
    "token_dim": 4,
    "position_dim": 2,
    "heads": 2,
    "blocks": 2,
    "mlp_ratio": 2,
    "timesteps": 3,
    "v_threshold": 0.5,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes):
    torch.manual_seed(0)
    return awake(SpikeDecoder(SpikeDecoderConfig.from_dict({**SMALL, **changes})).eval(), 0.3)


def tokens(b=2, s=5):
    return torch.randint(0, 7, (b, s), generator=torch.Generator().manual_seed(1))


def test_counts_depend_on_the_spikes_and_add_up_over_batches():
    model, ids = small(), tokens(4)
    whole = energy.measure(model, ids)
    parts = energy.measure(model, [ids[:1], ids[1:]])
    assert whole.rows == parts.rows and whole.tokens == parts.tokens == 20
    assert whole.pairs == parts.pairs == 4 * 15
    with torch.no_grad():
        for p in model.blocks[0].mlp.fc1.norm.parameters():
            p.zero_()  # its neurons fall silent
    silent = energy.measure(model, ids).row("blocks.0.mlp.fc2", "linear")
    before = whole.row("blocks.0.mlp.fc2", "linear")
    assert silent.count == silent.events == 0 < before.count == before.events * 6


def test_training_mode_is_left_as_it_was_and_nothing_is_learned():
    model = small(norm="batch", mlp_dropout=0.5).train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    first, second = energy.measure(model, tokens()), energy.measure(model, tokens())
    assert first.rows == second.rows
    assert model.training and model.blocks[0].mlp.dropout.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_watching_generation_counts_each_token_once():
    model = small()
    with energy.Recorder(model, "token") as recorder:
        ids = model.generate(tokens(1, 3), 2, temperature=0)
    ledger = recorder.ledger()
    assert (ledger.tokens, ledger.sequences, ledger.pairs) == (4, 1, 10)  # the last one is not read
    assert ledger.rows == energy.measure(model, ids[:, :4], mode="token").rows
    ann = small(spike_degree=0)
    with energy.Recorder(ann, "token") as recorder:
        ids = ann.generate(tokens(1, 3), 2, temperature=0)
    counted = {(r.layer, r.operation): (r.add, r.mul, r.special) for r in recorder.ledger().rows}
    whole = energy.measure(ann, ids[:, :4], mode="token").rows
    assert counted == {(r.layer, r.operation): (r.add, r.mul, r.special) for r in whole}


def test_a_spiking_embedding_feeds_accumulates():
    """Degree 1: the first q, k, v get spikes (times a gain), all later layers real numbers."""
    for gain in (1.0, 2.0):
        rows = energy.measure(small(spike_degree=1, embedding_gain=gain), tokens()).rows
        fed = {r.layer for r in rows if r.kind == "ac" and r.operation == "linear"}
        assert fed == {f"blocks.0.attention.{part}" for part in "qkv"}
    rows = energy.measure(small(spike_degree=1, float_embedding=True), tokens()).rows
    assert not [r for r in rows if r.kind == "ac"]


def test_the_mean_of_one_timestep_is_spikes():
    head = energy.measure(small(timesteps=1), tokens()).row("head", "linear")
    averaged = energy.measure(small(timesteps=2), tokens()).row("head", "linear")
    assert (head.kind, averaged.kind) == ("ac", "mac")


# baselines


@pytest.mark.parametrize("mode", ["prompt", "token"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(
    "variant", [{}, {"token_encoding": "two-hot", "heads": 1}, {"reunite": "concatenate"}]
)
def test_the_ann_ledger_is_that_of_a_real_ann_of_the_same_shapes(variant, norm, mode):
    model = small(norm=norm, **variant)
    ledger = energy.measure(model, tokens(), mode=mode)
    baseline = energy.ann_ledger(ledger)
    twin = SpikeDecoder(energy.twin_config(model.config))
    assert twin.config.embed_dim == model.config.embed_dim
    real = energy.measure(twin, tokens(), mode=mode)
    for rows in (baseline.rows, real.rows):
        rows.sort(key=lambda r: (r.layer, r.operation))
        for row in rows:
            row.events = 0  # how many inputs are exactly 0 costs nothing there
    assert baseline.rows == real.rows
    assert baseline.parameters == real.parameters


def test_break_even_is_where_both_cost_the_same():
    ledger = energy.measure(small(mlp_ratio=4), tokens())
    even = energy.break_even_rate(ledger, "horowitz-45nm")
    # fc1, by hand: K = 6, N = 24, T = 3; ANN: K N MACs and N additions; here r T K N + T N additions
    hand = (6 * 24 * 4.6 + 24 * 0.9 - 3 * 24 * 0.9) / (3 * 6 * 24 * 0.9)
    measured, limit = even.layers["blocks.0.mlp.fc1"]
    assert limit == pytest.approx(hand)
    assert measured == ledger.row("blocks.0.mlp.fc1", "linear").rate
    # all driven operations in proportion: at the break-even rate the totals are equal
    driven = sum(ledger.joules().rows[r.layer, r.operation][0] for r in ledger.rows if r.kind == "ac")
    fixed = ledger.joules().joules - driven
    ann = energy.ann_ledger(ledger).joules().joules
    if even.overall is None:
        assert fixed >= ann
    else:
        assert fixed + driven * even.overall / even.rate == pytest.approx(ann)


def test_break_even_of_integers_pays_for_the_shifts_between_their_timesteps():
    model = small(neuron="ilif", levels=15, timesteps=1, token_dim=10, position_dim=6, mlp_ratio=4)
    even = energy.break_even_rate(energy.measure(model, tokens()), "horowitz-45nm", "int8")
    # fc1, by hand: K = 16, four binary timesteps; of N outputs each a bias and three shifts. ANN: 16 MACs of
    # 0.3 pJ and a bias; here r 4 16 accumulates, a bias and three shifts of 0.1 pJ
    assert even.layers["blocks.0.mlp.fc1"][1] == pytest.approx((16 * 0.3 - 3 * 0.1) / (4 * 16 * 0.1))
    assert even.layers["blocks.0.mlp.fc1"][1] == pytest.approx(0.703, abs=5e-4)


def test_overall_break_even_of_a_wide_model_and_none_for_a_silent_one():
    model = small(mlp_ratio=60, timesteps=1)
    even = energy.break_even_rate(energy.measure(model, tokens()), "horowitz-45nm")
    assert even.overall is not None and even.overall > 0
    silent = energy.break_even_rate(energy.measure(small(v_threshold=50.0), tokens()), "horowitz-45nm")
    assert silent.rate == 0 and silent.overall is None


def test_compare_lists_each_model_with_its_twins():
    ledgers = [energy.measure(small(), tokens(), name="a"), energy.measure(small(spike_degree=0), tokens())]
    comparison = energy.compare(ledgers)
    assert [e.variant for e in comparison.of("a")] == [
        "this model, fp32",
        "this model, int8",
        "ANN, fp32",
        "ANN, int8",
        "ANN, int8 x 2 bit",
    ]
    assert [e.variant for e in comparison.of("model 2")] == ["this model, fp32", "this model, int8"]
    joules = {e.variant: e.estimate.joules for e in comparison.of("a")}
    assert joules["ANN, fp32"] > joules["ANN, int8"] > joules["ANN, int8 x 2 bit"]
    assert set(comparison.break_even) == {"a"}
    assert comparison.to_dict()["estimate"] is True
    assert any("estimate" in line for line in comparison.assumptions)
    twice = energy.compare([ledgers[0], ledgers[0]])
    assert {e.model for e in twice.entries} == {"a", "a (2)"}
    with pytest.raises(TypeError, match="ledgers: got a Ledger, takes several"):
        energy.compare(ledgers[0])
    with pytest.raises(ValueError, match="ledgers: got none"):
        energy.compare([])


def test_compare_needs_a_config_only_of_a_spiking_model():
    ledgers = []
    for layer in (nn.Linear(3, 2), SpikeLinear(3, 2)):
        with energy.Recorder(layer) as recorder:
            layer(torch.ones(2, 1, 5, 3))
        ledgers.append(recorder.ledger())
    comparison = energy.compare(ledgers[:1])
    assert [e.variant for e in comparison.entries] == ["this model, fp32", "this model, int8"]
    assert not comparison.break_even and not any(e.baseline for e in comparison.entries)
    with pytest.raises(ValueError, match="ledger: got one of a model without a config"):
        energy.compare(ledgers)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({"timesteps": 4}, 3),
        ({"timesteps": 1, "neuron": "ilif", "levels": 5}, 3),
        ({"timesteps": 4, "spike_degree": 1}, 1),  # runs in one pass
    ],
)
def test_the_narrow_twin_has_the_bits_of_the_spikes_that_a_neuron_can_fire(changes, bits):
    comparison = energy.compare([energy.measure(small(**changes), tokens())])
    assert comparison.entries[-1].variant == f"ANN, int8 x {bits} bit"


def test_equal_bits():
    # T timesteps count from 0 to T
    assert [energy.equal_bits(t) for t in (1, 2, 3, 4, 7, 8)] == [1, 2, 2, 3, 3, 4]


# out of the ledger


def test_csv_and_dict_hold_every_row():
    ledger = energy.measure(small(), tokens())
    lines = list(csv.DictReader(io.StringIO(ledger.to_csv())))
    assert len(lines) == len(ledger.rows)
    assert sum(float(line["estimated_joules"]) for line in lines) == pytest.approx(ledger.joules().joules)
    assert {line["estimated_memory_joules"] for line in lines} == {""}  # left out
    said = {(line["mode"], line["table"], line["number_format"]) for line in lines}
    assert said == {("prompt", "horowitz-45nm", "fp32")}
    other = energy.measure(small(), tokens(), mode="token")
    full = other.joules("jouppi-7nm", memory=True, number_format="int8")
    lines = list(csv.DictReader(io.StringIO(other.to_csv(full))))
    assert sum(float(line["estimated_memory_joules"]) for line in lines) == pytest.approx(full.memory)
    said = {(line["mode"], line["table"], line["number_format"]) for line in lines}
    assert said == {("token", "jouppi-7nm", "int8")}
    values = ledger.to_dict()
    assert [row["count"] for row in values["rows"]] == [row.count for row in ledger.rows]
    totals = values["totals"]
    assert totals["ac"] == sum(r.count for r in ledger.rows if r.kind == "ac") > 0
    assert {r.kind for r in ledger.rows} == set(KINDS)
    estimate = ledger.joules(memory=True)
    assert sum(estimate.by_layer.values()) == pytest.approx(estimate.joules) == float(estimate)
    assert estimate.per_token == estimate.joules / 10
    assert estimate.to_dict()["estimate"] is True and estimate.to_dict()["mode"] == "prompt"
    assert any("a shift = an int32 addition" in line for line in estimate.to_dict()["assumptions"])


def test_memory_can_be_placed_by_hand():
    ledger = energy.measure(small(), tokens())
    near, far = (ledger.joules(memory={"weights": where}) for where in ("sram_8kB", "dram"))
    assert far.by_memory["weights"] == pytest.approx(130 * near.by_memory["weights"])
    assert far.by_memory["state"] == near.by_memory["state"]
    for wrong in ({"weight": "dram"}, {"weights": "tape"}):
        with pytest.raises(ValueError, match="memory: got"):
            ledger.joules(memory=wrong)
    with pytest.raises(TypeError, match="memory: got 3"):
        ledger.joules(memory=3)


def test_a_spike_is_one_bit_whatever_the_format():
    layer = SpikeLinear(40_000, 2)
    with energy.Recorder(layer) as recorder:
        layer(torch.ones(4, 1, 1, 40_000))  # 20 kB of spikes
    for number_format in ("fp32", "fp16", "int8"):
        estimate = recorder.ledger().joules(memory=True, number_format=number_format)
        assert estimate.placement["activations"] == "sram_32kB"


def test_what_is_not_known_is_not_left_out():
    config = SpikeDecoderConfig.preset("default", vocab_size=9, blocks=1, heads=2, token_dim=11, max_len=8)
    for place in ("blocks.0.mlp.input_lif", "blocks.0.attention.q.lif"):
        model = SpikeDecoder(config)
        model.set_submodule(place, torch.nn.ReLU())
        with pytest.raises(ValueError, match=f"model: {place}: the operations of ReLU are not known here"):
            energy.measure(model, torch.zeros(1, 4, dtype=torch.int64))


def test_a_model_that_recomputes_is_counted_in_full():
    model = small()
    want = energy.measure(model, tokens())
    model.eval().recompute_activations()
    with energy.Recorder(model) as recorder:  # gradients are on
        model(tokens())
    assert recorder.ledger().rows == want.rows


def test_tokens_of_a_model_without_an_embedding_are_counted_at_every_pass():
    lif = LIF(LIFParams())  # used twice in a pass, which is still one pass
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), lif, SpikeLinear(3, 3), lif)):
        once, twice = energy.Recorder(model), energy.Recorder(model)
        x = torch.ones(4, 2, 5, 3)
        with once:
            model(x)
        with twice:
            model(x)
            model(x)
        one, two = once.ledger(), twice.ledger()
        assert (one.tokens, one.sequences, one.pairs) == (10, 2, 30)
        assert (two.tokens, two.sequences, two.pairs) == (20, 4, 60)
        assert [r.count for r in two.rows] == [2 * r.count for r in one.rows]
        assert two.joules().per_token == pytest.approx(one.joules().per_token)


def test_a_pass_that_failed_is_followed_by_a_pass_of_its_own():
    model = nn.Sequential(nn.Linear(3, 3), SpikeLinear(3, 3))
    with energy.Recorder(model) as recorder:
        with pytest.raises(ValueError, match="input of 1 is not spikes"):
            model(torch.full((2, 5, 3), 0.3))
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(3))
            model[0].bias.zero_()
        model(torch.ones(3, 5, 3))
    assert recorder.ledger().tokens == 25


def test_generation_fetches_weights_for_each_token_only_of_inputs_that_spiked():
    model, ids = small(), tokens(1)
    prompt, token = (energy.measure(model, ids, mode=mode) for mode in ("prompt", "token"))
    fired = []
    handle = model.blocks[0].mlp.fc2.linear.register_forward_pre_hook(lambda m, a: fired.append(a[0]))
    model(ids)
    handle.remove()
    columns = int((fired[0] != 0).any(0).sum())
    name = ("blocks.0.mlp.fc2", "linear")
    assert prompt.row(*name).weight_words == 12 * 6
    assert token.row(*name).weight_words == columns * 6 < 5 * 12 * 6
    assert energy.ann_ledger(token).row(*name).weight_words == 5 * 12 * 6


# bad input


def test_a_model_that_saw_no_input():
    with energy.Recorder(small()) as recorder:
        pass
    with pytest.raises(ValueError, match="energy: the model has seen no input, so there are no operations"):
        recorder.ledger()
    with pytest.raises(ValueError, match="tokens: got none"):
        energy.measure(small(), [])


@pytest.mark.parametrize(
    "name",
    [
        "embedding.token.weight",
        "blocks.1.attention.k.linear.weight",
        "blocks.0.attention.q.norm.bias",
        "blocks.0.mlp.fc1.norm.weight",
        "blocks.0.mlp.fc1.lif.v_threshold",
        "blocks.0.mlp.fc2.norm.running_var",
        "head.linear.bias",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_is_named(name, value):
    """Also where no spike shows it: neurons that get NaN do not fire."""
    model = small(learn_threshold=True, norm="batch")
    with torch.no_grad():
        {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].view(-1)[0] = value
    message = f"model: {re.escape(name)} holds NaN or infinite values, so there is nothing to count or show"
    with pytest.raises(ValueError, match=message):
        energy.measure(model, tokens())
    with pytest.raises(ValueError, match=message):
        viz.record(model, tokens())


def test_further_parameters_that_are_not_finite_are_counted():
    model = small(neuron="ilif", levels=3, timesteps=1)
    with torch.no_grad():
        for p in model.head.parameters():
            p.fill_(math.nan)
    assert not_finite(model) == ["head.linear.weight", "head.linear.bias"]
    with pytest.raises(ValueError, match=r"head\.linear\.weight \(and 1 more\) holds NaN or infinite"):
        energy.measure(model, tokens())


def test_bad_arguments():
    model = small()
    with pytest.raises(TypeError, match="model: got Linear, takes a SpikeDecoder"):
        energy.measure(nn.Linear(2, 2), tokens())
    with pytest.raises(ValueError, match="mode: got 'both'"):
        energy.measure(model, tokens(), mode="both")
    with pytest.raises(TypeError, match="tokens: got NoneType, takes an int64 tensor"):
        energy.measure(model, None)
    with pytest.raises(ValueError, match=r"tokens: got shape \(2,\)"):
        energy.measure(model, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="operations of Conv1d are not known"):
        energy.Recorder(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(ValueError, match="no layer whose operations are known"):
        energy.Recorder(nn.Identity())
    ledger = energy.measure(model, tokens())
    with pytest.raises(ValueError, match="number_format: got 'fp8'"):
        ledger.joules(number_format="fp8")
    with pytest.raises(ValueError, match="activation_bits: got 2 with fp32"):
        ledger.joules(activation_bits=2)
    with energy.Recorder(model, "prompt"), pytest.raises(ValueError, match="takes 'token'"):
        model.prefill(tokens())


def test_decay_and_norm_of_the_attention_are_billed():
    plain = small()
    options = {"decay_fastest": 0.7, "decay_slowest": 0.9, "attention_norm": True}
    model = small(**options)
    ids = tokens()
    c = model.config
    for mode in ("prompt", "token"):
        ledger = energy.measure(model, ids, mode=mode)
        for block in range(c.blocks):
            rows = {
                r.operation: r for r in ledger.rows if r.layer == f"blocks.{block}.attention.attention_lif"
            }
            if mode == "token":
                size = c.embed_dim // c.heads
                numbers = c.timesteps * c.heads * size * size * ids.numel()
                assert (rows["decay"].mul, rows["decay"].state_words) == (numbers, 2 * numbers)
                assert rows["state += k^T v"].state_words == 0
                real = ("state += k^T v", "q state")
            else:
                assert rows["decay"].mul == rows["(q k^T) v"].events and rows["decay"].state_words == 0
                real = ("(q k^T) v",)  # of scores times powers of the decay
            assert {o for o, r in rows.items() if r.kind == "ac" and r.arithmetic == "values"} == set(real)
            assert rows["norm"].count == c.timesteps * ids.numel() * c.embed_dim
        for row in energy.measure(plain, ids, mode=mode).rows:
            assert row.operation != "decay"
            assert row.kind != "ac" or row.arithmetic in ("counts", "weights")


def test_kept_keys_and_values_lie_with_the_state():
    model = small(spike_degree=0).eval()
    ids = tokens()
    b, s = ids.shape
    c = model.config
    whole = energy.measure(model, ids, mode="token")
    with energy.Recorder(model, "token") as recorder:  # token by token, the cache grows
        _, state = model.prefill(ids[:, :1])
        for i in range(1, s):
            _, state = model.step(ids[:, i], state)
    for ledger in (whole, recorder.ledger(), energy.ann_ledger(energy.measure(small(), ids, mode="token"))):
        for operation in ("q k^T", "softmax v"):
            row = ledger.row("blocks.0.attention", operation)
            assert row.cache_words == b * (s * (s + 1) // 2 + s) * c.embed_dim
            assert (row.cache_held, row.activation_words) == (s * c.embed_dim, b * s * c.embed_dim)
        kept = c.blocks * 2 * s * c.embed_dim
        for number_format, width in (("fp32", 4), ("int8", 1)):
            estimate = ledger.joules(memory=True, number_format=number_format)
            assert estimate.placement["state"] == energy.EnergyTable.smallest_memory(kept * width)
            words = sum(r.cache_words for r in ledger.rows)
            price = energy.EnergyTable.load("horowitz-45nm").per_bit(estimate.placement["state"])
            assert estimate.by_memory["state"] == pytest.approx(words * width * 8 * price * 1e-12)
    prompt = energy.measure(model, ids, mode="prompt").row("blocks.0.attention", "q k^T")
    assert prompt.cache_words == prompt.cache_held == 0
    assert prompt.activation_words == 2 * b * s * c.embed_dim
