"""Compile every kernel for GPUs that need not be here, and read what the compiler made of it.

    python bench/aot.py                          # all kernels, all architectures; writes docs/kernels.md
    python bench/aot.py --only lif --target 90   # prints the table, writes nothing

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
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spikedecoder.kernels import _launch
from spikedecoder.kernels._launch import Launch
from spikedecoder.params import ILIFParams, LIFParams

TARGETS = (80, 90, 100)
RATES = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second, data sheets of the SXM boards
DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
_OPCODES = re.compile(r"\b((?:FFMA|LDG\.E|LDGSTS|STG\.E|LDL|STL)[.\w]*|(?:[HIQ]G?|UTC\w*)MMA\b(?:\.\w+)*)")
MEGA = 1 << 20


@dataclass(frozen=True)
class Row:
    """An operator's call. `minimum`: bytes that it must move; `needs`: what its code must have."""

    operator: str
    call: str
    dtype: str
    size: str
    minimum: float
    needs: tuple[str, ...]
    run: Callable[[], object]


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


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_WITHOUT_PRODUCT = (
    "scan_segments",
    "pack_kernel",
    "lif_forward",
    "norm_lif_forward",
    "moments_of_rows",
)  # kernels beside those with the product
STREAM = ("128-bit loads", "128-bit stores", "no spill")
LOADS = ("128-bit loads", "no spill")
DOT = ("tensor core", "no spill")
ROUNDED = (*STREAM, "no FFMA")


def lif_rows() -> Iterator[Row]:
    from spikedecoder.kernels import lif

    def forward(T: int, dtype: torch.dtype, threshold: Tensor | float) -> Callable[[], object]:
        x = meta((T, 64 * MEGA // T // 1024, 1024), dtype)
        return lambda: lif.forward(x, threshold, None, LIFParams(), want_v=False)

    def backward(T: int, dtype: torch.dtype, threshold: Tensor | float) -> Callable[[], object]:
        x = meta((T, 64 * MEGA // T // 1024, 1024), dtype)
        return lambda: lif.backward(x, None, x, threshold, None, LIFParams(), want_grad_v_init=False)

    scalar, channel = meta((), torch.float32), meta((1024,), torch.float32)
    for T, dtype in ((4, torch.bfloat16), (8, torch.bfloat16), (16, torch.bfloat16), (4, torch.float32)):
        size = dtype.itemsize
        name = f"64 Mi, T = {T}"
        yield Row(
            "lif", "forward", _TYPES[dtype], name, 2 * size * 64 * MEGA, ROUNDED, forward(T, dtype, 1.0)
        )
        yield Row(
            "lif", "backward", _TYPES[dtype], name, 3 * size * 64 * MEGA, STREAM, backward(T, dtype, 1.0)
        )
    for label, threshold in (("scalar threshold", scalar), ("threshold per channel", channel)):
        run = backward(4, torch.bfloat16, threshold)
        yield Row("lif", f"backward, {label}", "bf16", "64 Mi, T = 4", 6 * 64 * MEGA, STREAM, run)
    x = meta((4, 16 * MEGA // 1024, 1024))
    packed = lambda: lif.forward_packed(x, 1.0, None, LIFParams())  # noqa: E731
    yield Row("lif", "forward to bits", "bf16", "64 Mi, T = 4", (2 + 1 / 8) * 64 * MEGA, LOADS, packed)


def small_rows() -> Iterator[Row]:
    from spikedecoder.kernels import binarize, ilif, pack_spikes

    x, words = meta((64 * MEGA // 1024, 1024)), meta((64 * MEGA // 1024, 16), torch.int64)
    bits = 2 + 1 / 8
    unpack = lambda: pack_spikes.unpack(words, 1024, torch.bfloat16)  # noqa: E731
    yield Row("binarize", "forward", "bf16", "64 Mi", 4 * 64 * MEGA, STREAM, lambda: binarize.forward(x, 2.0))
    backward = lambda: binarize.backward(meta(x.shape), x, 2.0)  # noqa: E731
    yield Row("binarize", "backward", "bf16", "64 Mi", 6 * 64 * MEGA, STREAM, backward)
    p = ILIFParams(4)
    yield Row("ilif", "forward", "bf16", "64 Mi", 5 * 64 * MEGA, STREAM, lambda: ilif.forward(x, p, True))
    passes = meta(x.shape, torch.uint8)
    yield Row("ilif", "backward", "bf16", "64 Mi", 5 * 64 * MEGA, STREAM, lambda: ilif.backward(x, passes, p))
    yield Row("pack_spikes", "pack", "bf16", "64 Mi", bits * 64 * MEGA, LOADS, lambda: pack_spikes.pack(x))
    yield Row(
        "pack_spikes", "unpack", "bf16", "64 Mi", bits * 64 * MEGA, ("128-bit stores", "no spill"), unpack
    )


def norm_lif_rows() -> Iterator[Row]:
    from spikedecoder.kernels import norm_lif

    bf16, p = torch.bfloat16, LIFParams()

    def row(call: str, T: int, C: int, dtype: torch.dtype = bf16) -> Row:
        x, grad = (meta((T, 64 * MEGA // T // C, C), dtype) for _ in range(2))
        weight, channel = meta((C,), torch.float32), meta((C,), torch.float32)
        rows = meta(x.shape[:-1], torch.float32)
        norm = functools.partial(norm_lif.forward, x, weight, weight)
        back = (grad, x, weight, weight)
        run, passes, needs = {
            "layer forward": (functools.partial(norm, None, None, 1e-5, 1.0, p), 2, STREAM),
            "layer backward": (
                functools.partial(norm_lif.backward_layer, *back, rows, rows, 1.0, p), 3, STREAM,
            ),
            "moments": (functools.partial(norm_lif.moments, x, True), 1, ("no spill",)),
            "channel forward": (functools.partial(norm, channel, channel, 1e-5, 1.0, p), 2, ROUNDED),
            "channel backward, sums": (
                functools.partial(norm_lif.backward_reduce, *back, channel, channel, 1.0, p), 2, LOADS,
            ),
            "channel backward, x": (
                functools.partial(
                    norm_lif.backward_apply, *back, channel, channel, 1.0, p, channel, channel, channel
                ),
                3, STREAM,
            ),
        }[call]  # fmt: skip
        if C > norm_lif.MAX_ROW:  # a launch that only sums writes little
            needs = LOADS
        minimum = passes * x.numel() * dtype.itemsize + (8 * x.numel() / C if "layer" in call else 0)
        return Row("norm_lif", call, _TYPES[dtype], f"64 Mi, T = {T}, C = {C}", minimum, needs, run)

    layer = ("layer forward", "layer backward")
    channels = ("channel forward", "channel backward, sums", "channel backward, x")
    for T in (4, 8, 16, 64):
        yield from (row(call, T, 512) for call in (*layer, *channels))
    yield row("moments", 4, 512)
    for T, C in ((4, 80), (8, 80), (4, 1280), (16, 1280), (4, 4096), (16, 4096), (4, 8192), (16, 8192)):
        yield from (row(call, T, C) for call in layer)
    for T in (4, 16):
        yield from (row(call, T, 1024, torch.float32) for call in layer)


def attention_rows() -> Iterator[Row]:
    from spikedecoder.kernels import spike_attention as k

    def row(call: str, dtype: torch.dtype, B: int, S: int, d: int, decay: bool) -> Row:
        q, key, v, grad = (meta((4, B, S, 8, d), dtype).transpose(2, 3) for _ in range(4))
        powers = meta((8,), torch.float32) if decay else None
        run = {
            "forward": lambda: k.forward(q, key, v, 0.125, powers, None, False),
            "backward": lambda: k.backward(grad, q, key, v, 0.125, powers, None),
        }[call]
        moved = q.numel() * dtype.itemsize * (4 if call == "forward" else 7)
        name = f"T = 4, B H = {8 * B}, S = {S}, d = {d}"
        return Row("spike_attention", call + ", decay" * decay, _TYPES[dtype], name, moved, DOT, run)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for call in ("forward", "backward"):
        yield row(call, bf16, 16, 2048, 64, False)
        yield row(call, bf16, 32, 256, 16, False)
    for call in ("forward", "backward"):
        for dtype, B, S, d, decay in (
            (bf16, 16, 2048, 32, False), (bf16, 16, 2048, 128, False), (bf16, 1, 65536, 64, False),
            (bf16, 16, 2048, 64, True), (fp16, 16, 2048, 64, False), (fp32, 16, 2048, 64, False),
            (fp32, 16, 2048, 128, True), (fp32, 16, 2048, 128, False),
        ):  # fmt: skip
            yield row(call, dtype, B, S, d, decay)
    for decay in (False, True):  # in segments
        yield row("forward", fp32, 1, 65536, 128, decay)


def attention_lif_rows() -> Iterator[Row]:
    from spikedecoder.kernels import spike_attention_lif as k

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for T, dtype, B, S, d, decay in (
        (4, bf16, 16, 2048, 64, False), (4, bf16, 32, 256, 16, False), (4, bf16, 16, 2048, 32, False),
        (8, bf16, 16, 2048, 16, False), (4, bf16, 16, 2048, 64, True), (4, fp16, 16, 2048, 64, False),
        (4, bf16, 16, 2048, 128, False), (16, bf16, 16, 2048, 64, False), (4, fp32, 16, 2048, 64, False),
    ):  # fmt: skip
        q, key, v = (meta((T, B, S, 8, d), dtype).transpose(2, 3) for _ in range(3))
        powers = meta((8,), torch.float32) if decay else None
        run = functools.partial(k.forward, q, key, v, 0.125, powers, 1.0, LIFParams())
        name = f"T = {T}, B H = {8 * B}, S = {S}, d = {d}"
        call, moved = "forward" + ", decay" * decay, 4 * q.numel() * dtype.itemsize
        yield Row("spike_attention_lif", call, _TYPES[dtype], name, moved, DOT, run)


def linear_rows() -> Iterator[Row]:
    from spikedecoder.kernels import spike_linear as k

    for dtype, M, K, N in (
        (torch.bfloat16, 32768, 512, 2048), (torch.bfloat16, 32768, 80, 160), (torch.float16, 32768, 512,
        2048),
        (torch.float32, 32768, 512, 2048),
    ):  # fmt: skip
        s, grad, weight, bias = (
            meta((M, K), dtype),
            meta((M, N), dtype),
            meta((N, K), dtype),
            meta((N,), dtype),
        )
        words = meta((M, -(-K // 64)), torch.int64)
        size, b = f"M = {M}, K = {K}, N = {N}", dtype.itemsize
        forward = functools.partial(k.forward, s, weight, bias)
        backward = functools.partial(k.weight_grad, words, K, grad)
        moved = b * (M * K + N * K + M * N) + M * K / 8
        yield Row("spike_linear", "forward", _TYPES[dtype], size, moved, DOT, forward)
        moved = b * (M * N + N * K) + M * K / 8
        yield Row("spike_linear", "weight gradient", _TYPES[dtype], size, moved, DOT, backward)


def linear_norm_lif_rows() -> Iterator[Row]:
    from spikedecoder.kernels import linear_norm_lif as k

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, T, R, K, N, kind in (
        (bf16, 4, 8192, 80, 80, "layer"), (bf16, 4, 8192, 80, 1280, "layer"),
        (bf16, 4, 8192, 80, 1280, "channel"), (bf16, 4, 8192, 512, 2048, "channel"),
        (bf16, 4, 8192, 512, 256, "layer"), (bf16, 4, 8192, 512, 512, "layer"),
        (fp16, 4, 8192, 80, 80, "layer"), (fp16, 4, 8192, 80, 1280, "channel"),
        (fp32, 4, 8192, 80, 80, "layer"), (fp32, 4, 8192, 80, 1280, "layer"),
        (fp32, 4, 8192, 512, 2048, "channel"),
    ):  # fmt: skip
        s, weight, channel = meta((T, R, K), dtype), meta((N, K), dtype), meta((N,), fp32)
        given = (None, None) if kind == "layer" else (channel, channel)
        run = functools.partial(
            k.forward, s, weight, meta((N,), dtype), channel, channel, *given, 1e-5, 1.0, LIFParams()
        )
        statistics = 8 * T * R if kind == "layer" else 0
        moved = dtype.itemsize * (T * R * (K + N) + N * K) + T * R * K / 8 + statistics
        size = f"T = {T}, R = {R}, K = {K}, N = {N}"
        yield Row("linear_norm_lif", f"{kind} forward", _TYPES[dtype], size, moved, DOT, run)


def rows() -> Iterator[Row]:
    yield from lif_rows()
    yield from attention_lif_rows()
    yield from linear_rows()
    yield from linear_norm_lif_rows()
    yield from attention_rows()
    yield from norm_lif_rows()
    yield from small_rows()


def _argument(name: str, value: Any) -> str:
    if value is None or name.isupper():
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: Launch, target: int) -> tuple[int, int, int, dict[str, int]]:
    """(registers, shared bytes, local bytes, opcode counts) of a launch compiled for sm_`target`."""
    names = launch.kernel.arg_names
    arguments = {name: launch.arguments[name] for name in names}
    signature = {name: _argument(name, value) for name, value in arguments.items()}
    constants = {name: arguments[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about {launch.kernel.__name__}: {usage!r}")
    registers, stack, _, local = map(int, found.groups())
    return (
        registers,
        int(compiled.metadata.shared),
        stack + local,
        dict(collections.Counter(_OPCODES.findall(code))),
    )


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
        registers, shared, local, opcodes = compile_launch(launch, target)
        done[launch.key] = Compiled(
            row.operator, row.call, row.dtype, row.size, row.needs, launch.kernel.__name__, target, registers,
            shared, local, opcodes, moved,
        )  # fmt: skip
    return list(done.values())


def compile_all(
    only: str | None, first: int | None, targets: tuple[int, ...], processes: int, spread: bool = False
) -> list[Compiled]:
    """`spread`: each call for one of the targets in turn."""
    numbers = [i for i, row in enumerate(rows()) if only is None or row.operator in only.split(",")][:first]
    wanted = [(i, t) for i in numbers for t in targets]
    if spread:
        wanted = [(i, targets[n % len(targets)]) for n, i in enumerate(numbers)]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(compile_row, *zip(*wanted, strict=True)))
    return [compiled for part in parts for compiled in part]


def faults(c: Compiled) -> list[str]:
    """Where the compiled code is not what its row needs; empty if it is."""
    wrong = []
    if c.shared > (limit := {80: 163, 90: 227, 100: 227}[c.target] * 1024):
        wrong.append(f"{c.shared} bytes of shared memory, a program has {limit}")
    if "no spill" in c.needs and c.spills:
        wrong.append(f"spills: {c.local} bytes of local memory")
    if "no FFMA" in c.needs and any(opcode.startswith("FFMA") for opcode in c.opcodes):
        wrong.append("multiplies and adds with one rounding, so that spikes depend on the compiler")
    if "128-bit loads" in c.needs and 128 not in c.widths("LDG", "LDGSTS"):
        wrong.append(f"widest load is {max(c.widths('LDG', 'LDGSTS'), default=0)} bits")
    if "128-bit stores" in c.needs and 128 not in c.widths("STG"):
        wrong.append(f"widest store is {max(c.widths('STG'), default=0)} bits")
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
`UTC*MMA` are the tensor cores of Ampere, Hopper and Blackwell.

{table(results)}

## Bytes

What a call's launches touch, each tensor once, against what the operator must move at the least: inputs read
once, outputs written once. The floors are the minimum over the memory's rate (H100 3.35 TB/s, H200 4.8 TB/s).

{floors(results, 90)}

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
    parser.add_argument("--first", type=int, help="only so many calls")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="compute capability")
    parser.add_argument("--spread", action="store_true", help="each call for one of the targets in turn")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels can't be compiled under the interpreter")
    targets = tuple(options.target or TARGETS)
    results = compile_all(options.only, options.first, targets, options.processes, options.spread)
    print(table(results), floors(results, (options.target or [90])[0]), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(c) | {"faults": faults(c)} for c in results], indent=1))
    elif not (options.only or options.first or options.target or options.spread):
        DOCS.write_text(page(results))
    wrong = [f"{c.kernel} ({c.call}, {c.dtype}, sm_{c.target}): {f}" for c in results for f in faults(c)]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
