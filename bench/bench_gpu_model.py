"""A training step of the original's README character model on the GPU: one row per process.

    python bench/bench_gpu_model.py --row triton                       # prints JSON
    python bench/bench_gpu_model.py --row triton --graph               # replayed, as training does
    python bench/bench_gpu_model.py --row reference --compile default
    python bench/bench_gpu_model.py --row triton --profile trace.json.gz   # torch.profiler, two steps

B = 32, S = 256, T = 4, matrix products in bfloat16 by autocast, AdamW. Peak memory is the allocator's during
a step; activations are that peak minus what weights, gradients and optimiser hold before the step. With
--graph, the step is the one that is captured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.training.graph import BEFORE, GraphedStep

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def training_step(
    compile_mode: str | None, dry: bool, recompute: bool = False, graph: bool = False
) -> tuple[Callable[[], torch.Tensor], int]:
    """(step, tokens per step) on fixed random tokens."""
    torch.manual_seed(0)
    batch, length = (1, 4) if dry else (32, 256)
    changes: dict[str, Any] = {}
    if dry:
        changes = {
            "blocks": 1, "heads": 1, "token_dim": 12, "position_dim": 4, "mlp_ratio": 1, "timesteps": 2,
        }  # fmt: skip
    config = SpikeDecoderConfig.preset("original-char", **changes)
    model = SpikeDecoder(config).to(DEVICE)
    model.recompute_activations(recompute)
    loss_of: Callable[..., torch.Tensor] = model.loss
    if compile_mode is not None:
        # a dry run traces the same graph but compiles nothing
        loss_of = torch.compile(model.loss, **({"backend": "aot_eager"} if dry else {"mode": compile_mode}))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-3, betas=(0.9, 0.95), fused=CUDA)
    tokens = torch.randint(0, 28, (batch, length), device=DEVICE)
    targets = tokens.roll(-1, 1)

    def eager(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            loss = loss_of(tokens, targets)
        loss.backward()
        return loss.detach()

    backward = GraphedStep(eager, model.parameters()) if graph else eager

    def step() -> torch.Tensor:
        loss = backward(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, batch * length


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure(step: Callable[[], torch.Tensor], tokens: int, seconds: float) -> dict[str, Any]:
    losses = [step().item() for _ in range(BEFORE)]
    result: dict[str, Any] = {"losses": [round(loss, 4) for loss in losses]}
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        _wait()
        result["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        result["activations_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        _wait()
        start = time.perf_counter()
        step()
        _wait()
        times.append(time.perf_counter() - start)
        if not CUDA:
            break
    median = statistics.median(times)
    return {
        **result,
        "ms": round(median * 1e3, 3),
        "tokens_per_s": round(tokens / median),
        "rounds": len(times),
    }


def profile(step: Callable[[], torch.Tensor], path: Path) -> str:
    """Write a trace of two steps; returns the table of its most expensive kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(BEFORE + 1):  # with --graph the last one captures
        step()
    with torch.profiler.profile(activities=activities) as found:
        step()
        step()
        _wait()
    found.export_chrome_trace(str(path))
    return found.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", required=True, choices=("triton", "reference", "auto"))
    parser.add_argument("--recompute", action="store_true", help="keep bits, compute Linears again")
    parser.add_argument("--graph", action="store_true", help="replay forward and backward as one CUDA graph")
    parser.add_argument("--compile", choices=("default", "reduce-overhead"))
    parser.add_argument(
        "--profile", type=Path, help="write a trace here, its table beside it, and time nothing"
    )
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model, on the CPU under the interpreter"
    )
    options = parser.parse_args()
    if options.graph and options.compile:
        parser.error("--graph: not together with --compile")
    backend = use_backend(options.row) if options.row != "auto" else contextlib.nullcontext()
    with backend:
        step, tokens = training_step(options.compile, options.dry_run, options.recompute, options.graph)
        if options.profile:
            table = options.profile.with_name(options.profile.name.split(".")[0] + ".txt")
            table.write_text(profile(step, options.profile))
            print(json.dumps({"trace": str(options.profile)}))
        else:
            print(json.dumps(measure(step, tokens, options.seconds)))


if __name__ == "__main__":
    main()
