"""What the tests of the interpreter of PTX share: a kernel around some instructions, and running it."""

from __future__ import annotations

import numpy as np
from ptx import arithmetic, tensor, transfer, warps  # noqa: F401  the instructions
from ptx.machine import launch
from ptx.memory import Globals
from ptx.parse import parse

KERNEL = """
.version 9.0
.target sm_90
.address_size 64
{shared}
.visible .entry k(.param .u64 .ptr .global .align 1 k_in, .param .u64 k_out, .param .u32 k_n)
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<20>;
  ld.param.b64 %d1, [k_in];
  ld.param.b64 %d2, [k_out];
  ld.param.b32 %r1, [k_n];
  mov.u32 %r2, %tid.x; // a comment; with a semicolon
  mul.wide.u32 %d3, %r2, 4;
  add.s64 %d4, %d1, %d3;
  mad.wide.u32 %d5, %r2, {size}, %d2;
  {body}
  ret;
}}
"""


def execute(
    body: str,
    values: np.ndarray,
    n: int = 0,
    threads: int = 32,
    grid: int = 1,
    shared: int = 0,
    words: int = 1,
) -> np.ndarray:
    """What a kernel of that body makes of 32-bit values, at %d4 of each thread: `words` of them, at %d5."""
    declared = f".shared .align 1024 .b8 memory[{shared}];" if shared else ""
    kernel = parse(KERNEL.format(body=body, shared=declared, size=4 * words))["k"]
    given = np.ascontiguousarray(values).ravel().view(np.uint8).copy()
    out = np.zeros(4 * words * threads, np.uint8)
    memory = Globals()
    memory.add(1 << 20, given)
    memory.add(1 << 30, out)
    launch(kernel, (grid,), (threads,), [1 << 20, 1 << 30, n], shared, memory)
    return out.view(np.uint32)


ONE = np.arange(32, dtype=np.uint32)
SIGNED = np.arange(-16, 16, dtype=np.int32)
FLOATS = np.array([0.0, -0.0, 1.5, -2.25, 3.0e38, -1e-40, np.inf, np.nan] * 4, np.float32)
