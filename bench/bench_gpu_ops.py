"""Every operator on the GPU, compared with other implementations.

    python bench/bench_gpu_ops.py --out results.json            # all groups, within --limit seconds
    python bench/bench_gpu_ops.py --out results.json --only lif --rows others   # not the compiled reference
    TRITON_INTERPRET=1 python bench/bench_gpu_ops.py --out results.json --dry-run    # no GPU, tiny shapes

The rows of a group are these kernels, the eager reference, torch.compile of the reference, and, if they are
installed, peers: SpikingJelly's neurons (`peer_spikingjelly.py`), causal FlashAttention through
scaled_dot_product_attention (which computes another function of the same inputs) and flash-linear-attention's
chunked linear attention. A row that cannot run gives the reason instead. Input spikes, and the output spikes
of `lif` and `norm_lif`, have the rate of a trained model, about one in six; the groups of `gpu_rates.py` vary
the rate. Results are compared with the reference before anything is timed; a wrong row says so and has no
time. Groups for which there was no time are listed in "left_out".

Times are medians of device events, with the cache flushed between runs and kernels queued in advance. GB/s
counts the least bytes that must move; its share is of the rate of a large copy, measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_groups import COMPILED, CUDA, DEVICE, EXTENSION, FLASH_LINEAR, Group
from gpu_groups import GROUPS as OPERATOR_GROUPS
from gpu_rates import ROWS as RATE_ROWS
from gpu_rates import rate_groups
from torch import Tensor

GROUPS = {**OPERATOR_GROUPS, "rates": rate_groups}
LATER = (FLASH_LINEAR, COMPILED)  # rows that take long to tune or compile: after all others, in this order
PASSES: dict[str, tuple[str | None, ...]] = {
    "all": (None, *LATER),
    "others": (None, FLASH_LINEAR),
    "compiled": (COMPILED,),
}
CHECKED = ("ours", "ours, two kernels", COMPILED, EXTENSION, *RATE_ROWS)
CLOCK = 2e9  # cycles per second, roughly, to express the wait before a measured call
PEERS = 60.0  # seconds reserved for SpikingJelly, though at most half the limit
IMPORT = 9.0  # seconds of these that a process needs to report that it cannot run


def median_ms(call: Callable[[], Any], quick: bool) -> float:
    """Median time on the device, by events; the cache is flushed before each run.

    The device first waits long enough for the host to queue the whole call, so that the time Python takes to
    launch kernels is not measured. (Whole steps are measured by the wall clock: bench_gpu_model.py.)
    """
    start = time.perf_counter()
    call()
    if not CUDA:
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    cache = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(max(5, min(100, round((0.06 if quick else 0.15) / taken)))):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(round((1.5 * host + 1e-4) * CLOCK))
        cache.zero_()
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return statistics.median(times)


def ceilings(dry: bool) -> dict[str, float]:
    """Measured: GB/s of a large copy (bytes read plus written), TFLOP/s of a large bfloat16 product."""
    n = 1 << (16 if dry else 29)
    source = torch.randn(n // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source), True) / 1e6
    side = 64 if dry else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * side**3 / median_ms(lambda: a @ b, True) / 1e9
    return {"copy_gb_per_s": round(copy, 2), "bf16_tflop_per_s": round(product, 6)}


def run_peer(command: list[str], seconds: float) -> tuple[dict[str, Any], str]:
    """(the last line of JSON that the command printed, even if its time ran out; why it ended)."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds)
        printed, reason = done.stdout, f"exit {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed, reason = error.stdout or b"", f"time limit of {seconds:.0f} s"
    for line in reversed(printed.decode(errors="replace").splitlines()):
        if line.startswith("{") and line.endswith("}"):
            return json.loads(line), reason
    return {}, reason


def spikingjelly_rows(dry: bool, ceiling: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """Rows for the groups of `lif_groups`, each implementation measured by a process of its own.

    Each process gets what is left of `seconds`, except for the time that those after it need to report that
    they cannot run.
    """
    elements, steps = (1 << 12, (4,)) if dry else (1 << 26, (4, 8, 16))
    rows, end = [], time.monotonic() + seconds
    if importlib.util.find_spec("spikingjelly") is None:  # three processes would take a while to say so
        groups = (f"lif forward + backward bf16 T={T} n={elements}" for T in steps)
        return [
            {"group": g, "row": "SpikingJelly", "skipped": "spikingjelly is not installed"} for g in groups
        ]
    second = importlib.metadata.version("spikingjelly") >= "2"
    implementations = ("triton", "torch", "cuda" if second else "cupy")
    for i, implementation in enumerate(implementations):
        command = [sys.executable, str(Path(__file__).parent / "peer_spikingjelly.py")]
        command += ["--implementation", implementation, "--elements", str(elements)]
        command += [f"--T={T}" for T in steps] + (["--dry-run"] if dry else [])
        behind = len(implementations) - 1 - i
        share = max(1.0, end - time.monotonic() - IMPORT * behind)
        found, reason = run_peer(command, share)
        for T in steps:
            group = f"lif forward + backward bf16 T={T} n={elements}"
            row: dict[str, Any] = {"group": group, "row": f"SpikingJelly {implementation}"}
            row |= found.get(str(T), {"failed": reason})
            if "ms" in row:
                row["gb_per_s"] = round(10.0 * elements / row["ms"] / 1e6, 1)
                row["of_copy"] = round(row["gb_per_s"] / ceiling["copy_gb_per_s"], 3)
            rows.append(row)
    return rows


def _agrees(row: str, got: Tensor | list[Tensor], want: Tensor | list[Tensor], group: Group) -> str | None:
    """What is wrong with a row's result (a tensor, or several of one shape); None if nothing is."""
    if row not in CHECKED:
        return None  # it computes another function, or has another layout
    got, want = (torch.stack(x) if isinstance(x, list) else x for x in (got, want))
    if row in group.exact or row == "ours, two kernels":
        differ = (got != want).double().mean().item()
        return f"{differ:.2%} of the elements differ" if differ > 2e-3 else None
    got, want = got.double(), want.double()
    error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
    return None if error < 3e-2 else f"relative error {error:.2g}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def bench(group: Group, dry: bool, ceiling: dict[str, float], later: str | None) -> list[dict[str, Any]]:
    """The row named `later`, one of LATER; or, with None, all rows that are not among these."""
    torch.manual_seed(0)
    rows = []
    try:
        calls = group.make()
        reference = calls[group.reference]
        calls = {name: call for name, call in calls.items() if (name if name in LATER else None) == later}
        if all(isinstance(call, str) for call in calls.values()):
            rest = {"group": group.name, **group.about}
            return [{**rest, "row": name, "skipped": call} for name, call in calls.items()]
        assert not isinstance(reference, str)
        want = reference()
    except Exception as error:  # a group that can't run must not take the others with it
        return [{"group": group.name, **group.about, "row": later or "all", "failed": _said(error)}]
    for name, call in calls.items():
        row: dict[str, Any] = {"group": group.name, **group.about, "row": name}
        if isinstance(call, str):
            rows.append({**row, "skipped": call})
            continue
        try:
            wrong = _agrees(name, call(), want, group)
            if wrong:
                row["wrong"] = wrong
            else:
                if CUDA:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    call()
                    torch.cuda.synchronize()
                    row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
                ms = median_ms(call, dry or bool(group.about))  # a sweep has many points
                row["ms"] = round(ms, 4)
                row["gb_per_s"] = round(group.bytes / ms / 1e6, 1)
                row["of_copy"] = round(group.bytes / ms / 1e6 / ceiling["copy_gb_per_s"], 3)
                if group.flops:
                    row["tflop_per_s"] = round(group.flops / ms / 1e9, 2)
                    row["of_product"] = round(group.flops / ms / 1e9 / ceiling["bf16_tflop_per_s"], 3)
        except Exception as error:  # a row that can't run must not take the others with it
            row["failed"] = _said(error)
        rows.append(row)
    return rows


def of(later: str | None, groups: list[Group]) -> list[Group]:
    """The groups that may have rows in a pass; those that take the compiler longest come last."""
    if later == FLASH_LINEAR:
        return [group for group in groups if "attention" in group.name]
    if later == COMPILED:
        return sorted((group for group in groups if not group.about), key=lambda group: group.slow)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(GROUPS), action="append", help="may be repeated")
    parser.add_argument(
        "--rows", choices=tuple(PASSES), default="all", help="those that compile, or the others"
    )
    parser.add_argument("--limit", type=float, default=170, help="seconds; groups after that are left out")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, on the CPU under the interpreter"
    )
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    passes = PASSES[options.rows]
    with_peers = options.only is None or "lif" in options.only
    peers = min(PEERS, options.limit / 2) if with_peers and None in passes else 0.0
    groups = [
        group
        for operator, make in GROUPS.items()
        if options.only is None or operator in options.only
        for group in make(options.dry_run)
    ]
    work = {
        f"{g.name}, {later}" if later else g.name: (later, g) for later in passes for g in of(later, groups)
    }
    result: dict[str, Any] = {"ceilings": ceilings(options.dry_run), "rows": [], "left_out": list(work)}

    def save() -> None:  # results survive a time limit, even one that ends this while it writes
        partial = options.out.with_suffix(".part")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(options.out)

    save()
    for later in passes:
        for name, group in ((n, g) for n, (which, g) in work.items() if which == later):
            if time.monotonic() > end - (0.0 if later else peers):
                break
            result["rows"] += bench(group, options.dry_run, result["ceilings"], later)
            result["left_out"].remove(name)
            if CUDA:
                torch.cuda.empty_cache()
            save()
        if peers and not later:
            result["rows"] += spikingjelly_rows(options.dry_run, result["ceilings"], peers)
            save()


if __name__ == "__main__":
    main()
