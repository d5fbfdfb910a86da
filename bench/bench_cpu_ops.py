"""The compiled CPU operators, compared with the eager reference, torch's own dense operators, and the
reference under torch.compile.

    python -m pytest bench/bench_cpu_ops.py --benchmark-json=result.json

Each group is one operator and shape, each row one way to compute it. All rows allocate their outputs, with
the memory allocator as this package sets it, and every result is checked before it is timed. The rows that
are ours, such as "cpu", also give

- ``speedup_*``: how many times slower the others were, called in turns with it (ratio of the fastest rounds;
  compare these on a busy machine). The call before has then swept the caches, which costs the faster ones
  more. ``warm_*`` is the same ratio for calls that come right after another of their own kind;
- ``share_of_copy_bandwidth``, ``times_dense_ceiling`` and ``share_of_ceiling``: how close it comes to what
  the machine can do, timed in turns, too. The last is the least time that its bytes or its operations need
  (``bound_by`` says which of them needs longer) over its own time.

The group "ceilings" shows what the machine can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spikedecoder import ext, ops

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext import cpu as backend
from spikedecoder.ext.cpu import (
    dense_linear,
    ilif,
    lif,
    linear_norm_lif,
    norm_lif,
    spike_attention,
    spike_attention_lif,
    spike_linear,
    token_shift,
)
from spikedecoder.params import ILIFParams, LIFParams
from spikedecoder.reference import lif as lif_reference
from spikedecoder.reference import norm_lif as norm_lif_reference
from spikedecoder.reference import spike_attention as attention_reference
from spikedecoder.reference import spike_attention_lif as attention_lif_reference
from spikedecoder.reference import token_shift as token_shift_reference

Calls = dict[str, Callable[[], Any]]
P = LIFParams()


def interleaved(calls: Calls, seconds: float = 1.5) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the fastest call of each, in many rounds in turns, each with two calls in a row: (of the
    first calls, of the second)."""
    best = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            for fastest in best:
                start = time.perf_counter()
                call()
                fastest[name] = min(fastest[name], time.perf_counter() - start)
        rounds += 1
    return best


def rows(make: Callable[..., Calls], *cases: Any) -> Iterator[Any]:
    """A pytest parameter (make, case, row) for each row, marked with the name of its group."""
    for case in cases:
        for row in make.rows:  # type: ignore[attr-defined]
            name = f"{make.__name__} {' x '.join(map(str, case))}"
            yield pytest.param(make, case, row, marks=pytest.mark.benchmark(group=name), id=f"{name} {row}")


def named(*names: str) -> Callable[[Callable[..., Calls]], Callable[..., Calls]]:
    def mark(make: Callable[..., Calls]) -> Callable[..., Calls]:
        make.rows = names  # type: ignore[attr-defined]
        return make

    return mark


def assert_same(calls: Calls, tolerance: float, flips: float = 0.0) -> None:
    results = [call() for call in calls.values()]
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            wrong = (actual - expected).abs() > tolerance * (1 + expected.abs())
            assert wrong.double().mean() <= flips


@named("cpu", "reference", "compiled")
def lif_train(*shape: int) -> Calls:
    x, grad = torch.randn(shape), torch.randn(shape)

    def both(module: Any) -> tuple[torch.Tensor, ...]:
        # as the operator calls it, without asking for potentials
        options = {"want_v": False} if getattr(module, "STATES_ON_REQUEST", False) else {}
        spikes, _ = module.forward(x, 1.0, None, P, **options)
        return spikes, module.backward(grad, None, x, 1.0, None, P)[0]

    compiled = torch.compile(lambda: both(lif_reference))
    calls: Calls = {"cpu": lambda: both(lif), "reference": lambda: both(lif_reference), "compiled": compiled}
    assert_same(calls, 1e-4)
    return calls


@named("cpu", "reference", "compiled")
def norm_lif_train(*shape: int) -> Calls:
    x, grad, weight, bias = (
        torch.randn(shape),
        torch.randn(shape),
        torch.ones(shape[-1]),
        torch.zeros(shape[-1]),
    )

    def both(module: Any) -> tuple[torch.Tensor, ...]:
        spikes, mean, rstd = module.forward(x, weight, bias, None, None, 1e-5, 1.0, P)
        return spikes, module.backward_layer(grad, x, weight, bias, mean, rstd, 1.0, P)[0]

    compiled = torch.compile(lambda: both(norm_lif_reference))
    calls: Calls = {
        "cpu": lambda: both(norm_lif),
        "reference": lambda: both(norm_lif_reference),
        "compiled": compiled,
    }
    assert_same(calls, 1e-3, flips=1e-4)
    return calls


@named("cpu", "parts", "reference", "compiled")
def norm_ilif_train(*shape: int) -> Calls:
    """BatchNorm in training and I-LIF as one operator computes them; "parts" are torch's norm, then I-LIF."""
    p = ILIFParams(15, 0.2)
    x, grad, channels = torch.randn(shape), torch.randn(shape), shape[-1]
    weight, bias = torch.ones(channels), torch.zeros(channels)
    running = torch.zeros(channels), torch.ones(channels)

    def both(module: Any) -> tuple[torch.Tensor, ...]:
        mean, var = module.moments(x, True)
        statistics = (weight, bias, mean, (var + 1e-5).rsqrt())
        counts = module.forward(x, *statistics, 1e-5, 1.0, p)[0]
        sum_gz, sum_g, _ = module.backward_reduce(grad, x, *statistics, 1.0, p)
        a = statistics[-1]
        coefficients = (a, -a * sum_gz / len(x), -a * sum_g / len(x))
        return counts, module.backward_apply(grad, x, *statistics, 1.0, p, *coefficients)

    def parts() -> tuple[torch.Tensor, ...]:
        y, *saved = torch.native_batch_norm(x, weight, bias, *running, True, 0.1, 1e-5)
        counts, mask = ilif.forward(y, p, True)
        grad_y = ilif.backward(grad, mask, p)
        backward = torch.ops.aten.native_batch_norm_backward
        return counts, backward(grad_y, x, weight, *running, *saved, True, 1e-5, [True] * 3)[0]

    calls: Calls = {
        "cpu": lambda: both(norm_lif),
        "parts": parts,
        "reference": lambda: both(norm_lif_reference),
        "compiled": torch.compile(lambda: both(norm_lif_reference)),
    }
    assert_same(calls, 1e-3, flips=1e-4)
    return calls


ATTENTION_RATE = 0.2


@named("cpu", "reference")
def attention_lif_train(*shape: int) -> Calls:
    t, b, h, s, d = shape
    q, k, v = ((torch.rand(t, b, s, h, d) < ATTENTION_RATE).float().transpose(2, 3) for _ in range(3))
    grad = torch.randn(t, b, s, h, d).transpose(2, 3)

    def both(module: Any) -> tuple[torch.Tensor, ...]:
        spikes = module.forward(q, k, v, 0.125, None, 1.0, P)
        return spikes, *module.backward(grad, q, k, v, 0.125, None, 1.0, P)[:3]

    calls: Calls = {
        "cpu": lambda: both(spike_attention_lif),
        "reference": lambda: both(attention_lif_reference),
    }
    assert_same(calls, 1e-3)
    return calls


LEVELS = 15


@named("cpu", "reference")
def integer_attention_train(*shape: int) -> Calls:
    """Attention on the integers of I-LIF neurons, with a decay for each head."""
    t, b, h, s, d = shape
    q, k, v = (torch.randint(0, LEVELS + 1, (t, b, s, h, d)).float().transpose(2, 3) for _ in range(3))
    grad = torch.randn(t, b, s, h, d).transpose(2, 3)
    decay = 1 - 2.0 ** -torch.arange(2, 2 + h).float()

    def both(module: Any) -> tuple[torch.Tensor, ...]:
        out, _ = module.forward(q, k, v, 0.125, decay, None, False, LEVELS)
        return out, *module.backward(grad, q, k, v, 0.125, decay, None, LEVELS)

    calls: Calls = {"cpu": lambda: both(spike_attention), "reference": lambda: both(attention_reference)}
    # gradients are sums of terms of either sign, hence the larger tolerance
    assert_same({name: lambda call=call: call()[:1] for name, call in calls.items()}, 1e-5)
    assert_same(calls, 1e-2)
    return calls


def _linear(m: int, k: int, n: int, rate: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    s = (torch.rand(m, k, generator=generator) < rate).float()
    return s, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)


@named("cpu", "words", "torch")
def spike_linear_forward(m: int, k: int, n: int, rate: float) -> Calls:
    """Row "cpu" takes spikes as floats and packs them; row "words" takes the bits that `lif(packed=True)`
    makes."""
    s, weight, bias = _linear(m, k, n, rate)
    words = ops.pack_spikes(s)
    calls: Calls = {
        "cpu": lambda: spike_linear.forward(s, weight, bias)[:1],
        "words": lambda: (spike_linear.from_words(words, k, weight, bias),),
        "torch": lambda: (F.linear(s, weight, bias),),
    }
    assert_same(calls, 1e-3)
    return calls


@named("cpu", "public", "compiled function", "torch")
def spike_linear_token(m: int, k: int, n: int, rate: float) -> Calls:
    """A few rows, as when generating, with a weight laid out by columns beforehand. "cpu" is the backend's
    function, "public" the operator without a gradient, "compiled function" the C++ function behind both."""
    s, weight, bias = _linear(m, k, n, rate)
    by_columns = weight.t().contiguous().t()
    arguments = (s, by_columns, bias, False, False, True, torch.get_num_threads())
    calls: Calls = {
        "cpu": lambda: spike_linear.forward(s, by_columns, bias)[:1],
        "public": lambda: (ops.spike_linear(s, by_columns, bias),),
        "compiled function": lambda: backend.native.few_rows(*arguments)[:1],
        "torch": lambda: (F.linear(s, weight, bias),),
    }
    assert_same(calls, 1e-3)
    return calls


@named("cpu", "torch")
def spike_linear_weight_grad(m: int, k: int, n: int, rate: float) -> Calls:
    s, weight, bias = _linear(m, k, n, rate)
    words, grad = spike_linear.forward(s, weight, bias)[1], torch.randn(m, n)
    calls: Calls = {
        "cpu": lambda: (spike_linear.weight_grad(words, k, grad),),
        "torch": lambda: (grad.t() @ s,),
    }
    assert_same(calls, 1e-2)
    return calls


@named("cpu", "torch")
def spike_linear_dense_grads(m: int, k: int, n: int) -> Calls:
    """The gradients of the spikes and of the bias."""
    weight, grad = torch.randn(n, k), torch.randn(m, n)
    calls: Calls = {
        "cpu": lambda: spike_linear.input_and_bias_grad(grad, weight),
        "torch": lambda: (grad @ weight, grad.sum(0)),
    }
    assert_same(calls, 1e-2)
    return calls


@named("cpu", "torch")
def token_shift_train(b: int, s: int, channels: int, n: int) -> Calls:
    """Token shift and its gradient."""
    x, grad = torch.randn(b, s, channels), torch.randn(b, s, channels)
    calls: Calls = {
        "cpu": lambda: (token_shift.forward(x, n), token_shift.forward(grad, n, True)),
        "torch": lambda: (token_shift_reference.forward(x, n), token_shift_reference.forward(grad, n, True)),
    }
    assert_same(calls, 0)
    return calls


@named("cpu", "torch")
def dense_linear_train(m: int, k: int, n: int) -> Calls:
    """A linear layer on counts of I-LIF neurons, forward and all gradients. On most CPUs the operator uses
    torch's product instead (`_cost.outpaces_torch`)."""
    s, (_, weight, bias) = torch.randint(0, LEVELS + 1, (m, k)).float(), _linear(m, k, n, 0)
    grad = torch.randn(m, n)

    def cpu() -> tuple[Any, ...]:
        return dense_linear.forward(s, weight, bias), *dense_linear.backward(grad, s, weight, (True,) * 3)

    def by_torch() -> tuple[Any, ...]:
        return F.linear(s, weight, bias), grad @ weight, grad.t() @ s, grad.sum(0)

    calls: Calls = {"cpu": cpu, "torch": by_torch}
    assert_same(calls, 1e-2)
    return calls


@named("cpu", "parts")
def linear_norm_lif_forward(m: int, k: int, n: int, rate: float) -> Calls:
    """Linear, LayerNorm and LIF over 4 timesteps in one; "parts" are the operators one after the other."""
    s, weight, bias = _linear(m, k, n, rate)
    s, ones, zeros = s.view(4, -1, k), torch.ones(n), torch.zeros(n)

    def parts() -> tuple[torch.Tensor, ...]:
        current, words = spike_linear.forward(s, weight, bias)
        return *norm_lif.forward(current, ones, zeros, None, None, 1e-5, 1.0, P), words

    def fused() -> tuple[torch.Tensor, ...]:
        return linear_norm_lif.forward(s, weight, bias, ones, zeros, None, None, 1e-5, 1.0, P)

    calls: Calls = {"cpu": fused, "parts": parts}
    assert_same(calls, 0.0)
    return calls


SHAPES = ((8192, 80, 80), (8192, 80, 1280), (8192, 1280, 80), (4096, 512, 2048), (4096, 2048, 512))
LINEAR = [(*shape, rate) for shape in SHAPES for rate in (0.05, 0.1, 0.5)]
TOKEN = [(4, 80, 1280, 0.1), (4, 1280, 80, 0.1), (4, 512, 2048, 0.1), (4, 2048, 512, 0.1)]


@pytest.fixture(autouse=True)
def variant(benchmark: Any) -> None:
    benchmark.extra_info["variant"] = backend.native.variant()


@pytest.mark.parametrize(
    ("make", "case", "row"),
    [
        *rows(lif_train, (4, 2048, 80), (4, 2048, 1280)),
        *rows(norm_lif_train, (4, 2048, 80), (4, 2048, 1280)),
        *rows(norm_ilif_train, (4096, 96), (4096, 384), (8192, 512)),
        *rows(attention_lif_train, (4, 8, 5, 256, 16), (4, 2, 8, 512, 64)),
        *rows(integer_attention_train, (1, 32, 4, 128, 24), (1, 4, 4, 512, 64)),
        *rows(spike_linear_forward, *LINEAR),
        *rows(spike_linear_token, *TOKEN),
        *rows(spike_linear_weight_grad, *LINEAR),
        *rows(spike_linear_dense_grads, *SHAPES),
        *rows(token_shift_train, (8, 128, 96, 4), (32, 256, 384, 4)),
        *rows(dense_linear_train, (1024, 96, 96), (1024, 96, 384), (1024, 384, 96), *SHAPES),
        *rows(
            linear_norm_lif_forward,
            *[(8192, *k_n, p) for k_n in ((80, 1280), (512, 2048)) for p in (0.05, 0.2)],
        ),
    ],
)
def test_operator(benchmark: Any, make: Callable[..., Calls], case: tuple[Any, ...], row: str) -> None:
    torch.manual_seed(0)
    calls = make(*case)
    benchmark.pedantic(calls[row], rounds=7, warmup_rounds=1)
    ours = ("cpu", "words", "public", "compiled function")
    if row in ours:
        others = {name: call for name, call in calls.items() if name not in ours}
        best, warm = interleaved({row: calls[row], **others, **_ceiling(make, case)})
        for prefix, times in (("", best), ("warm_", warm)):
            for other in others:
                benchmark.extra_info[f"{prefix}speedup_over_{other}"] = round(times[other] / times[row], 2)
            if make in BYTES:
                share = BYTES[make] / 8 * times["copy"] / times["cpu"]
                benchmark.extra_info[f"{prefix}share_of_copy_bandwidth"] = round(share, 2)
        if make in ATTENTIONS:
            benchmark.extra_info |= _share_of_ceiling(best, ATTENTIONS[make], *case)
        elif "product" in best:
            benchmark.extra_info["times_dense_ceiling"] = round(best["product"] / best[row], 2)


# Bytes per element, forward and backward, that must be moved; a copy moves 8.
BYTES = {lif_train: 20, norm_lif_train: 20, norm_ilif_train: 32}


# Rows of a state [d, d] that are read or added to for each channel of a token, forward and backward, in eight
# passes. Six of them go by spikes and touch only that share of the rows; dq reads, and dk adds, by dL/dy.
ATTENTIONS = {attention_lif_train: 6 * ATTENTION_RATE + 2, integer_attention_train: 8.0}
PRODUCT = 512  # rows, columns and depth of the product that attention is measured against


def _ceiling(make: Callable[..., Calls], case: tuple[Any, ...]) -> Calls:
    """What bounds an operator: a copy of its input, or a product of its size, with nothing allocated."""
    if make in BYTES or make in ATTENTIONS:
        x = torch.randn(case)
        y = torch.empty_like(x)
        a, c = torch.randn(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
        product: Calls = {"product": lambda: torch.mm(a, a, out=c)} if make in ATTENTIONS else {}
        return {"copy": lambda: y.copy_(x), **product}
    if make in (spike_linear_forward, spike_linear_weight_grad, spike_linear_dense_grads):
        m, k, n = case[:3]
        a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        return {"product": lambda: torch.mm(a, b, out=c)}
    return {}


def _share_of_ceiling(
    best: dict[str, float], rows: float, t: int, b: int, h: int, s: int, d: int
) -> dict[str, Any]:
    """For attention, forward and backward: 16 + 28 bytes per element, and `rows` of the state for each."""
    seconds = {
        "bytes": 44 / 8 * best["copy"],
        "operations": t * b * h * s * d * d * rows / PRODUCT**3 * best["product"],
    }
    bound = max(seconds, key=seconds.__getitem__)
    return {"share_of_ceiling": round(seconds[bound] / best["cpu"], 2), "bound_by": bound}


@pytest.mark.benchmark(group="ceilings")
def test_copy_bandwidth(benchmark: Any) -> None:
    x = torch.randn(4, 2048, 1280)
    y = torch.empty_like(x)
    benchmark.pedantic(lambda: y.copy_(x), rounds=15, warmup_rounds=2)
    benchmark.extra_info["gbyte_per_second"] = round(8 * x.numel() / benchmark.stats.stats.min / 1e9, 1)


@pytest.mark.benchmark(group="ceilings")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmul(benchmark: Any, dtype: torch.dtype) -> None:
    # torch has no fast product of bfloat16 for a CPU without AVX-512
    slow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    n = 256 if slow else 2048
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    benchmark.pedantic(lambda: a @ b, rounds=7, warmup_rounds=1)
    benchmark.extra_info["gflop_per_second"] = round(2 * n**3 / benchmark.stats.stats.min / 1e9, 1)
