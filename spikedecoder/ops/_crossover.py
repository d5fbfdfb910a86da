"""Which backend was measured to be the fastest on a GPU, by shape; ``auto`` looks here first.

`crossover.json` beside this file is written by ``python bench/gpu_crossover.py``. For an operator, dtype and
numbers of rows, channels and outputs, an entry gives the spike rate below which the CUDA extension took less
time than Triton. The rate of a call is unknown without waiting for the GPU, so ASSUMED_RATE is used, roughly
that of a trained model. An entry applies to GPUs of the compute capability that it was measured on, and to
channels and outputs between half and twice its own. An entry of few rows applies up to twice its number of
rows, one of many rows from half its number on. Without an entry, the device's order of preference decides.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("crossover.json")
ASSUMED_RATE = 0.1
FEW = 64  # an entry of up to this many rows is one of few


@functools.cache
def entries() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(TABLE.read_text("utf-8"))["entries"])


@functools.cache
def capability(device: torch.device) -> str | None:
    """The compute capability, such as "9.0"; None if the device is not a CUDA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def is_measured(operator: str, device: torch.device) -> bool:
    """Whether there are entries for `operator`, or a part of it, on this device, so that shapes matter."""
    return any(
        entry["operator"].startswith(operator) and entry["capability"] == capability(device)
        for entry in entries()
    )


def fastest(part: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    """The backend to try first for these rows, channels and outputs (packing has no outputs), or None."""
    return _find(part, capability(device), str(dtype), sizes)


@functools.lru_cache(maxsize=1024)
def _find(part: str, capability: str | None, dtype: str, sizes: tuple[int, ...]) -> str | None:
    for entry in entries():
        same = (entry["operator"], entry["capability"], f"torch.{entry['dtype']}")
        if same == (part, capability, dtype) and _stands(entry, *sizes):
            return "cuda" if entry["below_triton"] >= ASSUMED_RATE else None
    return None


def _stands(entry: dict[str, Any], rows: int, *widths: int) -> bool:
    measured = [entry[name] for name in ("channels", "outputs") if entry[name] is not None]
    near = len(measured) == len(widths) and all(
        own < 2 * width and width < 2 * own for own, width in zip(measured, widths, strict=True)
    )
    few = entry["rows"] <= FEW
    return near and (0 < rows <= 2 * entry["rows"] if few else rows >= entry["rows"] / 2)
