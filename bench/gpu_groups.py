"""What `bench_gpu_ops.py` measures: operators, shapes, and how to call each row."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikedecoder import ops
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.reference import binarize as binarize_reference
from spikedecoder.reference import ilif as ilif_reference
from spikedecoder.reference import lif as lif_reference
from spikedecoder.reference import norm_lif as norm_lif_reference
from spikedecoder.reference import pack_spikes as pack_reference
from spikedecoder.reference import spike_attention as attention_reference
from spikedecoder.reference import spike_attention_lif as attention_lif_reference
from spikedecoder.reference import token_shift as shift_reference

# how to call each row, or a string that says why it is left out
Calls = dict[str, "Callable[[], Any] | str"]
COMPILED = "compiled reference"
FLASH_LINEAR = "flash-linear-attention"
EXTENSION = "CUDA extension"
P = LIFParams()
INTEGERS = ILIFParams(15, 0.36)
RATE = 0.16
SPREAD, MEAN = 1.8, 0.3  # of currents that make one neuron in six fire, at any number of timesteps
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass
class Group:
    """One operator and shape: how to call each row, and the least bytes and operations that it needs."""

    name: str
    make: Callable[[], Calls]
    bytes: float
    flops: float = 0.0
    exact: tuple[str, ...] = field(default=("ours",))  # rows that must equal `reference`
    reference: str = "eager reference"  # the row that the others are compared with
    slow: bool = False  # takes the compiler long: measured after all others
    about: dict[str, Any] = field(default_factory=dict)  # identifies a point of a sweep, in its rows


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile; without a GPU it only traces, so that a dry run makes the same calls."""
    return torch.compile(fn, dynamic=False, backend="inductor" if CUDA else "eager")


def _on(backend: str, fn: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with ops.use_backend(backend):
            return fn()

    return call


def _spikes(*shape: int, dtype: torch.dtype = torch.bfloat16, rate: float = RATE) -> Tensor:
    return (torch.rand(shape, device=DEVICE) < rate).to(dtype)


def currents(*shape: int) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * SPREAD + MEAN).to(torch.bfloat16)


def affine(C: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm, such that its outputs are like `currents`."""
    return torch.full((C,), SPREAD, device=DEVICE), torch.full((C,), MEAN, device=DEVICE)


def both_ways(fn: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """A call that runs forward and backward, and returns dL/dx."""

    def call() -> Tensor:
        leaf = x.detach().requires_grad_()
        fn(leaf).backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    return call


def extension(operator: str) -> ModuleType | str:
    """The CUDA extension's module for an operator, or why it is missing."""
    from spikedecoder.ext import cuda

    return cuda.missing() or importlib.import_module(f"{cuda.__name__}.{operator}")


def lif_groups(dry: bool) -> Iterator[Group]:
    from spikedecoder.kernels import lif as k

    elements = 1 << (12 if dry else 26)
    for T in (4,) if dry else (4, 8, 16):

        def make(T: int = T) -> Calls:
            x = currents(T, elements // T // 512, 512)
            calls: Calls = {
                "ours": lambda: k.forward(x, 1.0, None, P, want_v=False)[0],
                "eager reference": lambda: lif_reference.forward(x, 1.0, None, P)[0],
                "ours, packed": lambda: k.forward_packed(x, 1.0, None, P, want_v=False)[0],
            }
            compiled = _compiled(lambda x: lif_reference.forward(x, 1.0, None, P)[0])
            calls[COMPILED] = lambda: compiled(x)
            return calls

        yield Group(f"lif forward bf16 T={T} n={elements}", make, 4.0 * elements, slow=T > 4)

        def make_both(T: int = T) -> Calls:
            x = currents(T, elements // T // 512, 512)
            grad = torch.randn_like(x)

            def reference(x: Tensor) -> Tensor:
                return lif_reference.lif(x, 1.0, None, P)[0]

            return {
                "ours": _on("triton", both_ways(lambda x: ops.lif_params(x, P), x, grad)),  # type: ignore[arg-type, return-value]
                "eager reference": both_ways(reference, x, grad),
                COMPILED: both_ways(_compiled(reference), x, grad),
            }

        # elements of 2 bytes: two in the forward pass, three in the backward pass
        name = f"lif forward + backward bf16 T={T} n={elements}"
        yield Group(name, make_both, 10.0 * elements, exact=(), slow=T > 4)


def _through_norm(
    kind: str, shape: tuple[int, ...], operator: Callable[..., Tensor], reference: Callable[..., Tensor]
) -> Calls:
    """Forward and backward of an operator on (x, norm)."""
    x, C = currents(*shape), shape[-1]
    grad = torch.randn_like(x)
    weight, bias = affine(C)
    running = (torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)) if kind == "batch" else ()

    def through(fn: Callable[[Tensor, NormParams], Tensor]) -> Callable[[], Tensor]:
        def of_norm(leaf: Tensor) -> Tensor:
            w = weight.detach().requires_grad_()
            return fn(leaf, NormParams(kind, w, bias, running=tuple(r.clone() for r in running)))

        return both_ways(of_norm, x, grad)

    return {
        "ours": _on("triton", through(operator)),
        "eager reference": _on("reference", through(operator)),
        COMPILED: through(_compiled(lambda x, n: reference(x.float(), n).to(x.dtype))),
    }


def _norm_lif_both(kind: str, T: int, C: int, elements: int) -> Group:
    def make() -> Calls:
        return _through_norm(
            kind, (T, elements // T // C, C), lambda x, n: ops.norm_lif(x, n, P),
            lambda x, n: norm_lif_reference.norm_lif(x, n, 1.0, P),
        )  # fmt: skip

    name = f"norm_lif {kind} forward + backward bf16 T={T} C={C} n={elements}"
    return Group(name, make, (10.0 if kind == "layer" else 16.0) * elements, exact=(), slow=T > 4)


def norm_lif_groups(dry: bool) -> Iterator[Group]:
    from spikedecoder.kernels import norm_lif as k

    elements, C = (1 << 12, 64) if dry else (1 << 26, 512)
    for T in (4,) if dry else (4, 8, 16):

        def make(T: int = T) -> Calls:
            x = currents(T, elements // T // C, C)
            weight, bias = affine(C)
            calls: Calls = {
                "ours": lambda: k.forward(x, weight, bias, None, None, 1e-5, 1.0, P)[0],
                "eager reference": lambda: norm_lif_reference.forward(
                    x, weight, bias, None, None, 1e-5, 1.0, P
                )[0],
            }
            fn = _compiled(lambda x: norm_lif_reference.forward(x, weight, bias, None, None, 1e-5, 1.0, P)[0])
            calls[COMPILED] = lambda: fn(x)
            return calls

        name = f"norm_lif layer forward bf16 T={T} C={C} n={elements}"
        yield Group(name, make, 4.0 * elements, slow=T > 4)
        for kind in ("layer", "batch"):
            yield _norm_lif_both(kind, T, C, elements)
    for C in (48,) if dry else (80, 384, 1280):  # rows that are split into slices
        yield _norm_lif_both("layer", 4, C, elements)

    for C in (64, 48) if dry else (512, 384):

        def make_integers(C: int = C) -> Calls:
            return _through_norm(
                "batch", (elements // C, C), lambda x, n: ops.norm_ilif(x, n, INTEGERS),
                lambda x, n: ilif_reference.ilif(ops.norm(x, n), INTEGERS),
            )  # fmt: skip

        name = f"norm_ilif batch forward + backward bf16 C={C} n={elements}"
        yield Group(name, make_integers, 16.0 * elements, exact=())


LONG = "cost quadratic, or thousands of launches, at this length"


def attention_groups(dry: bool) -> Iterator[Group]:
    from spikedecoder.kernels import spike_attention as k
    from spikedecoder.kernels import spike_attention_lif as fused

    sizes = [(2, 1, 2, 40, 16)]
    if not dry:  # a cost that is linear in S shows in equal shares of the copy
        sizes = [(4, 16, 8, 2048, 64), (4, 2, 8, 16384, 64), (4, 1, 8, 65536, 64), (4, 32, 5, 256, 16)]
    for T, B, H, S, d in sizes:
        shape = (T, B, S, H, d)
        elements = math.prod(shape)
        flops = elements * 2.0 * (2 * 64 + 2 * d)
        name = f"T={T} BH={B * H} S={S} d={d}"
        long = S > 4096  # the quadratic peers and the reference would use up the time

        def make(shape: tuple[int, ...] = shape, long: bool = long) -> Calls:
            q, key, v = (_spikes(*shape).transpose(2, 3) for _ in range(3))
            calls: Calls = {
                "ours": lambda: k.forward(q, key, v, 0.125, None, None, False)[0],
                "eager reference": lambda: attention_reference.forward(q, key, v, 0.125, None, None, False)[
                    0
                ],
            }
            flat = [x.flatten(0, 1) for x in (q, key, v)]
            fn = _compiled(lambda *x: attention_reference.forward(*x, 0.125, None, None, False)[0])
            calls[COMPILED] = LONG if long else lambda: fn(q, key, v)
            calls["SDPA causal (softmax)"] = (
                LONG if long else lambda: F.scaled_dot_product_attention(*flat, is_causal=True)
            )
            fla = _flash_linear_attention()
            calls[FLASH_LINEAR] = fla if isinstance(fla, str) else lambda: fla(q, key, v)
            return calls

        slow = S > 256  # the reference is a loop over chunks, which the compiler unrolls
        yield Group(f"spike_attention forward bf16 {name}", make, 8.0 * elements, flops, slow=slow)
        if long:
            continue

        def make_both(shape: tuple[int, ...] = shape) -> Calls:
            q, key, v = (_spikes(*shape).transpose(2, 3) for _ in range(3))
            grad = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(2, 3)

            def through(fn: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
                def call() -> list[Tensor]:
                    leaves = [x.detach().requires_grad_() for x in (q, key, v)]
                    fn(*leaves).backward(grad)
                    return [leaf.grad for leaf in leaves if leaf.grad is not None]

                return call

            def sdpa(q: Tensor, key: Tensor, v: Tensor) -> Tensor:
                flat = (x.flatten(0, 1) for x in (q, key, v))
                return F.scaled_dot_product_attention(*flat, is_causal=True).unflatten(0, shape[:2])

            compiled = _compiled(lambda *x: attention_reference.forward(*x, 0.125, None, None, False)[0])
            fla = _flash_linear_attention()
            return {
                "ours": _on("triton", through(lambda *x: ops.spike_attention(*x))),  # type: ignore[arg-type, return-value]
                "eager reference": _on("reference", through(lambda *x: ops.spike_attention(*x))),  # type: ignore[arg-type, return-value]
                COMPILED: through(compiled),
                "SDPA causal (softmax)": through(sdpa),
                FLASH_LINEAR: fla if isinstance(fla, str) else through(fla),
            }

        name_both = f"spike_attention forward + backward bf16 {name}"
        yield Group(name_both, make_both, 22.0 * elements, 3.5 * flops, exact=(), slow=slow)

        def make_fused(shape: tuple[int, ...] = shape) -> Calls:
            q, key, v = (_spikes(*shape).transpose(2, 3) for _ in range(3))

            def apart() -> Tensor:
                return ops.lif_params(ops.spike_attention(q, key, v).transpose(2, 3), P).transpose(2, 3)  # type: ignore[union-attr]

            fn = _compiled(lambda *x: attention_lif_reference.forward(*x, 0.125, None, 1.0, P))
            return {
                "ours": lambda: fused.forward(q, key, v, 0.125, None, 1.0, P),
                "ours, two kernels": _on("triton", apart),
                "eager reference": lambda: attention_lif_reference.forward(q, key, v, 0.125, None, 1.0, P),
                COMPILED: lambda: fn(q, key, v),
            }

        yield Group(f"spike_attention_lif forward bf16 {name}", make_fused, 8.0 * elements, flops, slow=slow)


def _flash_linear_attention() -> Callable[..., Tensor] | str:
    """A function of q, k, v [T, B, H, S, d] (its kernels take [B, S, H, d]), or why there is none."""
    if not CUDA:
        return "needs a CUDA device"
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        return f"{error.name or 'fla'} is not installed"

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(2, 3).flatten(0, 1) for x in qkv)
        out = chunk_linear_attn(q, k, v, scale=0.125, normalize=False)[0]
        return out.unflatten(0, qkv[0].shape[:2]).transpose(2, 3)

    return attend


def linear_groups(dry: bool) -> Iterator[Group]:
    from spikedecoder.kernels import spike_linear as k

    for M, K, N in [(64, 80, 32)] if dry else [(32768, 80, 1280), (32768, 512, 2048), (131072, 1024, 1024)]:

        def make(M: int = M, K: int = K, N: int = N) -> Calls:
            s = _spikes(M, K)
            weight = torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16) / K**0.5
            fn = _compiled(lambda s, weight: F.linear(s.float(), weight.float()).to(torch.bfloat16))
            return {
                "ours": lambda: k.forward(s, weight, None)[0],
                "dense": lambda: F.linear(s, weight),
                "eager reference": lambda: F.linear(s.float(), weight.float()).to(torch.bfloat16),
                COMPILED: lambda: fn(s, weight),
            }

        name = f"spike_linear forward bf16 M={M} K={K} N={N}"
        yield Group(name, make, 2.0 * (M * K + N * K + M * N) + M * K / 8, 2.0 * M * K * N, exact=())

        def make_grad(M: int = M, K: int = K, N: int = N) -> Calls:
            s = _spikes(M, K)
            grad = torch.randn(M, N, device=DEVICE, dtype=torch.bfloat16)
            with ops.use_backend("triton"):
                words = ops.pack_spikes(s)
            fn = _compiled(lambda grad, s: (grad.float().T @ s.float()).to(torch.bfloat16))
            return {
                "ours": lambda: k.weight_grad(words, K, grad),
                "dense": lambda: grad.T @ s,
                "eager reference": lambda: (grad.float().T @ s.float()).to(torch.bfloat16),
                COMPILED: lambda: fn(grad, s),
            }

        name = f"spike_linear weight gradient bf16 M={M} K={K} N={N}"
        yield Group(name, make_grad, 2.0 * (M * N + N * K) + M * K / 8, 2.0 * M * K * N, exact=())


def linear_norm_lif_groups(dry: bool) -> Iterator[Group]:
    """Inference: one kernel where that pays, and its parts beside it."""
    from spikedecoder.kernels import linear_norm_lif as k
    from spikedecoder.kernels import norm_lif, spike_linear

    sizes = [(2, 40, 80, 32)] if dry else [(4, 8192, 80, 80), (4, 8192, 80, 1280), (4, 8192, 512, 2048)]
    for T, R, K, N in sizes:
        for kind in ("layer", "channel") if K == 80 else ("channel",):

            def make(T: int = T, R: int = R, K: int = K, N: int = N, kind: str = kind) -> Calls:
                s = _spikes(T, R, K)
                # integers: their sums are exact in bfloat16, so that the order of adding moves no spike
                weight = torch.randint(-3, 4, (N, K), device=DEVICE).to(torch.bfloat16)
                mean, rstd = torch.zeros(N, device=DEVICE), torch.full((N,), 0.5, device=DEVICE)
                given = (mean, rstd / (RATE * K) ** 0.5) if kind == "channel" else (None, None)
                rest = (*affine(N), *given, 1e-5, 1.0, P)

                def eager(s: Tensor) -> Tensor:
                    x = F.linear(s.float(), weight.float()).to(torch.bfloat16)
                    return norm_lif_reference.forward(x, *rest)[0]

                fn = _compiled(eager)

                return {
                    "ours": lambda: k.forward(s, weight, None, *rest)[0],
                    "ours, two kernels": lambda: norm_lif.forward(
                        spike_linear.forward(s, weight, None)[0], *rest
                    )[0],
                    "eager reference": lambda: eager(s),
                    COMPILED: lambda: fn(s),
                }

            name = f"linear_norm_lif {kind} forward bf16 T={T} R={R} K={K} N={N}"
            moved = 2.0 * (T * R * (K + N) + N * K) + T * R * K / 8
            yield Group(name, make, moved, 2.0 * T * R * K * N)


def element_groups(dry: bool) -> Iterator[Group]:
    """Operators that pass over memory once: neurons without timesteps, and packing."""
    from spikedecoder.kernels import binarize, ilif, pack_spikes, token_shift

    elements, C = (1 << 12, 64) if dry else (1 << 26, 512)
    shape, size = (elements // C, C), f"bf16 n={elements}"

    def passes(
        forward: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]
    ) -> Callable[[], Calls]:
        def make() -> Calls:
            x = currents(*shape)
            fn = _compiled(reference)
            return {
                "ours": lambda: forward(x),
                "eager reference": lambda: reference(x),
                COMPILED: lambda: fn(x),
            }

        return make

    def through(
        operator: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]
    ) -> Callable[[], Calls]:
        def make() -> Calls:
            x = currents(*shape)
            grad = torch.randn_like(x)
            return {
                "ours": _on("triton", both_ways(operator, x, grad)),
                "eager reference": both_ways(reference, x, grad),
                COMPILED: both_ways(_compiled(reference), x, grad),
            }

        return make

    make = passes(lambda x: binarize.forward(x, 2.0), lambda x: binarize_reference.forward(x, 2.0))
    yield Group(f"binarize forward {size}", make, 4.0 * elements)
    make = through(lambda x: ops.binarize(x), lambda x: binarize_reference.binarize(x, 2.0))
    yield Group(f"binarize forward + backward {size}", make, 10.0 * elements, exact=())
    make = passes(
        lambda x: ilif.forward(x, INTEGERS, False)[0], lambda x: ilif_reference.forward(x, INTEGERS, False)[0]
    )
    yield Group(f"ilif forward {size}", make, 4.0 * elements)
    make = through(lambda x: ops.ilif_params(x, INTEGERS), lambda x: ilif_reference.ilif(x, INTEGERS))
    # in each direction two elements of 2 bytes, and a byte for where the gradient passes
    yield Group(f"ilif forward + backward {size}", make, 10.0 * elements, exact=())

    make = passes(lambda x: token_shift.forward(x, 4), lambda x: shift_reference.forward(x, 4))
    yield Group(f"token_shift forward {size}", make, 4.0 * elements)
    make = through(lambda x: ops.token_shift(x, 4), lambda x: shift_reference.forward(x, 4))
    yield Group(f"token_shift forward + backward {size}", make, 8.0 * elements)

    def make_pack() -> Calls:
        s, cuda = _spikes(*shape), extension("pack_spikes")
        return {
            "ours": lambda: pack_spikes.pack(s),
            EXTENSION: cuda if isinstance(cuda, str) else lambda: cuda.pack(s),
            "eager reference": lambda: pack_reference.pack(s),
        }

    def make_unpack() -> Calls:
        words, cuda = pack_reference.pack(_spikes(*shape)), extension("pack_spikes")
        return {
            "ours": lambda: pack_spikes.unpack(words, C, torch.bfloat16),
            EXTENSION: cuda if isinstance(cuda, str) else lambda: cuda.unpack(words, C, torch.bfloat16),
            "eager reference": lambda: pack_reference.unpack(words, C, torch.bfloat16),
        }

    for name, make in (("pack_spikes", make_pack), ("unpack_spikes", make_unpack)):
        yield Group(f"{name} {size}", make, 2.125 * elements, exact=("ours", EXTENSION))


GROUPS: dict[str, Callable[[bool], Iterator[Group]]] = {
    "lif": lif_groups,
    "spike_attention": attention_groups,
    "norm_lif": norm_lif_groups,
    "spike_linear": linear_groups,
    "linear_norm_lif": linear_norm_lif_groups,
    "elements": element_groups,
}
