"""The interpreter of PTX (`bench/ptx`): instructions, memory, and the faults that it finds."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from ptx import machine
from ptx.machine import PTXError, launch
from ptx.memory import Globals
from ptx.numbers import fma, to_bf16
from ptx.parse import parse
from ptx.traffic import Traffic
from ptx_code import FLOATS, KERNEL, ONE, SIGNED, execute


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
        ("bfe.s32 %r4, %r3, 28, 8;", SIGNED, SIGNED >> 28),
        ("bfe.s32 %r4, %r3, 60, 8;", SIGNED, SIGNED >> 31),
        ("bfe.u32 %r4, -1, %r3, 8;", ONE, np.where(ONE <= 24, 255, 2 ** (32 - ONE.astype(int)) - 1)),
        ("bfe.u32 %r4, -1, 256, %r3;", ONE, 2**ONE - 1),
        ("bfi.b32 %r4, 5, %r3, 4, 3;", ONE, ONE & 15 | 0x50),
        ("bfi.b32 %r4, -1, 0, %r3, 40;", ONE, (2**32 - 2**ONE.astype(int))),
        ("cvt.u64.u32 %d6, %r3; bfi.b64 %d7, %d6, -1, 32, 32; shr.u64 %d7, %d7, 32; cvt.u32.u64 %r4, %d7;",
         ONE, ONE),
        ("prmt.b32 %r4, %r3, 0x44332211, 0x7650;", ONE, ONE | 0x44332200),
        ("prmt.b32 %r4, %r3, 0x80, 0xc8b4;", SIGNED, np.where(SIGNED < 0, 0xFFFFFF80, 0xFF000080)),
        ("lop3.b32 %r4, %r3, 12, 10, 0x96;", ONE, ONE ^ 12 ^ 10),
        ("lop3.b32 %r4, %r3, 12, 10, 0x40;", ONE, ONE & 12 & ~np.uint32(10)),
        ("shf.l.wrap.b32 %r4, -1, %r3, 36;", ONE, ONE << 4 | 15),
        ("shf.l.clamp.b32 %r4, 7, %r3, 36;", ONE, ONE * 0 + 7),
        ("shf.r.wrap.b32 %r4, 0x50, %r3, 4;", ONE, ONE << 28 | 5),
        ("shf.r.clamp.b32 %r4, 7, %r3, 40;", ONE, ONE),
        ("mul.hi.s32 %r4, %r3, 0x40000000;", SIGNED, SIGNED >> 2),
        ("mul.wide.s32 %d6, %r3, -8; mad.wide.s32 %d6, %r3, 3, %d6; cvt.u32.u64 %r4, %d6;",
         SIGNED, SIGNED * -5),
        ("min.s32 %r4, %r3, 3; max.s32 %r4, %r4, -5;", SIGNED, np.clip(SIGNED, -5, 3)),
        ("min.u32 %r4, %r3, 0x80000000;", SIGNED, np.where(SIGNED < 0, 2**31, SIGNED)),
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
        ("shfl.sync.down.b32 %r4|%p1, %r3, 3, 0x1807, -1; @!%p1 add.s32 %r4, %r4, 100;", ONE,
         np.where(ONE % 8 < 5, ONE + 3, ONE + 100)),
        ("shfl.sync.idx.b32 %r4|%p1, %r3, 13, 0x1803, -1; @!%p1 add.s32 %r4, %r4, 100;", ONE, ONE + 100),
        ("shfl.sync.idx.b32 %r4, %r3, 13, 0x1807, -1;", ONE, ONE // 8 * 8 + 5),
        ("shfl.sync.up.b32 %r4|%p1, %r3, 2, 0, -1;", ONE, np.where(ONE < 2, ONE, ONE - np.uint32(2))),
        ("redux.sync.add.s32 %r4, %r3, -1;", ONE, np.full(32, 496)),
        ("setp.gt.u32 %p1, %r3, 29; vote.sync.ballot.b32 %r4, %p1, -1;", ONE, np.full(32, 3 << 30)),
    ],
)  # fmt: skip
def test_instructions(instructions, of, expected):
    out = execute(f"ld.global.b32 %r3, [%d4]; {instructions} st.global.b32 [%d5], %r4;", of)
    assert np.array_equal(out, np.asarray(expected).astype(np.int64).astype(np.uint32))


def bits(*floats: float) -> np.ndarray:
    return np.array(floats, np.float32).view(np.uint32)


TINY, HUGE, NAN = float(np.float32(1e-40)), 3e38, 0x7FFFFFFF


@pytest.mark.parametrize(
    ("instructions", "given", "expected"),
    [
        # any NaN is the same one, and ftz makes zeros of denormals before and after
        ("sub.f32 %r4, %r3, %r3;", bits(np.inf, np.nan, -0.0), [NAN, NAN, 0]),
        ("add.f32 %r4, %r3, %r3;", bits(TINY, -TINY), bits(2 * TINY, -2 * TINY)),
        ("add.ftz.f32 %r4, %r3, %r3;", bits(TINY, -TINY), bits(0, -0.0)),
        ("mul.ftz.f32 %r4, %r3, 0f00800000;", bits(0.5, 2), bits(0, 2.0**-125)),
        ("mad.rn.f32 %r4, %r3, %r3, 0fBF800000;", bits(1 + 2.0**-23), bits(2.0**-22 + 2.0**-46)),
        ("mov.b64 %d6, {%r3, %r3}; add.ftz.f32x2 %d6, %d6, %d6; mov.b64 {_, %r4}, %d6;",
         bits(TINY, 3), bits(0, 6)),
        ("div.rn.f32 %r4, %r3, 0f40400000;", bits(1, -0.0), bits(1 / 3, -0.0)),
        ("rcp.approx.ftz.f32 %r4, %r3;", bits(TINY, -0.0, 2.0**127, np.inf), bits(np.inf, -np.inf, 0, 0)),
        ("rsqrt.approx.ftz.f32 %r4, %r3;", bits(4, -TINY, -1), [*bits(0.5, -np.inf), NAN]),
        ("sqrt.rn.f32 %r4, %r3;", bits(2, -0.0, -1), [*bits(2**0.5, -0.0), NAN]),
        ("ex2.approx.ftz.f32 %r4, %r3;", bits(-np.inf, -140, 128, 3), bits(0, 0, np.inf, 8)),
        ("ex2.approx.f32 %r4, %r3;", bits(-140), bits(2.0**-140)),
        # of two zeros the lesser is negative, and a NaN is less and more than nothing
        ("min.f32 %r4, %r3, 0f00000000;", bits(-0.0, np.nan, -2), bits(-0.0, 0, -2)),
        ("min.f32 %r4, 0f80000000, %r3;", bits(0.0, np.nan), bits(-0.0, -0.0)),
        ("max.f32 %r4, %r3, 0f00000000;", bits(-0.0, np.nan, 2), bits(0, 0, 2)),
        ("max.NaN.f32 %r4, %r3, 0f00000000;", bits(-0.0, np.nan, np.inf), [0, NAN, *bits(np.inf)]),
        ("max.f32 %r4, %r3, 0f3F800000, 0f40000000;", bits(3, 0, np.nan), bits(3, 2, 2)),
        ("neg.f32 %r4, %r3;", bits(0, -np.inf), bits(-0.0, np.inf)),
        # comparisons with a NaN hold only where they say so
        ("setp.ne.f32 %p1, %r3, %r3; selp.b32 %r4, 1, 0, %p1;", bits(np.nan, 1), [0, 0]),
        ("setp.neu.f32 %p1, %r3, %r3; selp.b32 %r4, 1, 0, %p1;", bits(np.nan, 1), [1, 0]),
        ("setp.num.f32 %p1, %r3, %r3; selp.b32 %r4, 1, 0, %p1;", bits(np.nan, 1), [0, 1]),
        ("setp.nan.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 0, %p1;", bits(np.nan, 1), [1, 0]),
        ("setp.gt.ftz.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 0, %p1;", bits(TINY, 1), [0, 1]),
        ("setp.gt.f32 %p1, %r3, 0f00000000; selp.b32 %r4, 1, 0, %p1;", bits(TINY, 1), [1, 1]),
        ("setp.hi.u32 %p1, %r3, 5; selp.b32 %r4, 1, 0, %p1;", [2**32 - 1, 5], [1, 0]),
        ("setp.lt.s32 %p3, %r3, 4; setp.gt.and.s32 %p1|%p2, %r3, 2, !%p3; selp.b32 %r4, 1, 0, %p1;"
         "@%p2 add.s32 %r4, %r4, 2;", [1, 3, 4, 9], [0, 0, 1, 1]),
        ("setp.lt.s32 %p3, %r3, 4; setp.gt.and.s32 %p1|%p2, %r3, 5, !%p3; selp.b32 %r4, 1, 0, %p1;"
         "@%p2 add.s32 %r4, %r4, 2;", [1, 3, 4, 9], [0, 0, 2, 1]),
        ("set.gt.f32.f32 %r4, %r3, 0f00000000;", bits(TINY, np.nan), bits(1, 0)),
        # conversions: NaN becomes 0, what is too large the largest there is
        ("cvt.rzi.s32.f32 %r4, %r3;", bits(-1.9, np.nan, HUGE, -HUGE), [-1, 0, 2**31 - 1, -(2**31)]),
        ("cvt.rni.u32.f32 %r4, %r3;", bits(2.5, -3, np.inf, 3.5), [2, 0, 2**32 - 1, 4]),
        ("cvt.rmi.u8.f32 %r4, %r3;", bits(300, 7.9, -1), [255, 7, 0]),
        ("cvt.rni.s8.f32 %r4, %r3;", bits(-300, 7.9), [-128, 8]),
        ("cvt.rpi.ftz.s32.f32 %r4, %r3;", bits(TINY, 0.1), [0, 1]),
        ("cvt.rzi.s64.f32 %d6, %r3; shr.s64 %d6, %d6, 32; cvt.u32.u64 %r4, %d6;", bits(HUGE, -HUGE, -1),
         [2**31 - 1, -(2**31), -1]),
        ("cvt.rzi.u64.f32 %d6, %r3; shr.u64 %d6, %d6, 32; cvt.u32.u64 %r4, %d6;",
         bits(HUGE, -1), [2**32 - 1, 0]),
        ("cvt.rmi.ftz.f32.f32 %r4, %r3;", bits(-1.5, -TINY), bits(-2, -0.0)),
        ("cvt.rn.f32.u32 %r4, %r3;", [2**24 + 1, 2**24 + 3, 2**32 - 1], bits(2**24, 2**24 + 4, 2.0**32)),
        ("cvt.s32.s8 %r4, %r3;", [0x1FF, 0x17F], [-1, 127]),
        ("cvt.u32.u8 %r4, %r3;", [0x1FF, 0x17F], [255, 127]),
        ("cvt.s8.s32 %r4, %r3;", [0x1FF, 0x17F], [-1, 127]),
        ("cvt.u16.s32 %h1, %r3; cvt.s32.s16 %r4, %h1;", [0x18000, 5], [-(2**15), 5]),
        # two 16-bit floats: the first operand is the upper half
        ("cvt.rn.bf16x2.f32 %r4, %r3, 0f3F800000;", bits(2, np.nan), [0x40003F80, 0x7FFF3F80]),
        ("cvt.rn.f16x2.f32 %r4, %r3, 0f3F800000;", bits(2, 1e6), [0x40003C00, 0x7C003C00]),
        ("mov.b32 {%h1, %h2}, %r3; cvt.f32.bf16 %r4, %h2;", [0x3F801234], bits(1)),
        ("mov.b32 {%h1, %h2}, %r3; cvt.f32.f16 %r4, %h1;", [0x12340001], bits(2.0**-24)),
        ("cvt.rn.f16.f32 %h1, %r3; cvt.u32.u16 %r4, %h1;", bits(2049, 2051, 65520), [0x6800, 0x6802, 0x7C00]),
        ("cvt.rn.bf16.u32 %h1, %r3; cvt.u32.u16 %r4, %h1;",
         [2**24 + 2**16, 2**24 + 2**16 + 1], [0x4B80, 0x4B81]),
        ("mov.b32 {%h1, _}, %r3; cvt.rn.bf16.f16 %h1, %h1; cvt.u32.u16 %r4, %h1;",
         [0x3C04, 0x3C05], [0x3F80, 0x3F81]),
        # 16-bit sums and products are rounded once: 3 * 683 = 2049 and 7 * 37 = 259 lie between two of them
        ("mov.b32 {%h1, %h2}, %r3; mov.b16 %h3, 0x6156; fma.rn.f16 %h1, %h1, %h3, %h2; cvt.u32.u16 %r4, %h1;",
         [0x00004200, 0x00014200, 0x80014200], [0x6800, 0x6801, 0x6800]),
        ("mov.b32 {%h1, %h2}, %r3; mov.b16 %h3, 0x4214; fma.rn.bf16 %h1, %h1, %h3, %h2;"
         "cvt.u32.u16 %r4, %h1;",
         [0x000040E0, 0xB58040E0], [0x4382, 0x4381]),
        ("fma.rn.bf16x2 %r4, %r3, 0x42144214, 0xB5800000;", [0x40E040E0], [0x43814382]),
        ("mov.b16 %h1, 0x4040; fma.rn.f32.bf16 %r4, %h1, %h1, %r3;", bits(1, 0.1), bits(10, 9.1)),
        ("mov.b16 %h1, 0x4040; sub.f32.bf16 %r4, %h1, %r3;", bits(0.5), bits(2.5)),
        ("add.f16x2 %r4, %r3, 0x00013C00;", [0x00013C00, 0x7C000001], [0x00024000, 0x7C003C00]),
        ("mul.bf16x2 %r4, %r3, 0x3F814000;", [0x3F813F80], [0x3F824000]),
        ("max.f16x2 %r4, %r3, 0x80003C00;", [0x00007E00], [0x00003C00]),
        ("min.NaN.bf16x2 %r4, %r3, 0x00003F80;", [0x80007FC0], [0x80007FFF]),
        ("neg.bf16x2 %r4, %r3;", [0x3F808000], [0xBF800000]),
        ("setp.neu.f16x2 %p1|%p2, %r3, 0; selp.b32 %r4, 1, 0, %p1; @%p2 add.s32 %r4, %r4, 2;",
         [0x00018000, 0x80007E00, 0], [2, 1, 0]),
    ],
)  # fmt: skip
def test_floats_and_conversions(instructions, given, expected):
    values = np.zeros(32, np.uint32)
    values[: len(given)] = np.asarray(given)
    out = execute(f"ld.global.b32 %r3, [%d4]; {instructions} st.global.b32 [%d5], %r4;", values)
    assert [f"{x:x}" for x in out[: len(given)]] == [f"{int(x) % 2**32:x}" for x in expected]


def test_a_fused_sum_is_rounded_once():
    """The first: float64 rounds the sum to a tie between two float32, of which the lower is even."""
    rng = np.random.default_rng(0)
    a, b = (1 + rng.integers(0, 2**23, 4096).astype(np.float32) * np.float32(2.0**-23) for _ in range(2))
    c = (2.0 ** rng.integers(-40, 30, 4096)).astype(np.float32)
    a[0], b[0], c[0] = 2.0**-12 + 2.0**-24, 2.0**-12 - 2.0**-24 + 2.0**-36, 1
    a[1:5], b[1:5], c[1:5] = (1, 1, -1, 2.0**-24), 1, (2.0**-24, -(2.0**-25), -(2.0**-24), 1)  # ties
    assert np.float32(float(a[0]) * float(b[0]) + 1) == 1
    results = fma(a, b, c).astype(np.float32)
    assert results[:5].tolist() == [1 + 2.0**-23, 1, 1, -1, 1]
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
    assert np.array_equal(execute(body, ONE[::-1].copy(), grid=3), 2 * ONE[::-1])


def test_threads_may_end_early():
    """Those that are left do not wait for them."""
    body = "setp.lt.u32 %p1, %r2, 32; @%p1 ret; bar.sync 0; st.global.b32 [%d5], %r2;"
    out = execute(body, np.arange(96, dtype=np.uint32), threads=96)
    assert out.tolist() == [0] * 32 + list(range(32, 96))


PLACE = "mov.b32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r7, %r5, %r6;"
STORE = f"{PLACE} st.shared.b32 [%r7], %r2;"
NEXT = "xor.b32 %r8, %r6, 128; add.s32 %r8, %r5, %r8; ld.shared.b32 %r4, [%r8]; st.global.b32 [%d5], %r4;"
COPY = f"{PLACE} cp.async.ca.shared.global [%r7], [%d4], 4;"
READ_ONE = f"{STORE} bar.sync 0; ld.shared.b32 %r4, [%r5];"
WRITE_ONE = "st.shared.b32 [%r5], 1;"
OWN = "ld.shared.b32 %r4, [%r7]; st.global.b32 [%d5], %r4;"


def test_a_barrier_makes_what_another_warp_wrote_readable():
    numbers = np.arange(64, dtype=np.uint32)
    out = execute(f"{STORE} bar.sync 0; {NEXT}", numbers, threads=64, shared=256)
    assert np.array_equal(out, numbers ^ 32)


def test_a_copy_is_there_once_it_was_waited_for():
    body = f"{COPY} cp.async.commit_group; cp.async.wait_group 0; {OWN}"
    assert np.array_equal(execute(body, ONE, shared=128), ONE)


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
        # all read the same word; then the last warp, one lane of a warp, a copy or a store comes too early
        (f"{READ_ONE} setp.eq.b32 %p1, %r2, 63; @%p1 {WRITE_ONE}", "no barrier behind another thread's read"),
        (f"{READ_ONE} setp.eq.b32 %p1, %r2, 3; @%p1 {WRITE_ONE}", "no barrier behind another thread's read"),
        (f"{READ_ONE} cp.async.ca.shared.global [%r5], [%d1], 4;", "no barrier behind another thread's read"),
        (f"{COPY} st.shared.b32 [%r7], 1;", "written before cp.async was waited for"),
        (f"{COPY} {COPY}", "written before cp.async was waited for"),
        (f"{STORE} ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r5+4];", "multiples of 16"),
        (f"{PLACE} cp.async.cg.shared.global [%r7], [%d4], 4;", "a copy of 4 bytes"),
        (f"{PLACE} cp.async.ca.shared.global [%r7], [%d4], 4, 5;", "5 bytes for 4"),
        ("mov.b16 %h1, 65536;", "does not fit in 2 bytes"),
    ],
)  # fmt: skip
def test_faults_are_found(body, message):
    with pytest.raises(PTXError, match=message):
        execute(body, np.arange(64, dtype=np.uint32), threads=64, shared=256)


UNKNOWN = """
  add.rz.f32 %r4, %r4, %r4
  add.sat.f32 %r4, %r4, %r4
  add.cc.u32 %r4, %r4, %r4
  addc.u32 %r4, %r4, 1
  mul.rp.f32 %r4, %r4, %r4
  fma.rn.sat.f32 %r4, %r4, %r4, %r4
  fma.rz.f32 %r4, %r4, %r4, %r4
  fma.rn.relu.bf16 %h1, %h1, %h1, %h1
  mad.lo.cc.u32 %r4, %r4, %r4, %r4
  mul.ftz.f16 %h1, %h1, %h1
  mad.hi.sat.s32 %r4, %r4, %r4, %r4
  min.xorsign.abs.f32 %r4, %r4, %r4
  max.relu.s32 %r4, %r4, %r4
  add.u16x2 %r4, %r4, %r4
  div.rz.f32 %r4, %r4, %r4
  sqrt.rz.f32 %r4, %r4
  ex2.approx.f16 %h1, %h1
  cvt.rz.f32.s32 %r4, %r4
  cvt.rn.relu.bf16.f32 %h1, %r4
  cvt.rz.bf16x2.f32 %r4, %r4, %r4
  cvt.rn.satfinite.f16.f32 %h1, %r4
  cvt.sat.f32.f32 %r4, %r4
  cvt.s32.f32 %r4, %r4
  lop3.or.b32 %r4|%p1, %r4, %r4, %r4, 3, %p2
  prmt.b32.f4e %r4, %r4, %r4, %r4
  bfe.u64 %d6, %d6, 3, 4
  set.lt.and.u32.f32 %r4, %r4, %r4, %p1
  set.lt.bf16.f32 %h1, %r4, %r4
  ld.acquire.gpu.b32 %r4, [%d4]
  ld.local.b32 %r4, [%d4]
  ld.shared::cluster.b32 %r4, [%r4]
  st.shared::cluster.b32 [%r4], %r4
  st.async.shared::cluster.b32 [%r4], %r4, [%r4]
  cp.async.bulk.commit_group
  red.global.add.u32 [%d4], 1
  cp.async.ca.shared.global.L2::cache_hint [%r4], [%d4], 4, %d6
  bar.sync 1
  bar.sync 0, 64
  bar.red.popc.u32 %r4, 0, %p1
  barrier.cluster.arrive
  shfl.sync.bfly.b32 %r4, %r4, 1, 31, 15
  redux.sync.max.s32 %r4, %r4, -1
  vote.sync.any.pred %p1, %p1, -1
  mov.u64 %d6, %clock64
  mov.u32 %r4, elsewhere
  ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r4, %r5}, [%r4]
  mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r4}, {%r4}, {%r4}, {%r4}
  mbarrier.init.shared::cta.b64 [%r4], 2
  mbarrier.arrive.shared::cta.b64 %d6, [%r4]
  tcgen05.ld.sync.aligned.32x32b.x1.pack::16b.b32 {%r4}, [%r4]
  tcgen05.mma.cta_group::2.kind::f16 [%r4], %d6
""".strip().splitlines()


@pytest.mark.parametrize("instruction", [line.strip() for line in UNKNOWN])
def test_what_it_does_not_know_is_said(instruction):
    """Also where only a modifier is unknown: without it the result would be another."""
    with pytest.raises(NotImplementedError, match=re.escape(instruction.split("%")[0].split("[")[0])):
        execute(f"mov.u32 %r4, 0; {instruction};", ONE, shared=128)


def test_vectors_and_small_numbers():
    """Signs are carried on where the type has one; a sink takes nothing."""
    body = """
      mov.b32 %r5, memory; shl.b32 %r6, %r2, 4; add.s32 %r5, %r5, %r6;
      mul.wide.u32 %d6, %r2, 12; add.s64 %d6, %d4, %d6;
      ld.global.v4.b32 {%r7, %r8, _, %r10}, [%d6];
      st.shared.v4.b32 [%r5], {%r7, %r8, -1, %r10};
      ld.shared.s8 %r11, [%r5+3]; ld.shared.u8 %r12, [%r5+3]; ld.shared.s16 %r13, [%r5+6];
      ld.shared.v2.b16 {%h1, %h2}, [%r5+4]; cvt.u32.u16 %r14, %h1;
      ld.shared.b64 %d7, [%r5+8]; cvt.u32.u64 %r15, %d7;
      st.shared.b8 [%r5+1], %r10; ld.shared.b32 %r16, [%r5];
      st.global.v2.b32 [%d5], {%r11, %r12}; st.global.v4.b32 [%d5+16], {%r13, %r14, %r15, %r16};
      st.global.v2.b64 [%d5+32], {%d7, %d7};
    """
    values = np.random.default_rng(0).integers(0, 2**32, (32, 4), np.uint32)
    out = execute(body, values, shared=512, words=12).reshape(32, 12)
    signed = values.view(np.int32)
    columns = {
        0: signed[:, 0] >> 24, 1: values[:, 0] >> 24, 4: signed[:, 1] >> 16, 5: values[:, 1] & 0xFFFF,
        6: np.full(32, -1), 7: values[:, 0] & 0xFFFF00FF | (values[:, 3] & 255) << 8, 8: np.full(32, -1),
        9: values[:, 3], 11: values[:, 3],
    }  # fmt: skip
    for column, expected in columns.items():
        assert np.array_equal(out[:, column], np.asarray(expected).astype(np.uint32)), column


def test_a_copy_of_a_part_is_filled_with_zeros():
    """Lane i copies i mod 17 of 16 bytes."""
    body = """
      mov.b32 %r5, memory; shl.b32 %r6, %r2, 4; add.s32 %r5, %r5, %r6;
      cvt.u64.u32 %d6, %r6; add.s64 %d6, %d1, %d6; rem.u32 %r7, %r2, 17;
      cp.async.cg.shared.global [%r5], [%d6], 16, %r7;
      cp.async.wait_all;
      ld.shared.v4.b32 {%r7, %r8, %r9, %r10}, [%r5]; st.global.v4.b32 [%d5], {%r7, %r8, %r9, %r10};
    """
    values = np.random.default_rng(0).integers(1, 256, (32, 16), np.uint8)
    out = execute(body, values, shared=512, words=4).view(np.uint8).reshape(32, 16)
    assert np.array_equal(out, np.where(np.arange(16) < np.arange(32)[:, None] % 17, values, 0))


def test_groups_of_copies_arrive_in_order():
    """Two in flight: waiting for all but one makes the first readable."""
    other = "cp.async.ca.shared.global [%r7+128], [%d4], 4; cp.async.commit_group;"
    body = f"{COPY} cp.async.commit_group; {other} cp.async.wait_group 1;"
    assert np.array_equal(execute(body + OWN, ONE, shared=256), ONE)
    with pytest.raises(PTXError, match=r"before cp\.async was waited for"):
        execute(f"{body} ld.shared.b32 %r4, [%r7+128];", ONE, shared=256)


@pytest.mark.parametrize("at_once", [32, 64])
def test_programs_may_not_meet_in_a_tensor(at_once, monkeypatch):
    """Nothing orders programs, whether or not they run side by side here."""
    monkeypatch.setattr(machine, "AT_ONCE", at_once)
    write = "mov.u32 %r4, %ctaid.x; st.global.b32 [%d5], %r4;"
    with pytest.raises(PTXError, match=r"written by two threads|different values to the same place"):
        execute(write, ONE, grid=2)
    execute("st.global.b32 [%d5], %r2;", ONE, grid=2)  # the same values
    with pytest.raises(PTXError, match="a tensor is read with no barrier behind another thread's write"):
        execute("st.global.b32 [%d5], %r2; xor.b32 %r5, %r2, 1; mad.wide.u32 %d6, %r5, 4, %d2;"
                "ld.global.b32 %r4, [%d6];", ONE)  # fmt: skip
    read_first = """
      setp.eq.b32 %p1, %r2, 0; mov.u32 %r5, %ctaid.x; setp.eq.b32 %p2, %r5, 1; and.pred %p1, %p1, %p2;
      ld.global.b32 %r4, [%d1]; @%p1 st.global.b32 [%d1], %r2;
    """
    with pytest.raises(PTXError, match="a tensor is written with no barrier behind another thread's read"):
        execute(read_first, ONE, grid=2)


def test_what_nobody_wrote_is_nan():
    body = "setp.eq.b32 %p1, %r2, 0; @%p1 mov.b32 %r4, 0; st.global.b32 [%d5], %r4;"
    assert execute(body, ONE).tolist() == [0] + [2**32 - 1] * 31


def test_variables_and_registers_of_a_kernel():
    """Memory of unknown size lies behind the rest; braces have registers of their own."""
    body = """{ .reg .b32 %r<5>; mov.b32 %r4, memory; mov.b32 %r3, 1; }
      mov.b32 %r4, fixed; { .reg .b32 %r<9>; mov.b32 %r4, 5; } mov.b32 %r3, memory; shl.b32 %r3, %r3, 8;
      add.s32 %r4, %r4, %r3; st.global.b32 [%d5], %r4;
      .shared .align 16 .b8 fixed[20];"""
    declared = ".extern .shared .align 16 .b8 memory[];"
    kernel = parse(KERNEL.format(body=body, shared=declared, size=4))["k"]
    assert kernel.shared == {"fixed": 0, "memory": 32} and kernel.shared_size == 32
    required = KERNEL.replace("k_n)", "k_n) .reqntid 64").format(body="", shared="", size=4)
    with pytest.raises(PTXError, match="32 threads, 64 are required"):
        launch(parse(required)["k"], (1,), (32,), [0, 0, 0], 0, Globals())


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
