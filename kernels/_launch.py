"""How kernels are declared and launched, and the block sizes they run with.

Sizes and strides are ordinary arguments that Triton does not specialise on, so a new batch size or sequence
length compiles nothing. Kernels are specialised on constexprs (T, head size, flags, block sizes), on dtypes
and on ``ALIGN``: sizes are divided by it when passed and multiplied by it again in the kernel, which tells
the compiler that 128-bit accesses are aligned without telling it the size. ALIGN depends only on the number
of channels.

Block sizes come from functions in each kernel's file, by device and operator; nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from spikedecoder.ops._dispatch import Call

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from spikedecoder.kernels._interpreter import install, unchecked

    install()
REGISTERS = 65536  # per multiprocessor
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# for `record`, which asks no device: A100, RTX 4090, H100 and H200, B200, RTX 5090
_MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, arguments by name, and Triton's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """What decides whether Triton compiles anew: everything except sizes and the values of floats."""
        parts: list[object] = [self.kernel.__name__, tuple(sorted(self.options.items()))]
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                aligned = value.storage_offset() * value.element_size() % 16 == 0
                parts.append((name, value.dtype, aligned))
            elif value is None or name.isupper():
                parts.append((name, value))
            elif isinstance(value, int):
                parts.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            else:
                parts.append((name, "fp32"))
        return tuple(parts)


@dataclass
class _Recorder:
    target: int
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def record(target: int) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, with the block sizes for compute capability `target` / 10.

    Tensors may be on any device, including "meta". Outputs are not written.
    """
    global _recorder
    before, _recorder = _recorder, _Recorder(target, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def kernel(fn: Callable[..., None]) -> Any:
    """`triton.jit` for a kernel whose pointers end in _ptr and whose constexprs are upper case.

    Everything else is a size, stride or number, and is not specialised on.
    """
    plain = [
        name for name in inspect.signature(fn).parameters if not name.isupper() and not name.endswith("_ptr")
    ]
    return triton.jit(fn, do_not_specialize=plain)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    fuse: bool = False,
    **arguments: Any,
) -> None:
    """Run `kernel` on its tensors' device.

    maxnreg: registers per thread, where the compiler would otherwise spill a few to run more programs side by
    side.
    fuse: allow fused multiply-adds, which don't round the product. Products that decide about a spike must
    then be exact or use `_neuron.times`, so that the spikes are the same as without.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, arguments, options))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, unchecked() if INTERPRETED else contextlib.nullcontext():
        kernel[grid](**arguments, **options)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _shared_memory(index: int | None) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(index or 0)["max_shared_mem"])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; a multiprocessor has about 1 KiB more in all."""
    if _recorder is not None:
        return SHARED_MEMORY[_recorder.target]
    return _shared_memory(device.index) if device.type == "cuda" else 2**16


@functools.cache
def _device_multiprocessors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(torch.device("cuda", index or 0)).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors (2 under the interpreter), from which grids are sized: the same device
    gives the same grid and so the same sums."""
    if _recorder is not None:
        return _MULTIPROCESSORS[_recorder.target]
    return _device_multiprocessors(device.index) if device.type == "cuda" else 2


def family(device: torch.device) -> int:
    """Whose tensor cores a device has, which block sizes depend on. 8: Ampere's, of capability 8.x and 12.x,
    with operands in registers; 9: Hopper's; 10: Blackwell's, of 10.x and 11.x; 0: the interpreter."""
    if _recorder is not None:
        major = _recorder.target // 10
    else:
        major = _capability(device.index)[0] if device.type == "cuda" else 0
    return {11: 10, 12: 8}.get(major, major)


def why_not(call: Call) -> str | None:
    """Why no Triton kernel can run this call, or None."""
    if call.dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, got {str(call.dtype).removeprefix('torch.')}"
    if _recorder is not None:  # nothing runs
        return None
    if call.device.type == "cuda":
        if INTERPRETED:
            return None
        if (found := _capability(call.device.index)) < (8, 0):
            return f"needs compute capability 8.0 or newer, this GPU has {found[0]}.{found[1]}"
        return None
    if call.device.type != "cpu":
        return f"needs a CUDA device, got {call.device}"
    if not INTERPRETED:
        return "no CUDA device: the input is on the CPU, and TRITON_INTERPRET=1 is not set"
    return None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def alignment(*sizes: int, limit: int = 16) -> int:
    """The largest power of two <= limit that divides all sizes (in elements)."""
    common = math.gcd(limit, *sizes)
    return common & -common


def element_sizes(x: Tensor) -> dict[str, int]:
    """Arguments of a kernel that goes over the n elements of x one by one. ALIGN is the same for any batch
    size and length."""
    align = alignment(x.numel(), *x.shape[-1:])
    return {"n": x.numel() // align, "ALIGN": align, "BLOCK": 256 * (16 // x.element_size())}


def element_grid(x: Tensor) -> tuple[int]:
    return (cdiv(x.numel(), element_sizes(x)["BLOCK"]),)
