"""`spikedecoder plot` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy
from spikedecoder.cli import main
from spikedecoder.data import CharTokenizer

pytest.importorskip("matplotlib")
TEXT = "the cat sat"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that looks like a run's: best/ and metrics.jsonl."""
    tokenizer = CharTokenizer.from_text(TEXT)
    torch.manual_seed(0)
    config = SpikeDecoderConfig(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        max_len=8,
        token_dim=6,
        position_dim=4,
        heads=2,
        blocks=1,
        timesteps=2,
        embedding_gain=2.0,
    )
    model = SpikeDecoder(config)
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("plot") / "run"
    model.save_pretrained(folder / "best")
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "val_loss": 1.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def plot(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as exit_:
        main(["plot", *map(str, arguments)])
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    return captured


@pytest.mark.parametrize(
    "arguments",
    [
        ["raster", "-p", TEXT, "--layer", "blocks.0.mlp.fc1"],
        ["rates", "-p", TEXT],
        ["potentials", "-p", TEXT, "--layer", "head.lif", "--layer", "blocks.0.mlp.fc1"],
        ["attention", "-p", TEXT],
        ["predictions", "-p", TEXT, "-n", "4"],
        ["energy", "-p", TEXT, "--memory"],
        ["loss"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_figure(run: Path, capsys, tmp_path: Path, arguments) -> None:
    out = tmp_path / "figure.png"
    said = plot(capsys, *arguments, "-c", run, "-o", out)
    assert said.out.strip() == str(out) and out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("figure", ["raster", "rates", "potentials", "attention"])
def test_a_text_beyond_the_context_is_said_to_be_cut(run: Path, capsys, tmp_path: Path, figure) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 200)
    for given, said in ((["-p", "the cat "], None), (["--text", tmp_path / "text.txt"], "of 2,200 tokens")):
        plot(capsys, figure, *given, "-c", run, "-o", tmp_path / "figure.svg")
        drawn = (tmp_path / "figure.svg").read_text()
        assert ("first 8" in drawn) is (said is not None) and (said or "") in drawn


def test_predictions_beyond_those_shown_are_said(run: Path, capsys, tmp_path: Path) -> None:
    plot(capsys, "predictions", "-p", TEXT, "-n", "66", "-c", run, "-o", tmp_path / "figure.svg")
    assert "first 64 of 66 generated" in (tmp_path / "figure.svg").read_text()


def test_energy_reads_as_much_of_a_text_as_the_command_energy(run: Path, capsys, tmp_path, monkeypatch):
    read = []
    real = energy.measure
    monkeypatch.setattr(energy, "measure", lambda *a, **k: read.append(real(*a, **k)) or read[-1])
    (tmp_path / "text.txt").write_text(TEXT * 400)
    common = ["--text", tmp_path / "text.txt", "-c", run]
    plot(capsys, "energy", *common, "-o", tmp_path / "figure.svg")
    assert "prompt mode" in (tmp_path / "figure.svg").read_text()
    with pytest.raises(SystemExit):
        main(["energy", *map(str, common)])
    assert [ledger.tokens for ledger in read] == [4096, 4096] and read[0].rows == read[1].rows


@pytest.mark.parametrize("figure", ["raster", "rates", "potentials", "attention", "predictions", "energy"])
def test_a_parameter_that_is_not_finite_is_named(run: Path, capsys, tmp_path: Path, figure) -> None:
    model = SpikeDecoder.from_pretrained(run / "best")
    with torch.no_grad():
        model.blocks[0].attention.q.norm.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    out = ["-c", tmp_path / "broken", "-o", tmp_path / "figure.png"]
    message = plot(capsys, figure, "-p", TEXT, *out, code=2).err
    assert message.startswith("error: model: blocks.0.attention.q.norm.bias holds NaN or infinite values")
    assert message.count("\n") == 1


def test_attention_of_the_baseline(run: Path, capsys, tmp_path: Path) -> None:
    baseline = SpikeDecoder(SpikeDecoder.from_pretrained(run / "best").config.replace(spike_degree=0))
    baseline.tokenizer = CharTokenizer.from_text(TEXT)
    baseline.save_pretrained(tmp_path / "baseline")
    common = ["-p", TEXT, "-c", tmp_path / "baseline", "-o", tmp_path / "figure.png"]
    plot(capsys, "attention", "--layer", "blocks.0.attention", *common)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "has no spiking layer" in plot(capsys, "raster", *common, code=2).err


def test_a_picture_that_cannot_be_written_is_refused_before_a_model_is_read(capsys, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    common = ["rates", "-p", TEXT, "-c", "no-such-model", "-o"]
    assert "cannot write (Not a dir" in plot(capsys, *common, tmp_path / "file" / "a.png", code=2).err
    assert "a folder, takes a file" in plot(capsys, *common, tmp_path / "folder.png", code=2).err
    assert "no-such-model" in plot(capsys, *common, tmp_path / "new" / "a.png", code=2).err
    assert not (tmp_path / "new").exists()


def test_bad_input_is_one_line(run: Path, capsys, tmp_path: Path) -> None:
    out = tmp_path / "figure.png"
    for arguments, message in (
        (["rasters", "-p", TEXT, "-c", run, "-o", out], "figure: got 'rasters', takes one of raster"),
        (["raster", "-c", run, "-o", out], "--prompt, --text: got neither"),
        (["raster", "-p", TEXT, "-c", run, "-c", run, "-o", out], "--checkpoint: got 2, raster takes one"),
        (["raster", "-p", TEXT, "-c", run, "-o", tmp_path / "figure.bmp"], "ends in .png"),
        (["raster", "-p", "", "-c", run, "-o", out], "holds no token"),
        (["raster", "-p", "xyz", "-c", run, "-o", out], "--prompt: 3 character(s) outside the model's"),
        (["raster", "-p", TEXT, "--layer", "none", "-c", run, "-o", out], "layer: got 'none', takes one of"),
        (
            ["rates", "-p", TEXT, "--layer", "none", "-c", run, "-o", out],
            "--layer: got with rates, belongs to",
        ),
        (["rates", "-p", TEXT, "-n", "3", "-c", run, "-o", out], "--tokens: got with rates, belongs to pred"),
        (["rates", "-p", TEXT, "--memory", "-c", run, "-o", out], "--memory: got with rates"),
        (["loss", "-p", TEXT, "-c", run, "-o", out], "--prompt: got with loss, belongs to raster"),
        (["loss", "-c", tmp_path / "none", "-o", out], "no such file"),
        (["energy", "-p", TEXT, "-c", tmp_path / "none", "-o", out], "no such folder"),
        (["rates", "-p", TEXT, "-c", run, "-o", run / "metrics.jsonl" / "a.png"], "cannot write"),
    ):
        captured = plot(capsys, *arguments, code=2)
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not out.exists()
