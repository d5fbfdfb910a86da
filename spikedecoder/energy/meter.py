"""The machine's own energy counters, where they can be read: RAPL (Intel, AMD) and NVML (NVIDIA)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Measured:
    """Joules of the whole CPU packages or GPU over `runs` runs, idle power and other programs included."""

    joules: float
    seconds: float
    runs: int
    source: str

    @property
    def per_run(self) -> float:
        """The mean joules of a run."""
        return self.joules / self.runs


class _Rapl:
    """The CPU's packages. Their counters wrap around at max_energy_range_uj."""

    def __init__(self, root: Path) -> None:
        domains = sorted(root.glob("intel-rapl:[0-9]*"))
        # intel-rapl:0 is a package, intel-rapl:0:0 a part of it
        self.domains = [d for d in domains if d.name.count(":") == 1 and not _is_platform(d)]
        if not self.domains:
            raise ValueError(f"measured joules: no RAPL counters in {root}")
        self.source = f"RAPL, {len(self.domains)} CPU package(s)"
        try:
            self.ranges = [_number(d / "max_energy_range_uj") for d in self.domains]
            self.last = self._read()
        except OSError as error:
            raise ValueError(f"measured joules: RAPL cannot be read here ({error})") from None

    def _read(self) -> list[int]:
        return [_number(d / "energy_uj") for d in self.domains]

    def since(self) -> float:
        """Joules since the last call."""
        now, before = self._read(), self.last
        self.last = now
        turns = zip(now, before, self.ranges, strict=True)
        return sum((n - b) % (limit + 1) if n < b else n - b for n, b, limit in turns) / 1e6

    def close(self) -> None:
        pass


def _is_platform(domain: Path) -> bool:
    """Whether this is "psys", the whole machine, which includes the packages."""
    name = domain / "name"
    return name.is_file() and name.read_text().strip() == "psys"


class _Nvml:
    """A GPU. It is found by its UUID: NVML counts GPUs that CUDA_VISIBLE_DEVICES hides, torch does not."""

    def __init__(self, device: str) -> None:
        try:
            import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError:
            raise ValueError("measured joules: NVML needs the package nvidia-ml-py") from None
        self.nvml: Any = pynvml
        try:
            uuid = torch.cuda.get_device_properties(device).uuid
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"measured joules: torch has no device {device!r} here ({error})") from None
        try:
            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.last = self._read()
        except pynvml.NVMLError as error:
            self.close()
            raise ValueError(f"measured joules: NVML cannot be read here ({error})") from None
        self.source = f"NVML, {device}"

    def _read(self) -> int:
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))  # mJ

    def since(self) -> float:
        now, before = self._read(), self.last
        self.last = now
        return (now - before) / 1e3

    def close(self) -> None:
        with suppress(self.nvml.NVMLError):  # nvmlInit may have failed
            self.nvml.nvmlShutdown()


def measured_joules(
    run: Callable[[], object], *, seconds: float = 1.0, device: str = "cpu", rapl: Path = _RAPL
) -> Measured:
    """Joules that the machine counts while `run` is called repeatedly for at least `seconds`.

    run: must return only when its device has finished; it is called once beforehand.
    device: "cuda" or "cuda:N" reads torch's current GPU or its GPU N by NVML, "cpu" the CPU's RAPL counters.
    rapl: the folder of the latter.

    Raises ValueError with the reason if the counters cannot be read (those of RAPL are often readable by root
    only, and absent in virtual machines), or if `device` has none that are known here.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"measured joules: device: got {device!r}, takes cpu, cuda or cuda:N")
    meter = _Nvml(device) if kind == "cuda" else _Rapl(rapl)
    try:
        run()
        meter.since()
        begin, runs = time.perf_counter(), 0
        while runs == 0 or time.perf_counter() - begin < seconds:
            run()
            runs += 1
        return Measured(meter.since(), time.perf_counter() - begin, runs, meter.source)
    finally:
        meter.close()


def _number(path: Path) -> int:
    return int(path.read_text())
