"""Time other tiles beside those that the tables in kernels/ choose: these tables come from such runs.

    python bench/gpu_tiles.py --out tiles.json --jobs 14                # on a machine with a GPU
    TRITON_INTERPRET=1 python bench/gpu_tiles.py --out tiles.json --dry-run     # any machine, tiny, no times

A table is a function that returns the block sizes of a launch. Each candidate replaces what it returns; None
stands for the table's own choice. A result that differs from that of the table's choice is noted. Compiling
takes most of the time: --jobs processes do it in advance, side by side. All is in bfloat16; times are medians
on the device, as in bench_gpu_ops.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench_gpu_ops import ceilings, median_ms
from gpu_groups import CUDA, DEVICE, P, _spikes, currents
from torch import Tensor

from spikedecoder.kernels import lif, norm_lif, spike_attention, spike_linear
from spikedecoder.kernels._launch import cdiv, power_of_2
from spikedecoder.kernels.norm_lif import _Backward

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Table:
    """A table, the sizes it is called for, candidates for what it returns, and a call that uses it."""

    name: str
    size: dict[str, int]
    bytes: float
    module: Any
    function: str
    candidates: tuple[Any, ...]
    make: Callable[[], Inputs]
    call: Callable[..., Tensor]


def _flat(warps: int, a_thread: int) -> dict[str, int]:
    return {"BLOCK_R": 1, "BLOCK_C": 32 * warps * a_thread, "num_warps": warps}


def _rows(C: int, a_thread: int, slices: int) -> dict[str, int]:
    """Rows of C channels in `slices` tiles, with `a_thread` elements of each tile per thread."""
    width = max(16, power_of_2(cdiv(C, slices)))
    warps = max(1, width // (32 * a_thread))
    rows = max(1, 32 * warps * a_thread // width)
    return {"BLOCK_R": rows, "BLOCK_C": width, "SLICES": slices, "num_warps": warps}


def lif_tables(elements: int) -> Iterator[Table]:
    for T in (4, 8, 16):
        shape = (T, elements // T // 64, 64)
        yield Table(
            "lif forward", {"T": T}, 4.0 * elements, lif, "tile",
            tuple(_flat(w, n) for w in (4, 8) for n in (8, 16)), lambda shape=shape: (currents(*shape),),
            lambda x: lif.forward(x, 1.0, None, P, want_v=False)[0],
        )  # fmt: skip
        yield Table(
            "lif backward", {"T": T}, 6.0 * elements, lif, "tile",
            tuple(_flat(w, n) for w in (2, 4, 8) for n in (2, 4, 8)),
            lambda shape=shape: (currents(*shape), currents(*shape)),
            lambda x, g: lif.backward(g, None, x, 1.0, None, P, want_grad_v_init=False)[0],
        )  # fmt: skip


def norm_lif_tables(elements: int) -> Iterator[Table]:
    one = lambda C: torch.ones(C, device=DEVICE)  # noqa: E731
    for T, C in ((4, 80), (8, 80), (4, 384), (4, 512), (8, 512), (16, 512), (4, 1280)):
        shape = (T, max(1, elements // T // C), C)
        many = norm_lif.slices(C)[0]
        apart = [(many, n) for n in (2, 4, 8)] if many > 1 else []  # (slices, elements per thread)
        forward = [
            {**_rows(C, n, slices), "CHUNK": min(T, c), "STAGES": s}
            for slices, n in ((1, 8), (1, 16), *apart)
            for c, s in ((1, 4), (2, 3), (4, 1), (8, 1))
        ]
        yield Table(
            "norm_lif forward", {"T": T, "C": C}, 4.0 * T * shape[1] * C, norm_lif, "_forward_tile",
            tuple(tile for i, tile in enumerate(forward) if tile not in forward[:i]),
            lambda shape=shape: (currents(*shape), one(shape[-1])),
            lambda x, w: norm_lif.forward(x, w, 0 * w, None, None, 1e-5, 1.0, P)[0],
        )  # fmt: skip
        rows = (
            (_rows(C, n, slices), min(T, c))
            for slices, n in ((1, 4), (1, 8), (1, 16), *apart)
            for c in (2, 4, 8, 16) if 32 <= min(T, c) * n * slices <= (64 if slices == 1 else 96)
        )  # fmt: skip
        backward = (
            _Backward(tile, T, chunk, min(registers, 65536 // (32 * tile["num_warps"])), s)
            for tile, chunk in rows
            for registers in (128, 160, 255)
            for s in (1, 3, 4)
        )
        yield Table(
            "norm_lif backward", {"T": T, "C": C}, 6.0 * T * shape[1] * C, norm_lif, "_backward_way",
            tuple(backward),
            lambda shape=shape: (
                currents(*shape), currents(*shape), one(shape[-1]),
                torch.full(shape[:2], 0.3, device=DEVICE), torch.full(shape[:2], 1.2, device=DEVICE),
            ),
            lambda x, g, w, mean, rstd: norm_lif.backward_layer(g, x, w, 0 * w, mean, rstd, 1.0, P)[0],
        )  # fmt: skip


def linear_tables(rows: int) -> Iterator[Table]:
    for K, N in ((80, 80), (80, 1280), (1280, 80), (512, 2048)):
        moved = 2.0 * (rows * K / 16 + N * K + rows * N)

        def make(K: int = K, N: int = N) -> Inputs:
            weight, grad = (torch.randn(n, N, device=DEVICE, dtype=torch.bfloat16) for n in (K, rows))
            words = spike_linear.pack(_spikes(rows, K))
            return words, weight.T.contiguous(), grad

        tiles = tuple(
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s}
            for m, n, w in ((64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8))
            for s in (2, 3)
        )
        yield Table(
            "spike_linear forward", {"K": K, "N": N}, moved, spike_linear, "forward_tile", tiles, make,
            lambda words, w, g: spike_linear.from_words(words, w.shape[1], w, None),
        )  # fmt: skip
        yield Table(
            "spike_linear gradients", {"K": K, "N": N}, moved, spike_linear, "grad_tile", tiles[:6], make,
            lambda words, w, g: spike_linear.weight_and_bias_grad(words, w.shape[1], g)[0],
        )  # fmt: skip


def attention_tables(tokens: int) -> Iterator[Table]:
    B = spike_attention.Blocks
    for d in (16, 32, 64, 128):
        candidates = tuple(
            B(64, d, columns, warps, stages=stages)
            for columns in (16, 32, 64)
            for warps in (4, 8)
            for stages in (1, 2, 3)
            if columns <= d and not (warps == 8 and columns == 16)
        )
        shape = (4, 16, tokens, 8, d)
        yield Table(
            "spike_attention forward", {"S": tokens, "d": d}, 8.0 * 4 * 16 * tokens * 8 * d, spike_attention,
            "blocks", candidates,
            lambda shape=shape: tuple(_spikes(*shape).transpose(2, 3) for _ in range(3)),
            lambda q, k, v: spike_attention.forward(q, k, v, 0.125, None, None, False)[0],
        )  # fmt: skip


def tables(dry: bool) -> list[Table]:
    elements, rows, tokens = (1 << 12, 64, 40) if dry else (1 << 26, 32768, 2048)
    return [
        *lif_tables(elements), *norm_lif_tables(elements), *linear_tables(rows), *attention_tables(tokens)
    ]  # fmt: skip


def run(table: Table, candidate: Any, inputs: Inputs) -> Tensor:
    if candidate is None:
        return table.call(*inputs)
    with patch.object(table.module, table.function, lambda *_, **__: candidate):
        return table.call(*inputs)


def compile_ahead(job: tuple[int, bool, int, int]) -> None:
    """Run every `of`-th candidate of a table once, from number `part` on, so that it is compiled."""
    number, dry, part, of = job
    table = tables(dry)[number]
    inputs = table.make()
    for candidate in (None, *table.candidates)[part::of]:
        try:
            run(table, candidate, inputs)
        except Exception:  # reported when it is measured
            continue


def measure(table: Table, dry: bool, copy: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    inputs = table.make()
    want, rows = run(table, None, inputs).double(), []
    for candidate in (None, *(table.candidates[:2] if dry else table.candidates)):
        row: dict[str, Any] = {"table": table.name, **table.size}
        row["tile"] = "the table's" if candidate is None else str(candidate)
        try:
            got = run(table, candidate, inputs).double()
            error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
            if error > 1e-3:
                row["differs"] = error
            ms = median_ms(lambda c=candidate: run(table, c, inputs), True)
            row |= {"ms": round(ms, 4), "of_copy": round(table.bytes / ms / 1e6 / copy, 3)}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="tables whose name begins so")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead")
    parser.add_argument("--limit", type=float, default=300, help="seconds; tables after that are left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, without a GPU")
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    chosen = [(i, t) for i, t in enumerate(tables(options.dry_run)) if t.name.startswith(options.only)]
    if options.dry_run:  # one of each
        chosen = list({t.name: (i, t) for i, t in reversed(chosen)}.values())
    if options.jobs and CUDA:
        jobs = [(i, options.dry_run, part, 4) for i, _ in chosen for part in range(4)]
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_ahead, jobs))
    result: dict[str, Any] = {"ceilings": ceilings(options.dry_run), "rows": []}
    for _, table in chosen:
        if time.monotonic() > end:
            break
        result["rows"] += measure(table, options.dry_run, result["ceilings"]["copy_gb_per_s"])
        options.out.write_text(json.dumps(result, indent=1))
    for name in dict.fromkeys((r["table"], *(r.get(k) for k in "TCKNSd")) for r in result["rows"]):
        found = [r for r in result["rows"] if (r["table"], *(r.get(k) for k in "TCKNSd")) == name]
        timed = sorted((r for r in found if "ms" in r), key=lambda r: r["ms"])
        print(
            *name,
            *(f"\n  {r['ms']} ms {r['of_copy']} {r['tile']}" for r in (found[0], *timed[:3]) if "ms" in r),
        )


if __name__ == "__main__":
    main()
