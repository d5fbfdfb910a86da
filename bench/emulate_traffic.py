"""What the Triton kernels move, counted as their PTX runs on a CPU: `bench/ptx` in place of a profiler.

    python bench/emulate_traffic.py --out bench/results/emulated-traffic.md

Tensors are read and written in sectors of 32 bytes, shared memory in wavefronts of 128. Each count stands
beside the fewest that would hold the bytes: 1.00 is an access whose lanes lie side by side, or without a
bank conflict. What products read from shared memory themselves (wgmma, tcgen05) is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
import triton
from emulate import check, emulated
from ptx.traffic import Traffic

from spikedecoder.kernels import _launch
from spikedecoder.testing import Case

CALLS = (
    *(Case("lif", f"T = {T}", (T, 1, 64, 1024)) for T in (4, 8, 16)),
    *(
        Case("norm_lif", f"{norm}, {C} channels, T = {T}", (T, 1, 64, C), {"norm": norm}, exact=False)
        for norm, C, T in (
            ("layer", 512, 4), ("layer", 512, 8), ("layer", 512, 16), ("layer", 80, 4), ("layer", 1280, 4),
            ("batch", 512, 4),
        )
    ),
    Case("norm_ilif", "batch, 384 channels", (1, 64, 384), {"norm": "batch", "levels": 15}, exact=False),
    Case("spike_attention", "256 tokens, d = 64", (1, 2, 2, 256, 64)),
    Case("spike_attention", "256 tokens, d = 16", (1, 2, 2, 256, 16)),
    Case("spike_attention", "256 tokens, d = 64, decay", (1, 2, 2, 256, 64), {"decay": True}, exact=False),
    Case("spike_attention_lif", "256 tokens, d = 16, T = 4", (4, 2, 2, 256, 16)),
    Case("spike_linear", "256 rows, 512 -> 256", (256, 512, 256), exact=False),
    Case("spike_linear", "256 rows, 80 -> 80", (256, 80, 80), exact=False),
    Case("pack_spikes", "512 channels", (256, 512)),
)  # fmt: skip


def lines(target: int) -> list[str]:
    """The table's: one for each kernel and kind of access of each call, in bfloat16."""
    found = []
    for case in CALLS:
        with emulated(target, 1) as emulator:
            emulator.traffic = traffic = Traffic()
            if fault := check(case, torch.bfloat16):
                raise SystemExit(f"{case}: {fault}")
        for (kernel, kind), (requests, taken, least) in sorted(traffic.counts.items()):
            unit = "wavefronts" if kind.startswith("shared") else "sectors"
            cells = (
                case.operator,
                case.name,
                kernel,
                kind,
                requests,
                f"{taken} {unit}",
                f"{taken / least:.2f}",
            )
            found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, default=90, choices=(80, 90, 100), help="compute capability")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels can't be compiled under the interpreter")
    about = __doc__.split("\n\n")
    head = f"sm_{options.target}, bfloat16, Triton {triton.__version__}, {datetime.date.today()}"
    names = "| operator | call | kernel | access | requests of warps | taken | of the least |"
    table = [names, "|---" * 7 + "|", *lines(options.target)]
    page = [f"# {about[0]}", f"`{about[1].strip()}`: {head}.", about[2].strip(), "\n".join(table)]
    options.out.write_text("\n\n".join(page) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
