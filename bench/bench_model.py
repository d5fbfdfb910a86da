"""The original's README character model: tokens per second of a forward pass and of a training step.

    python -m pytest bench/bench_model.py --benchmark-json=result.json

B = 8, S = 256, T = 4; also a training step of the default model, B = 8, S = 128. There is one row per backend
that can run here. The rows of a run share the machine's load, so compare rows, not runs. Peak memory is the
largest of three processes that only run two such steps each; for the compiled operators it is also measured
with the system's memory allocator as it is.

The group "in turns" runs each way of training in a process of its own, one step each in turns: the reference
with the system's memory allocator as it is, and as this package sets it; the compiled operators; and these in
bfloat16. ``speedup_*`` are ratios of the fastest rounds. The group "waiting threads spin" trains the default
model with several numbers of turns before OpenMP's threads sleep (`-k waiting`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.ops._dispatch import Call, candidates, why_not
from spikedecoder.training.devices import peak_rss_mib

BATCH, LENGTH = 8, 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _backends() -> list[str]:
    call = Call(DEVICE, torch.float32, ())
    return [b for b in candidates(DEVICE) if why_not(b, "lif", call) is None]


def training_step(
    backend: str, dtype: torch.dtype = torch.float32, default: bool = False
) -> tuple[SpikeDecoder, Callable[[], None], Callable[[], None]]:
    """(model, forward, step) on fixed random tokens. default: the default model for the built-in text."""
    torch.manual_seed(0)
    preset: dict[str, Any] = {"name": "default", "vocab_size": 105} if default else {"name": "original-char"}
    model = SpikeDecoder(SpikeDecoderConfig.preset(**preset)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-3, betas=(0.9, 0.95), fused=True)
    length = model.config.max_len if default else LENGTH
    tokens = torch.randint(0, 30, (BATCH, length), device=DEVICE)

    def forward() -> None:
        with torch.no_grad(), _backend(backend):
            model(tokens)
        _wait()

    def step() -> None:
        with _backend(backend):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = model.loss(tokens, tokens.roll(-1, 1))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait()

    return model, forward, step


def _backend(name: str) -> use_backend:
    # the fastest for each operator, or the reference everywhere
    return use_backend("reference" if name == "reference" else "auto")


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(backend: str, recompute: bool = False, tune_malloc: bool = True) -> float:
    """MiB: of the GPU's allocator, or the resident memory of a fresh process, the largest of three."""
    if DEVICE.type == "cuda":
        model, _, step = training_step(backend)
        model.recompute_activations(recompute)
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    environment = {**os.environ, "SPIKEDECODER_TUNE_MALLOC": str(int(tune_malloc))}
    command = [sys.executable, __file__, backend, *(["recompute"] if recompute else [])]
    peaks = []
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout)["peak_rss_mib"])
    return max(peaks)


@pytest.fixture(params=_backends())
def backend(request: Any) -> Iterator[str]:
    yield request.param


@pytest.mark.benchmark(group="original-char forward")
def test_forward(benchmark: Any, backend: str) -> None:
    _, forward, _ = training_step(backend)
    benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = round(BATCH * LENGTH / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="original-char training step")
def test_training_step(benchmark: Any, backend: str) -> None:
    _, _, step = training_step(backend)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = round(BATCH * LENGTH / benchmark.stats.stats.median)
    benchmark.extra_info["peak_memory_mib"] = round(_peak_memory(backend))
    benchmark.extra_info["peak_memory_recomputed_mib"] = round(_peak_memory(backend, recompute=True))
    if backend == "cpu":
        for name, recompute in (("", False), ("recomputed_", True)):
            peak = _peak_memory(backend, recompute, tune_malloc=False)
            benchmark.extra_info[f"peak_memory_{name}system_allocator_mib"] = round(peak)


@pytest.mark.benchmark(group="default training step")
def test_default_step(benchmark: Any, backend: str) -> None:
    model, _, step = training_step(backend, default=True)
    benchmark.pedantic(step, rounds=40, warmup_rounds=5)
    tokens = BATCH * model.config.max_len
    benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median)


class Worker:
    """A process that holds a model and steps when told to."""

    def __init__(self, *command: str, **environment: str) -> None:
        command = (sys.executable, __file__, *command)
        environment = {**os.environ, **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]

    def step(self) -> float:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


WORKERS = {
    "reference, system allocator": (("reference", "float32"), {"SPIKEDECODER_TUNE_MALLOC": "0"}),
    "reference": (("reference", "float32"), {}),
    "cpu": (("cpu", "float32"), {}),
    "cpu bfloat16": (("cpu", "bfloat16"), {}),
}
# for the default model: how long OpenMP's threads spin before they sleep, see spikedecoder/_waiting.py
WAITING = {
    f"{turns} turns": (("cpu", "float32", "default"), {"GOMP_SPINCOUNT": turns})
    for turns in ("1000", "10000", "300000")
}


def _in_turns(workers: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each worker's steps, taken in turns."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (command, environment) in workers.items():
            running[name] = Worker(*command, **environment)
            stack.callback(running[name].process.communicate)
            running[name].step()
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in running.items():
                seconds[name].append(worker.step())
        return seconds


@pytest.fixture(scope="module")
def turns() -> dict[str, list[float]]:
    return _in_turns(WORKERS, rounds=6)


@pytest.fixture(scope="module")
def waiting() -> dict[str, list[float]]:
    return _in_turns(WAITING, rounds=30)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the CPU's memory")
@pytest.mark.benchmark(group="original-char training step, in turns")
@pytest.mark.parametrize("name", WORKERS)
def test_in_turns(benchmark: Any, turns: dict[str, list[float]], name: str) -> None:
    _replay(benchmark, turns[name])
    for other in list(WORKERS)[:2]:
        ratio = min(turns[other]) / min(turns[name])
        benchmark.extra_info[f"speedup_over_{other.replace(', ', '_').replace(' ', '_')}"] = round(ratio, 2)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the CPU's threads")
@pytest.mark.benchmark(group="default training step, waiting threads spin, in turns")
@pytest.mark.parametrize("name", WAITING)
def test_waiting(benchmark: Any, waiting: dict[str, list[float]], name: str) -> None:
    _replay(benchmark, waiting[name])


def _replay(benchmark: Any, seconds: list[float]) -> None:
    # the benchmark reports the times of the worker
    benchmark._timer = _Replay(iter(seconds))
    benchmark.pedantic(lambda: None, rounds=len(seconds))


class _Replay:
    """A timer that reports durations measured elsewhere."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.durations, self.now, self.started = durations, 0.0, False

    def __call__(self) -> float:
        self.started = not self.started
        if not self.started:
            self.now += next(self.durations)
        return self.now


STEPS = 5  # of the default model per turn, because it is small


if __name__ == "__main__":
    backend, how = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    only_memory, default = how in ("", "recompute"), "default" in sys.argv[3:]
    dtype = torch.float32 if only_memory else getattr(torch, how)
    model, _, step = training_step(backend, dtype, default)
    if only_memory:
        model.recompute_activations(how == "recompute")
        step()
        step()
        print(json.dumps({"peak_rss_mib": peak_rss_mib()}))
    else:
        steps = STEPS if default else 1
        for _ in sys.stdin:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            print(json.dumps((time.perf_counter() - start) / steps), flush=True)
