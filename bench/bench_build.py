"""How long the compiled extension takes to build from scratch: its C++ part alone, and with the CUDA part.

    python -m pytest bench/bench_build.py --benchmark-json=result.json

This is what `pip install .` does, without pip's own work. ``busy_s`` is the CPU time of all cores together,
the least of the rounds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
CXX, CUDACXX = os.environ.get("CXX", "c++"), os.environ.get("CUDACXX", "nvcc")


def _lacks(part: str) -> str | None:
    lacking = [name for name in ("setuptools", "pybind11") if importlib.util.find_spec(name) is None]
    lacking += [name for name in ("cmake", "ninja", CXX) if shutil.which(name) is None]
    if part == "cuda" and shutil.which(CUDACXX) is None:
        lacking.append(CUDACXX)
    return f"needs {', '.join(lacking)}" if lacking else None


@pytest.mark.benchmark(group="the extension builds")
@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_build(benchmark: Any, tmp_path: Path, part: str) -> None:
    if reason := _lacks(part):
        pytest.skip(reason)
    busy: list[float] = []

    def build() -> None:
        folder = tmp_path / str(len(busy))
        before = os.times()
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "-t", folder / "temp", "-b", folder / "lib"],
            cwd=ROOT,
            env={**os.environ, "SPIKEDECODER_BUILD": part},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = os.times()
        busy.append(sum(after[2:4]) - sum(before[2:4]))
        assert len(list(folder.glob("lib/spikedecoder/_C*.so"))) == (2 if part == "cuda" else 1)

    benchmark.pedantic(build, rounds=ROUNDS)
    compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True)
    benchmark.extra_info["busy_s"] = round(min(busy), 1)
    benchmark.extra_info["compiler"] = compiler.stdout.splitlines()[0]
