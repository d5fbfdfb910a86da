"""What the GPU run measures over rates of spikes and what becomes of it, and how it gets its extension.

Without a GPU: the same calls under the interpreter, a reference in the extension's place, made-up results.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from spikedecoder.ops import _crossover, _dispatch
from spikedecoder.reference import ilif, lif, norm_lif

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # its modules import each other by name
gpu, gpu_build, gpu_crossover = (
    importlib.import_module(name) for name in ("gpu", "gpu_build", "gpu_crossover")
)
gpu_groups, gpu_rates, bench_gpu_ops = (
    importlib.import_module(name) for name in ("gpu_groups", "gpu_rates", "bench_gpu_ops")
)


@pytest.mark.parametrize("T", [4, 8, 16])
def test_neurons_fire_as_often_as_a_trained_models(T: int) -> None:
    torch.manual_seed(0)
    x = gpu_groups.currents(T, 64, 512).cpu()
    weight, bias = (w.cpu() for w in gpu_groups.affine(512))
    for spikes in (
        lif.forward(x, 1.0, None, gpu_groups.P)[0],
        norm_lif.forward(x, weight, bias, None, None, 1e-5, 1.0, gpu_groups.P)[0],
        ilif.forward(x, gpu_groups.INTEGERS, False)[0].float() / gpu_groups.INTEGERS.levels,
    ):
        assert 0.1 < spikes.float().mean() < 0.2


@pytest.mark.triton_interpreter
def test_every_row_of_the_rates_runs_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the extension's, whose place the reference takes: arguments and results are alike."""

    def reference(operator: str) -> Any:
        return importlib.import_module(f"spikedecoder.reference.{operator}")

    for module in (gpu_rates, gpu_groups):
        monkeypatch.setattr(module, "extension", reference)
    groups = [*gpu_rates.rate_groups(True), *gpu_groups.element_groups(True)]
    rows = [
        row
        for group in groups
        for row in bench_gpu_ops.bench(group, True, {"copy_gb_per_s": 1.0, "bf16_tflop_per_s": 1.0}, None)
    ]
    assert {row.get("operator") for row in rows} == {
        "spike_linear", "spike_linear_weight_grad", "pack_spikes", "unpack_spikes", None
    }  # fmt: skip
    assert {row["row"] for row in rows} >= {*gpu_rates.ROWS, gpu_groups.EXTENSION, "ours"}
    assert not [row for row in rows if "ms" not in row]

    def wrong(operator: str) -> Any:
        return type(
            "module", (), {"forward": lambda s, w, b: (s @ w.t() + 1, None), "pack": lambda s: s.new_ones(1)}
        )

    monkeypatch.setattr(gpu_rates, "extension", wrong)
    for operator in ("spike_linear", "pack_spikes"):
        group = next(g for g in gpu_rates.rate_groups(True) if g.about["operator"] == operator)
        found = bench_gpu_ops.bench(group, True, {"copy_gb_per_s": 1.0, "bf16_tflop_per_s": 1.0}, None)
        assert "wrong" in next(row for row in found if row["row"] == gpu_rates.CUDA)


def test_the_rates_of_a_real_run() -> None:
    """What has to be there, by name; nothing is allocated to list it."""
    points = [group.about for group in gpu_rates.rate_groups(False)]
    for operator, rows in (("spike_linear", 8192), ("spike_linear", 4), ("spike_linear_weight_grad", 8192)):
        for shape in ((512, 2048), (2048, 512), (80, 1280)):
            for dtype in ("bfloat16", "float32"):
                wanted = (operator, dtype, rows, *shape)
                rates = [
                    p["rate"] for p in points if tuple(p[name] for name in gpu_crossover.SHAPE) == wanted
                ]
                assert rates == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], wanted
    assert _crossover.ASSUMED_RATE in gpu_rates.RATES
    assert {(p["operator"], p["rows"]) for p in points if p["outputs"] is None} == {
        (operator, rows) for operator in ("pack_spikes", "unpack_spikes") for rows in (8192, 4)
    }


def test_without_the_extension_its_rows_say_why() -> None:
    from spikedecoder.ext import cuda

    found = gpu_groups.extension("spike_linear")
    if (reason := cuda.missing()) is not None:
        assert found == reason
    else:
        assert found.__name__ == "spikedecoder.ext.cuda.spike_linear"


def test_compiled_references_come_last_and_those_that_take_long_at_their_end() -> None:
    groups = [group for make in bench_gpu_ops.GROUPS.values() for group in make(False)]
    compiled = bench_gpu_ops.of(bench_gpu_ops.COMPILED, groups)
    slow = [group.slow for group in compiled]
    assert slow == sorted(slow) and {True, False} == set(slow)
    assert not [group for group in compiled if group.about]
    assert set(bench_gpu_ops.PASSES["all"]) == {
        *bench_gpu_ops.PASSES["others"],
        *bench_gpu_ops.PASSES["compiled"],
    }


def row(name: str, rate: float, ms: float | None, **changes: Any) -> dict[str, Any]:
    point = {"operator": "spike_linear", "dtype": "bfloat16", "rows": 8192, "channels": 512, "outputs": 2048}
    found = {"group": f"{name} {rate}", **point, "rate": rate, "row": name, **changes}
    return found | ({"skipped": "it is not built"} if ms is None else {"ms": ms})


def result(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    environment = {"gpu": {"name": "NVIDIA H200", "capability": "9.0"}, "date": "2026-11-30"}
    operators = {"rows": list(rows), "ceilings": {}, "left_out": []}
    empty = {"dry_run": False, "stages": [], "parity": {}, "model": {}}
    return {**empty, "environment": environment, "operators": operators, **changes}


SWEEP = [
    row(name, rate, ms)
    for name, times in {
        "dense": (1.0, 1.0, 1.0, 1.0),
        "triton": (2.0, 2.0, 2.0, 2.0),
        "cuda": (0.3, 0.97, 1.5, 1.2),  # at 0.05 too little to be sure of; at 0.5 chance
    }.items()
    for rate, ms in zip((0.01, 0.05, 0.1, 0.5), times, strict=True)
]


def test_the_crossover_is_the_last_rate_before_another_is_as_fast() -> None:
    (found,) = gpu_crossover.table(result(*SWEEP))["entries"]
    assert found == {
        "capability": "9.0", "operator": "spike_linear", "dtype": "bfloat16", "rows": 8192, "channels": 512,
        "outputs": 2048, "below_triton": 0.5, "below_dense": 0.01,
    }  # fmt: skip
    slower = [row("cuda", 0.2, 2.5), row("triton", 0.2, 2.0)]
    assert gpu_crossover.table(result(*SWEEP, *slower))["entries"][0]["below_triton"] == 0.1
    never = [row("cuda", 0.01, 2.0), row("triton", 0.01, 2.0)]
    assert gpu_crossover.table(result(*never))["entries"][0]["below_triton"] == 0.0


def test_packing_takes_as_long_at_any_rate() -> None:
    packing = {"operator": "pack_spikes", "outputs": None}
    rows = [
        row(name, 0.16, ms, **packing)
        for name, ms in (("triton", 2.0), ("cuda", 1.0), ("eager reference", 9.0))
    ]
    (found,) = gpu_crossover.table(result(*rows))["entries"]
    assert (found["below_triton"], found["below_dense"]) == (1.0, None)


def test_what_was_not_measured_has_no_entry() -> None:
    missing = [row("cuda", 0.01, None), row("triton", 0.01, 2.0), row("dense", 0.01, 1.0)]
    other = [row(name, 0.01, 1.0, dtype="float32") for name in ("cuda", "triton")]
    (found,) = gpu_crossover.table(result(*missing, *other))["entries"]
    assert found["dtype"] == "float32"
    for nothing in (
        result(*missing),
        result(),
        result(*SWEEP, dry_run=True),
        result(*SWEEP, environment=None),
    ):
        with pytest.raises(ValueError, match="the result"):
            gpu_crossover.table(nothing)


def test_a_written_table_is_what_auto_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_text(json.dumps(result(*SWEEP)))
    command = [sys.executable, str(BENCH / "gpu_crossover.py"), str(tmp_path / "results.json")]
    subprocess.run([*command, "--out", str(tmp_path / "table.json")], check=True, timeout=60)
    monkeypatch.setattr(_crossover, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(_crossover, "capability", lambda device: "9.0")
    call = _dispatch.Call(torch.device("cuda"), torch.bfloat16, (4, 2048, 512), {"outputs": 2048})
    caches = _crossover.entries, _crossover._find
    try:
        for cached in caches:
            cached.cache_clear()
        assert _dispatch._order("spike_linear", call) == ("cuda", "triton", "reference")
    finally:
        for cached in caches:
            cached.cache_clear()
    monkeypatch.undo()
    assert gpu_crossover.TABLE == _crossover.TABLE


def test_rates_stand_side_by_side_on_the_page() -> None:
    rows = [*SWEEP, row("cuda, weight by columns", 0.01, None), {"group": "lif", "row": "ours", "ms": 1.0}]
    page = gpu.render(result(*rows))
    assert "### spike_linear bfloat16 M=8192 K=512 N=2048, ms by rate" in page
    assert "| row | 0.01 | 0.05 | 0.1 | 0.5 |" in page
    assert "| cuda | 0.3 | 0.97 | 1.5 | 1.2 |" in page
    assert "| cuda, weight by columns | it is not built | - | - | - |" in page
    assert "The extension is faster than triton up to 0.5, than dense up to 0.01." in page
    assert page.count("### ") == 2 and "### lif" in page


USABLE = {"built": True, "stale": False, "loaded": True, "folder": str(gpu_build.ROOT / "spikedecoder")}
MISSING = {"built": False, "loaded": False, "mend": "it is not built", "architecture": "90"}


def states(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any]) -> None:
    following = iter(found)
    monkeypatch.setattr(gpu_build, "state", lambda: next(following))


def test_an_extension_that_is_there_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states(monkeypatch, USABLE)
    monkeypatch.setattr(gpu_build, "build", lambda architecture: pytest.fail("built"))
    assert gpu_build.provide(True)["how"] == "ready-made"


def test_what_is_missing_is_built_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gpu_build, "find_nvcc", lambda: "/usr/local/bin/nvcc")
    monkeypatch.setattr(gpu_build, "build", asked.append)
    states(monkeypatch, MISSING, USABLE)
    assert gpu_build.provide(True)["how"].startswith("built in ") and asked == ["90"]
    states(monkeypatch, MISSING, {**MISSING, "folder": "/usr/lib/spikedecoder"})
    found = gpu_build.provide(True)
    assert found["how"] == "missing" and "/usr/lib/spikedecoder, not this checkout" in found["why"]
    monkeypatch.setattr(gpu_build, "build", lambda architecture: "the build ended with 1")
    states(monkeypatch, MISSING, {**MISSING, "folder": USABLE["folder"]})
    assert gpu_build.provide(True)["why"] == "the build ended with 1"
    monkeypatch.setattr(gpu_build, "find_nvcc", lambda: None)
    states(monkeypatch, MISSING)
    assert "no nvcc" in gpu_build.provide(True)["why"]


def test_a_module_of_another_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "spikedecoder"
    folder.mkdir()
    own = importlib.machinery.EXTENSION_SUFFIXES[0]
    for name in (
        f"_C_cuda{own}",
        "_C_cuda.cpython-27-x86_64-linux-gnu.so",
        "_C.cpython-27-x86_64-linux-gnu.so",
    ):
        (folder / name).write_bytes(b"")
    assert gpu_build.of_other_pythons(folder) == ["_C_cuda.cpython-27-x86_64-linux-gnu.so"]
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    states(monkeypatch, MISSING)
    why = gpu_build.provide(False)["why"]
    assert "_C_cuda.cpython-27-x86_64-linux-gnu.so" in why and str(sys.implementation.cache_tag) in why


def test_what_is_there_is_asked_of_a_process_of_its_own() -> None:
    """For real: without a GPU nothing is usable, and it says why; a process that fails is a reason too."""
    found = gpu_build.state()
    assert gpu_build.is_usable(found) or found["mend"]
    assert torch.cuda.is_available() or not found["loaded"]
    assert Path(found["folder"]).name == "spikedecoder"
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_build.py"), "--no-build"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["python"] == sys.implementation.cache_tag


def test_a_module_that_cannot_be_loaded_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "def info(): raise ImportError('GLIBC_2.99 not found')\n"
    broken = f"from spikedecoder import ext\n{broken}ext.info = info\n"
    monkeypatch.setattr(gpu_build, "_STATE", broken + gpu_build._STATE)
    assert gpu_build.state()["mend"] == "it cannot be loaded: GLIBC_2.99 not found"
    monkeypatch.setattr(gpu_build, "_STATE", "raise SystemExit('no torch')")
    assert gpu_build.state()["mend"] == "a process that asks ended with 1: no torch"


def test_the_page_says_how_the_extension_came() -> None:
    page = gpu.render(result(extension={"how": "missing", "python": "cpython-312", "why": "no nvcc"}))
    assert "CUDA extension: missing; python cpython-312; why no nvcc" in page
    assert "CUDA extension" not in gpu.render(result(extension=None))


@pytest.mark.parametrize("dry", [True, False])
def test_the_stages_of_a_run(dry: bool, tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, dry)}
    names = list(stages)
    assert names[:4] == ["environment", "build", "parity", "operators-rates"]
    assert names[-1] == "operators-compiled"
    assert {f"operators-{name}" for name in gpu.OPERATORS} <= set(names)
    for stage in stages.values():
        for _, command in stage.processes:
            for argument in command:
                assert not argument.endswith(".py") or Path(argument).is_file(), argument
    parity = dict(stages["parity"].processes)
    assert parity["extension"][-1].endswith("test_ext_cuda.py")
    assert dry or parity["opcheck"][-1].endswith("test_kernels_opcheck.py")
    extension = dict(stages["build"].processes)["extension"]
    assert ("--no-build" in extension) == dry
    of_operators = {name for group in gpu.OPERATORS for name in gpu._which(group) if not name.startswith("-")}
    assert of_operators == {*bench_gpu_ops.GROUPS, "others", "compiled"}
