"""Compile every kernel for GPUs that need not be here, and read what the compiler made of it.

    python bench/aot.py                          # all kernels, all architectures; writes docs/kernels.md
    python bench/aot.py --only lif --target 90   # prints the table, writes nothing
    python bench/aot.py --changed --spread       # what the page does not have as it is now, a target each
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
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aot_sass
import triton
from aot_code import OPCODES, Compiled, beyond_memory, faults
from aot_page import RATES, floors, on_the_page, page, table
from aot_rows import MORE_CASES, OPERATORS, TYPES, rows
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend

from spikedecoder import use_backend
from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import Launch
from spikedecoder.testing import cases, make_inputs, run

TARGETS = (80, 90, 100)  # of the page
COUNTED = ("lif_forward", "lif_backward", "norm_lif_forward", "norm_lif_backward", "token_shift_units")
LOOPS = ("linear_forward", "linear_weight_grad")
RULES = Path(__file__).with_name("aot_code.py").read_text()
DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


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


def made_of(launch: Launch, target: int, needs: tuple[str, ...]) -> str:
    """A number of all that decides machine code (sources, types, constants, options, Triton's version) and
    whether it is what its row needs."""
    parts = (triton.__version__, target, launch.kernel.cache_key, launch.key, needs, RULES)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def gpu_code(launch: Launch, target: int) -> tuple[str, int]:
    """(PTX, bytes of shared memory) of a launch for sm_`target`: the compiler's stages but the last."""
    gpu = GPUTarget("cuda", target, 32)
    backend, context = make_backend(gpu), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(launch.options))
    source = source_of(launch)
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(gpu, options, implementation, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": gpu, **vars(options)}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ptx":
            break
    return module, metadata["shared"]


def compile_launch(launch: Launch, target: int) -> tuple[int, int, int, bool, str]:
    """(registers, shared bytes, local bytes, whether products are serial, disassembly) of a launch compiled
    for sm_`target`."""
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
    serial = _serial(compiled.asm["ptx"], target)
    return registers, int(compiled.metadata.shared), stack + local, serial, code


def _serial(ptx: str, target: int) -> bool:
    """Whether ptxas says that it makes every wgmma wait for the one before, which the PTX does not."""
    if "wgmma" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code.ptx")
        code.write_text(ptx)
        command = [
            get_ptxas(target).path,
            "-v",
            f"-arch=sm_{target}a",
            code,
            "-o",
            code.with_suffix(".cubin"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in done.stdout + done.stderr


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


def compile_row(index: int, target: int, left_out: frozenset[str] = frozenset()) -> list[Compiled]:
    """Compile what row number `index` launches, but for what is made of what is `left_out`."""
    row = list(rows())[index]
    with _launch.record(target) as launches:
        row.run()
    done: dict[tuple[object, ...], Compiled] = {}
    for launch in launches:
        source = made_of(launch, target, row.needs)
        if source in left_out:
            continue
        moved = _touched(launch)
        if launch.key in done:
            done[launch.key].moved += moved
            continue
        registers, shared, local, serial, code = compile_launch(launch, target)
        name, counted, loop = launch.kernel.__name__, {}, None
        if target == 90 and name in COUNTED and row.operator in name:
            counted = aot_sass.per_element(code, launch)
        if target == 90 and name in LOOPS and row.operator == "spike_linear":
            warps = launch.options["num_warps"]
            loop = (warps, *aot_sass.product_loop(code, warps))
        done[launch.key] = Compiled(
            row.operator, row.call, row.dtype, row.size, row.needs, name, target, registers, shared, local,
            dict(collections.Counter(OPCODES.findall(code))), moved,
            "maxnreg" in launch.options, serial, loop, counted, source,
        )  # fmt: skip
    return list(done.values())


def compile_all(
    only: str | None,
    first: int | None,
    targets: tuple[int, ...],
    processes: int,
    spread: bool = False,
    left_out: frozenset[str] = frozenset(),
) -> list[Compiled]:
    """`spread`: each call for one of the targets in turn. `left_out`: what is not compiled, by `made_of`."""
    seen: collections.Counter[str] = collections.Counter()
    numbers = []
    for i, row in enumerate(rows()):
        seen[row.operator] += 1
        if (only is None or row.operator in only.split(",")) and (not first or seen[row.operator] <= first):
            numbers.append(i)
    wanted = [(i, t) for i in numbers for t in targets]
    if spread:
        wanted = [(i, targets[n % len(targets)]) for n, i in enumerate(numbers)]
    compile_one = functools.partial(compile_row, left_out=left_out)
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(compile_one, *zip(*wanted, strict=True)))
    return [compiled for part in parts for compiled in part]


def case_launches(target: int) -> list[tuple[str, Launch]]:
    """What the cases launch in every dtype, forward and backward: a case, and each variant once."""
    found: dict[object, tuple[str, Launch]] = {}
    for case in (*cases(*OPERATORS), *MORE_CASES):
        for dtype in _launch.DTYPES:
            with use_backend("triton"), _launch.record(target) as launches:
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
            found = []
            if whole:
                found = beyond_memory(compile_launch(launch, target)[1], target)
            else:
                check_source(launch, target)
        except Exception as error:
            found = [_innermost(error)]
        wrong += [f"{launch.kernel.__name__} ({case}, sm_{target}): {fault}" for fault in found]
    return len(chosen), wrong


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="an operator, or several with commas between")
    parser.add_argument("--first", type=int, help="only so many calls of each operator")
    parser.add_argument(
        "--target",
        type=int,
        action="append",
        choices=sorted(_launch.SHARED_MEMORY),
        help="ten times the compute capability",
    )
    parser.add_argument("--spread", action="store_true", help="each call for one of the targets in turn")
    parser.add_argument("--changed", action="store_true", help="only what the page has no line of")
    parser.add_argument("--page", type=Path, default=DOCS, help="default: docs/kernels.md")
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
    some = options.only or options.first or options.target or options.spread or options.changed
    results = compile_all(
        options.only, options.first, targets, options.processes, options.spread,
        on_the_page(options.page) if options.changed else frozenset(),
    )  # fmt: skip
    parts = (
        floors(results, (options.target or [90])[0]),
        aot_sass.table(results, RATES["H200"]),
        aot_sass.product_table(results),
    )
    print(table(results), *parts, sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(c) | {"faults": faults(c)} for c in results], indent=1))
    elif not some:
        options.page.write_text(page(results))
    wrong = [f"{c.kernel} ({c.call}, {c.dtype}, sm_{c.target}): {f}" for c in results for f in faults(c)]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
