"""The original's README character model: tokens per second of a forward pass and of a training step.

    python -m pytest bench/bench_model.py --benchmark-json=result.json

B = 8, S = 256, T = 4. One row per backend that can run here; the rows of a run share the machine's mood, so
compare rows, not runs. Peak memory is measured in a process of its own, whose only work is two such steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.ops._dispatch import Call, candidates, why_not

BATCH, LENGTH = 8, 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _backends() -> list[str]:
    call = Call(DEVICE, torch.float32, ())
    return [b for b in candidates(DEVICE) if why_not(b, "lif", call) is None]


def training_step(backend: str) -> tuple[SpikeDecoder, Callable[[], None], Callable[[], None]]:
    """(model, forward, step) on fixed random tokens."""
    torch.manual_seed(0)
    model = SpikeDecoder(SpikeDecoderConfig.preset("original-char")).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, 30, (BATCH, LENGTH), device=DEVICE)

    def forward() -> None:
        with torch.no_grad(), _backend(backend):
            model(tokens)
        _wait()

    def step() -> None:
        with _backend(backend):
            model.loss(tokens, tokens.roll(-1, 1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait()

    return model, forward, step


def _backend(name: str) -> use_backend:
    # the fastest of each operator, or the reference everywhere
    return use_backend("reference" if name == "reference" else "auto")


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(backend: str) -> float:
    """MiB: of the GPU's allocator, or resident in a fresh process."""
    if DEVICE.type == "cuda":
        _, _, step = training_step(backend)
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    done = subprocess.run([sys.executable, __file__, backend], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["peak_rss_mib"]


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


if __name__ == "__main__":
    import resource

    _, _, two_steps = training_step(sys.argv[1])
    two_steps()
    two_steps()
    print(json.dumps({"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
