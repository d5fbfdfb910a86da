"""The calls of the operators that `bench/aot.py` compiles, and what the code of each must have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spikedecoder.params import ILIFParams, LIFParams
from spikedecoder.testing import Case

MEGA = 1 << 20
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip

STREAM = ("128-bit loads", "128-bit stores", "no spill")
LOADS = ("128-bit loads", "no spill")
NARROW = ("64-bit loads", "64-bit stores", "no spill")  # backward, measured to be faster: lif.tile
NARROWEST = ("32-bit loads", "32-bit stores", "no spill")
DOT = ("tensor core", "no spill")
ONCE = "no FFMA"  # sums and products each rounded: what fires does not depend on the compiler
ROUNDED = (*STREAM, ONCE)


OPERATORS = (
    "lif", "ilif", "binarize", "token_shift", "pack_spikes", "norm", "norm_lif", "norm_ilif",
    "spike_attention", "spike_attention_lif", "spike_linear", "linear_norm", "linear_norm_lif",
)  # fmt: skip
MORE_CASES = (
    Case("lif", "T17", (17, 3, 33)),  # in pieces
    Case("lif", "threshold-full", (4, 3, 5, 33), {"threshold": (5, 33)}),
    *(
        Case("norm_lif", f"{norm}-T{T}-{size}", (T, 3, 36), {"norm": norm, "threshold": threshold})
        for norm in ("layer", "batch")
        for T in (4, 6)  # backward in one piece, in several
        for size, threshold in (("channel", (36,)), ("full", (3, 36)))
    ),
    *(Case("norm_lif", f"layer-C{C}", (6, 3, C), {"norm": "layer"}) for C in (2050, 5000)),
    *(
        Case("spike_attention", f"segments-{d}", (1, 1, 2, 1100, d), {"state": True, "return_state": True})
        for d in (18, 64, 128)
    ),
    Case("spike_attention_lif", "T6", (6, 1, 2, 70, 32)),  # in two kernels
    *(Case("spike_attention", f"chunks-d{d}", (1, 1, 1, 300, d)) for d in (32, 64, 128)),
    *(
        Case("spike_attention", f"chunks-{name}-d{d}", (1, 1, 2, 300, d), options, exact=False)
        for name, options in (("decay", {"decay": True}), ("integers-decay", {"levels": 15, "decay": True}))
        for d in (32, 64)
    ),
    Case("spike_linear", "chunks", (600, 400, 200), exact=False),  # of inputs and of rows
    Case("spike_linear", "chunks-narrow", (600, 320, 40), exact=False),
    Case("linear_norm_lif", "chunks", (2, 1, 70, 400, 100), {"norm": "batch"}, exact=False),
    Case("linear_norm_lif", "wide", (3, 2, 5, 70, 300), {"norm": "layer"}),
    Case("linear_norm_lif", "many-inputs", (3, 2, 5, 140, 300), {"norm": "layer"}),
)


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


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
        needs = (*ROUNDED, "at most 12 instructions")
        yield Row("lif", "forward", TYPES[dtype], name, 2 * size * 64 * MEGA, needs, forward(T, dtype, 1.0))
        yield Row(
            "lif",
            "backward",
            TYPES[dtype],
            name,
            3 * size * 64 * MEGA,
            (*(NARROW if T <= 4 else NARROWEST), "at most 27 instructions"),
            backward(T, dtype, 1.0),
        )
    for label, threshold in (("scalar threshold", scalar), ("threshold per channel", channel)):
        run = backward(4, torch.bfloat16, threshold)
        yield Row("lif", f"backward, {label}", "bf16", "64 Mi, T = 4", 6 * 64 * MEGA, NARROW, run)
    x = meta((4, 16 * MEGA // 1024, 1024))
    packed = lambda: lif.forward_packed(x, 1.0, None, LIFParams(), want_v=False)  # noqa: E731
    yield Row("lif", "forward to bits", "bf16", "64 Mi, T = 4", (2 + 1 / 8) * 64 * MEGA, LOADS, packed)


def small_rows() -> Iterator[Row]:
    from spikedecoder.kernels import binarize, ilif, pack_spikes, token_shift

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
    for C, n in ((96, 4), (512, 4)):
        for back in (False, True):
            run = functools.partial(token_shift.forward, meta((64 * MEGA // C // 128, 128, C)), n, back)
            call = f"{'backward' if back else 'forward'}, {n} groups"
            needs = (*STREAM, "at most 16 instructions")
            yield Row("token_shift", call, "bf16", f"64 Mi, C = {C}", 4 * 64 * MEGA, needs, run)
    uneven = functools.partial(token_shift.forward, meta((2 * MEGA // 128, 128, 32)), 5)
    yield Row(
        "token_shift", "forward, 5 groups", "bf16", "64 Mi, C = 32", 4 * 64 * MEGA, ("no spill",), uneven
    )
    yield Row("pack_spikes", "pack", "bf16", "64 Mi", bits * 64 * MEGA, LOADS, lambda: pack_spikes.pack(x))
    yield Row(
        "pack_spikes", "unpack", "bf16", "64 Mi", bits * 64 * MEGA, ("128-bit stores", "no spill"), unpack
    )


def norm_rows() -> Iterator[Row]:
    from spikedecoder.kernels import norm as k

    bf16, fp32 = torch.bfloat16, torch.float32
    for C, dtype, to in (
        (80, bf16, fp32), (512, bf16, fp32), (1280, bf16, fp32), (4096, bf16, fp32), (80, bf16, bf16),
        (80, fp32, fp32), (512, fp32, fp32),
    ):  # fmt: skip
        x, grad, channel = meta((64 * MEGA // C, C), dtype), meta((64 * MEGA // C, C), to), meta((C,), fp32)
        mean, rstd = (meta((64 * MEGA // C, 1), fp32) for _ in range(2))
        size, statistics = f"64 Mi, C = {C}, y in {TYPES[to]}", 8 * mean.numel()
        forward = functools.partial(k.forward, x, channel, channel, 1e-5, to)
        backward = functools.partial(k.backward, grad, x, mean, rstd, channel)
        moved = (dtype.itemsize + to.itemsize) * x.numel() + statistics
        yield Row("norm", "forward", TYPES[dtype], size, moved, STREAM, forward)
        moved += dtype.itemsize * x.numel()
        yield Row("norm", "backward", TYPES[dtype], size, moved, STREAM, backward)


def norm_lif_rows() -> Iterator[Row]:
    from spikedecoder.kernels import norm_lif

    bf16, lif = torch.bfloat16, LIFParams()

    def row(call: str, T: int, C: int, dtype: torch.dtype = bf16, p: LIFParams | ILIFParams = lif) -> Row:
        x, grad = (meta((T, 64 * MEGA // T // C, C), dtype) for _ in range(2))
        weight, channel = meta((C,), torch.float32), meta((C,), torch.float32)
        rows = meta(x.shape[:-1], torch.float32)
        norm = functools.partial(norm_lif.forward, x, weight, weight)
        back = (grad, x, weight, weight)
        wide = STREAM
        wide_back = STREAM if C > 256 else NARROW
        many = norm_lif.slices(C)[0] if C <= norm_lif.MAX_ROW else 1
        if many > 1 and dtype != torch.float32:  # as many elements of each as registers hold
            wide = NARROW
            wide_back = NARROW if isinstance(p, ILIFParams) or (many == 3 and not 4 < T <= 8) else NARROWEST
        run, passes, needs = {
            "layer forward": (functools.partial(norm, None, None, 1e-5, 1.0, p), 2, wide),
            "layer backward": (
                functools.partial(norm_lif.backward_layer, *back, rows, rows, 1.0, p), 3, wide_back,
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
                3, NARROW,
            ),
        }[call]  # fmt: skip
        if C > norm_lif.MAX_ROW:  # a launch that only sums writes little
            needs = LOADS
        if (C == 512 or many > 1) and dtype != torch.float32:
            backward = 35 if T <= 4 else 44 if many == 1 else 55
            most = {"layer forward": 20, "layer backward": backward, "channel forward": 16}
            if isinstance(p, ILIFParams):
                most = {"layer forward": 24, "channel forward": 19, "layer backward": 36}
            needs = (*needs, f"at most {most.get(call, 30 if T <= 16 else 46)} instructions")
        minimum = passes * x.numel() * dtype.itemsize + (8 * x.numel() / C if "layer" in call else 0)
        if isinstance(p, ILIFParams):
            call = f"I-LIF {call}"
        return Row("norm_lif", call, TYPES[dtype], f"64 Mi, T = {T}, C = {C}", minimum, needs, run)

    layer = ("layer forward", "layer backward")
    channels = ("channel forward", "channel backward, sums", "channel backward, x")
    for T in (4, 8, 16, 64):
        yield from (row(call, T, 512) for call in (*layer, *channels))
    yield row("moments", 4, 512)
    for T, C in ((4, 80), (8, 80), (4, 384), *((T, C) for C in (1280, 4096, 8192) for T in (4, 16))):
        yield from (row(call, T, C) for call in layer)
    yield from (row(call, 4, 384) for call in channels)
    for T, C in ((4, 1024), (16, 1024), (4, 4096)):
        yield from (row(call, T, C, torch.float32) for call in layer)
    for dtype, C in ((bf16, 384), (bf16, 512), (torch.float32, 512)):
        yield from (row(call, 1, C, dtype, ILIFParams(15)) for call in (*layer, *channels))
    yield from (row(call, 1, C, p=ILIFParams(15)) for C in (4096, 8192) for call in layer)


def attention_rows() -> Iterator[Row]:
    from spikedecoder.kernels import spike_attention as k

    def row(
        call: str, dtype: torch.dtype, B: int, S: int, d: int, decay: bool, T: int = 4, levels: int = 1,
        states: bool = False,
    ) -> Row:  # fmt: skip
        q, key, v, grad = (meta((T, B, S, 8, d), dtype).transpose(2, 3) for _ in range(4))
        powers = meta((8,), torch.float32) if decay else None
        state = meta((T, B, 8, d, d), torch.float32) if states else None
        run = {
            "forward": lambda: k.forward(q, key, v, 0.125, powers, state, states, levels),
            "backward": lambda: k.backward(grad, q, key, v, 0.125, powers, state, levels),
        }[call]
        moved = q.numel() * dtype.itemsize * (4 if call == "forward" else 7)
        if state is not None:
            moved += state.numel() * (8 if call == "forward" else 4)
        name = f"T = {T}, B H = {8 * B}, S = {S}, d = {d}"
        call += ", states" * states + ", decay" * decay + f", integers to {levels}" * (levels > 1)
        return Row("spike_attention", call, TYPES[dtype], name, moved, DOT, run)

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
    for call in ("forward", "backward"):  # of I-LIF neurons; a decay takes real sums, whatever the operands
        yield row(call, bf16, 16, 2048, 64, False, T=1, levels=15)
        yield row(call, bf16, 32, 256, 24, True, T=1, levels=15)
    for call in ("forward", "backward"):
        for dtype, decay in ((bf16, False), (fp32, True)):
            yield row(call, dtype, 16, 2048, 64, decay, states=True)
    for decay in (False, True):  # in segments
        yield row("forward", fp32, 1, 65536, 128, decay)


def attention_lif_rows() -> Iterator[Row]:
    from spikedecoder.kernels import spike_attention_lif as k

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for T, dtype, B, S, d, decay in (
        (4, bf16, 16, 2048, 64, False), (4, bf16, 32, 256, 16, False), (4, bf16, 16, 2048, 32, False),
        (8, bf16, 16, 2048, 16, False), (4, bf16, 16, 2048, 64, True), (4, fp16, 16, 2048, 64, False),
        (4, bf16, 16, 2048, 128, False), (16, bf16, 16, 2048, 64, False), (4, fp32, 16, 2048, 64, False),
        (4, fp32, 32, 256, 16, False), (4, fp32, 16, 2048, 32, False),
        (4, fp32, 16, 2048, 64, True),
    ):  # fmt: skip
        q, key, v = (meta((T, B, S, 8, d), dtype).transpose(2, 3) for _ in range(3))
        powers = meta((8,), torch.float32) if decay else None
        run = functools.partial(k.forward, q, key, v, 0.125, powers, 1.0, LIFParams())
        name = f"T = {T}, B H = {8 * B}, S = {S}, d = {d}"
        call, moved = "forward" + ", decay" * decay, 4 * q.numel() * dtype.itemsize
        needs = DOT if decay else (*DOT, ONCE)
        yield Row("spike_attention_lif", call, TYPES[dtype], name, moved, needs, run)
        if (T, d) == (4, 64) and dtype != fp16:
            run = functools.partial(k.forward, q, key, v, 0.125, powers, meta((8, d), fp32), LIFParams())
            call += ", threshold per channel"
            yield Row("spike_attention_lif", call, TYPES[dtype], name, moved, needs, run)


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
        both = functools.partial(k.weight_and_bias_grad, words, K, grad)
        moved = b * (M * K + N * K + M * N) + M * K / 8
        yield Row("spike_linear", "forward", TYPES[dtype], size, moved, DOT, forward)
        moved = b * (M * N + N * K) + M * K / 8
        yield Row("spike_linear", "weight gradient", TYPES[dtype], size, moved, DOT, backward)
        yield Row("spike_linear", "weight and bias gradient", TYPES[dtype], size, moved, DOT, both)


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
        needs = DOT if kind == "layer" else (*DOT, ONCE)  # a square root fuses
        yield Row("linear_norm_lif", f"{kind} forward", TYPES[dtype], size, moved, needs, run)


def rows() -> Iterator[Row]:
    yield from lif_rows()
    yield from attention_lif_rows()
    yield from linear_rows()
    yield from linear_norm_lif_rows()
    yield from attention_rows()
    yield from norm_rows()
    yield from norm_lif_rows()
    yield from small_rows()
