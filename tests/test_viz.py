"""Pictures: what they show is what the model did; what cannot be shown is said."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy, viz
from spikedecoder.activity import Activity
from spikedecoder.generation import SamplingParams, generate
from spikedecoder.spike_stats import SpikeCounter

matplotlib = pytest.importorskip("matplotlib")

LABELS = list("the ca")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = SpikeDecoderConfig(
        vocab_size=9,
        max_len=8,
        token_dim=6,
        position_dim=4,
        heads=2,
        blocks=2,
        timesteps=3,
        mlp_ratio=2,
        embedding_gain=2.0,
        norm="batch",
        v_reset=None,
    )
    model = SpikeDecoder(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.bias"):
                p.add_(torch.randn_like(p) + 0.5)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def activity(model, tokens):
    return viz.record(model, tokens, potentials=True, scores=True)


def png(fig, tmp_path):
    data = viz.save(fig, tmp_path / "figure.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 2000
    return data


def test_the_record_holds_what_fired(model, tokens, activity):
    with SpikeCounter(model) as counter, torch.no_grad():
        model(tokens)
    counts = {name: int(s.sum()) for name, s in activity.spikes.items()}
    assert counts == {name: spikes for name, (spikes, *_) in counter.counts().items()}
    assert any(counts.values())
    for name, rate in counter.rates().items():
        assert float(activity.rates()[name].mean()) == pytest.approx(rate)
    s = activity.spikes["blocks.0.mlp.fc1"]
    dead = sum(1 for n in range(s.shape[-1]) if not s[..., n].any())
    full = sum(1 for n in range(s.shape[-1]) if s[..., n].all())
    assert activity.dead()["blocks.0.mlp.fc1"] == pytest.approx(dead / s.shape[-1])
    assert activity.saturated()["blocks.0.mlp.fc1"] == pytest.approx(full / s.shape[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_norm": True, "decay_fastest": 0.5, "decay_slowest": 0.9},
        {"neuron": "ilif", "levels": 3, "timesteps": 1, "v_reset": None},
    ],
    ids=("plain", "norm", "ilif"),
)
def test_a_neuron_fires_where_its_potential_reaches_the_threshold(model, tokens, changes):
    torch.manual_seed(0)
    other = SpikeDecoder(model.config.replace(attention_scale=1.0, **changes)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    for block in other.blocks:
        if block.attention.attention_lif.norm is not None:
            torch.nn.init.constant_(block.attention.attention_lif.norm.bias, 1.5)
    activity = viz.record(other, tokens, potentials=True)
    assert activity.spikes["blocks.1.attention.attention_lif"].any()
    assert activity.potentials.keys() == activity.spikes.keys()
    assert len(activity.spikes["head.lif"]) == other.config.binary_timesteps
    for name, h in activity.potentials.items():
        fires = h >= activity.thresholds[name]
        far = (
            h - activity.thresholds[name]
        ).abs() > 1e-4  # sums of another order may differ at the threshold
        assert torch.equal(fires[far], activity.spikes[name][far]), name


@pytest.mark.parametrize(
    "changes", [{}, {"neuron": "ilif", "levels": 3, "timesteps": 1, "v_reset": None}], ids=("lif", "ilif")
)
def test_a_record_is_made_of_numbers_that_are_none_only_if_asked_for(model, tokens, changes):
    broken = SpikeDecoder(model.config.replace(**changes)).eval()
    with torch.no_grad():
        broken.blocks[0].mlp.fc1.norm.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"model: blocks\.0\.mlp\.fc1\.norm\.bias holds NaN"):
        viz.record(broken, tokens)
    activity = viz.record(broken, tokens, potentials=True, scores=True, check=False)
    assert activity.potentials["blocks.0.mlp.fc1"].isnan().all()
    assert not activity.spikes["blocks.0.mlp.fc1"].any()


def test_sums_beyond_the_range_of_floats_are_named_with_their_layer(model, tokens):
    plain = SpikeDecoder(model.config.replace(spike_degree=0)).eval()
    spiking = SpikeDecoder(model.config).eval()
    with torch.no_grad():
        for part in (plain.blocks[1].attention.q, plain.blocks[1].attention.k):
            part.norm.weight.fill_(1e30)
        spiking.blocks[0].mlp.fc1.norm.weight.fill_(1e38)
        spiking.blocks[0].mlp.fc1.norm.bias.fill_(3e38)
    with pytest.raises(ValueError, match=r"scores of blocks\.1\.attention: NaN or infinite"):
        viz.record(plain, tokens, scores=True)
    with pytest.raises(ValueError, match=r"potentials of blocks\.0\.mlp\.fc1: NaN or infinite"):
        viz.record(spiking, tokens, potentials=True)


def test_scores_are_q_times_k(model, tokens, activity):
    seen = {}
    attention = model.blocks[1].attention.attention_lif
    handle = attention.register_forward_pre_hook(lambda m, args: seen.update(q=args[0], k=args[1]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    d = 5
    for head in range(2):
        part = slice(head * d, head * d + d)
        expected = (seen["q"][:, 1, 4, part] * seen["k"][:, 1, 2, part]).sum()
        assert activity.scores["blocks.1.attention.attention_lif"][1, head, 4, 2] == expected


def test_scores_of_integers_are_called_so(model, tokens, activity):
    other = SpikeDecoder(model.config.replace(neuron="ilif", levels=15, timesteps=1)).eval()
    seen = viz.record(other, tokens, scores=True)
    assert (activity.score, seen.score) == ("spikes that coincide", "q k of integers")
    figure = viz.attention_map(seen)
    assert any(ax.get_ylabel() == seen.score for ax in figure.axes)


@pytest.mark.parametrize("degree", [0, 1])
def test_softmax_attention_shows_its_weights(model, tokens, degree):
    config = model.config.replace(spike_degree=degree, token_shift=2)
    model = SpikeDecoder(config).eval()
    seen = viz.record(model, tokens, scores=True)
    name = "blocks.0.attention"
    weights = seen.scores[name]
    assert list(seen.scores) == [f"blocks.{i}.attention" for i in range(config.blocks)]
    assert not seen.spikes and not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    taken = {}
    attention = model.get_submodule(name)
    attention.proj.register_forward_pre_hook(lambda _, inputs: taken.update(out=inputs[0]))
    attention.v.register_forward_hook(lambda _, inputs, output: taken.update(v=output))
    model(tokens)
    v = taken["v"].unflatten(-1, (config.heads, -1)).transpose(1, 2)
    torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(-2), taken["out"])
    figure = viz.attention_map(seen)
    assert "attention weight" in {ax.get_ylabel() for ax in figure.axes}
    for picture in (viz.raster, viz.spike_rates):
        with pytest.raises(ValueError, match="activity: holds no spikes"):
            picture(seen)
    with pytest.raises(ValueError, match="no spiking layer"):
        viz.record(SpikeDecoder(config.replace(spike_degree=0)), tokens)


def test_the_raster_draws_each_spike(activity, tmp_path):
    fig = viz.raster(activity, "blocks.0.mlp.fc1", labels=LABELS, sequence=1)
    panels = [ax for ax in fig.axes if ax.images]
    assert len(panels) == 3
    for t, ax in enumerate(panels):
        drawn = torch.as_tensor(ax.images[0].get_array().data)
        assert torch.equal(drawn.bool(), activity.spikes["blocks.0.mlp.fc1"][t, 1].T)
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["t", "h", "e", "␣", "c", "a"]
    png(fig, tmp_path)


def test_neurons_and_tokens_are_counted_in_whole_numbers():
    for ax in viz.raster(Activity({"layer": torch.ones(1, 1, 4, 3, dtype=torch.bool)})).axes:
        for ticks in (ax.get_xticks(), ax.get_yticks()):
            assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)


def test_every_figure_can_be_written(activity, tmp_path):
    for fig in (
        viz.spike_rates(activity),
        viz.potentials(activity, ["head.lif", "blocks.1.mlp.fc1"]),
        viz.attention_map(activity, labels=LABELS, heads=[1]),
    ):
        png(fig, tmp_path)
    for ending, start in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = viz.save(viz.raster(activity), tmp_path / f"figure{ending}")
        assert path.read_bytes().startswith(start)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pdf", ".png", ".svg"]  # no temporary file stays


def test_predictions_show_probabilities_and_any_text(model, tmp_path):
    result = generate(model, [[1, 2]], 5, SamplingParams(seed=0), top=3)
    names = ["$x^2$", " ", "\n", "a_very_long_word_indeed", "\\frac", "é", "f", "g", "h"]
    fig = viz.predictions(result.tokens[0], result.predictions[0], names, rows=9)
    ax = fig.axes[0]
    grid = torch.as_tensor(ax.images[0].get_array().filled(-1))
    given = sorted(p.probability for at in result.predictions[0] for p in at)
    assert sorted(grid[grid >= 0].tolist()) == pytest.approx(given)
    png(fig, tmp_path)
    assert ax.get_title() == "Predictions; framed: the token chosen"
    few = viz.predictions(result.tokens[0], result.predictions[0], names, rows=1).axes[0]
    assert re.fullmatch(r"Predictions of 1 of \d tokens; .*", few.get_title())
    some = viz.predictions(result.tokens[0], result.predictions[0], names, limit=2).axes[0]
    assert "; first 2 of 5 generated; framed" in some.get_title()
    with pytest.raises(ValueError, match="candidates: got none"):
        viz.predictions([1], [[]], names)
    with pytest.raises(ValueError, match="candidates: got 1, takes 2"):
        viz.predictions([1, 2], [[]], names)
    for name, value in (("rows", 0), ("limit", -1)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, takes an integer >= 1"):
            viz.predictions(result.tokens[0], result.predictions[0], names, **{name: value})


@pytest.mark.parametrize("memory", [False, True])
def test_energy_bars_are_as_long_as_the_estimates(model, tokens, memory, tmp_path):
    mode = "token" if memory else "prompt"
    comparison = energy.compare({"a $model$": energy.measure(model, tokens, mode=mode)}, memory=memory)
    fig = viz.energy_bars(comparison)
    moved = "with memory" if memory else "arithmetic only, memory left out"
    assert fig.axes[0].get_title() == f"Estimate (horowitz-45nm; {mode} mode; {moved})"
    ends = [0.0] * 5
    for container in fig.axes[0].containers:
        for i, bar in enumerate(container):
            ends[i] = max(ends[i], bar.get_x() + bar.get_width())
    joules = [entry.estimate.per_token for entry in comparison.entries]
    assert [end / max(ends) for end in ends] == pytest.approx([j / max(joules) for j in joules])
    png(fig, tmp_path)


def test_loss_curves_read_runs(tmp_path):
    for name, lines in (
        ("one", [{"step": 1, "loss": 3.0}, {"step": 2, "val_loss": 2.5, "val_bits_per_token": 3.6}]),
        ("two", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]),
    ):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'
        (tmp_path / name / "metrics.jsonl").write_bytes(text.encode() + b"\xff\0\n")
    fig = viz.loss_curves([tmp_path / "one", tmp_path / "two" / "metrics.jsonl"])
    drawn = [line.get_xydata().tolist() for line in fig.axes[0].lines]
    assert [[1.0, 3.0]] in drawn and [[2.0, 2.5]] in drawn and [[1.0, 2.0], [2.0, 1.5]] in drawn
    png(fig, tmp_path)
    (tmp_path / "more" / "one").mkdir(parents=True)
    shutil.copy(tmp_path / "two" / "metrics.jsonl", tmp_path / "more" / "one")
    same = [tmp_path / "one", tmp_path / "two", tmp_path / "more" / "one", f"{tmp_path}/one/"]
    fig = viz.loss_curves(same)  # a last part that two runs share hides none of them
    drawn = [line.get_xydata().tolist() for line in fig.axes[0].lines]
    assert [[1.0, 3.0]] in drawn and drawn.count([[1.0, 2.0], [2.0, 1.5]]) == 2
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == [str(tmp_path / "one"), "two", str(tmp_path / "more" / "one")]
    with pytest.raises(FileNotFoundError, match=r"runs: .*none"):
        viz.loss_curves({"x": tmp_path / "none"})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no losses"):
        viz.loss_curves([tmp_path / "empty.jsonl"])
    with pytest.raises(ValueError, match="runs: got none"):
        viz.loss_curves([])


def test_bad_input(model, tokens, activity, tmp_path):
    with pytest.raises(ValueError, match="layer: got 'x', takes one of blocks"):
        viz.raster(activity, "x")
    with pytest.raises(ValueError, match="sequence: got 2, takes 0 to 1"):
        viz.raster(activity, sequence=2)
    with pytest.raises(ValueError, match="labels: got 2, takes 6"):
        viz.raster(activity, labels=["a", "b"])
    with pytest.raises(ValueError, match="heads: got 2, takes 0 to 1"):
        viz.attention_map(activity, heads=[2])
    for wrong in (1.5, None, [0]):
        with pytest.raises(ValueError, match=r"sequence: got .*, takes 0 to 1"):
            viz.attention_map(activity, sequence=wrong)
    with pytest.raises(TypeError, match="heads: got 3, takes numbers of heads"):
        viz.attention_map(activity, heads=3)
    with pytest.raises(ValueError, match="heads: got none"):
        viz.attention_map(activity, heads=[])
    with pytest.raises(ValueError, match="layer: got 'x', takes one of blocks"):
        viz.attention_map(activity, "x")
    with pytest.raises(ValueError, match=r"layer: got \['x'\], takes one of blocks"):
        viz.raster(activity, ["x"])
    with pytest.raises(TypeError, match="layers: got str, takes names of layers"):
        viz.potentials(activity, "blocks.0.mlp.fc1")
    with pytest.raises(ValueError, match="layers: got none"):
        viz.potentials(activity, [])
    with pytest.raises(ValueError, match="bins: got 0, takes an integer >= 1"):
        viz.potentials(activity, bins=0)
    for picture in (viz.potentials, viz.attention_map):
        with pytest.raises(ValueError, match="activity: holds no tokens"):
            picture(activity.last(0))
    trial = {"number": 0, "state": "complete", "bits": 1.0, "params": {}}
    with pytest.raises(ValueError, match="trials: got none with params"):
        viz.sweep_slices([trial])
    with pytest.raises(ValueError, match="trials: got none that has held-out bits"):
        viz.sweep_history([{**trial, "bits": None}])
    with pytest.raises(TypeError, match="labels: got int, takes the text of each token"):
        viz.raster(activity, labels=3)
    for picture in (viz.raster, viz.spike_rates, viz.potentials, viz.attention_map):
        with pytest.raises(TypeError, match="activity: got NoneType, takes Activity"):
            picture(None)
    with pytest.raises(TypeError, match="comparison: got NoneType, takes Comparison"):
        viz.energy_bars(None)
    bare = viz.record(model, tokens)
    with pytest.raises(ValueError, match="scores=True"):
        viz.attention_map(bare)
    with pytest.raises(ValueError, match="potentials=True"):
        viz.potentials(bare)
    with pytest.raises(ValueError, match="has no spiking layer"):
        viz.record(SpikeDecoder(model.config.replace(spike_degree=0)), tokens)
    with pytest.raises(TypeError, match="model: got int"):
        viz.record(3, tokens)
    with pytest.raises(ValueError, match=r"ends in \.png"):
        viz.save(viz.raster(activity), tmp_path / "figure.bmp")
    with pytest.raises(TypeError, match="picture: got NoneType, takes a str or Path"):
        viz.save(viz.raster(activity), None)
    with pytest.raises(TypeError, match="fig: got str, takes a figure"):
        viz.save("figure.png", tmp_path / "figure.png")


def test_without_matplotlib_the_way_to_get_it_is_said(activity, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'spikedecoder\[viz\]'"):
        viz.raster(activity)


def test_importing_viz_leaves_matplotlib_alone(monkeypatch):
    for name in [
        n for n in sys.modules if n.split(".")[0] == "matplotlib" or n.startswith("spikedecoder.viz")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("spikedecoder.viz", viz)  # an import rebinds it
    assert importlib.import_module("spikedecoder.viz").raster is not viz.raster
