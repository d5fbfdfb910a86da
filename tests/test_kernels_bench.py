"""The GPU run's own machinery, without a GPU: every stage ends, is noted, and stops no other."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark.expression import Expression

pytest.importorskip("triton")
from spikedecoder.kernels import _launch

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))  # its modules import each other by name


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    return module


gpu = load()


def dry_run(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return json.loads((out / "results.json").read_text())


@pytest.mark.triton_interpreter
def test_dry_runs_of_some_stages(tmp_path: Path) -> None:
    dry_run(tmp_path / "out", "--only", "build")
    result = dry_run(tmp_path / "out", "--only", "environment")
    assert [s["stage"] for s in result["stages"]] == ["environment", "build"]
    assert all(s["ok"] for s in result["stages"])
    assert result["environment"]["versions"]["triton"]


def ended(out: Path, stage: str, said: str, dry: bool = False) -> None:
    """What a call leaves of a stage."""
    out.mkdir(exist_ok=True)
    step = "rows" if stage.startswith("operators-") else "step"
    gpu.keep(out, gpu.Outcome(stage, 1.0, {step: said}), dry)
    (out / f"{stage}-{step}.log").write_text(json.dumps({"ms": said}))
    if step == "rows":
        rows = [{"group": stage, "row": "ours", "ms": 1.0, "said": said}]
        part = {"ceilings": {"copy_gb_per_s": 3.0, "bf16_tflop_per_s": 8.0}, "rows": rows, "left_out": []}
        (out / f"{stage}.json").write_text(json.dumps(part))


def test_calls_into_one_folder_add_up(tmp_path: Path) -> None:
    """Stages that are run again replace their own results; one that there was no time for does not."""
    for stage in ("operators-lif", "model-triton", "operators-compiled"):
        ended(tmp_path, stage, "first")
    gpu.draw(tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(result | {"note": "Two calls."}))
    ended(tmp_path, "operators-compiled", "second")
    gpu.keep(tmp_path, gpu.Outcome("operators-lif", 0.0, {"all": "left out"}, left_out=True), False)
    gpu.keep(tmp_path, gpu.Outcome("model-triton-graph", 0.0, {"all": "left out"}, left_out=True), False)
    gpu.draw(tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(s["stage"], *s["status"].values(), s["ok"]) for s in result["stages"]] == [
        ("operators-lif", "first", False),
        ("model-triton-graph", "left out", False),
        ("model-triton", "first", False),
        ("operators-compiled", "second", False),
    ]
    assert result["model"] == {"triton-graph": None, "triton": {"ms": "first"}}
    assert [row["said"] for row in result["operators"]["rows"]] == ["first", "second"]
    page = (tmp_path / "results.md").read_text()
    assert "| triton | first |" in page and "Two calls." in page and "Dry run" not in page
    ended(tmp_path, "model-triton", "third", dry=True)
    assert gpu.gather(tmp_path)["dry_run"]


def test_calls_into_folders_of_their_own_are_put_together(tmp_path: Path) -> None:
    for stage, call in (("model-triton", "a"), ("operators-lif", "a"), ("operators-lif", "b")):
        ended(tmp_path / call, stage, call)
        gpu.draw(tmp_path / call)
    for file in sorted((tmp_path / "b").iterdir()):
        shutil.copy(file, tmp_path / "a")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "a"), "--redraw"]
    assert subprocess.run(command, timeout=120).returncode == 0
    result = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [s["stage"] for s in result["stages"]] == ["operators-lif", "model-triton"]
    assert result["model"] == {"triton": {"ms": "a"}}
    assert [row["said"] for row in result["operators"]["rows"]] == ["b"]


def test_a_stage_that_fails_leaves_no_rows_of_an_earlier_call(tmp_path: Path) -> None:
    ended(tmp_path, "operators-lif", "first")
    stage = gpu.Stage("operators-lif", 3, [("rows", [sys.executable, "-c", "raise SystemExit(3)"])])
    gpu.keep(tmp_path, gpu.run_stage(stage, tmp_path, 3, dict(os.environ)), False)
    result = gpu.gather(tmp_path)
    assert result["operators"] is None and result["stages"][0]["status"] == {"rows": "exit 3"}


def test_kept_results_alone_are_drawn_again(tmp_path: Path) -> None:
    kept = json.loads((SCRIPT.parent / "results" / "gpu-h200.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(kept))
    gpu.draw(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == kept
    assert kept["note"] in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.triton_interpreter
def test_a_dry_run_of_everything(tmp_path: Path) -> None:
    result = dry_run(tmp_path / "out")
    assert {s.name for s in gpu.stages(tmp_path, True)} == {s["stage"] for s in result["stages"]}
    assert "passed" in result["parity"]["parity-parity"]
    rows = result["operators"]["rows"]
    assert {row["row"] for row in rows} >= {"ours", "eager reference"}
    assert not [row for row in rows if "failed" in row or "wrong" in row]
    assert result["model"]["triton"]["losses"] == pytest.approx(
        result["model"]["reference"]["losses"], rel=1e-3
    )
    assert result["model"]["triton-graph"]["losses"] == result["model"]["triton"]["losses"]
    page = (tmp_path / "out" / "results.md").read_text()
    assert "The times mean nothing" in page
    assert (tmp_path / "out" / "trace-triton.json.gz").stat().st_size > 0


def test_a_failing_or_endless_process_is_noted_and_others_end_well(tmp_path: Path) -> None:
    """What an endless one started ends with it."""
    endless = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    )
    processes = [
        ("good", [sys.executable, "-c", "print('{\"a\": 1}')"]),
        ("bad", [sys.executable, "-c", "raise SystemExit(3)"]),
        ("endless", [sys.executable, "-c", endless]),
        ("absent", [str(tmp_path / "nothing")]),
    ]
    outcome = gpu.run_stage(gpu.Stage("mixed", 3, processes), tmp_path, 3, dict(os.environ))
    assert outcome.status["good"] == "ok"
    assert outcome.status["bad"] == "exit 3"
    assert outcome.status["endless"].startswith("time limit")
    assert "No such file" in outcome.status["absent"]
    assert not outcome.ok and outcome.seconds < 30
    child = Path(f"/proc/{(tmp_path / 'mixed-endless.log').read_text().strip()}/stat")

    def ended() -> bool:  # without an init in the container the dead stay listed
        try:
            return child.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # the signal is sent; when it takes effect is the system's choice
    deadline = time.monotonic() + 20
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended()
    gpu.keep(tmp_path, outcome, False)
    result = gpu.gather(tmp_path)
    assert result["operators"] is None and result["environment"] is None
    page = gpu.render(result)
    assert "bad: exit 3" in page and "Dry run" not in page


def test_at_its_limit_a_process_says_what_it_has(tmp_path: Path) -> None:
    """As pytest does of what failed; and it works beside what is measured, not in the checkout."""
    script = """
import pathlib, time
print(pathlib.Path.cwd(), flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("so far 3 failed", flush=True)
"""
    stage = gpu.Stage("slow", 3, [(name, [sys.executable, "-c", script]) for name in ("a", "b")])
    outcome = gpu.run_stage(stage, tmp_path, 3, dict(os.environ))
    assert set(outcome.status.values()) == {"time limit of 3 s"} and outcome.seconds < 3 + 2 * gpu.GRACE
    for name in "ab":
        assert (tmp_path / f"slow-{name}.log").read_text().split("\n") == [
            str(tmp_path),
            "so far 3 failed",
            "",
        ]


def test_results_that_are_cut_off_take_no_others_with_them(tmp_path: Path) -> None:
    part = {"ceilings": {"copy_gb_per_s": 3.0}, "rows": [{"group": "g", "row": "ours", "ms": 1.0}]}
    (tmp_path / "operators-lif.json").write_text(json.dumps(part)[:-9])
    for name in ("norm_lif", "spike_linear"):
        (tmp_path / f"operators-{name}.json").write_text(json.dumps({**part, "left_out": [name]}))
    found = gpu.gather(tmp_path)["operators"]
    assert found == {**part, "rows": 2 * part["rows"], "left_out": ["norm_lif", "spike_linear"]}


def test_a_group_that_fails_takes_no_others_with_it() -> None:
    import bench_gpu_ops

    def make() -> Any:
        raise torch.OutOfMemoryError("too large")

    group = bench_gpu_ops.Group("g", make, 1.0)
    rows = bench_gpu_ops.bench(group, True, {}, None)
    assert rows == [{"group": "g", "row": "all", "failed": "OutOfMemoryError: too large"}]


def test_operators_beyond_the_time_limit_are_left_out_by_name(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT.parent / "bench_gpu_ops.py"), "--dry-run", "--only", "spike_linear"]
    done = subprocess.run(
        [*command, "--limit", "0", "--out", str(tmp_path / "ops.json")], capture_output=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ops.json").read_text())
    assert found["rows"] == [] and found["ceilings"]["copy_gb_per_s"] > 0
    assert len(found["left_out"]) == 4 and found["left_out"][-1].endswith(", compiled reference")


def test_rows_that_failed_or_were_wrong_have_no_time_in_the_table() -> None:
    rows = [
        {"group": "g", "row": "eager reference", "ms": 2.0, "gb_per_s": 1.0, "of_copy": 0.1},
        {"group": "g", "row": "ours", "ms": 0.5, "gb_per_s": 4.0, "of_copy": 0.4},
        {"group": "g", "row": "peer", "wrong": "relative error 1"},
        {"group": "g", "row": "absent", "skipped": "not installed"},
    ]
    result = {
        "dry_run": False, "environment": None, "stages": [], "parity": {}, "model": {},
        "operators": {"rows": rows, "ceilings": {}, "left_out": ["h"]},
    }  # fmt: skip
    page = gpu.render(result)
    assert "| ours | 0.5 | 4.0 | 0.4 | - | - | - | 4.00 |" in page
    assert "| peer | relative error 1 | | | | | | |" in page
    assert "| absent | not installed | | | | | | |" in page
    assert "Left out for lack of time: h" in page


def test_the_roofline_is_drawn_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"group": "spike_attention forward", "row": "ours", "tflop_per_s": 200.0, "gb_per_s": 2500.0}
    others = [
        {"group": "lif", "row": "ours", "gb_per_s": 2800.0},
        {"group": "g", "row": "peer", "skipped": "-"},
    ]
    operators = {"rows": [row, *others], "ceilings": {"copy_gb_per_s": 3000.0, "bf16_tflop_per_s": 800.0}}
    saved = json.loads(json.dumps({"operators": operators}))
    assert gpu.points(saved) == [("spike_attention forward", 80.0, 200.0)]
    gpu.roofline(saved, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    gpu.roofline({"operators": None}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_spikingjelly_is_measured_or_says_why_not(tmp_path: Path) -> None:
    script = SCRIPT.parent / "peer_spikingjelly.py"
    command = [sys.executable, str(script), "--T", "4", "--elements", "4096", "--dry-run"]
    for implementation in ("torch", "triton"):
        done = subprocess.run(
            [*command, "--implementation", implementation], capture_output=True, text=True, timeout=120
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])["4"]
        assert found.get("ms", 0) > 0 or "installed" in found["skipped"] or "CUDA" in found["skipped"]


def test_a_peer_that_is_ended_early_leaves_what_it_printed() -> None:
    import bench_gpu_ops

    script = """
import time
print('{"4": {"ms": 1.0}}', flush=True)
print('no JSON {', flush=True)
time.sleep(60)
"""
    found, reason = bench_gpu_ops.run_peer([sys.executable, "-c", script], 5)
    assert found == {"4": {"ms": 1.0}} and reason == "time limit of 5 s"
    assert bench_gpu_ops.run_peer([sys.executable, "-c", "raise SystemExit(3)"], 60) == ({}, "exit 3")


def test_several_gradients_are_compared_as_one() -> None:
    import bench_gpu_ops

    group = bench_gpu_ops.Group("g", dict, 1.0, exact=())
    one, two = torch.ones(3), torch.full((3,), 2.0)
    assert bench_gpu_ops._agrees("ours", [one, two], [one, two], group) is None
    wrong = bench_gpu_ops._agrees("ours", [one, one], [one, two], group)
    assert wrong is not None and wrong.startswith("relative error 0.4")


def test_a_real_run_fits_ten_minutes_and_looks_at_every_kernel_test(tmp_path: Path) -> None:
    assert gpu.TOTAL < 600
    parity = next(s for s in gpu.stages(tmp_path, False) if s.name == "parity")
    tests = [
        str(SCRIPT.parent.parent / "tests" / f"test_kernels_{n}.py") for n in ("parity", "norm", "launch")
    ]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    nodes = {line for line in done.stdout.splitlines() if "::" in line}
    chosen: set[str] = set()
    for name, arguments in parity.processes:
        if "-k" in arguments:
            expression = Expression.compile(arguments[arguments.index("-k") + 1])
            found = {node for node in nodes if expression.evaluate(lambda word, node=node: word in node)}
            assert found, name
            chosen |= found
    assert nodes and chosen == nodes


def test_every_tile_that_is_tried_can_be_launched() -> None:
    tiles = importlib.import_module("gpu_tiles")
    for table in tiles.tables(dry=True):
        inputs = table.make()
        for candidate in (None, *table.candidates):
            with _launch.record(90) as launches:
                tiles.run(table, candidate, inputs)
            assert launches, f"{table.name} {table.size} {candidate}"
