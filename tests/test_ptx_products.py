"""The interpreter of PTX (`bench/ptx`): products of matrices, and what says that they are done."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx.machine import PTXError
from ptx_code import ONE, execute

ARRIVE = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"


def test_a_barrier_in_shared_memory_has_phases():
    """Before anything has arrived the odd phase is over, and nobody waits for the even one in vain."""
    body = """
      mov.b32 %r5, memory; elect.sync %r6|%p1, -1;
      @%p1 mbarrier.init.shared::cta.b64 [%r5], 1; bar.warp.sync -1;
    $again:
      mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], {parity}; selp.b32 %r4, 1, 0, %p2;
      @!%p2 bra $again; st.global.b32 [%d5], %r4;
    """
    assert (execute(body.replace("{parity}", "1"), ONE, shared=8) == 1).all()
    with pytest.raises(PTXError, match="never comes"):
        execute(body.replace("{parity}", "0"), ONE, shared=8)
    with pytest.raises(PTXError, match="no barrier behind another thread's write"):
        execute(body.replace("bar.warp.sync -1;", "").replace("{parity}", "1"), ONE, shared=8)


def test_those_that_wait_let_others_arrive():
    """Whichever code comes first."""
    body = f"""
      mov.b32 %r5, memory; setp.eq.b32 %p1, %r2, 0; setp.lt.u32 %p3, %r2, 32;
      @%p1 mbarrier.init.shared::cta.b64 [%r5], 1; bar.sync 0; @%p3 bra $arrive;
    $wait:
      mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0; @!%p2 bra $wait; st.global.b32 [%d5], %r2; ret;
    $arrive:
      @%p1 {ARRIVE} [%r5]; bra $wait;
    """
    threads = np.arange(64, dtype=np.uint32)
    assert np.array_equal(execute(body, threads, threads=64, shared=8), threads)
    with pytest.raises(PTXError, match="never comes"):
        execute(body.replace("%p1 tcgen05", "%p2 tcgen05"), threads, threads=64, shared=8)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def fill(size: int) -> str:
    """Instructions that bring so many bytes to shared memory, 16 a thread, and the barrier behind them."""
    return f"""
      mov.b32 %r5, memory; mov.u32 %r7, %ntid.x; shl.b32 %r7, %r7, 4; shl.b32 %r6, %r2, 4;
    $fill:
      setp.lt.u32 %p1, %r6, {size}; @!%p1 bra $filled;
      cvt.u64.u32 %d6, %r6; add.s64 %d6, %d1, %d6; add.s32 %r8, %r5, %r6; add.s32 %r6, %r6, %r7;
      ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d6]; st.shared.v4.b32 [%r8], {{%r10, %r11, %r12, %r13}};
      bra $fill;
    $filled:
      bar.sync 0;
    """


@pytest.mark.parametrize("turned", [False, True])
def test_a_warps_product_is_numpys(turned):
    """A [16, 16] and B [16, 8] by ldmatrix, their product by mma, and A once more by stmatrix."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (16, 16)), rng.integers(-9, 9, (16, 8))
    trans, registers = (".trans", "%r20, %r22, %r21, %r23") if turned else ("", "%r20, %r21, %r22, %r23")
    # rows of A are 32 bytes; of B, which lies behind A, 16
    body = f"""
      {fill(768)}
      and.b32 %r6, %r2, 15; shl.b32 %r6, %r6, 5; shr.u32 %r7, %r2, 4; shl.b32 %r7, %r7, 4;
      add.s32 %r6, %r6, %r7; add.s32 %r6, %r6, %r5;
      ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{{registers}}}, [%r6];
      and.b32 %r7, %r2, 15; shl.b32 %r7, %r7, 4; add.s32 %r7, %r7, %r5;
      ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r24, %r25}}, [%r7+512];
      mov.b32 %r30, 0f3F800000;
      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {{%r26, %r27, %r28, %r29}}, {{%r20, %r21, %r22, %r23}}, {{%r24, %r25}}, {{%r30, %r30, %r30, %r30}};
      bar.sync 0;
      stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r6], {{%r20, %r22, %r21, %r23}};
      bar.sync 0;
      shl.b32 %r6, %r2, 4; add.s32 %r6, %r6, %r5; ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6];
      st.global.v4.b32 [%d5], {{%r26, %r27, %r28, %r29}};
      st.global.v4.b32 [%d5+16], {{%r10, %r11, %r12, %r13}};
    """
    given = np.concatenate([bfloat16(a.T if turned else a).ravel(), bfloat16(b).ravel()])
    out = execute(body, given, shared=768, words=8).reshape(32, 8)
    product = out[:, :4].view(np.float32).reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    assert np.array_equal(product, a @ b + 1)
    assert np.array_equal(np.ascontiguousarray(out[:, 4:]).view(np.uint16).reshape(16, 16), bfloat16(a.T))


def lines(matrix: np.ndarray) -> np.ndarray:
    """Rows of 128, 64 or 32 bytes, whose parts of 16 bytes change places every 128 bytes."""
    rows, size = np.arange(len(matrix))[:, None], 2 * matrix.shape[1]
    parts = size // 16
    return bfloat16(matrix).reshape(-1, parts, 8)[rows, np.arange(parts) ^ rows * size // 128 % parts].ravel()


def steps(product: str, count: int, left: int, right: int) -> str:
    """A product in steps of 16 numbers, by descriptors %d8 and %d9 that go on from %d6 and %d7 by so many
    times 16 bytes. %p2: whether sums go on."""
    return "\n".join(
        f"add.s64 %d8, %d6, {k * left}; add.s64 %d9, %d7, {k * right}; setp.ne.b32 %p2, {k}, 0; {product}"
        for k in range(count)
    )


def described(register: str, start: int, lead: int, stride: int, mode: int) -> str:
    """A descriptor of what lies so many bytes behind %r5."""
    return f"""add.s32 %r6, %r5, {start}; shr.u32 %r6, %r6, 4; cvt.u64.u32 {register}, %r6;
      or.b64 {register}, {register}, {mode << 61 | (stride >> 4) << 32 | (lead >> 4) << 16};"""


PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23, %r24, %r25, %r26, %r27}"
)
STORE_SUMS = (
    "st.global.v4.b32 [%d5], {%r20, %r21, %r22, %r23}; st.global.v4.b32 [%d5+16], {%r24, %r25, %r26, %r27};"
)


def wgmma(line: int = 128, turned: bool = False) -> str:
    """[64, line / 2] times 16 columns; `turned`: these lie in the first places of rows of 128 bytes."""
    mode, size = {128: 2, 64: 4, 32: 6}[line], 64 * line + (64 * 128 if turned else 16 * line)
    return f"""
      {fill(size)} fence.proxy.async.shared::cta;
      {described("%d6", 0, 16, 8 * line, mode)}
      {described("%d7", 64 * line, 16, 1024 if turned else 8 * line, 2 if turned else mode)}
      wgmma.fence.sync.aligned;
      {steps(f"{PRODUCT}, %d8, %d9, %p2, 1, 1, 0, {int(turned)};", line // 32, 2, 128 if turned else 2)}
      wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
      {STORE_SUMS}
    """


def of_128_threads(body: str, words: int, *parts: np.ndarray) -> np.ndarray:
    """What two programs make of the same bytes in shared memory, [128, words]."""
    given = np.concatenate(parts)
    out = execute(body, given, threads=128, grid=2, shared=2 * given.size + 1024, words=words)
    return out.view(np.float32).reshape(128, words)


def sums(out: np.ndarray) -> np.ndarray:
    """[64, 16] of [128, 8]: a lane has two neighbours of two rows, of each eight columns."""
    return out.reshape(4, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(64, 16)


@pytest.mark.parametrize(("line", "turned"), [(128, False), (64, False), (32, False), (128, True)])
def test_a_product_of_four_warps_is_numpys(line, turned):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (64, line // 2)), rng.integers(-9, 9, (16, line // 2))
    right = lines(np.pad(b.T, ((0, 0), (0, 48)))) if turned else lines(b)
    assert np.array_equal(sums(of_128_threads(wgmma(line, turned), 8, lines(a), right)), a @ b.T)


FROM_REGISTERS = f"""
  {fill(512 + 2048)} fence.proxy.async.shared::cta; {described("%d7", 0, 16, 256, 6)}
  shl.b32 %r6, %r2, 4; add.s32 %r6, %r6, %r5; ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r6+512];
  wgmma.fence.sync.aligned; mov.pred %p2, 0;
  {PRODUCT}, {{%r30, %r31, %r32, %r33}}, %d7, %p2, 1, 1, 0;
  wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
  {STORE_SUMS}
"""


def test_a_product_of_four_warps_from_registers_is_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (64, 16)), rng.integers(-9, 9, (16, 16))
    # of a warp's 16 rows a lane has two, and of each two neighbours and the two 8 columns on
    held = bfloat16(a).reshape(4, 2, 8, 2, 4, 2).transpose(0, 2, 4, 3, 1, 5).ravel()
    assert np.array_equal(sums(of_128_threads(FROM_REGISTERS, 8, lines(b), held)), a @ b.T)


FREE = "@%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r14, 64;"


def tcgen05(before: str, products: str, after: str, form: int, size: int) -> str:
    """Products of one thread in 64 columns of tensor memory, from %r14 on, of inputs of `size` bytes."""
    return f"""
      {fill(size)} setp.lt.u32 %p3, %r2, 32; elect.sync %r9|%p4, -1; and.pred %p4, %p4, %p3;
      @%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5+{size}], 64;
      @%p4 mbarrier.init.shared::cta.b64 [%r5+{size + 8}], 1;
      fence.proxy.async.shared::cta; bar.sync 0;
      ld.shared.b32 %r14, [%r5+{size}]; mov.b32 %r15, {form | 1 << 4 | 1 << 7 | 1 << 10};
      and.b32 %r16, %r2, 96; shl.b32 %r16, %r16, 16; add.s32 %r16, %r16, %r14;
      {before}
      {products}
      @%p4 {ARRIVE} [%r5+{size + 8}];
    $wait:
      mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r5+{size + 8}], 0; @!%p1 bra $wait;
      {after}
      tcgen05.wait::ld.sync.aligned; bar.sync 0; {FREE}
    """


SUMS = [f"%r{i}" for i in range(20, 36)]
READ = f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {{{', '.join(SUMS)}}}, [%r16+0];" + "".join(
    f"st.global.v4.b32 [%d5+{4 * i}], {{{', '.join(SUMS[i : i + 4])}}};" for i in range(0, 16, 4)
)


def of_128_rows(turned: bool = False) -> str:
    """[128, 64] times 16 columns, both in shared memory; `turned`: 64 rows or columns in a line."""
    right, form = 128 * 128, 16 // 8 << 17 | 128 // 16 << 24 | (3 << 15 if turned else 0)
    size, step = right + (64 * 128 if turned else 16 * 128), 128 if turned else 2
    before = described("%d6", 0, 8192, 1024, 2) + described("%d7", right, 16, 1024, 2)
    product = "@%p4 tcgen05.mma.cta_group::1.kind::f16 [%r14+0], %d8, %d9, %r15, %p2;"
    return tcgen05(before, steps(product, 4, step, step), READ, form, size)


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_in_tensor_memory_is_numpys(turned):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (128, 64)), rng.integers(-9, 9, (16, 64))
    parts = (a[:64].T, a[64:].T, np.pad(b.T, ((0, 0), (0, 48)))) if turned else (a, b)
    out = of_128_threads(of_128_rows(turned), 16, *map(lines, parts))
    assert np.array_equal(out, a @ b.T)


def of_64_rows() -> str:
    """[64, 32] in tensor memory times 8 columns, added to ones: two lanes have four of a row's sums each."""
    held = [f"%r{i}" for i in range(20, 28)]
    ones = ", ".join(["%r17"] * 4)
    before = f"""
      {described("%d7", 4096, 16, 512, 4)}
      mov.b32 %r17, 0f3F800000; tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r16+32], 4, {{{ones}}};
      shl.b32 %r6, %r2, 5; add.s32 %r6, %r6, %r5;
      ld.shared.v4.b32 {{{", ".join(held[:4])}}}, [%r6]; ld.shared.v4.b32 {{{", ".join(held[4:])}}}, [%r6+16];
      tcgen05.st.sync.aligned.16x32bx2.x8.b32 [%r16+0], 8, {{{", ".join(held)}}};
      tcgen05.wait::st.sync.aligned; bar.sync 0; mov.pred %p2, 1;
    """
    products = "".join(
        f"add.s64 %d9, %d7, {2 * k}; "
        f"@%p4 tcgen05.mma.cta_group::1.kind::f16 [%r14+32], [%r14+{8 * k}], %d9, %r15, %p2;"
        for k in range(2)
    )
    after = f"""tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {{{", ".join(held[:4])}}}, [%r16+32], 4;
      st.global.v4.b32 [%d5], {{{", ".join(held[:4])}}};"""
    return tcgen05(before, products, after, 8 // 8 << 17 | 64 // 16 << 24, 4096 + 512)


def test_a_product_of_64_rows_in_tensor_memory_is_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (64, 32)), rng.integers(-9, 9, (8, 32))
    halves = bfloat16(a).reshape(4, 16, 2, 16).transpose(0, 2, 1, 3).ravel()  # by warp, half of a row, row
    out = of_128_threads(of_64_rows(), 4, halves, lines(b))
    assert np.array_equal(out.reshape(4, 2, 16, 4).transpose(0, 2, 1, 3).reshape(64, 8), a @ b.T + 1)


WGMMA, TCGEN05, FENCE = wgmma(), of_128_rows(), "fence.proxy.async.shared::cta;"
ONE_COLUMN = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r16+0], {%r2};"
WAIT = re.search(r"mbarrier.try_wait.*", TCGEN05)[0]


@pytest.mark.parametrize(
    ("code", "old", "new", "message"),
    [
        (WGMMA, FENCE, "", r"no fence\.proxy\.async behind the write"),
        (WGMMA.replace(FENCE, ""), "bar.sync 0;", f"setp.eq.b32 %p1, %r2, 0; @%p1 {FENCE} bar.sync 0;",
         r"no fence\.proxy\.async behind the write"),
        (WGMMA, "bar.sync 0;", "", "no barrier behind another thread's write"),
        (WGMMA, "wgmma.wait_group.sync.aligned 0;", "", "%r20 is read before it was waited for"),
        (WGMMA, "wgmma.wait_group.sync.aligned 0;", "bar.sync 0; st.shared.b32 [%r8], %r2;",
         "written before a product that reads it was waited for"),
        (WGMMA, "wait_group.sync.aligned 0;", "wait_group.sync.aligned 0; st.shared.b32 [%r8], %r2;",
         "no barrier behind another thread's read"),
        (FROM_REGISTERS, "wgmma.wait_group", "mov.b32 %r31, 0; wgmma.wait_group",
         "%r31 is written before a product that uses it was waited for"),
        (WGMMA, "wgmma.wait_group", "mov.b32 %r27, 0; wgmma.wait_group",
         "%r27 is written before a product that uses it was waited for"),
        (TCGEN05, FENCE, "", r"no fence\.proxy\.async behind the write"),
        (TCGEN05, WAIT, "bar.sync 0;",
         "tensor memory is used before what writes it was waited for"),
        (TCGEN05, WAIT, "bar.sync 0; st.shared.b32 [%r8], %r2;",
         "written before a product that reads it was waited for"),
        (of_64_rows(), "$wait:", f"bar.sync 0; {ONE_COLUMN} $wait:",
         "written before a product that reads it was waited for"),
        (of_64_rows(), "tcgen05.wait::st.sync.aligned;", "", "used before what writes it was waited for"),
        (of_64_rows(), "tcgen05.wait::st.sync.aligned; bar.sync 0;", "tcgen05.wait::st.sync.aligned;",
         "tensor memory is read with no barrier"),
        (TCGEN05, "and.b32 %r16, %r2, 96;", "and.b32 %r16, %r2, 64;", "another's lanes"),
        (TCGEN05, FREE, "", "not freed"),
        (TCGEN05, FREE, ONE_COLUMN + FREE,
         "freed before all was waited for"),
        (TCGEN05, FREE, FREE.replace("64;", "32;"), "not the last allocated"),
        (TCGEN05, "], 64;", "], 48;", "48 columns"),
    ],
)  # fmt: skip
def test_faults_around_products_are_found(code, old, new, message):
    assert old in code
    with pytest.raises(PTXError, match=message):
        of_128_threads(code.replace(old, new), 16, lines(np.ones((144, 64))))
