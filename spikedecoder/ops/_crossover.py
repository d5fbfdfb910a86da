"""Which backend was measured to be the fastest on a GPU, by shape: what ``auto`` asks before its order.

`crossover.json` beside this file is written by ``python bench/gpu_crossover.py``. An entry says up to which
rate of spikes the CUDA extension took less time than Triton, for an operator, a dtype, rows, channels and
outputs. The rate of a call is not known without waiting for the GPU; it is taken to be ASSUMED_RATE, about
that of a trained model. An entry stands for GPUs of the compute capability that it was measured on; for
channels and outputs less than twice or more than half its own; and for rows: one of few for up to twice as
many, one of many from half as many on. Where no entry stands, the device's order holds.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("crossover.json")
ASSUMED_RATE = 0.1
FEW = 64  # rows: up to here few


@functools.cache
def entries() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(TABLE.read_text("utf-8"))["entries"])


@functools.cache
def capability(device: torch.device) -> str | None:
    """Such as "9.0"; None of what is no GPU of CUDA."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def is_measured(operator: str, device: torch.device) -> bool:
    """Whether shapes matter to the choice for `operator`, or a part of it, on this device."""
    return any(
        entry["operator"].startswith(operator) and entry["capability"] == capability(device)
        for entry in entries()
    )


def fastest(part: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    """The backend to try first for rows, channels and outputs (packing has none); None where none is."""
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
