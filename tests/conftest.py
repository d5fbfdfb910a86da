"""What every test runs under: no network, a cache of its own, few threads, poisoned empty memory.

Triton reads TRITON_INTERPRET when a kernel is defined, so the variable is set here, before any test module
can import one. A test that compiles kernels for real (ahead of time) does it in a subprocess without it.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads OpenMP: tests share the cores

import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# cuBLAS is asked for deterministic results by the poison below, and then wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

sys.path.append(str(Path(__file__).parent.parent / "bench"))  # for ptx, the interpreter

NO_GPU = "needs a CUDA device"
OPERATOR_TESTS = ("ops", "operator", "parity", "reference", "kernel", "triton", "native", "csrc")
OPS = Path(__file__).parent.parent / "spikedecoder" / "ops"
OPERATORS = tuple(path.stem for path in OPS.glob("[!_]*.py"))


def pytest_configure(config: pytest.Config) -> None:
    cache = tempfile.TemporaryDirectory(prefix="spikedecoder-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ["SPIKEDECODER_CACHE"] = cache.name
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a worker a core that this process may use, few enough to share a GPU's memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _interpreter_missing() -> str | None:
    """Why Triton kernels can't be interpreted here, or None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for the GPU of this machine; set TRITON_INTERPRET=1 to interpret instead"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # else one core waits for the last
    interpreter_missing = _interpreter_missing()
    for item in items:
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if interpreter_missing and item.get_closest_marker("triton_interpreter"):
            item.add_marker(pytest.mark.skip(reason=interpreter_missing))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many GPU tests were not run, so that a run without a GPU is never taken for one with."""
    # a module that was skipped whole is reported without keywords
    reports = terminalreporter.getreports("skipped")
    skipped = [report for report in reports if "gpu" in getattr(report, "keywords", ())]
    deselected = [
        item for item in terminalreporter.stats.get("deselected", []) if item.get_closest_marker("gpu")
    ]
    count = len(skipped) + len(deselected)
    if count:
        cause = "deselected or skipped" if HAS_CUDA else "no CUDA device"
        terminalreporter.write_line(f"GPU tests not run: {count} ({cause})", yellow=True)


@pytest.fixture(scope="session")
def workers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of pytest-xdist's workers, for what takes long enough to be made once."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _is_operator_test(path: Path) -> bool:
    return path.stem.removeprefix("test_").startswith((*OPERATOR_TESTS, *OPERATORS))


@pytest.fixture(autouse=True)
def poisoned_empty_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """An output element that an operator forgets to write is NaN, or the largest integer; never a lucky 0.

    torch fills `empty`, `empty_like`, `new_empty` and `empty_strided` only while it is deterministic as well.
    That is done below Python, so it holds inside torch.compile and for memory that torch itself asks for. The
    CPU backend's results are torch's meanwhile (`ext/cpu/_memory.py`).
    """
    if not (request.node.get_closest_marker("poison_empty") or _is_operator_test(request.path)):
        yield
        return
    from spikedecoder.ext import cpu

    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    keeps, cpu.KEEPS_FREED_MEMORY = cpu.KEEPS_FREED_MEMORY, False
    yield
    cpu.KEEPS_FREED_MEMORY = keeps
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than small tensors do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
