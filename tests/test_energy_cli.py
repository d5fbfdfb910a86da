"""`spikedecoder energy` as a user runs it."""

from __future__ import annotations

import csv
import io
import json
import os

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy
from spikedecoder.cli import main
from spikedecoder.data import CharTokenizer

TEXT = "the cat sat on the mat. it was a fat cat."


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tokenizer = CharTokenizer.from_text(TEXT)
    made = []
    for degree in (4, 0):
        torch.manual_seed(0)
        config = SpikeDecoderConfig(
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            max_len=16,
            token_dim=10,
            position_dim=6,
            heads=2,
            blocks=1,
            timesteps=2,
            embedding_gain=2.0,
            spike_degree=degree,
        )
        model = SpikeDecoder(config)
        model.tokenizer = tokenizer
        made.append(tmp_path_factory.mktemp("energy") / f"degree-{degree}")
        model.save_pretrained(made[-1])
    return made


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as exit_:
        main(["energy", *map(str, arguments)])
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    return captured


def fails(capsys, *arguments):
    captured = run(capsys, *arguments, code=2)
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_json_equals_the_python_api(folders, capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    out = run(capsys, "-c", folders[0], "--text", path, "--memory", "--json").out
    values = json.loads(out)
    model = SpikeDecoder.from_pretrained(folders[0])
    ids = torch.tensor([int(i) for i in model.tokenizer.encode(TEXT)])
    # windows of the context, the rest by itself
    ledger = energy.measure(model, [ids[:32].reshape(2, 16), ids[None, 32:]])
    name = str(folders[0])
    assert values["models"][name]["tokens"] == ledger.tokens == len(ids)
    assert values["models"][name]["totals"] == ledger.to_dict()["totals"]
    assert "rows" not in values["models"][name]
    first = values["entries"][0]
    assert first["variant"] == "this model, fp32"
    assert first["joules"] == pytest.approx(ledger.joules(memory=True).joules)
    assert values["estimate"] is True and len(values["assumptions"]) > 5
    assert len(values["break_even"][name]) == 2


def test_several_checkpoints_csv_picture_and_the_original(folders, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "rows.csv", tmp_path / "bars.png"
    flags = ["--compat", "--per-layer", "--csv", table, "--picture", picture]
    out = run(capsys, "-c", folders[0], "-c", folders[1], "--prompt", "the cat", *flags).out
    assert "break-even" in out and "known errors" in out and "Every figure is an estimate" in out
    assert "mlp.fc1" in out
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert {line["checkpoint"] for line in lines} == {str(folder) for folder in folders}
    assert {line["kind"] for line in lines} >= {"ac", "mac", "lif", "norm"}
    assert {(line["mode"], line["table"], line["number_format"]) for line in lines} == {
        ("prompt", "horowitz-45nm", "fp32")
    }
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("memory", [[], ["--memory"]])
def test_layers_have_the_same_names_and_joules_in_json_as_in_csv(folders, capsys, tmp_path, memory):
    table, flags = tmp_path / "rows.csv", ["--per-layer", "--json", *memory]
    out = run(capsys, "-c", folders[0], "--prompt", "the cat", "--csv", table, *flags).out
    rows = json.loads(out)["models"][str(folders[0])]["rows"]
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    for name in ("estimated_joules", "estimated_memory_joules"):
        assert ["" if row[name] is None else str(row[name]) for row in rows] == [line[name] for line in lines]
    assert sum(row["estimated_joules"] for row in rows) > 0
    assert not {"joules", "memory_joules"} & set(rows[0])


def test_token_mode_and_a_table_of_ones_own(folders, capsys, tmp_path):
    values = {}
    for mode in ("prompt", "token"):
        flags = ["--prompt", "the cat", "--mode", mode, "--per-layer", "--json"]
        values[mode] = json.loads(run(capsys, "-c", folders[0], *flags).out)["models"][str(folders[0])]
    out = run(capsys, "-c", folders[0], "--prompt", "the cat", "--mode", "token", "--compat").out
    assert "  compat: got a ledger of mode 'token', takes 'prompt'" in out
    operations = {mode: {row["operation"] for row in v["rows"]} for mode, v in values.items()}
    assert "q k^T" in operations["prompt"] and "state += k^T v" in operations["token"]
    path = tmp_path / "mine.toml"
    names = {"arithmetic": energy.table.ARITHMETIC, "memory": tuple(energy.table.MEMORIES)}
    text = "".join(f"[{s}]\n" + "".join(f"{k} = 0\n" for k in keys) for s, keys in names.items())
    path.write_text(text)
    flags = ["--prompt", "the cat", "--table", path, "--json"]
    assert json.loads(run(capsys, "-c", folders[0], *flags).out)["entries"][0]["joules"] == 0
    said = run(capsys, "-c", folders[0], *flags[:-1]).out
    assert said.count("arithmetic only: both cost nothing") == 2
    path.write_text(text.replace("dram = 0", "dram = -1"))
    assert "dram: got -1" in fails(capsys, "-c", folders[0], *flags)


def test_a_byte_order_mark_is_no_text(folders, capsys, tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    read = [
        json.loads(run(capsys, "-c", folders[0], *flags, "--json").out)["models"][str(folders[0])]
        for flags in (["--text", tmp_path / "marked.txt"], ["--prompt", "the cat"])
    ]
    assert read[0] == read[1]


def test_bad_input_is_one_line(folders, capsys, tmp_path):
    spiking = folders[0]
    assert "got neither, takes one" in fails(capsys, "-c", spiking)
    assert "got both, takes one" in fails(capsys, "-c", spiking, "--prompt", "a", "--text", "b")
    assert "no such file" in fails(capsys, "-c", spiking, "--text", tmp_path / "none.txt")
    assert "no such folder" in fails(capsys, "-c", "./nowhere", "--prompt", "a")
    assert "--device: got 'meta'" in fails(capsys, "-c", spiking, "--prompt", "a", "--device", "meta")
    assert "--mode: got 'x'" in fails(capsys, "-c", spiking, "--prompt", "cat", "--mode", "x")
    assert "takes horowitz-45nm, jouppi-7nm" in fails(capsys, "-c", spiking, "--prompt", "a", "--table", "x")
    assert f"--prompt for {spiking}: 1 character(s) outside the model's" in fails(
        capsys, "-c", spiking, "--prompt", "QQ"
    )
    (tmp_path / "unknown.txt").write_text("QQ")
    assert f"--text for {spiking}: 1 char" in fails(capsys, "-c", spiking, "--text", tmp_path / "unknown.txt")
    assert "holds no token" in fails(capsys, "-c", spiking, "--prompt", "QQ", "--errors", "drop")
    (tmp_path / "latin").write_bytes(b"\xe9\xff")
    assert "not valid utf-8 text" in fails(capsys, "-c", spiking, "--text", tmp_path / "latin")
    pytest.importorskip("matplotlib")
    assert "ends in .png" in fails(capsys, "-c", spiking, "--prompt", "a", "--picture", "bars.bmp")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    folders, capsys, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.delattr(energy, "measure")
    (tmp_path / "file").touch()
    for option, name in (("--csv", "rows.csv"), ("--picture", "bars.png")):
        flags = ["-c", folders[0], "--prompt", "the cat", option]
        assert "cannot write (Not a directory)" in fails(capsys, *flags, tmp_path / "file" / name)
    assert "a folder, takes a file" in fails(capsys, "-c", folders[0], "-p", "the cat", "--csv", tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_nan_weights_are_named(folders, capsys, tmp_path):
    model = SpikeDecoder.from_pretrained(folders[0])
    with torch.no_grad():
        model.blocks[0].mlp.fc1.linear.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    message = fails(capsys, "-c", tmp_path / "nan", "--prompt", "the cat")
    assert "blocks.0.mlp.fc1.linear.weight holds NaN" in message


def test_measured_joules_beside_the_estimate_or_why_not(folders, capsys, tmp_path, monkeypatch):
    real, flags = energy.measured_joules, ["-c", folders[0], "--prompt", "the cat", "--measured"]
    monkeypatch.setattr(energy, "measured_joules", lambda run, **o: real(run, **o, rapl=tmp_path))
    said = run(capsys, *flags).out
    assert f"no RAPL counters in {tmp_path}; the estimates above stand alone" in said and "fp32" in said
    found = json.loads(run(capsys, *flags, "--json").out)["models"][str(folders[0])]["measured"]
    assert found["joules"] is None and "no RAPL counters" in found["reason"]

    (tmp_path / "intel-rapl:0").mkdir()
    for name, value in (("energy_uj", 5), ("max_energy_range_uj", 100)):
        (tmp_path / "intel-rapl:0" / name).write_text(f"{value}\n")
    monkeypatch.setattr(energy, "measured_joules", lambda run, **o: real(run, **o, seconds=0, rapl=tmp_path))
    assert (
        "measured while this program computed it: 0 J a pass (RAPL, 1 CPU package" in run(capsys, *flags).out
    )


def test_a_pipe_is_written_to_and_stays_one(folders, capsys, tmp_path):
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run(capsys, "-c", folders[0], "-p", "the cat", "--csv", pipe)
        assert pipe.is_fifo()
        assert os.read(reading, 20).startswith(b"checkpoint,layer")
    finally:
        os.close(reading)
