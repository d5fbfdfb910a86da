"""Training: settings, evaluation, checkpoints that survive a kill."""

# ruff: noqa: F811 (fixtures)

import dataclasses
import errno
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from training import StopAt, corpus, settings, tiny  # noqa: F401

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.data import Corpus
from spikedecoder.presets import PRESETS
from spikedecoder.spike_stats import SpikeCounter
from spikedecoder.training import (
    TRAIN_PRESETS,
    TrainConfig,
    evaluate,
    health,
    train,
)
from spikedecoder.training.checkpoints import latest, publish, read_step, save_checkpoint

# --- settings ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", 0),
        ("grad_accum", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", "fast"),
        ("min_lr", 1.0),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("beta2", 1.0),
        ("clip", -1.0),
        ("eval_tokens", 0),
        ("save_every", -1),
        ("seed", -1),
        ("mixed_precision", "fp8"),
        ("device", "tpu"),
        ("threads", 0),
        ("threads", 5000),
        ("compile", 1),
        ("cuda_graph", 1),
        ("tokenizer", "bpe"),
        ("val_fraction", 1.0),
    ],
)
def test_bad_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: got "):
        TrainConfig.from_dict({field: value})


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean batch_size"):
        TrainConfig.from_dict({"batchsize": 3})


def test_settings_survive_json() -> None:
    config = settings(lr=1, min_lr=None, eval_tokens=None)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.lr == 1.0 and isinstance(config.lr, float)


def test_presets_have_the_names_of_the_models() -> None:
    assert set(TRAIN_PRESETS) == set(PRESETS)
    for name in TRAIN_PRESETS:
        TrainConfig.preset(name)
    with pytest.raises(ValueError, match="preset: got 'defualt', takes one of default, "):
        TrainConfig.preset("defualt")


def test_model_and_training_share_no_field_name() -> None:
    model = {f.name for f in dataclasses.fields(SpikeDecoderConfig)}
    assert not model & {f.name for f in dataclasses.fields(TrainConfig)}


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    c = TrainConfig(steps=101, warmup=10, lr=1.0, min_lr=0.1)
    rates = [c.lr_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)  # half way down
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert TrainConfig(steps=1, warmup=50).lr_at(0) == TrainConfig().lr  # warm-up never fills a short run


# --- evaluation ---


def test_evaluation_is_the_mean_over_every_held_out_target(corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = SpikeDecoder(tiny(corpus)).double()
    val = corpus.val[:40]  # two windows of 16 and one of 7 targets
    got = evaluate(model, val, batch_size=2)
    assert got is not None
    losses, hits = [], 0
    with torch.no_grad():
        for start in range(0, 39, 16):
            window = torch.from_numpy(val[start : start + 17].astype("int64"))
            logits = model.eval()(window[None, :-1])[0]
            losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
            hits += int((logits.argmax(-1) == window[1:]).sum())
    assert (got.tokens, got.of_tokens, len(losses)) == (39, 39, 39)
    assert got.loss == pytest.approx(sum(losses) / 39, abs=1e-6)
    assert got.bits == pytest.approx(got.loss / math.log(2))
    assert got.accuracy == hits / 39


def test_evaluation_of_a_part_says_so(corpus: Corpus) -> None:
    model = SpikeDecoder(tiny(corpus))
    model.train()
    part, whole = evaluate(model, corpus.val, max_tokens=20), evaluate(model, corpus.val)
    assert part is not None and whole is not None
    assert model.training
    model.head.eval()  # frozen
    evaluate(model, corpus.val, max_tokens=20)
    assert model.training and model.blocks.training and not model.head.training
    assert part.tokens == 20 and part.covers.startswith("the first 20 of ")
    assert whole.tokens == len(corpus.val) - 1 and whole.covers.startswith("all ")
    padded = corpus.val[:40].copy()
    padded[[0, 5, 6, 39]] = model.config.pad_id
    part, whole = evaluate(model, padded, max_tokens=20), evaluate(model, padded)
    assert part is not None and whole is not None
    assert whole.covers == "all 36 held-out tokens"  # the first is no target, and padding is none
    assert part.covers == "the first 18 of 36 held-out tokens"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tokens", x) for x in (None, "text", [1, 2, 3], np.zeros(9), np.zeros((3, 3), int), 0.5)),
        *(("batch_size", x) for x in ("8", None, 0.5, 0)),
        *(("max_tokens", x) for x in ("8", 0.5, -1)),
    ],
)
def test_what_cannot_be_evaluated_is_named(corpus: Corpus, name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*got"):
        evaluate(SpikeDecoder(tiny(corpus)), **{"tokens": corpus.val, name: value})  # type: ignore[arg-type]


def test_evaluation_leaves_out_padding(corpus: Corpus) -> None:
    model = SpikeDecoder(tiny(corpus))
    val = corpus.val[:17].copy()
    val[5] = model.config.pad_id
    got = evaluate(model, val)
    assert got is not None and got.tokens == 15


def watched_reading(model: SpikeDecoder) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens, which of them count, and what every module returns last, by name."""
    tokens, mask = torch.randint(2, model.config.vocab_size, (3, 16)), torch.rand(3, 16) < 0.5
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
    return tokens, mask, outputs


def test_spike_rates_count_spikes_where_targets_count(corpus: Corpus) -> None:
    torch.manual_seed(1)
    model = SpikeDecoder(tiny(corpus)).eval()
    tokens, mask, outputs = watched_reading(model)
    with torch.no_grad(), SpikeCounter(model) as counter:
        counter.mask = mask
        model(tokens)
        model(tokens)
    rates = counter.rates()
    fused = ["blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.v", "blocks.0.mlp.fc1"]
    alone = ["blocks.0.attention.input_lif", "blocks.0.attention.attention_lif", "blocks.0.mlp.input_lif"]
    assert set(rates) == {*fused, *alone, "head.lif"}
    for name, rate in rates.items():
        assert rate == pytest.approx(float(outputs[name].transpose(1, 0)[:, :].movedim(0, 1)[:, mask].mean()))
    assert 0 < rates["blocks.0.attention.input_lif"] < 1
    with torch.no_grad():
        model(tokens)
    assert counter.rates() == rates  # closed: counts no more
    with torch.no_grad(), SpikeCounter(model) as counter, pytest.raises(ValueError, match=r"mask: got shape"):
        counter.mask = mask[0]
        model(tokens)


@pytest.mark.parametrize("levels", [4, 7, 15])
def test_integers_count_as_the_ones_among_their_digits(corpus: Corpus, levels: int) -> None:
    torch.manual_seed(1)
    model = SpikeDecoder(tiny(corpus, neuron="ilif", levels=levels, timesteps=1, v_reset=None)).eval()
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.norm.bias, std=10.0)  # so that some are at the largest
    tokens, mask, outputs = watched_reading(model)
    with torch.no_grad(), SpikeCounter(model) as counter:
        counter.mask = mask
        model(tokens)
    digits = levels.bit_length()
    largest = 0
    for name, (spikes, full, slots) in counter.counts().items():
        integers = [int(n) for n in outputs[name][:, mask].flatten()]
        assert spikes == sum(n.bit_count() for n in integers)
        assert full == digits * integers.count(levels)
        assert slots == digits * len(integers)
        largest += full
    assert largest > 0


def test_dead_and_saturated_layers_are_reported_in_words(corpus: Corpus) -> None:
    silent = SpikeDecoder(tiny(corpus, embedding_gain=1.0, timesteps=4))
    report = health(evaluate(silent, corpus.val, max_tokens=64), silent.config)  # type: ignore[arg-type]
    assert any(text.startswith("dead") and "blocks.0.attention.input_lif" in text for text in report)
    assert any("embedding_gain" in text for text in report)
    full = SpikeDecoder(tiny(corpus, learn_threshold=True))
    for name, parameter in full.named_parameters():
        if name.endswith("v_threshold"):
            torch.nn.init.constant_(parameter, -50.0)
    report = health(evaluate(full, corpus.val, max_tokens=64), full.config)  # type: ignore[arg-type]
    assert len(report) == 1 and report[0].startswith("saturated") and "v_threshold" in report[0]
    torch.manual_seed(0)
    fine = SpikeDecoder(tiny(corpus, attention_scale=2.0))
    assert health(evaluate(fine, corpus.val), fine.config) == []  # type: ignore[arg-type]


# --- checkpoints ---


class Killed(BaseException):
    pass


class Dying:
    """Lets `calls` file-system calls through, then none: the process is gone, and cleans up nothing."""

    NAMES = ("rename", "replace", "symlink", "fsync", "mkdir", "unlink", "rmdir", "chmod", "open", "write")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return call(*args, **kwargs)

        return wrapper


def test_a_kill_between_any_two_system_calls_leaves_a_whole_checkpoint(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = SpikeDecoder(tiny(corpus))
    model.tokenizer = corpus.tokenizer
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1))
    model.loss(torch.ones(1, 4, dtype=torch.int64), torch.full((1, 4), 2)).backward()
    optimizer.step()
    state = {"recent_losses": [], "best": {}, "evaluated": -1, "evaluation": None, "warnings": []}
    state["scaler"] = None
    folder = save_checkpoint(tmp_path, 1, model, optimizer, state)
    publish(tmp_path, folder, ("last", "best"))
    step, died = 1, 0
    for calls in range(200):
        with monkeypatch.context() as patch:
            Dying(patch, calls)
            try:
                folder = save_checkpoint(tmp_path, step + 1, model, optimizer, state)
                publish(tmp_path, folder, ("last", "best"))
                finished = True
            except Killed:
                finished = False
                died += 1
        found = latest(tmp_path)
        assert found is not None and read_step(found) in (step, step + 1)
        for name in ("last", "best"):
            assert {p.name for p in (tmp_path / name).iterdir()} == {
                "config.json", "model.safetensors", "tokenizer.json", "optimizer.safetensors", "trainer.json"
            }  # fmt: skip
            SpikeDecoder.from_pretrained(tmp_path / name)
        step = read_step(found)
        if finished:
            break
    assert died > 20, "the loop did not meet the calls it is about"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1, "leftovers of the killed ones are deleted"


def test_without_links_last_and_best_are_folders(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    result = train(tiny(corpus), corpus, settings(), out=tmp_path / "run", reporter=StopAt(7))
    assert not (tmp_path / "run" / "last").is_symlink() and (tmp_path / "run" / "last").is_dir()
    result = train(tiny(corpus), corpus, settings(), out=tmp_path / "run", resume=True)
    assert read_step(tmp_path / "run" / "last") == result.step == 12
    assert read_step(tmp_path / "run" / "best") == result.best["step"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
