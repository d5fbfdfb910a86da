"""Compile every kernel for GPUs that need not be here, and read what the compiler made of it.

    python bench/aot.py                          # all kernels, all architectures; writes docs/kernels.md
    python bench/aot.py --only lif --target 90   # prints the table, writes nothing
    python bench/aot.py --cases                  # only whether all that the tests' cases launch compiles

The operators are called on tensors without memory while their launches are recorded, so what is compiled is
what a GPU would be asked to run: same block sizes, same constants, same alignment. Registers, shared memory
and spills come from the compiled code, access widths and tensor-core instructions from its disassembly.

Bytes: each tensor that a launch touches counted once, over what the operator must move at the least. The
floor is the bytes over the memory's rate in its data sheet, so no measurement is behind it.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aot_sass
import triton
from aot_rows import MEGA, MORE_CASES, OPERATORS, TYPES, rows
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from spikedecoder import use_backend
from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import Launch
from spikedecoder.testing import cases, make_inputs, run

TARGETS = (80, 90, 100)
CAPPED = 64  # bytes of local memory, at the most, where registers are as many as were measured to be fastest
RATES = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second, data sheets of the SXM boards
COUNTED = ("lif_forward", "lif_backward", "norm_lif_forward", "norm_lif_backward")
DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPCODES = re.compile(r"\b((?:FFMA|LDG\.E|LDGSTS|STG\.E|LDL|STL)[.\w]*|(?:[HIQ]G?|UTC\w*)MMA\b(?:\.\w+)*)")


@dataclass
class Compiled:
    """One kernel of a row on one target."""

    operator: str
    call: str
    dtype: str
    size: str
    needs: tuple[str, ...]
    kernel: str
    target: int
    registers: int
    shared: int
    local: int
    opcodes: dict[str, int]
    moved: float
    capped: bool  # asks for so many registers: with more, or fewer elements a thread, it was slower
    instructions: dict[str, float]  # an element, by kind; of the neurons' kernels on sm_90 alone

    def widths(self, *names: str) -> list[int]:
        """Widths in bits of the global accesses whose opcode starts with one of `names`."""
        found = set()
        for opcode in self.opcodes:
            if opcode.startswith(names):
                widths = [int(w) for w in re.findall(r"\.[US]?(16|32|64|128|256)\b", opcode)]
                found.add(max(widths, default=8 if re.search(r"\.[US]8\b", opcode) else 32))
        return sorted(found)

    @property
    def tensor_core(self) -> list[str]:
        return sorted({re.sub(r"\..*", "", o) for o in self.opcodes if "MMA" in o})

    @property
    def spills(self) -> int:
        return self.local + sum(n for o, n in self.opcodes.items() if o.startswith(("LDL", "STL")))


_WITHOUT_PRODUCT = (
    "scan_segments",
    "pack_kernel",
    "lif_forward",
    "norm_lif_forward",
    "moments_of_rows",
    "add_parts",
)  # kernels beside those with the product


def _argument(name: str, value: Any) -> str:
    if value is None or name.isupper():
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def source_of(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    arguments = {name: launch.arguments[name] for name in names}
    signature = {name: _argument(name, value) for name, value in arguments.items()}
    constants = {name: arguments[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    return ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def compile_launch(launch: Launch, target: int) -> tuple[int, int, int, str]:
    """(registers, shared bytes, local bytes, disassembly) of a launch compiled for sm_`target`."""
    compiled = triton.compile(
        source_of(launch), target=GPUTarget("cuda", target, 32), options=dict(launch.options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about {launch.kernel.__name__}: {usage!r}")
    registers, stack, _, local = map(int, found.groups())
    return registers, int(compiled.metadata.shared), stack + local, code


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _touched(launch: Launch) -> float:
    """Bytes of every tensor of a launch, each counted once; repeats by `expand` not at all."""
    total = 0.0
    for tensor in {id(v): v for v in launch.arguments.values() if isinstance(v, Tensor)}.values():
        distinct = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            distinct *= size if stride else 1
        total += distinct * tensor.element_size()
    return total


def compile_row(index: int, target: int) -> list[Compiled]:
    """Compile what row number `index` launches."""
    row = list(rows())[index]
    with _launch.record(target // 10) as launches:
        row.run()
    done: dict[tuple[object, ...], Compiled] = {}
    for launch in launches:
        moved = _touched(launch)
        if launch.key in done:
            done[launch.key].moved += moved
            continue
        registers, shared, local, code = compile_launch(launch, target)
        name, counted = launch.kernel.__name__, {}
        if target == 90 and name in COUNTED and row.operator in name and not launch.arguments.get("LEVELS"):
            counted = aot_sass.per_element(code, launch)
        done[launch.key] = Compiled(
            row.operator, row.call, row.dtype, row.size, row.needs, name, target, registers, shared, local,
            dict(collections.Counter(_OPCODES.findall(code))), moved,
            "maxnreg" in launch.options, counted,
        )  # fmt: skip
    return list(done.values())


def compile_all(
    only: str | None, first: int | None, targets: tuple[int, ...], processes: int, spread: bool = False
) -> list[Compiled]:
    """`spread`: each call for one of the targets in turn."""
    seen: collections.Counter[str] = collections.Counter()
    numbers = []
    for i, row in enumerate(rows()):
        seen[row.operator] += 1
        if (only is None or row.operator in only.split(",")) and (not first or seen[row.operator] <= first):
            numbers.append(i)
    wanted = [(i, t) for i in numbers for t in targets]
    if spread:
        wanted = [(i, targets[n % len(targets)]) for n, i in enumerate(numbers)]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(compile_row, *zip(*wanted, strict=True)))
    return [compiled for part in parts for compiled in part]


def case_launches(target: int) -> list[tuple[str, Launch]]:
    """What the cases launch in every dtype, forward and backward: a case, and each variant once."""
    found: dict[object, tuple[str, Launch]] = {}
    for case in (*cases(*OPERATORS), *MORE_CASES):
        for dtype in _launch.DTYPES:
            with use_backend("triton"), _launch.record(target // 10) as launches:
                run(case, make_inputs(case, dtype))
            for launch in launches:
                found.setdefault(launch.key, (f"{case}, {TYPES[dtype]}", launch))
    return list(found.values())


def check_source(launch: Launch, target: int) -> None:
    """As far as Triton's own types: a twentieth of what compiling takes."""
    gpu = GPUTarget("cuda", target, 32)
    backend, context = make_backend(gpu), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(launch.options))
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source_of(launch).make_ir(gpu, options, implementation, modules, context)


def check_cases(target: int, part: int = 0, parts: int = 1, whole: bool = True) -> tuple[int, list[str]]:
    """(variants looked at, what is wrong with them) of every `parts`-th variant; `whole`: to machine code."""
    wrong = []
    chosen = case_launches(target)[part::parts]
    for case, launch in chosen:
        try:
            if whole:
                compile_launch(launch, target)
            else:
                check_source(launch, target)
        except Exception as error:
            wrong.append(f"{launch.kernel.__name__} ({case}, sm_{target}): {_innermost(error)}")
    return len(chosen), wrong


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def faults(c: Compiled) -> list[str]:
    """Where the compiled code is not what its row needs; empty if it is."""
    wrong = []
    if c.shared > (limit := {80: 163, 90: 227, 100: 227}[c.target] * 1024):
        wrong.append(f"{c.shared} bytes of shared memory, a program has {limit}")
    if "no spill" in c.needs and (c.local > CAPPED if c.capped else c.spills):
        wrong.append(f"spills: {c.local} bytes of local memory")
    if "no FFMA" in c.needs and any(opcode.startswith("FFMA") for opcode in c.opcodes):
        wrong.append("multiplies and adds with one rounding, so that spikes depend on the compiler")
    most = min((int(n.split()[2]) for n in c.needs if n.endswith(" instructions")), default=0)
    if most and c.instructions and (count := sum(c.instructions.values())) > most:
        wrong.append(f"{count:.1f} instructions an element, {most} are enough")
    few = c.kernel == "add_parts"  # of what it reads it writes one in the number of parts
    for kind, names in (("load", ("LDG", "LDGSTS")), ("store", ("STG",))):
        least = max((int(n.split("-")[0]) for n in c.needs if n.endswith(f"-bit {kind}s")), default=0)
        widest = max(c.widths(*names), default=0)
        if widest < least and not (few and kind == "store"):
            wrong.append(f"widest {kind} is {widest} bits")
    if "tensor core" in c.needs and not c.tensor_core and c.kernel not in _WITHOUT_PRODUCT:
        wrong.append("no tensor-core instruction")
    return wrong


def table(results: list[Compiled]) -> str:
    """One line a kernel and architecture."""
    lines = [
        "| kernel | call | dtype | size | sm | registers | shared | spills | loads | stores | tensor core |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in results:
        loads, stores = ("/".join(map(str, w)) for w in (c.widths("LDG", "LDGSTS"), c.widths("STG")))
        lines.append(
            f"| {c.kernel} | {c.operator} {c.call} | {c.dtype} | {c.size} | {c.target} | {c.registers} "
            f"| {c.shared} | {c.spills} | {loads} | {stores} | {', '.join(c.tensor_core) or '-'} |"
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
`UTC*MMA` are the tensor cores of Ampere, Hopper and Blackwell. What spills asks for as many registers and
elements a thread as were measured to be fastest on an H200 (bench/results/gpu-h200-tiles.json).

{table(results)}

## Bytes

What a call's launches touch, each tensor once, against what the operator must move at the least: inputs read
once, outputs written once. The floors are the minimum over the memory's rate (H100 3.35 TB/s, H200 4.8 TB/s).

{floors(results, 90)}

## Instructions

Of `lif` and `norm_lif` on sm_90: instructions an element of x, counted in the machine code, those of lanes
beyond a row's end included (bench/aot_sass.py). "unpack, pack": conversions and shifts; "special":
exponentials, reciprocals, roots; "global" includes constants; "warps": as many as the registers leave room
for side by side, of 64. Last the least time that 64 Mi elements take on an H200, were nothing else in the
way: by instructions, of which its 132 multiprocessors begin 128 lanes' a cycle at 1.75 GHz, and by the
bytes above. The longer one is the floor; what a warp waits for comes on top.

{aot_sass.table(results, RATES["H200"])}

## Linear, norm and LIF in one kernel

Bytes a row of the input and timestep in bfloat16, K inputs as bits, N outputs: the parts write the current
and read it again. In one kernel a LayerNorm over more than 128 outputs, too many for a tile beside its
potentials, takes the product twice and so W once more a tile of 64 rows. It runs where that is no more than
what memory is spared.

{fusion()}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="an operator, or several with commas between")
    parser.add_argument("--first", type=int, help="only so many calls of each operator")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="compute capability")
    parser.add_argument("--spread", action="store_true", help="each call for one of the targets in turn")
    parser.add_argument("--cases", action="store_true", help="every variant of the table of cases")
    parser.add_argument("--types-only", action="store_true", help="with --cases: make no machine code")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels can't be compiled under the interpreter")
    targets = tuple(options.target or TARGETS)
    if options.cases:
        work = [
            (t, part, options.processes, not options.types_only)
            for t in targets
            for part in range(options.processes)
        ]
        with ProcessPoolExecutor(options.processes) as pool:
            found = list(pool.map(check_cases, *zip(*work, strict=True)))
        print(f"{sum(count for count, _ in found)} variants for {', '.join(f'sm_{t}' for t in targets)}")
        bad = [fault for _, some in found for fault in some]
        print(*bad, sep="\n", file=sys.stderr)
        return 1 if bad else 0
    results = compile_all(options.only, options.first, targets, options.processes, options.spread)
    parts = floors(results, (options.target or [90])[0]), aot_sass.table(results, RATES["H200"])
    print(table(results), *parts, sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(c) | {"faults": faults(c)} for c in results], indent=1))
    elif not (options.only or options.first or options.target or options.spread):
        DOCS.write_text(page(results))
    wrong = [f"{c.kernel} ({c.call}, {c.dtype}, sm_{c.target}): {f}" for c in results for f in faults(c)]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
