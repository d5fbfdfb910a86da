"""The command doctor: what it finds on this machine, and what it says of what is missing or broken."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spikedecoder import ext
from spikedecoder.cli import main
from spikedecoder.cli.doctor import _look_for, _show, examine
from spikedecoder.ext import _sources
from spikedecoder.ops import _dispatch

needs_extension = pytest.mark.skipif(not ext.is_built(), reason=ext.NOT_BUILT)


@pytest.fixture(autouse=True)
def long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    return captured.err if code == 2 else captured.out


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"{start}: "))
    return found.removeprefix(f"{start}: ")


def test_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    got = json.loads(run(capsys, "--json"))
    assert got["training_step"]["works"] is True and got["torch"] == torch.__version__
    assert "reference" in got["operators"]["cpu"]["lif"]
    for rows in got["operators"]["cpu"].values():
        assert list(rows.values()).count("chosen") == 1
    for part in ("cpu", "cuda"):
        assert got["extension"][part]["built"] or "pip install" in got["extension"][part]["mend"]
    assert got["threads"] == torch.get_num_threads()

    text = run(capsys)
    assert "works" in line(text, "a training step of a small model")
    assert f"{got['threads']} threads, {got['cpu_capability']}" in line(text, "cpu")
    for tool in ("compiler", "nvcc"):
        assert line(text, tool) == got[tool] or line(text, tool).endswith(got["mend"][tool])
    for package in ("triton", "matplotlib", "optuna"):
        assert line(text, package) == got["optional"][package] or "pip install" in line(text, package)
    assert line(text, "CUDA kernels")


def test_an_operator_that_no_backend_has_is_computed_by_its_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "spike_linear, then norm_lif" in run(capsys)
    call = _dispatch.Call(torch.device("cpu"), torch.float32, (4, 1, 128, 96))
    for built in (True, False):
        reasons = {"cpu": None if built else "not built", "reference": "it has none"}
        monkeypatch.setattr(_dispatch, "why_not", lambda backend, *_, found=reasons: found[backend])
        assert dict(_dispatch.explain("linear_norm_lif", call)) == {
            "cpu": "chosen" if built else "not built",
            "reference": "it has none",
            "spike_linear, then norm_lif": "possible" if built else "chosen",
        }


@needs_extension
def test_the_compiled_part_and_what_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from spikedecoder.ext.cpu import native

    got = json.loads(run(capsys, "--json"))
    cpu = got["extension"]["cpu"]
    assert cpu["variant"] == native.variant() and cpu["variants"] == list(native.variants())
    assert cpu["features"] == list(native.build()["features"])
    if platform.machine() in ("x86_64", "AMD64") and cpu["variant"] != "baseline":
        assert "avx2" in cpu["features"]
    assert got["kernels"]["agree"] > 20 and got["kernels"]["differ"] == []
    text = run(capsys)
    for part in (
        f"built by {cpu['compiler']}",
        f"running {cpu['variant']}",
        f"of {', '.join(cpu['variants'])}",
        f"CPU has {', '.join(cpu['features'])}",
        f"OpenMP {cpu['openmp']}" if cpu["openmp"] else cpu["mend"],
        f"{torch.get_num_threads()} threads",
    ):
        assert part in line(text, "C++ kernels").split("; ")
    assert line(text, "C++ kernels beside the reference") == f"{got['kernels']['agree']} cases agree"


def test_the_architectures_of_the_cuda_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("spikedecoder._C_cuda")
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
    module.architectures = "80-real 100-real 100-virtual"  # type: ignore[attr-defined]
    module.compiler, module.sources = "nvcc 13.0", _sources.fingerprint()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    report = examine()
    assert report["extension"]["cuda"]["architectures"] == ["80-real", "100-real", "100-virtual"]
    _show(report)
    said = line(capsys.readouterr().out, "CUDA kernels").split("; ")
    assert "built by nvcc 13.0" in said and "for 80-real, 100-real, 100-virtual" in said


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.mark.parametrize(
    ("system", "compiler", "nvcc"),
    [
        ("Linux", "apt install g++", "conda install -c nvidia cuda-toolkit"),
        ("Darwin", "xcode-select --install", "no CUDA for macOS"),
        ("Windows", "wsl --install", "wsl --install"),
    ],
)
def test_each_system_has_its_commands(
    system: str, compiler: str, nvcc: str, no_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    for tool, command in (("compiler", compiler), ("nvcc", nvcc)):
        path, mend = _look_for(tool)
        assert path is None and mend is not None and command in mend


def test_what_is_missing_and_what_mends_it(
    no_programs: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    report = examine()
    assert report["compiler"] is None and report["nvcc"] is None
    assert set(report["mend"]) == {"compiler", "nvcc"}
    for built, needed in (
        (False, "none found; needed to build the C++ kernels: "),
        (True, "none found; needed to build the C++ kernels, which are there, anew: "),
    ):
        report["extension"]["cpu"] = {"built": built, **({} if built else {"mend": ext.NOT_BUILT})}
        _show(report)
        text = capsys.readouterr().out
        assert line(text, "compiler").startswith(
            f"{needed}CXX: got 'no-such-compiler', which is not a program here"
        )
        assert built or "pip install . in a checkout, with a C++ compiler" in line(text, "C++ kernels")
        assert line(text, "nvcc").endswith(report["mend"]["nvcc"])


def test_nvcc_is_found_where_the_build_finds_it(no_programs: None, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert _look_for("nvcc") == (str(nvcc), None)


@needs_extension
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("norm_lif.backward_layer", "norm_lif-wide"),
        ("norm_lif.backward_batch", "norm_lif-batch-train"),
        ("norm_lif.moments", "norm_ilif-power-train"),
        ("linear_norm_lif.forward", "linear_norm_lif-layer"),
        ("spike_linear.weight_grad", "linear_norm-layer"),
    ],
)
def test_a_kernel_whose_results_are_zero(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernel: str, case: str
) -> None:
    name, function = kernel.split(".")
    module = importlib.import_module(f"spikedecoder.ext.cpu.{name}")
    real = getattr(module, function)

    def zeros(*x: Any, **options: Any) -> Any:
        found = real(*x, **options)
        for part in (found,) if torch.is_tensor(found) else found:
            if part is not None:
                part.zero_()
        return found

    monkeypatch.setattr(module, function, zeros)
    assert case in json.loads(run(capsys, "--json", code=1))["kernels"]["differ"]


@needs_extension
def test_a_kernel_that_computes_something_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikedecoder.ext.cpu import binarize

    forward = binarize.forward
    monkeypatch.setattr(binarize, "forward", lambda *x: 1 - forward(*x))
    assert "binarize-matrix" in json.loads(run(capsys, "--json", code=1))["kernels"]["differ"]
    text = run(capsys, code=1)
    assert line(text, "C++ kernels that differ from the reference") == "binarize-matrix"


def test_what_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_read_environment", _dispatch._read_environment.__wrapped__)
    monkeypatch.setenv("SPIKEDECODER_BACKEND", "cuda")
    step = json.loads(run(capsys, "--json", code=1))["training_step"]
    assert not step["works"] and "BackendError" in step["error"]
    monkeypatch.setenv("SPIKEDECODER_BACKEND", "cudda")
    assert run(capsys, code=2).startswith("error: environment variable SPIKEDECODER_BACKEND: got 'cudda'")
