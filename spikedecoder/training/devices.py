"""Where a run computes, and how much memory it took."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from spikedecoder.training.config import TrainConfig


def check_device(name: str) -> None:
    """ValueError where this machine lacks the device (of a name that `TrainConfig` takes)."""
    kind, _, index = name.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"device: got {name!r}, but torch finds no CUDA GPU here; takes auto or cpu")
        if index and int(index) >= count:
            raise ValueError(f"device: got {name!r}, takes cuda:0 to cuda:{count - 1} here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: got {name!r}, but torch finds no MPS device here; takes auto or cpu")


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Accelerate keeps device, precision and accumulation for the life of the process: inside they are those
    of one run, and behind it those of the caller's own Accelerator again."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds: tuple[Any, ...] = (AcceleratorState, GradientState, PartialState)
    before = [dict(kind._shared_state) for kind in kinds]
    try:
        for kind in kinds:
            if kind is not PartialState or not torch.distributed.is_initialized():
                kind._shared_state.clear()
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            if kind is not PartialState or not torch.distributed.is_initialized():
                kind._shared_state.clear()
                kind._shared_state.update(state)


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Gradients, in the precision that the run's settings name, whatever the caller has switched on."""
    off: AbstractContextManager[Any] = nullcontext()
    if torch.is_autocast_enabled(device.type):
        # without a cache: the run's own autocast, inside of another, would keep what it once made of weights
        off = torch.autocast(device.type, enabled=False, cache_enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off:
        yield


def make_accelerator(settings: TrainConfig, find_unused_parameters: bool = False) -> Any:
    """Accelerate's Accelerator for these settings, inside of `own_accelerate_state`."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    check_device(settings.device)
    accelerator: Any = None
    chosen = settings.device if settings.device not in ("auto", "cpu") else None
    # where it is not told, Accelerate lets several processes on CPUs train apart, each as if alone
    cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
    previous = os.environ.get("ACCELERATE_TORCH_DEVICE")
    try:
        if chosen is not None and "LOCAL_RANK" not in os.environ:
            os.environ["ACCELERATE_TORCH_DEVICE"] = chosen
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=settings.mixed_precision,
            # as a plugin: an environment variable of Accelerate's would override the plain argument
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.grad_accum),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
    finally:
        if previous is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = previous
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would leave it out without a word
        raise ValueError("mixed_precision: got 'fp16' on the CPU, takes 'no' or 'bf16' there")
    return accelerator


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, not that of the process which started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        import psutil  # type: ignore[import-untyped,unused-ignore]

        return psutil.Process().memory_info().peak_wset / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
