"""`spikedecoder generate` as a user runs it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from spikedecoder import CheckpointError, SpikeDecoder, SpikeDecoderConfig
from spikedecoder.cli.generate import generate
from spikedecoder.cli.inputs import find_checkpoint
from spikedecoder.data import CharTokenizer, WordTokenizer
from spikedecoder.generation import SamplingParams, generate_result, generate_text, start_token
from spikedecoder.generation.stats import text_cost
from spikedecoder.spike_stats import spiking_layers

TEXT = "the cat sat on the mat. it was a fat cat."

app = typer.Typer()
app.command("generate")(generate)
app.command("other")(lambda: None)  # so that typer keeps the command's name


def run(*arguments, stdin=None, code=0):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["char", "word"])
def saved(request, tmp_path_factory):
    tokenizer = (CharTokenizer if request.param == "char" else WordTokenizer).from_text(TEXT)
    torch.manual_seed(0)
    config = SpikeDecoderConfig(
        vocab_size=tokenizer.vocab_size, max_len=16, heads=2, blocks=1, timesteps=2, pad_id=tokenizer.pad_id
    )
    model = SpikeDecoder(config).eval()
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return model, folder


def test_text_on_the_terminal(saved):
    model, folder = saved
    out = run("--checkpoint", folder, "--prompt", "the cat", "--tokens", 30, "--seed", 3).stdout
    assert (
        out == generate_text(model, None, ["the cat"], max_new_tokens=30, temperature=0.8, seed=3)[0] + "\n"
    )
    assert out.startswith("the cat")
    # nothing at all to start from
    out = run("--checkpoint", folder, "--tokens", 30, "--seed", 3).stdout
    assert out == generate_text(model, None, [""], max_new_tokens=30, temperature=0.8, seed=3)[0] + "\n"


def test_flags_reach_the_sampler(saved):
    model, folder = saved
    for flags, params in (
        (["--temperature", 0], {"temperature": 0}),
        (["--temperature", 1.5, "--top-k", 3], {"temperature": 1.5, "top_k": 3}),
        (["--top-p", 0.4], {"temperature": 0.8, "top_p": 0.4}),
        (["--min-p", 0.05], {"temperature": 0.8, "min_p": 0.05}),
        (["--repetition-penalty", 1.4], {"temperature": 0.8, "repetition_penalty": 1.4}),
        (["--past", "continue"], {"temperature": 0.8, "past": "continue"}),
    ):
        out = run("--checkpoint", folder, "--prompt", "cat", "--tokens", 20, "--seed", 1, *flags).stdout
        assert out == generate_text(model, None, ["cat"], max_new_tokens=20, seed=1, **params)[0] + "\n"


def test_json(saved):
    model, folder = saved
    out = run(
        "--checkpoint", folder, "--prompt", "the", "--prompt", "a cat", "--tokens", 25, "--seed", 5, "--json",
        "--top", 2,
    ).stdout  # fmt: skip
    result = json.loads(out.splitlines()[-1])
    expected = generate_result(model, None, ["the", "a cat"], 25, SamplingParams(0.8, seed=5), top=2)
    assert [s["token_ids"] for s in result["samples"]] == expected.tokens
    assert [s["prompt"] for s in result["samples"]] == ["the", "a cat"]
    for sample, ids in zip(result["samples"], expected.sequences, strict=True):
        assert sample["text"] == model.tokenizer.decode(ids)
        assert sample["text"].endswith(sample["completion"]) and sample["tokens"] == 25
        assert [len(at) for at in sample["predictions"]] == [2] * 25
    first = result["samples"][0]
    assert all(result[key] == value for key, value in first.items())
    best = first["predictions"][0][0]
    assert best["token"] == model.tokenizer.tokens[expected.predictions[0][0][0].token]
    assert best["probability"] == pytest.approx(expected.predictions[0][0][0].probability)
    assert result["tokens_per_second"] > 0 and result["seed"] == 5 and result["checkpoint"] == str(folder)


def test_stop_strings(saved):
    _, folder = saved
    arguments = ["--checkpoint", folder, "-p", "the", "-n", 40, "--seed", 3]
    whole = run(*arguments).stdout[:-1]
    stop = whole[len(whole) // 2 :][:2]
    expected = whole[:3] + whole[3:].split(stop)[0]
    assert run(*arguments, "--stop", stop, "--stop", "no such text").stdout == expected + "\n"
    sample = json.loads(run(*arguments, "--stop", stop, "--json").stdout)
    assert sample["text"] == expected and sample["finish"] == "stop" and sample["tokens"] < 40


def test_stats(saved):
    model, folder = saved
    arguments = ["--checkpoint", folder, "-p", "the", "-p", "", "-n", 30, "--seed", 3]
    plain, told = run(*arguments), run(*arguments, "--stats")
    assert told.stdout == plain.stdout and plain.stderr == ""
    result = json.loads(run(*arguments, "--stats", "--json").stdout)
    stats = result["stats"]
    assert set(stats["spike_rates"]) == {name for name, _ in spiking_layers(model)}
    tokens = [s["token_ids"] for s in result["samples"]]
    cost = text_cost(model, [model.tokenizer.encode("the").tolist(), [start_token(model)]], tokens)
    assert stats["accumulates_per_token"] == cost.accumulates > 0
    assert stats["joules_per_token"] == cost.ledger.joules().per_token > 0
    assert "J of arithmetic estimated with horowitz-45nm" in told.stderr
    assert stats["spike_rate"] == cost.spike_rate and stats["tokens_per_second"] > 0
    assert f"{cost.accumulates:,.0f} accumulates" in told.stderr and "tokens/s" in told.stderr
    for name, rate in cost.spike_rates.items():
        assert name in told.stderr and f"{rate:.4f}" in told.stderr
    nothing = run("--checkpoint", folder, "-p", "the", "-n", 0, "--stats").stderr
    assert nothing.startswith("0.0 tokens/s")


def test_json_says_the_seed_it_took(saved):
    _, folder = saved
    first = json.loads(run("--checkpoint", folder, "--tokens", 20, "--json").stdout)
    again = json.loads(run("--checkpoint", folder, "--tokens", 20, "--json", "--seed", first["seed"]).stdout)
    assert again["text"] == first["text"] and "predictions" not in first


def test_several_prompts_on_the_terminal_equal_the_batch(saved):
    _, folder = saved
    arguments = ["--checkpoint", folder, "-p", "the cat", "-p", "a", "-n", 20, "--seed", 2]
    samples = json.loads(run(*arguments, "--json").stdout)["samples"]
    assert run(*arguments).stdout == "\n\n".join(s["text"] for s in samples) + "\n"


def test_prompt_from_standard_input(saved):
    _, folder = saved
    arguments = ["--checkpoint", folder, "--tokens", 10, "--seed", 1, "--prompt"]
    assert run(*arguments, "-", stdin="the cat\n").stdout == run(*arguments, "the cat").stdout
    windows = b"\xef\xbb\xbfthe cat\r\n"
    assert run(*arguments, "-", stdin=windows).stdout == run(*arguments, "the cat").stdout
    with pytest.raises(ValueError, match="standard input: not valid utf-8 text"):
        raise run(*arguments, "-", stdin=b"the \xff", code=1).exception


def test_top_shows_predictions(saved):
    model, folder = saved
    lines = run(
        "--checkpoint", folder, "-p", "the", "-n", 4, "--temperature", 0, "--top", 3
    ).stdout.splitlines()
    expected = generate_result(model, None, ["the"], 4, SamplingParams(0), top=3)
    assert lines[0] == "the" and len(lines) == 5
    for line, at in zip(lines[1:], expected.predictions[0], strict=True):
        for p in at:
            assert f"{model.tokenizer.tokens[p.token]!r} {p.probability:.3f}" in line


def test_unknown_characters(saved):
    _, folder = saved
    arguments = ["--checkpoint", folder, "--tokens", 5, "--seed", 1, "--prompt", "the Zebra"]
    with pytest.raises(ValueError, match=r"prompt: \d \w+\(s\) outside .*: ('zebra'|'Z', 'b', 'r');"):
        raise run(*arguments, code=1).exception
    for errors in ("drop", "replace"):
        assert run(*arguments, "--errors", errors).stdout.startswith("the")
    with pytest.raises(ValueError, match="errors: got 'skip'"):
        raise run(*arguments, "--errors", "skip", code=1).exception


def test_run_folders(saved, tmp_path):
    _, folder = saved
    run_folder = tmp_path / "run"
    shutil.copytree(folder, run_folder / "last")
    assert find_checkpoint(str(run_folder)) == str(run_folder / "last")
    shutil.copytree(folder, run_folder / "best")
    assert find_checkpoint(str(run_folder)) == str(run_folder / "best")
    assert find_checkpoint(str(folder)) == str(folder)
    assert find_checkpoint("someone/some-model") == "someone/some-model"
    arguments = ["--tokens", 10, "--seed", 1, "--checkpoint"]
    assert run(*arguments, run_folder).stdout == run(*arguments, folder).stdout


def test_bad_checkpoints(saved, tmp_path, monkeypatch):
    _, folder = saved
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    no_tokenizer, cut, foreign = tmp_path / "bare", tmp_path / "cut", tmp_path / "foreign"
    for copy in (no_tokenizer, cut, foreign):
        shutil.copytree(folder, copy)
    (no_tokenizer / "tokenizer.json").unlink()
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    for name, error, why in (
        ("empty", ValueError, "no config.json, nor have best/ or last/"),
        ("file", ValueError, "is a file, takes a folder"),
        ("nowhere", ValueError, "no such folder"),
        ("bare", ValueError, "has no tokenizer.json"),
        ("cut", CheckpointError, "truncated"),
        ("foreign", CheckpointError, "not a spikedecoder config"),
    ):
        with pytest.raises(error, match=why):
            raise run("--checkpoint", tmp_path / name, code=1).exception
    with pytest.raises(CheckpointError, match="no such folder here, and config"):
        raise run("--checkpoint", "someone/some-model", code=1).exception
    monkeypatch.chdir(tmp_path)
    for name in ("run", "bare/lsat"):  # no hub is asked for what can only be a folder
        with pytest.raises(ValueError, match="a name on the hub is OWNER/NAME"):
            raise run("--checkpoint", name, code=1).exception


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--temperature", "-1"], "temperature: got -1.0"),
        (["--top-p", "0"], "top_p: got 0.0"),
        (["--top-k", "0"], "top_k: got 0"),
        (["--min-p", "1.5"], "min_p: got 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty: got 0.0"),
        (["--stop", ""], "stop: got an empty string"),
        (["--past", "on"], "past: got 'on', takes one of slide, continue"),
        (["--seed", "-3"], "seed: got -3"),
        (["--device", "warp"], "--device: got 'warp'"),
    ],
)
def test_bad_values(saved, flags, why):
    with pytest.raises(ValueError, match=why):
        raise run("--checkpoint", saved[1], *flags, code=1).exception


def test_bad_usage(saved):
    assert "--checkpoint" in run(code=2).stderr
    assert "--tokens" in run("--checkpoint", saved[1], "--tokens", "-1", code=2).stderr


def test_the_entry_point_answers_in_one_line(saved):
    """Exit code 2, one line on standard error, no traceback."""
    code = "from spikedecoder.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--checkpoint", saved[1], "--prompt", "ZZ0Z"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "outside the model's vocabulary" in done.stderr and done.stderr.count("\n") == 1


def test_an_error_begins_a_line_of_its_own(saved, monkeypatch):
    """The prompt is on the terminal by then."""

    def refuse(model):
        raise ValueError("no")

    monkeypatch.setattr("spikedecoder.generation.native.why_not", refuse)
    done = CliRunner().invoke(app, ["generate", "-c", str(saved[1]), "-p", "the", "-n", "3"])
    assert str(done.exception) == "no" and done.stdout == "the\n"


@pytest.mark.skipif(os.name != "posix", reason="there are no pseudo-terminals")
def test_a_vocabulary_does_not_command_the_terminal(saved):
    import pty

    orders = "\x1b]0;title\x07\x1b[2J\x9b2J\r\b\u202e\u2066\u200f\x7f"
    text = f"a{orders}z \t\n\u00e9\u4e2d"
    command = [sys.executable, "-c", f"from spikedecoder.cli.generate import _print; _print({text!r})"]
    own = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    assert subprocess.run(command, stdout=subprocess.PIPE, env=own, check=True).stdout == text.encode()
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        subprocess.run(command, stdout=theirs, env=own, check=True)
        got = terminal.read(1000).decode()
        os.close(theirs)
    shown = "\ufffd]0;title\ufffd\ufffd[2J\ufffd2J" + "\ufffd" * 6
    assert got == f"a{shown}z \t\r\n\u00e9\u4e2d"  # the terminal itself returns the carriage
