"""Runs that begin with a model's weights, in Python and on the command line."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli_train import SMALL, STORY, result, run
from training import StopAt, corpus, files, settings, tiny  # noqa: F401

from spikedecoder import CheckpointError, SpikeDecoder
from spikedecoder.data import CharTokenizer, Corpus
from spikedecoder.training import Reporter, train
from spikedecoder.training.checkpoints import read_step


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_begins_with_a_models_weights_and_goes_on_bit_for_bit(corpus: Corpus, tmp_path: Path) -> None:
    class First(Reporter):
        """What the run has before its first step."""

        weights: dict[str, torch.Tensor]

        def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
            if step == 0:
                self.weights = SpikeDecoder.from_pretrained(out / "last").state_dict()

    config, out = tiny(corpus, norm="batch", learn_threshold=True), tmp_path / "run"
    half = train(config, corpus, settings(steps=4), out=tmp_path / "before").model.half()
    config = config.replace(mlp_dropout=0.2)
    first = First()
    train(config, corpus, settings(save_every=0), out=out, init=half, reporter=first)
    for name, weight in half.state_dict().items():
        own = first.weights.pop(name)
        assert torch.equal(own, weight.to(own.dtype)), name
        assert own.dtype == torch.float32 or not own.is_floating_point()
    assert not first.weights
    stopped = tmp_path / "stopped"
    train(config, corpus, settings(save_every=0), out=stopped, init=half, reporter=StopAt(3))
    train(config, corpus, settings(save_every=0), out=stopped, resume=True)
    assert files(stopped / "last") == files(out / "last")


def test_what_a_run_cannot_begin_with(corpus: Corpus, tmp_path: Path) -> None:
    model = SpikeDecoder(tiny(corpus))
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"init: weights do not fit the config: missing blocks\.1\."):
        train(tiny(corpus, blocks=2), corpus, settings(), out=out, init=model)
    model.tokenizer = CharTokenizer.from_text(["other"])
    with pytest.raises(ValueError, match="init: its tokenizer is another than the corpus'"):
        train(tiny(corpus), corpus, settings(), out=out, init=model)
    with pytest.raises(ValueError, match="init: not together with resume"):
        train(tiny(corpus), corpus, settings(), out=out, init=model, resume=True)
    with pytest.raises(TypeError, match="model: got str, takes a SpikeDecoder"):
        train(tiny(corpus), corpus, settings(), out=out, init="runs/x")  # type: ignore[arg-type]
    assert not out.exists() or not any(out.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out, other = tmp_path / "base", tmp_path / "fine", tmp_path / "other.txt"
    story = tmp_path / "story.txt"
    story.write_text(STORY)
    other.write_text("the hat ran to the öther cat. " * 60)
    assert run("train", "--text", story, "--out", base, "--max-steps", "3", *SMALL, "--lr", "0.003") == 0
    capsys.readouterr()
    flags = ["--text", other, "--out", out, "--max-steps", "4"]
    assert run("train", "--init", base, *flags, "--json") == 0
    said = capsys.readouterr()
    got = json.loads(said.out.splitlines()[-1])
    assert f"begins with the weights of {base}" in said.err
    assert f"unknown characters: {got['val_unknown']:.1%}" in said.err and got["val_unknown"] > 0
    begun, ended = SpikeDecoder.from_pretrained(base), SpikeDecoder.from_pretrained(out)
    assert ended.tokenizer == begun.tokenizer and ended.config == begun.config
    kept = json.loads((out / "run.json").read_text())
    assert kept["train"]["lr"] == 0.003 and kept["source"]["init"] == str(base)
    assert result(capsys, "train", "--resume", out, "--max-steps", "6")["steps"] == 6
    assert read_step(out / "last") == 6
    # of a model alone, with the settings of the default preset
    begun.save_pretrained(tmp_path / "alone")
    more = ["--out", tmp_path / "more", "--max-steps", "1"]
    assert result(capsys, "train", "--init", tmp_path / "alone", "--text", other, *more)["steps"] == 1
    for wrong, why in (
        (["--preset", "default"], "--preset: not together with --init"),
        (["--tokenizer", "word"], "tokenizer: not together with --init"),
        (["--blocks", "2"], "init: weights do not fit the config"),
        (["--resume", out], "--init: not together with --resume"),
    ):
        asked = [] if "--resume" in wrong else ["--out", tmp_path / "new", "--text", other]
        assert run("train", "--init", base, *asked, *wrong) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
