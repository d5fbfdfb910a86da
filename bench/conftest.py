"""Shared by all benchmarks: writes the machine and the versions into the results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch
from processor import processor

_PACKAGES = ("spikedecoder", "torch", "triton", "numpy", "spikingjelly", "pytest-benchmark")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(
        processor=processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--original", help="a checkout of the original SpikeDecoder, to be timed as well")
    parser.addoption("--original-python", default=sys.executable, help="a Python that can run it")
