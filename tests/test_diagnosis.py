"""What `diagnose` and ``spikedecoder doctor --checkpoint`` say of healthy and broken models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.activity import record
from spikedecoder.cli import main
from spikedecoder.data import CharTokenizer
from spikedecoder.diagnosis import diagnose
from spikedecoder.energy import measure
from spikedecoder.spike_stats import SpikeCounter
from spikedecoder.training import evaluate
from spikedecoder.training.evaluate import health

TOKENIZER = CharTokenizer.from_text("the quick brown fox jumps over the lazy dog. ")


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def make(**changes: object) -> SpikeDecoder:
    torch.manual_seed(0)
    settings = {"max_len": 16, "token_dim": 24, "position_dim": 8, "blocks": 2, "norm": "layer"}
    config = SpikeDecoderConfig.preset(
        "default-lif",
        **{**settings, "vocab_size": TOKENIZER.vocab_size, "pad_id": TOKENIZER.pad_id, **changes},
    )
    model = SpikeDecoder(config)
    model.tokenizer = TOKENIZER
    with torch.no_grad():  # embeddings of both signs, as after training
        for table in (model.embedding.token, model.embedding.position):
            if table is not None:
                table.weight.normal_()
    return model


def text(model: SpikeDecoder, lines: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(
        0, model.config.vocab_size - 2, (lines, 17), generator=torch.Generator().manual_seed(1)
    )
    return tokens[:, :-1], tokens[:, 1:]


def test_neurons_that_do_not_fire_within_a_few_tokens_are_not_called_dying() -> None:
    model = make()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.norm.bias[: len(block.mlp.fc1.norm.bias) * 3 // 4] = -100.0
    tokens, _ = text(model)
    assert any(f.startswith("dying:") for f in diagnose(model, tokens).findings)
    assert not any(f.startswith("dying:") for f in diagnose(model, tokens[:1, :2]).findings)


def test_a_layer_that_never_fires_is_named() -> None:
    model = make(embedding_gain=1.0)  # 1 - 2^-T never reaches the threshold 1
    diagnosis = diagnose(model, *text(model))
    layers = {x.name: x for x in diagnosis.layers}
    first = layers["blocks.0.attention.input_lif"]
    assert first.rate == 0 and first.dead == 1
    (dead,) = (f for f in diagnosis.findings if f.startswith("dead:"))
    assert "blocks.0.attention.input_lif" in dead and "embedding_gain=2" in dead
    healthy = diagnose(make(), *text(model))
    assert "blocks.0.attention.input_lif" not in str(healthy.findings)


def test_a_layer_that_always_fires_is_named() -> None:
    model = make()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.norm.bias.fill_(50.0)
    diagnosis = diagnose(model, *text(model))
    layers = {x.name: x for x in diagnosis.layers}
    assert layers["blocks.1.mlp.fc1"].rate == 1 and layers["blocks.1.mlp.fc1"].saturated == 1
    assert any(f.startswith("saturated:") and "blocks.1.mlp.fc1" in f for f in diagnosis.findings)
    # fifty thresholds above it, the surrogate is flat too
    assert layers["blocks.1.mlp.fc1"].flat == 1
    assert any(f.startswith("flat:") and "blocks.1.mlp.fc1" in f for f in diagnosis.findings)


def test_integer_neurons_are_judged_over_their_binary_timesteps() -> None:
    model = make(neuron="ilif", levels=3, timesteps=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.norm.bias.fill_(-50.0)
        model.blocks[1].mlp.fc1.norm.bias.fill_(50.0)
        norm = model.blocks[1].attention.q.norm  # always 1: of 0, 1
        norm.weight.zero_()
        norm.bias.fill_(1.0)
    diagnosis = diagnose(model, *text(model))
    layers = {x.name: x for x in diagnosis.layers}
    low, high = layers["blocks.0.mlp.fc1"], layers["blocks.1.mlp.fc1"]
    assert (low.rate, low.dead, low.saturated, low.flat) == (0, 1, 0, 1)
    assert (high.rate, high.dead, high.saturated, high.flat) == (1, 0, 1, 1)
    one = layers["blocks.1.attention.q"]
    assert (one.rate, one.dead, one.saturated, one.flat) == (0.5, 0, 0, 0)
    with SpikeCounter(model) as counter:
        model(text(model)[0])
    assert counter.rates() == pytest.approx({name: x.rate for name, x in layers.items()})
    findings = " ".join(diagnosis.findings)
    assert "dead: no neuron of blocks.0.mlp.fc1" in findings and "saturated: blocks.1.mlp.fc1" in findings
    assert "flat: nearly all currents of" in findings and "surrogate" not in findings


@pytest.mark.parametrize("levels", [4, 5, 8, 15])
def test_integers_that_are_always_the_largest_are_saturated(levels: int) -> None:
    """Whose binary digits need not all be 1."""
    model = make(neuron="ilif", levels=levels, timesteps=1)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.norm.bias.fill_(50.0)
    tokens, _ = text(model)
    diagnosis = diagnose(model, tokens)
    layers = {x.name: x.saturated for x in diagnosis.layers}
    assert layers["blocks.1.mlp.fc1"] == 1 and layers["blocks.0.mlp.fc1"] == 0
    assert any(f.startswith("saturated: blocks.1.mlp.fc1 are") for f in diagnosis.findings)
    (said,) = health(evaluate(model, tokens.flatten().numpy()), model.config)
    assert said.startswith("saturated: blocks.1.mlp.fc1 are nearly always at their largest integer")


@pytest.mark.parametrize("levels", [1, 3, 4, 5, 8, 15])
def test_integers_that_are_nearly_always_the_largest_are_saturated(levels: int) -> None:
    model = make(neuron="ilif", levels=levels, timesteps=1)
    layer = model.blocks[1].mlp.fc1
    with torch.no_grad():
        layer.norm.bias.fill_(levels + 1.2)
    given: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _m, _i, out: given.append(out))
    diagnosis = diagnose(model, text(model, 64)[0])
    (found,) = (x for x in diagnosis.layers if x.name == "blocks.1.mlp.fc1")
    assert found.full == pytest.approx(float((given[0] == levels).float().mean()), abs=1e-6)
    assert 0.9 < found.full < 1 and found.saturated < 0.5
    assert any(f.startswith("saturated: blocks.1.mlp.fc1 ") for f in diagnosis.findings)


@pytest.mark.parametrize("levels", [4, 8])
def test_integers_with_as_many_spikes_as_the_largest_are_not_saturated(levels: int) -> None:
    model = make(neuron="ilif", levels=levels, timesteps=1)
    with torch.no_grad():
        norm = model.blocks[1].mlp.fc1.norm  # always 1: one spike, as the largest takes
        norm.weight.zero_()
        norm.bias.fill_(1.0)
    evaluation = evaluate(model, text(model)[0].flatten().numpy())
    assert evaluation is not None
    assert evaluation.spike_rates["blocks.1.mlp.fc1"] == 1 / levels.bit_length()
    assert evaluation.full["blocks.1.mlp.fc1"] == 0 and health(evaluation, model.config) == []


def test_a_model_that_was_compiled_in_place_is_watched() -> None:
    """torch calls no hook that comes after the first compiled call."""
    model = make().eval()
    tokens, targets = text(model)
    expected, alone = diagnose(model, tokens, targets), record(model, tokens).spikes
    model.compile(backend="eager")
    with torch.no_grad():
        model(tokens)
        assert model._compiled_call_impl is not None
        assert diagnose(model, tokens, targets) == expected
        with SpikeCounter(model) as counter:
            model(tokens)
    assert counter.rates() == pytest.approx({x.name: x.rate for x in expected.layers})
    assert alone and all(torch.equal(s, alone[name]) for name, s in record(model, tokens).spikes.items())
    assert measure(model, tokens).rows
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("learn", ["all", "head", "none"])
def test_gradients_do_not_depend_on_what_learns(learn: str) -> None:
    model = make()
    tokens, targets = text(model)
    expected = [x.gradient for x in diagnose(model, tokens, targets).layers]
    assert None not in expected
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learn == "all" or (learn == "head" and name.startswith("head")))
    assert [x.gradient for x in diagnose(model, tokens, targets).layers] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ignored", [-100, TOKENIZER.pad_id])
def test_gradients_are_of_the_targets_that_count(ignored: int) -> None:
    model = make().eval()
    tokens, targets = text(model)
    few = targets.clone()
    few[:, 2:] = ignored
    seen: list[torch.Tensor] = []

    def watch(_module: object, _inputs: object, spikes: torch.Tensor) -> None:
        spikes.register_hook(seen.append)

    handle = model.head.lif.register_forward_hook(watch)
    logits = model(tokens)[:, :2]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), few[:, :2].flatten(), reduction="sum").backward()
    handle.remove()
    found = {x.name: x.gradient for x in diagnose(model, tokens, few).layers}["head.lif"]
    assert found == pytest.approx(float(seen[0].square().mean().sqrt()), rel=1e-5)
    with pytest.raises(ValueError, match="targets: got none that counts"):
        diagnose(model, tokens, torch.full_like(targets, ignored))


def test_gradients_are_those_of_the_loss_and_leave_no_trace() -> None:
    model = make().train()
    tokens, targets = text(model)
    model.loss(tokens, targets).backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    seen: list[torch.Tensor] = []

    def watch(_module: object, _inputs: object, spikes: torch.Tensor) -> None:
        spikes.register_hook(seen.append)

    handle = model.head.lif.register_forward_hook(watch)
    model.eval()
    (model.loss(tokens, targets) * targets.numel()).backward()
    handle.remove()
    for name, parameter in model.named_parameters():
        parameter.grad = kept.get(name)
    model.train()

    diagnosis = diagnose(model, tokens, targets)
    layers = {x.name: x for x in diagnosis.layers}
    assert layers["head.lif"].gradient == pytest.approx(float(seen[0].square().mean().sqrt()), rel=1e-5)
    assert model.training
    for name, parameter in model.named_parameters():
        if name in kept:
            torch.testing.assert_close(parameter.grad, kept[name], rtol=0, atol=0)


def test_a_gradient_that_vanishes_is_named() -> None:
    model = make()
    with torch.no_grad():  # nothing comes back through the second block's MLP
        model.blocks[1].mlp.fc2.norm.weight.fill_(1e-9)
    diagnosis = diagnose(model, *text(model))
    assert any(f.startswith("vanishing gradient:") and "blocks.1.mlp" in f for f in diagnosis.findings)


def test_a_threshold_that_drifted_is_named() -> None:
    model = make(learn_threshold=True)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.lif.v_threshold.fill_(0.2)
    diagnosis = diagnose(model, *text(model))
    (drift,) = (f for f in diagnosis.findings if f.startswith("drifting thresholds:"))
    assert "blocks.0.mlp.fc1 (0.2)" in drift and "from 1 at the start" in drift
    assert "learn_threshold=false" in drift


@pytest.mark.parametrize(
    ("start", "now", "drifts"),
    [(-0.5, None, False), (-0.5, 0.1, True), (-0.5, -0.8, True), (0.0, 0.4, False), (0.0, 1.1, True)],
)
def test_thresholds_drift_by_their_distance_from_rest(start: float, now: float | None, drifts: bool) -> None:
    model = make(v_reset=-1.0, v_threshold=start, learn_threshold=now is not None)
    if now is not None:
        with torch.no_grad():
            model.blocks[0].mlp.fc1.lif.v_threshold.fill_(now)
    findings = diagnose(model, *text(model)).findings
    assert any(f.startswith("drifting thresholds: blocks.0.mlp.fc1 ") for f in findings) == drifts
    assert sum(f.startswith("drifting thresholds:") for f in findings) == drifts


ILIF = {"neuron": "ilif", "timesteps": 1, "v_threshold": 0.2, "attention_scale": 0.001}


@pytest.mark.parametrize("neurons", [{}, {**ILIF, "levels": 15}], ids=["lif", "ilif"])
@pytest.mark.parametrize(
    "name",
    [
        "head.linear.weight",
        "head.linear.bias",
        "embedding.token.weight",
        "blocks.0.attention.q.linear.weight",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(name: str, value: float, neurons: dict[str, object]) -> None:
    model = make(**neurons)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    for targets in (None, text(model)[1]):
        (finding,) = diagnose(model, text(model)[0], targets).findings
        assert finding.startswith(f"not finite: values of {name}")


def test_a_buffer_that_is_not_finite_is_named() -> None:
    model = make(norm="batch")
    model.blocks[1].mlp.fc1.norm.running_var[3] = torch.nan
    (finding,) = diagnose(model, text(model)[0]).findings
    assert finding.startswith("not finite: values of blocks.1.mlp.fc1.norm.running_var. ")


def test_a_loss_and_gradients_that_are_not_finite_are_named() -> None:
    model = make(**ILIF, levels=15)
    with torch.no_grad():
        model.head.linear.weight.fill_(3e38)
    diagnosis = diagnose(model, *text(model))
    assert diagnosis.findings[0].startswith(
        "not finite: the loss (nan); the gradient that reaches the spikes of "
    )
    assert not any(f.startswith("vanishing") for f in diagnosis.findings)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_that_are_all_0_are_named(frozen: bool) -> None:
    model = make(**ILIF, levels=15)
    with torch.no_grad():
        model.head.linear.weight.zero_()
    if frozen:
        model.requires_grad_(False)
    diagnosis = diagnose(model, *text(model))
    assert all(x.gradient == 0 for x in diagnosis.layers)
    (finding,) = diagnosis.findings
    assert finding.startswith("vanishing gradient: none reaches the spikes of blocks.0.attention.input_lif")
    assert "a head whose weights are not 0" in finding
    assert diagnose(model, text(model)[0]).findings == []


@pytest.mark.parametrize(
    ("changes", "advised", "not_advised"),
    [
        ({**ILIF, "levels": 15}, {"fewer blocks"}, {"more levels", "more timesteps", "surrogate"}),
        ({**ILIF, "levels": 4}, {"more levels", "fewer blocks"}, {"more timesteps", "surrogate"}),
        ({}, {"more timesteps", "fewer blocks"}, {"more levels", "spiking_residuals", "embedding_gain=2"}),
        ({"blocks": 1, "embedding_gain": 1.5}, {"embedding_gain=2"}, {"fewer blocks"}),
        ({"spiking_residuals": 1}, {"spiking_residuals=0"}, {"a decay"}),
        (
            {"surrogate": "atan", "attention_norm": True},
            {"a smaller surrogate_alpha"},
            {"atan", "attention_norm"},
        ),
        ({"decay_fastest": 1.0, "decay_slowest": 1.0}, {"a decay", "attention_norm=true"}, set()),
    ],
)
def test_only_what_the_config_takes_is_advised(
    changes: dict[str, object], advised: set[str], not_advised: set[str]
) -> None:
    model = make(**changes)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.norm.bias.fill_(-500.0)
        model.blocks[0].attention.q.norm.bias.fill_(500.0)
    said = " ".join(diagnose(model, *text(model)).findings)
    for kind in ("dead:", "saturated:", "flat:", "vanishing gradient:"):
        assert kind in said
    assert {words for words in advised | not_advised if words in said} == advised


@pytest.mark.parametrize("targets", [[[1, 2]], "abc", 3])
def test_targets_of_another_kind_are_named(targets: object) -> None:
    with pytest.raises(TypeError, match=r"targets: got .*, takes an int64 or int32 tensor"):
        diagnose(make(), text(make())[0], targets)  # type: ignore[arg-type]


def test_a_model_without_neurons_is_refused() -> None:
    model = make(spike_degree=0, embedding_gain=1.0)
    with pytest.raises(ValueError, match="no spiking layer"):
        diagnose(model, *text(model))


def test_doctor_examines_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(embedding_gain=1.0)
    model.save_pretrained(tmp_path / "m")
    assert run("doctor", "--checkpoint", tmp_path / "m", "--json") == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["tokens"] == 64 and any("embedding_gain=2" in f for f in got["findings"])
    assert {x["name"] for x in got["layers"]} >= {"blocks.0.attention.input_lif", "head.lif"}

    assert run("doctor", "--checkpoint", tmp_path / "m") == 0
    said = capsys.readouterr().out  # as on 80 columns: every figure whole
    assert "blocks.1.mlp.fc1" in said and "threshold" in said and "…" not in said
    assert "the surrogate has less than 1 % of its steepest slope" in " ".join(said.split())

    make(**ILIF, levels=15).save_pretrained(tmp_path / "ilif")
    assert run("doctor", "--checkpoint", tmp_path / "ilif") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "flat: currents beyond the levels" in said and "surrogate" not in said


def test_what_doctor_prints_as_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(**ILIF, levels=15)
    with torch.no_grad():
        model.head.linear.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "m")
    assert run("doctor", "--checkpoint", tmp_path / "m", "--json") == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert got["layers"] and all(x["gradient"] is None for x in got["layers"])
    assert got["findings"][0].startswith("not finite: values of head.linear.weight")


def test_doctor_names_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--checkpoint", tmp_path / "none") != 0
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("§")
    assert run("doctor", "--text", tmp_path / "text.txt") != 0
    assert "--checkpoint" in capsys.readouterr().err
    make().save_pretrained(tmp_path / "m")
    assert run("doctor", "-c", tmp_path / "m", "--text", tmp_path / "text.txt") != 0
    assert "takes two or more" in capsys.readouterr().err


def test_doctor_says_what_it_did_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("a cat Ж sat " * 30, encoding="utf-8")
    assert run("doctor", "-c", tmp_path / "m", "--text", tmp_path / "text.txt") == 0
    assert "The model does not know, and did not read: 'Ж'" in capsys.readouterr().out
