"""Instructions that a GPU issues for each element, counted in a kernel's machine code.

A multiprocessor of sm_90 issues four warp instructions, 128 lanes, a cycle, whatever they do; a kernel that
needs more of them than fit into the time of its bytes can't run at the memory's pace. The count is static:
each instruction once, in a loop as often as the loop goes round. Loops are found by their backward branches.
What lies behind the last EXIT (slow paths of divisions and roots) is left out.
"""

from __future__ import annotations

import collections
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aot import Compiled

    from spikedecoder.kernels._launch import Launch

PRODUCTS = 2048  # multiply-adds of 16 bits that a multiprocessor of an H100 or H200 does a cycle
LANES = 132 * 128 * 1.75e9  # instructions that an H100 or H200 begins a second, at about its usual clock
KINDS = {  # the first that fits
    "float": r"F(ADD|MUL|FMA|SETP?|SEL|MNMX|CHK)|HFMA2|HADD2|HMUL2",
    "special": r"MUFU",
    "unpack, pack": r"F2FP|PRMT|SHF\b|LOP3|IMAD\.(U32|SHL)|F2F|F2I|I2F",
    "shuffle": r"SHFL|REDUX",
    "shared": r"LDS|STS|BAR",
    "global": r"LDG|STG|LDC|ULDC",
    "local": r"LDL|STL",
    "other": r"",
}
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def instructions(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(opcodes in order, loops as first and last index, the outer ones first) of what nvdisasm printed."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            if found[1].startswith("BRA") and (to := re.search(r"\.L_x_\d+", found[2])):
                branches.append((len(opcodes), to[0]))
            opcodes.append(found[1])
    end = max((i for i, opcode in enumerate(opcodes) if opcode == "EXIT"), default=len(opcodes) - 1)
    loops = [(labels[to], at) for at, to in branches if labels[to] <= at <= end]
    return opcodes[: end + 1], sorted(loops, key=lambda loop: loop[0] - loop[1])


def product_loop(code: str, warps: int) -> tuple[int, int]:
    """(instructions of a warp, products of `warps` warps) of one round of the loop with most products."""
    opcodes, loops = instructions(code)
    best = (0, 0)
    for first, last in loops:
        round_ = opcodes[first : last + 1]
        products = 0
        for opcode in round_:
            if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
                products += math.prod(map(int, found.groups())) * warps // 4
            elif opcode.startswith("HMMA.16816"):
                products += 16 * 8 * 16 * warps
        best = max(best, (len(round_), products), key=lambda loop: (loop[1], -loop[0]))
    return best


def rounds(launch: Launch) -> tuple[int, ...]:
    """How often the loops of a `lif` or `norm_lif` kernel go round, by their depth (the sweep of a backward
    kernel once less)."""
    a = launch.arguments
    if "T" not in a:
        return ()
    chunks = a["T"] // a["CHUNK"] if "CHUNK" in a else 1
    if launch.kernel.__name__ != "norm_lif_backward":
        return (chunks,)
    return (math.ceil(a["rows"] / a["BLOCK_R"] / launch.grid[0]), chunks)


def per_element(code: str, launch: Launch) -> dict[str, float]:
    """Instructions an element of x by kind, those of lanes beyond a row's end included."""
    opcodes, loops = instructions(code)
    times = rounds(launch)
    counts: collections.Counter[str] = collections.Counter()
    for i, opcode in enumerate(opcodes):
        kind = next(name for name, pattern in KINDS.items() if re.match(pattern, opcode))
        depth = sum(first <= i <= last for first, last in loops)
        counts[kind] += math.prod(times[:depth])
    threads = math.prod(launch.grid) * 32 * launch.options["num_warps"]
    share = threads / launch.arguments["x_ptr"].numel()
    return {kind: counts[kind] * share for kind in KINDS}


def product_table(results: list[Compiled]) -> str:
    """One line a kernel: the loop with its products, and what a multiprocessor takes for a round of it."""
    lines = [
        "| kernel | call | dtype | size | warps | instructions | cycles for these | products "
        "| cycles for these |",
        "|---" * 9 + "|",
    ]
    for c in results:
        if c.loop is not None:
            warps, count, products = c.loop
            lines.append(
                f"| {c.kernel} | {c.call} | {c.dtype} | {c.size} | {warps} | {count} "
                f"| {count * warps / 4:.0f} | {products} | {products / PRODUCTS:.0f} |"
            )
    return "\n".join(lines)


def table(results: list[Compiled], rate: float) -> str:
    """One line a kernel: instructions an element, and the least time that they and its bytes take."""
    lines = [
        f"| kernel | call | dtype | size | {' | '.join(KINDS)} | all | warps | instructions | bytes |",
        "|---" * (8 + len(KINDS)) + "|",
    ]
    for c in results:
        if not c.instructions:
            continue
        total = sum(c.instructions.values())
        cells = " | ".join(f"{c.instructions[kind]:.1f}" for kind in KINDS)
        warps = min(64, 65536 // (32 * 8 * -(-c.registers // 8)))
        lines.append(
            f"| {c.kernel} | {c.call} | {c.dtype} | {c.size} | {cells} | {total:.1f} | {warps} "
            f"| {total * 2**26 / LANES * 1e3:.3f} ms | {c.moved / rate * 1e3:.3f} ms |"
        )
    return "\n".join(lines)
