"""Run the kernels' PTX on a CPU beside the reference: what a GPU would be given, without one.

    python bench/emulate.py                          # every case of the tests in every dtype, for sm_90
    python bench/emulate.py --only lif,norm_lif --target 80
    python bench/emulate.py --sample 20              # every twentieth call
    python bench/emulate.py --widths                 # norms of the presets' channels, at T = 4, 8, 16
    python bench/emulate.py --note bench/results/emulated.md  # adds a line to what was run so far

Each operator runs as on a GPU, forward and backward; its launches are compiled by Triton for the target and
their PTX is interpreted (`bench/ptx`), which holds every access against the tensors' bounds and looks for
missing barriers. Calls whose code needs instructions that the interpreter lacks are counted and named.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from aot import gpu_code, source_of
from aot_rows import MORE_CASES, OPERATORS, TYPES
from ptx import arithmetic, machine, tensor, transfer, warps  # noqa: F401  the instructions
from ptx.memory import Globals
from ptx.parse import Kernel, parse
from ptx.traffic import Traffic
from torch import Tensor

from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import DTYPES, Launch
from spikedecoder.testing import Case, cases

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from kernel_parity import compare, larger

HEAD = """# The kernels' PTX beside the reference, on a CPU

Each line is a run of the command in it: operators, forward and all gradients, whose kernels were compiled for
the architecture and interpreted (`bench/ptx`). "Wrong" are calls that differ from the reference by more than
the tests allow, reach beside a tensor, lack a barrier or do not wait for a product; "not run" those with an
instruction that the interpreter lacks.

"""


class Emulator:
    """In place of a recorder's list: runs each launch."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.compiled: dict[tuple[object, ...], tuple[Kernel, int]] = {}
        self.ran: collections.Counter[str] = collections.Counter()
        self.traffic: Traffic | None = None

    def append(self, launch: Launch) -> None:
        key = (*launch.key, launch.kernel.cache_key)
        if key not in self.compiled:
            text, shared = gpu_code(launch, self.target)
            self.compiled[key] = parse(text)[launch.kernel.__name__], shared
        kernel, shared = self.compiled[key]
        threads = 32 * launch.options["num_warps"]
        arguments, memory = _bits(launch), memory_of(launch)
        machine.launch(kernel, launch.grid, (threads,), arguments, shared, memory, self.traffic)
        self.ran[launch.kernel.__name__] += 1


def _bits(launch: Launch) -> list[int]:
    """Parameters as Triton passes them, and the two pointers that it adds."""
    bits = []
    signature = source_of(launch).signature
    for name in launch.kernel.arg_names:
        kind, value = signature[name], launch.arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            bits.append(value.data_ptr())
        elif kind == "fp32":
            bits.append(int.from_bytes(struct.pack("<f", value), "little"))
        else:
            bits.append(value % 2 ** (64 if kind == "i64" else 32))
    return [*bits, 0, 0]


def memory_of(launch: Launch) -> Globals:
    """From the first to the last element of each tensor, and as one block what overlaps."""
    given = [value for value in launch.arguments.values() if isinstance(value, Tensor) and value.numel()]
    blocks: list[tuple[int, int, int, Tensor]] = []  # from, to, size of the smallest element, whose storage
    for value in sorted(given, key=Tensor.data_ptr):
        start, size = value.data_ptr(), value.element_size()
        last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        end = start + (last + 1) * size
        if blocks and start < blocks[-1][1]:
            start, before, unit, _ = blocks.pop()
            end, size = max(end, before), min(size, unit)
        blocks.append((start, end, size, value))
    memory = Globals()
    for start, end, unit, value in blocks:
        storage = value.untyped_storage()
        data = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
        memory.add(start, data[start - storage.data_ptr() : end - storage.data_ptr()], unit)
    return memory


@contextlib.contextmanager
def _new_tensors_are_nan() -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def emulated(target: int, multiprocessors: int) -> Iterator[Emulator]:
    """Triton's backend runs on the CPU, as compiled for sm_`target` and a device of so many multiprocessors:
    of few, programs walk through several tiles in a loop, as they do with large tensors on a GPU. New tensors
    hold NaN, so that what no program writes is not by chance what lay there before."""
    emulator = Emulator(target)
    sizes = mock.patch.dict(_launch._MULTIPROCESSORS, {target: multiprocessors})
    with sizes, _new_tensors_are_nan(), _launch.record(target):
        assert _launch._recorder is not None
        _launch._recorder.launches = emulator
        yield emulator


def calls() -> list[tuple[Case, torch.dtype]]:
    """What the tests compare, and in which dtype."""
    every = [(case, dtype) for case in (*cases(*OPERATORS), *MORE_CASES) for dtype in DTYPES]
    return [
        (case, dtype)
        for case, dtype in every
        if not (case.operator == "norm" and case.options["norm"] != "layer")
        and not (case.operator == "linear_norm_lif" and dtype != torch.float32)
    ]


def widths() -> list[tuple[Case, torch.dtype]]:
    """Norms and neurons over the channels that models have: of one tile, of several, of none that fits."""
    found = []
    for T in (4, 8, 16):
        for channels in (80, 96, 384, 512, 1000, 1280, 2048):
            shape = (T, 1, 40 if channels < 600 else 12, channels)
            found += [
                (Case("norm_lif", f"{norm}-T{T}-C{channels}", shape, {"norm": norm}, exact=False), dtype)
                for norm in ("layer", "batch")
                for dtype in (torch.float32, torch.bfloat16)
            ]
    return found


def _commit() -> str:
    """The checkout's; with a + if kernels have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    name = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../kernels"])
    return name.stdout.strip() + "+" * changed.returncode


def note(path: Path, cells: dict[str, str]) -> None:
    """Add a line to a table of runs."""
    if not path.exists():
        path.write_text(HEAD + f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|\n")
    with path.open("a") as file:
        file.write(f"| {' | '.join(cells.values())} |\n")


def check(case: Case, dtype: torch.dtype) -> str | None:
    """What is wrong, or None; in `emulated`."""
    try:
        compare(case, dtype, "cpu")
    except (AssertionError, machine.PTXError) as error:
        return str(error)
    return None


def check_all(
    options: argparse.Namespace, chosen: list[tuple[Case, torch.dtype]]
) -> tuple[Emulator, int, int]:
    """Run calls and say what is wrong and what could not run: (what ran, how many of each)."""
    wrong, lacking = 0, collections.Counter[str]()
    with emulated(options.target, options.multiprocessors) as emulator:
        for case, dtype in chosen:
            began = time.perf_counter()
            name = f"{case}, {TYPES[dtype]}, sm_{options.target}"
            try:
                if fault := check(case, dtype):
                    wrong += 1
                    print(f"{name}: {fault}", file=sys.stderr, flush=True)
            except NotImplementedError as error:
                lacking[" ".join(str(error).split())[:60]] += 1
            if options.verbose:
                print(f"{time.perf_counter() - began:6.2f} s  {name}", flush=True)
    for what, count in lacking.items():
        print(f"not run, {count} times: {what}")
    return emulator, wrong, lacking.total()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="an operator, or several with commas between")
    parser.add_argument("--case", help="only cases whose name holds this")
    parser.add_argument("--dtype", help="fp32, fp16 or bf16")
    parser.add_argument(
        "--target",
        type=int,
        default=90,
        choices=sorted(_launch.SHARED_MEMORY),
        help="ten times the compute capability",
    )
    parser.add_argument(
        "--multiprocessors", type=int, default=2, help="of the device that grids are made for"
    )
    parser.add_argument("--sample", type=int, default=1, help="every so many calls")
    parser.add_argument("--widths", action="store_true", help="norms of the channels that presets have")
    parser.add_argument("--note", type=Path, help="add the result to this table")
    parser.add_argument("--larger", action="store_true", help="with 37 times as many rows or tokens")
    parser.add_argument("--verbose", action="store_true", help="name each call and its time")
    options = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels can't be compiled under the interpreter")
    return options


def main() -> int:
    options = parse_options()
    chosen = [
        (larger(case) if options.larger else case, dtype)
        for case, dtype in (widths() if options.widths else calls())
        if (options.only is None or case.operator in options.only.split(","))
        and (options.case is None or options.case in str(case))
        and options.dtype in (None, TYPES[dtype])
    ][:: options.sample]
    emulator, wrong, not_run = check_all(options, chosen)
    if options.note:
        command = re.sub(r" --note \S+", "", " ".join(["python bench/emulate.py", *sys.argv[1:]]))
        note(options.note, {
            "date": f"{datetime.date.today()}", "commit": _commit(), "command": f"`{command}`",
            "Triton": triton.__version__, "architecture": f"sm_{options.target}", "calls": f"{len(chosen)}",
            "launches": f"{emulator.ran.total()}", "kernels": f"{len(emulator.ran)}",
            "variants": f"{len(emulator.compiled)}", "wrong": f"{wrong}", "not run": f"{not_run}",
        })  # fmt: skip
    launches = ", ".join(f"{name} {count}" for name, count in sorted(emulator.ran.items()))
    print(f"{len(chosen)} calls for sm_{options.target}, {wrong} wrong, {not_run} not run: {launches}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
