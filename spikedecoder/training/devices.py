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
    """Raise ValueError if this machine lacks the device; `name` is one that `TrainConfig` takes."""
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
    """Give a run its own Accelerate state; the caller's is restored at the end.

    Accelerate otherwise keeps device, precision and gradient accumulation for the life of the process.
    """
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
    """Enable gradients and leave the precision to the run's settings, whatever modes the caller has set."""
    off: AbstractContextManager[Any] = nullcontext()
    if torch.is_autocast_enabled(device.type):
        # cache_enabled=False: nested in another autocast, the run's own would keep stale casts of the weights
        off = torch.autocast(device.type, enabled=False, cache_enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off:
        yield


def make_accelerator(settings: TrainConfig, find_unused_parameters: bool = False) -> Any:
    """The Accelerator for these settings; call it inside `own_accelerate_state`."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    check_device(settings.device)
    accelerator: Any = None
    chosen = settings.device if settings.device not in ("auto", "cpu") else None
    # without cpu=True, Accelerate would let several processes on CPUs train separately, each as if alone
    cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
    previous = os.environ.get("ACCELERATE_TORCH_DEVICE")
    try:
        if chosen is not None and "LOCAL_RANK" not in os.environ:
            os.environ["ACCELERATE_TORCH_DEVICE"] = chosen
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=settings.mixed_precision,
            # as a plugin, because an environment variable of Accelerate would override the plain argument
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.grad_accum),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
    finally:
        if previous is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = previous
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would silently ignore it
        raise ValueError("mixed_precision: got 'fp16' on the CPU, takes 'no' or 'bf16' there")
    return accelerator


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, this leaves out the memory of the parent process
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
