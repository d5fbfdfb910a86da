"""Training: what a run takes up from its checkpoints, and which it refuses."""

# ruff: noqa: F811 (fixtures)

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Messages, StopAt, corpus, settings, tiny  # noqa: F401

from spikedecoder import CheckpointError
from spikedecoder.checkpoint import read_tensors, write_tensors
from spikedecoder.data import Corpus, ngram_bits
from spikedecoder.training import TrainResult, checkpoints, loop, train
from spikedecoder.training.checkpoints import read_step


@pytest.fixture(scope="module")
def short_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tiny(corpus), corpus, settings(steps=2), out=tmp_path_factory.mktemp("runs") / "short")


def copied(run: TrainResult, folder: Path) -> tuple[Path, Path]:
    """A copy of a run, and the folder of its last checkpoint."""
    out = shutil.copytree(run.out, folder / "run", symlinks=True)
    return out, (out / "last").resolve()


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_other_held_out_tokens_begin_anew(corpus: Corpus, tmp_path: Path) -> None:
    out, before, after = tmp_path / "run", settings(eval_tokens=20), settings(eval_tokens=60)
    train(tiny(corpus), corpus, before, out=out, reporter=StopAt(6))
    easy = {"step": 5, "val_loss": 1e-3, "val_bits_per_token": 1e-3}  # no model is as good on other tokens
    change((out / "last").resolve() / "trainer.json", best=easy)
    heard = Messages()
    resumed = train(tiny(corpus), corpus, after, out=out, resume=True, reporter=heard)
    said = "evaluations predict 60 held-out tokens now, 20 before: the best model is looked for anew"
    assert [text for text in heard.texts if "held-out" in text] == [said]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if line.get("val_tokens") == 60}
    assert list(losses) == [10, 12] and resumed.best["val_loss"] == min(losses.values())
    assert losses[int(resumed.best["step"])] == resumed.best["val_loss"]
    assert json.loads((out / "best" / "trainer.json").read_text())["best"] == resumed.best

    heard = Messages()
    train(tiny(corpus), corpus, after, out=out, resume=True, reporter=heard)
    assert not any("held-out" in text for text in heard.texts)  # the same tokens: nothing is looked for anew
    ended = train(tiny(corpus), corpus, settings(eval_tokens=40), out=out, resume=True)
    assert ended.evaluation is not None and ended.evaluation.tokens == 40
    assert (ended.step, ended.evaluated_step, ended.best["step"]) == (12, 12, 12)
    assert ended.best["val_loss"] == ended.evaluation.loss
    assert ended.baselines == ngram_bits(corpus.train, corpus.val[:41], corpus.tokenizer.vocab_size)


@pytest.mark.parametrize("linked", [False, True])
def test_only_the_runs_own_checkpoints_are_deleted(
    corpus: Corpus, short_run: TrainResult, tmp_path: Path, linked: bool
) -> None:
    out, last = copied(short_run, tmp_path)
    parent = out / "checkpoints"
    if linked:  # as to a larger disk: what lies there may be of several runs
        os.rename(parent, tmp_path / "disk")
        parent.symlink_to(tmp_path / "disk", target_is_directory=True)
    own = ("step-00000001", "step-00000002.1", ".writing-0123abcd")
    others = ("mine", "step-2", "step-00000002 (copy)", ".writing-notes")
    for name in (*own, *others):
        (parent / name).mkdir()
    (parent / "notes.txt").touch()
    train(tiny(corpus), corpus, settings(steps=4), out=out, resume=True)
    deleted = () if linked else (*own, last.name)
    kept = {*own, last.name, *others, "notes.txt"} - {*deleted}
    assert {path.name for path in parent.iterdir()} == {*kept, "step-00000004"}

    checkpoints.drop(out)
    assert not (out / "last").exists() and not (out / "best").exists()
    assert {path.name for path in parent.iterdir()} == kept | ({"step-00000004"} if linked else set())


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
def test_a_checkpoint_has_the_mode_of_any_new_folder(corpus: Corpus, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        result = train(tiny(corpus), corpus, settings(steps=1), out=tmp_path / "run")
    finally:
        os.umask(before)
    folder = (result.out / "last").resolve()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


def test_a_kill_after_an_evaluation_loses_no_metrics(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for a kill: no code of the run goes on after it."""

    def published(out: Path, folder: Path, names: tuple[str, ...]) -> None:
        publish(out, folder, names)
        if "best" in names:
            raise Killed

    def metrics(out: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{key: v for key, v in line.items() if key != "tokens_per_second"} for line in lines]

    c, publish = settings(steps=6, log_every=2, eval_every=4, save_every=0), loop.publish
    train(tiny(corpus), corpus, c, out=tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, "publish", published)
        train(tiny(corpus), corpus, c, out=tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    train(tiny(corpus), corpus, c, out=tmp_path / "run", resume=True)
    got = metrics(tmp_path / "run")
    assert [(line["step"], "val_loss" in line) for line in got] == [
        (2, False),
        (4, False),
        (4, True),
        (6, False),
        (6, True),
    ]
    assert got == metrics(tmp_path / "whole")


@pytest.mark.parametrize("evaluation", [0, 1])
def test_a_kill_between_the_links_leaves_the_best_model_to_be_found(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    class Killed(BaseException):
        """Stands for a kill: no code of the run goes on after it."""

    linked: list[str] = []

    def link(path: Path, folder: Path) -> None:
        if path.name == "best":
            linked.append(folder.name)
            if len(linked) > evaluation:
                raise Killed
        make(path, folder)

    c, make = settings(steps=4, eval_every=2), checkpoints._link
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoints, "_link", link)
        train(tiny(corpus), corpus, c, out=tmp_path / "run")
    step = 2 * (evaluation + 1)
    result = train(tiny(corpus), corpus, c.replace(steps=step), out=tmp_path / "run", resume=True)
    assert result.best["step"] == step and read_step((tmp_path / "run" / "best").resolve()) == step


def test_an_optimiser_of_other_shapes_is_named(
    corpus: Corpus, tmp_path: Path, short_run: TrainResult
) -> None:
    out, last = copied(short_run, tmp_path)
    file = last / "optimizer.safetensors"
    whole = read_tensors(file)
    for name, wrong, message in (
        ("step/head.linear.bias", torch.ones(3), r"has shape \(3,\), takes \(\)"),
        ("exp_avg/head.linear.bias", torch.ones(2, 2), r"has shape \(2, 2\), takes \(\d+,\)"),
    ):
        assert name in whole
        write_tensors(file, {**whole, name: wrong}, {"step": "2"})
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}: {name} {message}"):
            train(tiny(corpus), corpus, settings(steps=3), out=out, resume=True)


NUMBERS = {"loss": 1.0, "bits": 1.4, "accuracy": 0.5, "tokens": 9, "of_tokens": 9}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -3),
        ("step", True),
        ("best", "x"),
        ("best", {"step": 2}),
        ("evaluation", {"loss": 1}),
        ("evaluation", {**NUMBERS, "spike_rates": {"blocks.0.mlp.fc1": "high"}}),
        ("recent_losses", 3),
        ("recent_losses", ["a"]),
        ("evaluated", -2),
        ("warnings", 3),
        ("scaler", {"scale": 1}),
    ],
)
def test_values_that_no_run_writes_are_named(
    corpus: Corpus, tmp_path: Path, short_run: TrainResult, name: str, value: object
) -> None:
    out, last = copied(short_run, tmp_path)
    change(last / "trainer.json", **{name: value})
    message = rf"^{re.escape(str(last / 'trainer.json'))}: {name}: got .*, takes "
    with pytest.raises(CheckpointError, match=message):
        train(tiny(corpus), corpus, settings(steps=3), out=out, resume=True)
