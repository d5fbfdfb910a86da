"""docs/kernels.md: what `bench/aot.py` found."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import aot_sass
import triton
from aot_code import Compiled, faults
from aot_rows import MEGA, rows

RATES = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second, data sheets of the SXM boards


def table(results: list[Compiled]) -> str:
    """One line a kernel and architecture."""
    lines = [
        "| kernel | call | dtype | size | sm | registers | shared | spills | loads | stores | tensor core "
        "| made of |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in results:
        loads, stores = ("/".join(map(str, w)) for w in (c.widths("LDG", "LDGSTS"), c.widths("STG")))
        lines.append(
            f"| {c.kernel} | {c.operator} {c.call} | {c.dtype} | {c.size} | {c.target} | {c.registers} "
            f"| {c.shared} | {c.spills} | {loads} | {stores} | {', '.join(c.tensor_core) or '-'} "
            f"| {'-' if faults(c) else c.made_of} |"
        )
    return "\n".join(lines)


def floors(results: list[Compiled], target: int) -> str:
    """One line a call: bytes against the minimum, and the time that memory alone would take."""
    moved: dict[tuple[str, str, str, str], float] = collections.defaultdict(float)
    for c in results:
        if c.target == target:
            moved[c.operator, c.call, c.dtype, c.size] += c.moved
    lines = [
        "| call | dtype | size | MiB moved | MiB minimum | ratio | floor on H100 | floor on H200 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        total = moved.get((row.operator, row.call, row.dtype, row.size))
        if total is None:
            continue
        times = " | ".join(f"{row.minimum / rate * 1e3:.3f} ms" for rate in RATES.values())
        lines.append(
            f"| {row.operator} {row.call} | {row.dtype} | {row.size} | {total / MEGA:.1f} "
            f"| {row.minimum / MEGA:.1f} | {total / row.minimum:.2f} | {times} |"
        )
    return "\n".join(lines)


def fusion() -> str:
    """Where Linear, norm and LIF in one kernel pay, by count: bfloat16, a row of the input and timestep."""
    from spikedecoder.kernels.linear_norm_lif import BLOCK_M, MAX_INPUTS

    lines = [
        "| norm | K | N | three parts | one kernel | memory is spared | W again, from cache | fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for norm, K, N in (
        ("layer", 80, 80), ("layer", 80, 1280), ("layer", 1280, 80), ("channels", 80, 1280),
        ("layer", 512, 512), ("layer", 512, 2048), ("channels", 512, 2048),
    ):  # fmt: skip
        apart, together = 6 * N + K / 8, 2 * N + K / 8
        wide = norm == "layer" and N > 128
        again = 2 * N * K / BLOCK_M if wide else 0
        lines.append(
            f"| {norm} | {K} | {N} | {apart:.0f} | {together:.0f} | {apart - together:.0f} | {again:.0f} "
            f"| {'no' if wide and K > MAX_INPUTS else 'yes'} |"
        )
    return "\n".join(lines)


def page(results: list[Compiled]) -> str:
    return f"""# The kernels as compiled

Written by `python bench/aot.py` with Triton {triton.__version__}; nothing on this page was measured on a GPU.

## Code

Access widths in bits; "spills" counts bytes of local memory and instructions that use it. `HMMA`, `HGMMA` and
`UTC*MMA` are the tensor cores of Ampere, Hopper and Blackwell. The kernels that spill keep the
settings that were fastest on an H200 (bench/results/gpu-h200-tiles.json). "made of" is a hash of sources,
constants, options and of what is asked of the code, by which the tests see which lines still hold.

{table(results)}

## Bytes

What a call's launches touch, each tensor once, against what the operator must move at the least: inputs read
once, outputs written once. The floors are the minimum over the memory's rate (H100 3.35 TB/s, H200 4.8 TB/s).

{floors(results, 90)}

## Instructions

Of `lif`, `norm_lif` and `token_shift` on sm_90: instructions an element of x, counted in the machine code,
those of lanes beyond a row's end and of branches not taken included (bench/aot_sass.py). "unpack, pack":
conversions and shifts; "special": exponentials, reciprocals, roots; "global" includes constants; "warps":
as many as the registers leave room for side by side, of 64. Last the least time that 64 Mi elements take on
an H200, were nothing else in the way: by instructions, of which its 132 multiprocessors begin 128 lanes' a
cycle at 1.75 GHz, and by the bytes above. The longer one is the floor; what a warp waits for comes on top.

{aot_sass.table(results, RATES["H200"])}

Of `spike_linear` on sm_90: one round of the loop with its products, for 64 inputs or rows. Instructions of a
warp, and the cycles that four schedulers take to issue those of all warps of a program; products of two
numbers, and the cycles that a multiprocessor's tensor cores take for them in 16 bits (2048 a cycle).

{aot_sass.product_table(results)}

## Linear, norm and LIF in one kernel

Bytes a row of the input and timestep in bfloat16, K inputs as bits, N outputs: the parts write the current
and read it again. With LayerNorm and more than 128 outputs, too many for a tile beside its potentials, the
one kernel computes the product twice, and W is read once more per tile of 64 rows. It is used where these
reads are no more bytes than it saves; on sm_90 the parts are faster and always run.

{fusion()}
"""


def on_the_page(path: Path) -> frozenset[str]:
    """What the kernels on a page, those without a fault, are made of."""
    text = path.read_text() if path.exists() else ""
    return frozenset(re.findall(r"^\|.*\| ([0-9a-f]{10}) \|$", text, re.MULTILINE))
