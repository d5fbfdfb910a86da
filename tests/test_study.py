"""The study's rows: each can be built, and the ladder ends at the presets that it chose."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikedecoder import SpikeDecoderConfig
from spikedecoder.training import TrainConfig

SCRIPT = Path(__file__).parent.parent / "bench" / "quality_rows.py"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


study, report = load("quality_rows"), load("quality_report")


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


def test_only_learned_positions_end_with_the_training_length() -> None:
    by_name = {row.name: row for row in study.SMALL}
    assert by_name["default"].reads_past(1) and by_name["default"].reads_past(4)
    learned = study.Row("learned", "gpt", {"position": "learned"})
    assert learned.reads_past(1) and not learned.reads_past(2)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8, 9, 10, 15, 21, 40])
def test_intervals_are_those_of_students_t(seeds: int) -> None:
    """The distribution's density, integrated over the interval, is 95 %."""
    runs = [{"bits": float(i % 2)} for i in range(seeds)]
    error = statistics.stdev(run["bits"] for run in runs) / math.sqrt(seeds)
    quantile, df = report.half_width(runs) / error, seeds - 1
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    n = 20_000
    step = 2 * quantile / n
    points = (quantile * (2 * i + 1 - n) / n for i in range(n))
    inside = sum(constant * (1 + t * t / df) ** (-(df + 1) / 2) * step for t in points)
    assert inside == pytest.approx(0.95, abs=2e-3 if seeds <= 21 else 8e-3)
    assert inside > 0.949  # never too narrow
    assert report.half_width(runs[:1]) is None


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
