"""The study's rows: each can be built, and the ladder ends at the presets that it chose."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikedecoder import SpikeDecoderConfig
from spikedecoder.training import TrainConfig

SCRIPT = Path(__file__).parent.parent / "bench" / "quality_rows.py"


def load_rows() -> Any:
    spec = importlib.util.spec_from_file_location("quality_rows", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality_rows"] = module
    spec.loader.exec_module(module)
    return module


study = load_rows()


def config_of(row: Any) -> SpikeDecoderConfig:
    make = SpikeDecoderConfig.preset if row.kind == "preset" else SpikeDecoderConfig
    return make(**row.model)


@pytest.mark.parametrize("size", study.ROWS)
def test_every_row_is_a_configuration_of_its_own(size: str) -> None:
    rows = study.ROWS[size]
    assert len({study.slug(row.name) for row in rows}) == len(rows)
    seen = []
    for row in rows:
        settings = TrainConfig(**row.train)
        if row.kind != "gpt":
            seen.append((config_of(row), settings, row.tried))
    assert len(set(seen)) == len(seen)


def test_the_ladder_ends_at_the_presets() -> None:
    by_name = {row.name: row for row in study.SMALL}
    changes = {"vocab_size": 30, "max_len": 128}
    lif = config_of(by_name["+ residual init 0.3"]).replace(**changes)
    assert lif == SpikeDecoderConfig.preset("default-lif", **changes)
    integers = config_of(by_name["+ I-LIF, 15 levels"]).replace(mlp_token_shift=2, **changes)
    assert integers == SpikeDecoderConfig.preset("default", **changes)
    original, medium = (config_of(rows[0]) for rows in (study.SMALL, study.MEDIUM))
    recipe = {"neuron", "levels", "timesteps", "norm", "v_threshold", "v_reset", "attention_scale"}
    recipe |= {"embedding_gain", "embedding_std", "residual_init", "token_shift", "mlp_token_shift"}
    recipe |= {"decay_fastest", "decay_slowest"}
    assert all(getattr(original, name) == getattr(medium, name) for name in recipe)


def test_a_study_goes_on_from_what_was_kept_of_it(tmp_path: Path) -> None:
    """As from bench/results in a fresh clone, where the folder of its runs is not."""
    pytest.importorskip("matplotlib")
    text, out = tmp_path / "text.txt", tmp_path / "study"
    text.write_text("the cat sat on the mat. " * 300, encoding="utf-8")

    def run(seeds: str) -> str:
        command = [
            sys.executable,
            str(SCRIPT.with_name("quality.py")),
            "--text",
            str(text),
            "--out",
            str(out),
        ]
        command += ["--rows", "GPT, ALiBi", "--steps", "2", "--length", "16", "--seeds", seeds]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "seed 0  GPT, ALiBi: " in run("0")
    first = json.loads(out.with_suffix(".json").read_text())
    shutil.rmtree(out)
    said = run("0,1")
    assert "seed 1  GPT, ALiBi: " in said and "seed 0  GPT, ALiBi: " not in said
    both = json.loads(out.with_suffix(".json").read_text())
    assert both["runs"][:1] == first["runs"] and len(both["runs"]) == 2
