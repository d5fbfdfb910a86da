"""The kernels' PTX, interpreted on the CPU beside the reference, and the interpreter itself (`bench/ptx`).

`bench/emulate.py` compiles in a process of its own, since the tests run kernels under Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from spikedecoder.ext import _programs

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
from ptx import arithmetic, tensor, transfer, warps  # noqa: F401, E402  the instructions
from ptx.machine import PTXError, launch  # noqa: E402
from ptx.memory import Globals  # noqa: E402
from ptx.numbers import fma, to_bf16  # noqa: E402
from ptx.parse import parse  # noqa: E402
from ptx.traffic import Traffic  # noqa: E402

KERNEL = """
.version 9.0
.target sm_90
.address_size 64
{shared}
.visible .entry k(.param .u64 .ptr .global .align 1 k_in, .param .u64 k_out, .param .u32 k_n)
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<9>;
  ld.param.b64 %d1, [k_in];
  ld.param.b64 %d2, [k_out];
  ld.param.b32 %r1, [k_n];
  mov.u32 %r2, %tid.x; // a comment; with a semicolon
  mul.wide.u32 %d3, %r2, 4;
  add.s64 %d4, %d1, %d3;
  add.s64 %d5, %d2, %d3;
  {body}
  ret;
}}
"""


def execute(
    body: str, values: np.ndarray, n: int = 0, threads: int = 32, grid: int = 1, shared: int = 0
) -> np.ndarray:
    """What a kernel of that body makes of 32-bit values; one a thread."""
    declared = f".shared .align 16 .b8 memory[{shared}];" if shared else ""
    kernel = parse(KERNEL.format(body=body, shared=declared))["k"]
    given, out = np.ascontiguousarray(values).view(np.uint8).copy(), np.zeros(4 * threads, np.uint8)
    memory = Globals()
    memory.add(1 << 20, given)
    memory.add(1 << 30, out)
    launch(kernel, (grid,), (threads,), [1 << 20, 1 << 30, n], shared, memory)
    return out


ONE = np.arange(32, dtype=np.uint32)
SIGNED = np.arange(-16, 16, dtype=np.int32)
FLOATS = np.array([0.0, -0.0, 1.5, -2.25, 3.0e38, -1e-40, np.inf, np.nan] * 4, np.float32)


@pytest.mark.parametrize(
    ("instructions", "of", "expected"),
    [
        ("add.s32 %r4, %r3, -3;", ONE, ONE - np.uint32(3)),
        ("mul.lo.s32 %r4, %r3, %r3;", ONE, ONE * ONE),
        ("mul.hi.u32 %r4, %r3, 0x80000000;", ONE, ONE >> 1),
        ("mad.lo.s32 %r4, %r3, 10, %r2;", ONE, ONE * 11),
        ("div.s32 %r4, %r3, -7;", SIGNED, (SIGNED / -7).astype(np.int32)),
        ("rem.s32 %r4, %r3, 7;", SIGNED, np.fmod(SIGNED, 7)),
        ("shl.b32 %r4, 1, %r3; shr.u32 %r4, %r4, 40;", ONE, ONE * 0),
        ("shr.s32 %r4, %r3, 33;", SIGNED, np.where(SIGNED < 0, -1, 0)),
        ("bfe.s32 %r4, %r3, 1, 3;", SIGNED, (SIGNED >> 1 & 7 ^ 4) - 4),
        ("bfi.b32 %r4, 5, %r3, 4, 3;", ONE, ONE & 15 | 0x50),
        ("prmt.b32 %r4, %r3, 0x44332211, 0x7650;", ONE, ONE | 0x44332200),
        ("popc.b32 %r4, %r3;", ONE, [int(x).bit_count() for x in ONE]),
        ("clz.b32 %r4, %r3;", ONE, 32 - np.ceil(np.log2(ONE.astype(float) + 1)).astype(np.uint32)),
        ("brev.b32 %r4, %r3;", ONE, [int(f"{x:032b}"[::-1], 2) for x in ONE]),
        ("setp.lt.s32 %p1, %r3, 5; selp.b32 %r4, 7, 9, %p1;", ONE, np.where(ONE < 5, 7, 9)),
        ("mov.b32 %r4, 1; setp.eq.b32 %p1, %r3, 3; @!%p1 mov.b32 %r4, 2;", ONE, np.where(ONE == 3, 1, 2)),
        ("setp.ge.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 0, %p1;", FLOATS, FLOATS >= 0),
        ("setp.geu.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 0, %p1;", FLOATS, ~(FLOATS < 0)),
        ("set.ltu.u32.f32 %r4, %r3, 0f3F800000;", FLOATS, np.where(FLOATS >= 1, 0, 2**32 - 1)),
        ("{ .reg .b32 %r3; mov.b32 %r3, 4; add.s32 %r4, %r3, 1; } add.s32 %r4, %r4, %r3;", ONE, ONE + 5),
        ("cvt.rn.f32.s32 %r4, %r3; cvt.rzi.s32.f32 %r4, %r4;", SIGNED, SIGNED),
        ("shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;", ONE, ONE ^ 5),
        ("shfl.sync.up.b32 %r4|%p1, %r3, 2, 0, -1;", ONE, np.where(ONE < 2, ONE, ONE - np.uint32(2))),
        ("redux.sync.add.s32 %r4, %r3, -1;", ONE, np.full(32, 496)),
        ("setp.gt.u32 %p1, %r3, 29; vote.sync.ballot.b32 %r4, %p1, -1;", ONE, np.full(32, 3 << 30)),
    ],
)  # fmt: skip
def test_instructions(instructions, of, expected):
    out = execute(f"ld.global.b32 %r3, [%d4]; {instructions} st.global.b32 [%d5], %r4;", of)
    assert np.array_equal(out.view(np.uint32), np.asarray(expected).astype(np.int64).astype(np.uint32))


def test_a_fused_sum_is_rounded_once():
    """The first: float64 rounds the sum to a tie between two float32, of which the lower is even."""
    rng = np.random.default_rng(0)
    a, b = (1 + rng.integers(0, 2**23, 4096).astype(np.float32) * np.float32(2.0**-23) for _ in range(2))
    c = (2.0 ** rng.integers(-40, 30, 4096)).astype(np.float32)
    a[0], b[0], c[0] = 2.0**-12 + 2.0**-24, 2.0**-12 - 2.0**-24 + 2.0**-36, 1
    assert np.float32(float(a[0]) * float(b[0]) + 1) == 1
    results = fma(a, b, c)
    assert results[0] == np.float32(1 + 2.0**-23)
    for x, y, z, got in zip(a, b, c, results, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = (np.nextafter(got, np.float32(sign * np.inf)) for sign in (-1, 1))
        assert all(abs(exact - Fraction(float(got))) <= abs(exact - Fraction(float(n))) for n in neighbours)


def test_bfloat16_is_rounded_to_the_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.nan, np.inf, -0.0], np.float32)
    assert to_bf16(values).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FFF, 0x7F80, 0x8000]


def test_loops_and_threads_that_go_their_own_ways():
    """Each thread of several programs counts down from its own number."""
    body = """
      ld.global.b32 %r3, [%d4];
      mov.b32 %r4, 0;
    $again:
      setp.eq.b32 %p1, %r3, 0;
      @%p1 bra $done;
      add.s32 %r4, %r4, 2;
      sub.s32 %r3, %r3, 1;
      bra.uni $again;
    $done:
      st.global.b32 [%d5], %r4;
    """
    assert np.array_equal(execute(body, ONE[::-1].copy(), grid=3).view(np.uint32), 2 * ONE[::-1])


PLACE = "mov.b32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r7, %r5, %r6;"
STORE = f"{PLACE} st.shared.b32 [%r7], %r2;"
NEXT = "xor.b32 %r8, %r6, 128; add.s32 %r8, %r5, %r8; ld.shared.b32 %r4, [%r8]; st.global.b32 [%d5], %r4;"
COPY = f"{PLACE} cp.async.ca.shared.global [%r7], [%d4], 4;"
OWN = "ld.shared.b32 %r4, [%r7]; st.global.b32 [%d5], %r4;"


def test_a_barrier_makes_what_another_warp_wrote_readable():
    numbers = np.arange(64, dtype=np.uint32)
    out = execute(f"{STORE} bar.sync 0; {NEXT}", numbers, threads=64, shared=256)
    assert np.array_equal(out.view(np.uint32), numbers ^ 32)


def test_a_copy_is_there_once_it_was_waited_for():
    body = f"{COPY} cp.async.commit_group; cp.async.wait_group 0; {OWN}"
    assert np.array_equal(execute(body, ONE, shared=128).view(np.uint32), ONE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{STORE} {NEXT}", "no barrier behind another thread's write"),
        (f"{STORE} bar.warp.sync -1; {NEXT}", "no barrier behind another thread's write"),
        (f"{STORE} bar.sync 0; {NEXT} {STORE}", "no barrier behind another thread's read"),
        ("mov.b32 %r5, memory; st.shared.b32 [%r5], %r2;", "different values to the same shared memory"),
        (f"{COPY} cp.async.commit_group; {OWN}", "before cp.async was waited for"),
        (f"{COPY} cp.async.commit_group; cp.async.wait_group 1; {OWN}", "before cp.async was waited for"),
        ("mov.b32 %r5, memory; ld.shared.b32 %r4, [%r5+4]; st.global.b32 [%d5], %r4;", "that nobody wrote"),
        ("mov.b32 %r5, memory; st.shared.b32 [%r5+256], %r2;", "of 256 bytes of shared memory"),
        ("ld.global.b32 %r4, [%d4+4];", "in no tensor: 256 bytes into one of 256"),
        ("ld.global.b32 %r4, [%d4+2];", "no multiple of 4"),
        ("ld.global.v2.b32 {%r4, %r5}, [%d4];", "no multiple of 8"),
        ("setp.eq.b32 %p1, %r2, 3; @%p1 bra $on; bar.sync 0; $on:", "only a part of 32 threads is there"),
    ],
)  # fmt: skip
def test_faults_are_found(body, message):
    with pytest.raises(PTXError, match=message):
        execute(body, np.arange(64, dtype=np.uint32), threads=64, shared=256)


def test_what_it_does_not_know_is_said():
    with pytest.raises(NotImplementedError, match=r"nanosleep\.u32 5"):
        execute("nanosleep.u32 5;", ONE)


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *(("-c", code) if code else (str(BENCH / "emulate.py"),)), *arguments]
    return subprocess.run(command, env=environment, cwd=BENCH, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "sample"), [("90", "14"), ("80", "29"), ("100", "31")])
def test_the_kernels_ptx_is_the_reference(target, sample):
    """Some of the calls; `python bench/emulate.py` runs all of them."""
    pytest.importorskip("triton")
    done = run("--target", target, "--sample", sample)
    assert done.returncode == 0, done.stderr
    assert " 0 wrong, 0 not run" in done.stdout


BROKEN = """
import re, sys
import emulate
code = emulate.gpu_code
def changed(launch, target):
    text, shared = code(launch, target)
    new = re.sub({old!r}, {new!r}, text)
    assert launch.kernel.__name__ != "norm_lif_backward" or new != text, "nothing to change"
    return new, shared
emulate.gpu_code = changed
sys.argv[1:] = ["--only", "norm_lif", "--dtype", "bf16", "--case", {case!r}]
sys.exit(emulate.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "case", "message"),
    [
        (r"set\.ltu\.u32\.f32", "set.geu.u32.f32", "norm_lif-layer-train", "are off by"),
        (r"0xffff0000|-65536", "0x7fff0000", "norm_lif-layer-train", "differ"),
        (r"bar\.sync\s+0;", "", "norm_lif-wide", "with no barrier behind"),
        (r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 99;", "norm_lif-wide", "before cp.async"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(old, new, case, message):
    pytest.importorskip("triton")
    done = run(code=BROKEN.format(old=old, new=new, case=case))
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(_programs.find_nvcc() is None, reason="needs nvcc")
def test_the_cuda_extensions_ptx_is_the_reference():
    done = subprocess.run(
        [sys.executable, str(BENCH / "emulate_cuda.py")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong: gather " in done.stdout


def test_traffic_is_counted():
    """Neighbours take the fewest sectors and wavefronts; lanes a sector or all banks apart do not."""
    lanes = np.arange(32)
    traffic = Traffic()
    traffic.tensors("k", "near", lanes, 4 * lanes, 4)
    traffic.tensors("k", "far", lanes, 64 * lanes, 16)
    traffic.shared("k", "near", lanes, 16 * lanes, 16)
    traffic.shared("k", "same", lanes, 0 * lanes, 4)
    traffic.shared("k", "one bank", lanes, 128 * lanes, 4)
    counts = {kind: tuple(count.tolist()) for (_, kind), count in traffic.counts.items()}
    assert counts == {
        "near": (2, 4 + 4, 4 + 4),
        "far": (1, 32, 16),
        "same": (1, 1, 1),
        "one bank": (1, 32, 1),
    }
