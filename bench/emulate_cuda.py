"""Run the CUDA extension's PTX on a CPU beside the reference, its own launches included.

    python bench/emulate_cuda.py        # builds it with nvcc, runs the tests' cases and larger ones

csrc/*.cu is compiled to PTX and linked with a runtime of a few functions (`bench/ptx/runtime.cpp`) that hands
each launch to the interpreter in `bench/ptx`. So the whole backend is tried but for a GPU's own work: the
choice of kernels by alignment, grids, arguments, and each thread's instructions, within the tensors' bounds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pybind11
import torch
from ptx import arithmetic, machine, tensor, transfer, warps  # noqa: F401  the instructions
from ptx.memory import Globals
from ptx.parse import parse
from torch import Tensor

from spikedecoder import ops
from spikedecoder.ext import _programs
from spikedecoder.ext.cuda import _arguments, pack_spikes, spike_linear
from spikedecoder.testing import cases, make_inputs, run

ROOT = Path(__file__).parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_Launched = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)


def build(folder: Path, target: int) -> tuple[ModuleType, str]:
    """The module, whose launches go to `launch_with`'s function, and its PTX."""
    compiler = _programs.find_nvcc()
    if compiler is None:
        raise FileNotFoundError("needs nvcc")
    nvcc = [compiler, "-std=c++17", "-O1", f"-arch=compute_{target}", f"-code=compute_{target}"]
    module, ptx = folder / "_C_cuda.so", folder / "kernels.ptx"
    include = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    macros = [f'-DSPIKEDECODER_{name}=""' for name in ("CUDA_ARCHS", "SOURCES", "CUDA_COMPILER")]
    sources = [ROOT / "csrc/bindings_cuda.cpp", ROOT / "csrc/kernels.cu", ROOT / "bench/ptx/runtime.cpp"]
    shared = ["-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-diag-suppress", "20091"]
    # the PTX of this very build: names of functions in an unnamed namespace differ from one to the next
    kept = ["--keep", "--keep-dir", folder]
    subprocess.run([*nvcc, *shared, *kept, *include, *macros, *sources, "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("_C_cuda", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded, ptx.read_text()


class Emulated:
    """The module's launches, run by the interpreter."""

    def __init__(self, module: ModuleType, ptx: str) -> None:
        self.kernels = parse(ptx)
        self.ran: collections.Counter[str] = collections.Counter()
        self.error: BaseException | None = None
        self._callback = _Launched(self._launched)
        assert module.__file__ is not None
        ctypes.CDLL(module.__file__).launch_with(self._callback)

    def _launched(self, name: bytes, sizes: Any, arguments: Any, shared: int) -> None:
        try:
            kernel = self.kernels[name.decode()]
            widths = {"u64": 8, "u32": 4, "u16": 2, "u8": 1, "f32": 4}
            bits = [
                int.from_bytes(ctypes.string_at(arguments[i], widths[kind]), "little")
                for i, (_, kind) in enumerate(kernel.parameters)
            ]
            size, memory = kernel.shared_size + shared, _tensors(bits)
            machine.launch(kernel, tuple(sizes[:3]), tuple(sizes[3:6]), bits, size, memory)
            self.ran[next(k for k in ("unpack", "transpose", "pack", "gather") if k in name.decode())] += 1
        except BaseException as error:  # not through C
            self.error = error

    def launch(self, function: Any, x: Tensor, *arguments: int) -> None:
        """In place of `_arguments.launch`, for tensors on the CPU."""
        function(*arguments, 0, 0)
        error, self.error = self.error, None
        if error is not None:
            raise error


def _tensors(arguments: list[int]) -> Globals:
    """The memory of the tensors that a launch was given: it names addresses alone."""
    memory, seen = Globals(), set()
    for value in gc.get_objects():
        if type(value) is Tensor and value.device.type == "cpu" and value.layout == torch.strided:
            storage = value.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            if start not in seen and any(start <= argument < start + size for argument in arguments):
                seen.add(start)
                memory.add(start, torch.tensor([], dtype=torch.uint8).set_(storage).numpy())
    return memory


@contextlib.contextmanager
def emulated(target: int = 90) -> Iterator[Emulated]:
    """Backend "cuda" runs on tensors of the CPU."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        module, ptx = build(Path(folder), target)
        emulator = Emulated(module, ptx)
        for part in (pack_spikes, spike_linear):
            stack.enter_context(mock.patch.object(part, "native", module))
            stack.enter_context(mock.patch.object(part, "launch", emulator.launch))
            stack.enter_context(mock.patch.object(part, "why_not", lambda call: None))
        yield emulator


def check_cases() -> list[str]:
    """The table's cases, forward and gradients; what is wrong."""
    wrong = []
    for case in cases("pack_spikes", "spike_linear"):
        for dtype in _arguments.TYPES:
            if dtype not in TOLERANCE:
                continue
            with ops.use_backend("cuda"):
                actual = run(case, make_inputs(case, dtype))
            with ops.use_backend("reference"):
                expected = run(case, make_inputs(case, torch.float64))
            for name, value in actual.items():
                error = (value.double() - expected[name].double()).abs()
                if (error > TOLERANCE[dtype] * (1 + expected[name].double().abs())).any():
                    wrong.append(f"{case}, {dtype}: {name} is off by up to {error.max():.3g}")
    return wrong


def check_shapes() -> list[str]:
    """Larger and odd shapes of whole numbers, of which every order of sums gives the same floats."""
    wrong = []
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((500, 130, 77), (3, 1100, 512), (1, 1, 1), (300, 64, 8), (2, 70, 1028)):
        for dtype in (torch.float32, torch.bfloat16):
            s = (torch.rand(m, k, generator=generator) < 0.1).to(dtype)
            weight = torch.randint(-1, 2, (n, k), generator=generator).to(dtype)
            grad = torch.randint(-1, 2, (m, n), generator=generator).to(dtype)
            y, words = spike_linear.forward(s, weight, None)
            exact = (s.double() @ weight.double().t()).to(dtype)
            dw = (grad.double().t() @ s.double()).to(dtype)
            got = {
                "y": torch.equal(y, exact),
                "y of words": torch.equal(spike_linear.from_words(words, k, weight, None), exact),
                "spikes": torch.equal(pack_spikes.unpack(words, k, dtype), s),
                "weight's gradient": torch.equal(spike_linear.weight_grad(words, k, grad), dw),
            }
            wrong += [
                f"{m} x {k} -> {n}, {dtype}: {what} is wrong" for what, right in got.items() if not right
            ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, default=90, choices=(80, 90, 100), help="compute capability")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors hold NaN until they are written
    with emulated(options.target) as emulator:
        wrong = check_cases() + check_shapes()
    print(*wrong, sep="\n", file=sys.stderr)
    launches = ", ".join(f"{name} {count}" for name, count in sorted(emulator.ran.items()))
    print(f"sm_{options.target}, {len(wrong)} wrong: {launches}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
