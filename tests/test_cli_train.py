"""The commands train and convert, as a user meets them."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.cli import main
from spikedecoder.cli.settings import MODEL_FIELDS, TRAIN_FIELDS, read_toml
from spikedecoder.training import TrainConfig
from spikedecoder.training.checkpoints import read_step

GOLDEN = Path(__file__).parent / "golden"
STORY = "The cat sat on the mat. The dog ate the hat. A rat ran to the cat and sat. " * 40
SMALL = ["--max-len", "16", "--blocks", "1", "--heads", "2", "--batch-size", "2"]
SMALL += ["--set", "token_dim=12", "--set", "position_dim=4", "--threads", "1"]

ILIF = ["--neuron", "ilif", "--levels", "3", "--timesteps", "1"]


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def result(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a wrong input."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


# --- train ---


def test_json_says_what_came_of_it(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    got = result(capsys, "train", "--text", story, "--out", out, "--max-steps", "5", *SMALL, *ILIF)
    assert got["steps"] == 5 and got["tokens_per_second"] > 0 and got["peak_rss_mib"] > 50
    assert got["train_loss"] > 0 and got["val_loss"] > 0
    assert got["val_bits_per_token"] == pytest.approx(got["val_loss"] * 1.4426950408889634)
    assert set(got["baselines"]) == {"unigram", "bigram", "trigram"}
    assert all(0 <= rate <= 1 for rate in got["spike_rates"].values()) and len(got["spike_rates"]) == 8
    assert got["sample"].startswith("The ")
    model = SpikeDecoder.from_pretrained(got["checkpoint"])
    assert model.config.blocks == 1 and model.config.vocab_size == model.tokenizer.vocab_size
    assert model.config.pad_id == model.tokenizer.pad_id


def test_a_person_sees_progress_and_text(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--text", story, "--out", tmp_path / "run", "--max-steps", "3", *SMALL) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("The ")
    for word in ("held-out", "bits per token", "trigram", "tokens/s", "spike rate", str(tmp_path / "run")):
        assert word in captured.err


def test_output_that_lacks_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("\u00e9\u6f22 " * 200, encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    arguments = ["--text", tmp_path / "text", "--out", tmp_path / "run", "--max-steps", "1", *SMALL]
    assert run("train", *arguments) == 0
    assert out.buffer.getvalue().count(b"?") > 20  # type: ignore[attr-defined]


def test_nothing_is_said_of_spikes_where_there_are_none(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--out", tmp_path / "run", "--max-steps", "1"]
    assert run("train", "--text", story, "--preset", "default-ann", *steps, *SMALL) == 0
    said = capsys.readouterr().err
    assert "spike degree 0" in said and "timesteps" not in said and "spike rate" not in said


def test_every_field_can_be_set(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        'preset = "default-lif"\n[model]\nblocks = 2\nv_reset = "none"\nattention_scale = 1\n'
        '[train]\nlr = 0.5\nsteps = 9\neval_tokens = "none"\nbeta1 = 0.8\n'
    )
    out = tmp_path / "run"
    sets = ["--set", "surrogate=atan", "--set", "weight_decay=0", "--set", "learn_threshold=true"]
    sets += ["--set", "mlp-token-shift=1", "--set", "min_lr=none"]
    result(
        capsys, "train", "--text", story, "--config", file, "--out", out, *SMALL, *sets, "--max-steps", "2"
    )
    saved = json.loads((out / "run.json").read_text())
    model, train = saved["model"], saved["train"]
    assert (model["blocks"], model["v_reset"], model["attention_scale"]) == (1, None, 1.0)  # the flag wins
    assert (model["surrogate"], model["learn_threshold"], model["mlp_token_shift"]) == ("atan", True, 1)
    assert (train["lr"], train["steps"], train["eval_tokens"], train["beta1"]) == (0.5, 2, None, 0.8)
    assert (train["weight_decay"], train["min_lr"]) == (0.0, None)


@pytest.mark.parametrize("preset", SpikeDecoderConfig.presets())
def test_every_setting_as_a_file_that_gives_them_back(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--blocks", "2", "--set", "embedding_std=0.00003", "--set", "min_lr=none", "--threads", "1"]
    assert run("train", "--preset", preset, *changes, "--print-config") == 0
    text = capsys.readouterr().out
    (tmp_path / "all.toml").write_text(text)
    assert "# lr, min_lr, warmup: the learning rate rises" in text and text.count("# blocks: ") == 1
    read = read_toml(tmp_path / "all.toml")
    assert {*read.model, *read.train} == {*MODEL_FIELDS, *TRAIN_FIELDS} - {"vocab_size", "pad_id"}
    expected = SpikeDecoderConfig.preset(preset, blocks=2, embedding_std=3e-5)
    assert SpikeDecoderConfig.preset(preset, **read.model) == expected
    assert TrainConfig.preset(preset, **read.train) == TrainConfig.preset(preset, min_lr=None, threads=1)
    assert run("train", "--config", tmp_path / "all.toml", "--print-config") == 0
    assert capsys.readouterr().out == text


def test_words_and_standard_input(story: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from spikedecoder.cli import main; main()",
        "train",
        "--text",
        "-",
        *SMALL,
    ]
    command += ["--tokenizer", "word", "--min-count", "2", "--max-steps", "2", "--json"]
    environment = {**os.environ, "SPIKEDECODER_CACHE": str(tmp_path / "cache")}
    story = STORY + "the zebra sat on the mat."
    done = subprocess.run(command, cwd=tmp_path, input=story.encode(), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["out"] == os.path.join("runs", "default-stdin-1")
    assert SpikeDecoder.from_pretrained(tmp_path / got["checkpoint"]).tokenizer.kind == "word"
    said = done.stderr.decode()
    assert 0 < got["val_unknown"] < 1 and f"unknown words: {got['val_unknown']:.1%} of the held-out" in said
    assert f", {got['val_unknown']:.1%} of them unknown words" in said


def test_the_first_free_folder_is_taken(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for n in (1, 2):
        got = result(capsys, "train", "--text", story, "--max-steps", "1", *SMALL)
        assert got["out"] == os.path.join("runs", f"default-story-{n}")


def test_a_folder_that_was_taken_meanwhile_is_left_for_the_next(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spikedecoder import training

    def taken(preset: str, text: str) -> Path:
        folder = training.run_folder.free_folder(preset, text)
        if folder.name.endswith("-1"):
            folder.mkdir(parents=True)
            (folder / "run.json").write_text("another's")
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "free_folder", taken)
    got = result(capsys, "train", "--text", story, "--max-steps", "1", *SMALL)
    assert got["out"] == os.path.join("runs", "default-story-2")
    assert (tmp_path / "runs" / "default-story-1" / "run.json").read_text() == "another's"


def test_a_moved_text_is_found_again(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved.txt"
    result(capsys, "train", "--text", story, "--out", out, "--max-steps", "1", *SMALL)
    story.rename(moved)
    assert "no such file" in fails(capsys, "train", "--resume", out, "--max-steps", "2")
    result(capsys, "train", "--resume", out, "--text", moved, "--max-steps", "2")
    assert result(capsys, "train", "--resume", out, "--max-steps", "3")["steps"] == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_text_from_a_pipe_has_to_be_given_again(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[STORY])
    writer.start()
    result(capsys, "train", "--text", pipe, "--out", out, "--max-steps", "1", *SMALL)
    writer.join()
    said = fails(capsys, "train", "--resume", out, "--max-steps", "2")
    assert "read a pipe; give it the text again" in said
    assert result(capsys, "train", "--resume", out, "--text", story, "--max-steps", "2")["steps"] == 2


def test_a_run_from_python_says_that_its_text_is_asked_for(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    result(capsys, "train", "--text", story, "--out", out, "--max-steps", "1", *SMALL)
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(
        json.dumps({**info, "source": {}})
    )  # as `spikedecoder.training.train` leaves it
    said = fails(capsys, "train", "--resume", out, "--max-steps", "2")
    assert "was begun from Python and does not say where its text is" in said
    assert result(capsys, "train", "--resume", out, "--text", story, "--max-steps", "2")["steps"] == 2


def test_a_run_that_cannot_save_has_failed(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spikedecoder.training.loop.save_checkpoint", full)
    assert run("train", "--text", story, "--out", tmp_path / "run", "--max-steps", "1", *SMALL) == 1
    said = capsys.readouterr().err
    assert "cannot save the checkpoint of step 1" in said and "No space left" in said


def test_letters_that_the_tokenizer_leaves_out_are_told(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story.write_text(STORY[:380] + "In 1812 \u0432 \u041c\u043e\u0441\u043a\u0432\u0435.")
    words = ["--tokenizer", "word", "--max-steps", "1", *SMALL]
    assert run("train", "--text", story, "--out", tmp_path / "run", *words) == 0
    said = capsys.readouterr().err
    assert "tokenizer word leaves out 11 letters and digits of the text (2.8% of its characters)" in said
    assert run("train", "--text", story, "--out", tmp_path / "char", "--max-steps", "1", *SMALL) == 0
    assert "leaves out" not in capsys.readouterr().err


def test_a_finished_run_can_be_prolonged(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = result(capsys, "train", "--text", story, "--out", out, "--max-steps", "3", *SMALL)
    assert run("train", "--resume", out) == 0
    said = capsys.readouterr().err
    assert "has done its 3 steps; --max-steps N trains longer" in said and "tokens/s" not in said
    again = result(capsys, "train", "--resume", out)
    assert (again["steps"], again["val_loss"]) == (3, first["val_loss"])
    assert result(capsys, "train", "--resume", out, "--max-steps", "6")["steps"] == 6


def test_a_run_killed_around_its_first_checkpoint_goes_on(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    result(capsys, "train", "--text", story, "--out", out, "--max-steps", "3", *SMALL)
    weights = (out / "last" / "model.safetensors").read_bytes()
    for link in ("last", "best"):
        (out / link).unlink()
    assert run("train", "--resume", out) == 0  # written, not linked yet
    assert "has done its 3 steps" in capsys.readouterr().err
    for link in ("last", "best"):
        (out / link).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints")
    assert run("train", "--resume", out) == 0  # not even written
    assert "the run has no checkpoint yet; it starts again" in capsys.readouterr().err
    assert (out / "last" / "model.safetensors").read_bytes() == weights
    lines = (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "checkpoints")  # lost, which the links still tell
    assert "which is not there; put it back" in fails(capsys, "train", "--resume", out)
    assert (out / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"short", "longer text"),
        (b"ten and six", "shorter than the context"),
        (b"\0\1\2\3" * 1000, "binary"),
        ("caf\u00e9 ".encode("latin-1") * 1000, "utf-8"),
        (("a text of Windows " * 100).encode("utf-16"), "begins as utf-16 text does, expected utf-8"),
    ],
)
def test_bad_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    line = fails(capsys, "train", "--text", tmp_path / "text", "--out", tmp_path / "run", *SMALL)
    assert message in line and not (tmp_path / "run").exists()


def test_a_text_of_letters_that_the_tokenizer_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("Щит и гриф " * 100, encoding="utf-8")
    options = ("--tokenizer", "original-char", "--out", tmp_path / "run", *SMALL)
    line = fails(capsys, "train", "--text", tmp_path / "text", *options)
    assert "shorter than the context" in line
    assert "the tokenizer original-char leaves out 800 letters and digits" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "blok=3"], "unknown field 'blok'; did you mean blocks?"),
        (["--set", "blocks"], "takes key=value"),
        (["--set", "norm=group"], "norm: got 'group'"),
        (["--set", "blocks=two"], "blocks: got 'two'"),
        (["--set", "decay_slowest=1.5"], "decay_slowest: got 1.5, takes a number in (0, 1]"),
        (["--preset", "default-lif", "--set", "tau=0.5"], "tau: got 0.5, takes a finite number >= 1"),
        (["--set", "surrogate_alpha=nan"], "surrogate_alpha: got nan"),
        (["--preset", "default-lif", "--set", "v_threshold=-1"], "v_threshold: got -1.0, takes"),
        (["--heads", "5"], "heads: got 5, takes a divisor of the 96 channels"),
        (["--timesteps", "0"], "timesteps: got 0"),
        (["--max-steps", "0"], "--max-steps"),
        (["--lr", "0"], "lr: got 0"),
        (["--lr", "fast"], "--lr"),
        (["--preset", "defualt"], "preset: got 'defualt', takes one of default"),
        (["--tokenizer", "bpe"], "tokenizer: got 'bpe', takes one of char"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--corpus", "builtin"], "--text and --corpus: got both"),
        (["--min-count", "3"], "min_count: got 3, takes --tokenizer word"),
        (["--set", "vocab_size=7"], "vocab_size: got 7"),
        (["--blok", "3"], "--blok"),
        (["--resume", "nowhere"], "nowhere: no such folder"),
        (["--resume", "here", "--preset", "default"], "--preset: not together with --resume"),
        (["--config", "absent.toml"], "absent.toml: no such file"),
        (["--config", "."], "--config: .: cannot be read (Is a directory)"),
        (["--text", "absent.txt"], "absent.txt: no such file"),
    ],
)
def test_bad_arguments(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    others = [] if "--resume" in arguments else ["--text", story, "--out", tmp_path / "run"]
    assert message in fails(capsys, "train", *others, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[model\n", "not a TOML file"),
        ("[modell]\n", "unknown field 'modell'; did you mean model?"),
        ("[model]\nlr = 1\n", "unknown field 'lr'"),
        ("[train]\nbatch = 1\n", "did you mean batch_size?"),
        ("model = 3\n", "takes a table [model]"),
        ("preset = ['default']\n", "preset: got ['default'], takes one of default"),
        ("[model]\ntimesteps = 0\n", "timesteps: got 0"),
        ("[model]\ndecay_fastest = -0.5\n", "decay_fastest: got -0.5, takes a number in (0, 1]"),
        ('preset = "default-lif"\n[model]\ntau = inf\n', "tau: got inf, takes a finite number >= 1"),
    ],
)
def test_bad_config_files(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "c.toml").write_text(content)
    assert message in fails(capsys, "train", "--text", story, "--config", tmp_path / "c.toml")


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nlr = 0.5\r\n")
    assert read_toml(tmp_path / "c.toml").train == {"lr": 0.5}


def test_an_existing_run_is_not_overwritten(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    result(capsys, "train", "--text", story, "--out", out, "--max-steps", "1", *SMALL)
    line = fails(capsys, "train", "--text", story, "--out", out, "--max-steps", "1", *SMALL)
    assert f"--resume {out}" in line and "another --out" in line
    assert "blocks: got 3" in fails(capsys, "train", "--resume", out, "--blocks", "3")


def test_a_failed_training_exits_with_1(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        "train", "--text", story, "--out", tmp_path / "run", "--max-steps", "9", *SMALL, "--lr", "1e38"
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and error.startswith("error: ") and "became" in error and "--lr" in error


def test_what_is_said_where_several_processes_train(
    story: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikedecoder.cli.train import _heading
    from spikedecoder.data import prepare_corpus

    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--text: got -, takes files" in fails(capsys, "train", "--text", "-")
    data, settings = prepare_corpus([story]), TrainConfig(batch_size=4, grad_accum=2)
    assert " steps of 24 x 256 tokens" in _heading(SpikeDecoderConfig(), data, settings, Path("run"))[1]


def test_debug_shows_where_an_error_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEDECODER_DEBUG", "1")
    with pytest.raises(ValueError, match="takes key=value"):
        main(["train", "--set", "blocks"])


# --- killed and stopped, for real ---


class Process:
    """A training run of 120 steps in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", "from spikedecoder.cli import main; main()", "train", *arguments]
        environment = {**os.environ, "SPIKEDECODER_CACHE": str(folder / "cache")}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for_step(self, out: Path, step: int) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            if (out / "last").exists():
                try:
                    if read_step(out / "last") >= step:
                        return
                except ValueError:
                    pass  # the folder was replaced while it was read
            time.sleep(0.001)
        raise AssertionError(f"step {step} not reached: {self.process.communicate()[1]}")

    def finish(self) -> str:
        _, errors = self.process.communicate(timeout=120)
        return errors


FRESH = ["--text", "story.txt", *SMALL, "--max-steps", "120", "--eval-every", "10", "--save-every", "3"]
FRESH += ["--set", "attention_dropout=0.1", "--set", "mlp_dropout=0.1", "--set", "eval_tokens=64"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_kill_9_at_any_moment_changes_nothing(story: Path, tmp_path: Path) -> None:
    whole = Process(tmp_path, *FRESH, "--out", "whole")
    assert whole.finish() and whole.process.returncode == 0
    moments = random.Random()  # a different moment in every run of this test
    killed = Process(tmp_path, *FRESH, "--out", "killed")
    for step in (moments.randint(3, 40), moments.randint(50, 90)):
        killed.wait_for_step(tmp_path / "killed", step)
        time.sleep(moments.uniform(0, 0.05))
        killed.process.kill()
        killed.finish()
        assert killed.process.returncode == -signal.SIGKILL
        at = read_step(tmp_path / "killed" / "last")
        assert step <= at < 120
        SpikeDecoder.from_pretrained(
            tmp_path / "killed" / "best" if at >= 10 else tmp_path / "killed" / "last"
        )
        killed = Process(tmp_path, "--resume", "killed")
    errors = killed.finish()
    assert killed.process.returncode == 0, errors
    for name in ("last", "best"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / name).iterdir()}
        assert len(files) == 5
        for file, data in files.items():
            assert (tmp_path / "killed" / name / file).read_bytes() == data, f"{name}/{file}"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_saves_and_says_how_to_go_on(story: Path, tmp_path: Path) -> None:
    process = Process(tmp_path, *FRESH, "--max-steps", "5000", "--out", "run", "--json")
    process.wait_for_step(tmp_path / "run", 3)
    process.process.send_signal(signal.SIGINT)
    out, errors = process.process.communicate(timeout=60)
    assert process.process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "go on with: spikedecoder train --resume run" in errors
    got = json.loads(out.splitlines()[-1])
    assert got["interrupted"] == "SIGINT"
    assert read_step(tmp_path / "run" / "last") == got["steps"] < 5000


# --- convert ---


def original_checkpoint(tmp_path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A golden case as the .pt file that the original would have written."""
    from safetensors.torch import load_file

    case = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    torch.save(state, tmp_path / "original.pt")
    return tmp_path / "original.pt", case


def golden_names() -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


@pytest.mark.parametrize("name", golden_names())
def test_convert(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, case = original_checkpoint(tmp_path, name)
    options = {k: v for k, v in case["config"].items() if k != "heads"}
    (tmp_path / "options.json").write_text(json.dumps(options))
    arguments = ["--kind", case["kind"], "--options", tmp_path / "options.json"]
    if "heads" in case["config"]:
        arguments += ["--heads", case["config"]["heads"]]
    got = result(capsys, "convert", checkpoint, tmp_path / "model", *arguments)
    assert got["config"]["heads"] == case["config"].get("heads", 2)
    model = SpikeDecoder.from_pretrained(tmp_path / "model")
    from spikedecoder.compat.convert import convert_original

    direct = convert_original(checkpoint, case["config"], kind=case["kind"])
    for key, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert (model.tokenizer is not None) == (model.config.vocab_size == 30 or "dictionary" in case["config"])


def test_convert_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, case = original_checkpoint(tmp_path, golden_names()[0])
    assert "no such file" in fails(
        capsys, "convert", tmp_path / "absent.pt", tmp_path / "m", "--set", "heads=2"
    )
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:500])
    assert "truncated" in fails(capsys, "convert", tmp_path / "cut.pt", tmp_path / "m", "--set", "heads=2")
    for junk in (b"hello world this is text\n", b"junk" * 100):
        (tmp_path / "cut.pt").write_bytes(junk)
        line = fails(capsys, "convert", tmp_path / "cut.pt", tmp_path / "m", "--set", "heads=2")
        assert "cut.pt: not a PyTorch checkpoint" in line
    (tmp_path / "empty.pt").touch()
    assert "truncated (nothing in it)" in fails(
        capsys, "convert", tmp_path / "empty.pt", tmp_path / "m", "--set", "heads=2"
    )
    said = fails(capsys, "convert", checkpoint, tmp_path / "m")
    assert "options: missing" in said and "--options FILE or --set KEY=VALUE" in said
    for option, message in (
        ("dictionary=5", "dictionary: got 5, takes a list of words"),
        ('normalization=["a"]', "normalization: got ['a'], takes one value"),
    ):
        assert message in fails(capsys, "convert", checkpoint, tmp_path / "m", "--set", option)
    assert "unknown option" in fails(capsys, "convert", checkpoint, tmp_path / "m", "--set", "hedas=2")
    for width in (0, -1):
        said = fails(capsys, "convert", checkpoint, tmp_path / "m", "--set", "heads=2", "--dim-hid", width)
        assert f"dim_hid: got {width}, takes an integer of 1 or more" in said
    assert "not empty" in fails(capsys, "convert", checkpoint, tmp_path, "--set", "heads=2")
    (tmp_path / "a.model").write_bytes(checkpoint.read_bytes())
    assert "does not end in .pt" in fails(capsys, "convert", tmp_path / "a.model", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    assert case


def test_convert_tensors_that_are_not_the_originals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, case = original_checkpoint(tmp_path, "char_powernorm_concat")
    (tmp_path / "options.json").write_text(json.dumps(case["config"]))
    arguments = (checkpoint, tmp_path / "m", "--kind", case["kind"], "--options", tmp_path / "options.json")
    state = torch.load(checkpoint, weights_only=True)
    head = next(name for name in state if name.startswith("Head.") and name.endswith("weight"))
    for change, said in (
        ({"x": torch.zeros(3)}, "original.pt: x: not a name of the original's"),
        ({3: torch.zeros(3)}, "original.pt: got no state dict of tensors"),
        ({head: state[head].to(torch.int8)}, "head.linear.weight of int8, takes float16 to float64"),
        ({head: state[head].to_sparse()}, "head.linear.weight of sparse_coo, takes strided"),
        ({name: t.to_sparse() for name, t in state.items()}, "of sparse_coo, takes strided"),
    ):
        torch.save({**state, **change}, checkpoint)
        assert said in fails(capsys, "convert", *arguments)
    assert not (tmp_path / "m").exists()
