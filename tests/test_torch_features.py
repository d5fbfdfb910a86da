"""The model inside what torch offers: compile, export, autocast, loss scaling, checkpointing, CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, ops, use_backend
from spikedecoder.ops import BackendError
from spikedecoder.params import LIFParams, NormParams

VARIANTS: dict[str, dict[str, Any]] = {
    "layer": {},
    "batch": {"norm": "batch", "learn_threshold": True},
    "power": {"norm": "power"},
    "residuals": {"spiking_residuals": 2, "reunite": "concatenate", "v_reset": None},
    "ilif": {"neuron": "ilif", "levels": 4, "timesteps": 1, "v_reset": None},
    "decay": {"decay_fastest": 0.9, "decay_slowest": 0.99, "attention_norm": True},
}
SHAPES = [(2, 8), (3, 5), (4, 2), (5, 7)]
COMPILED = ["layer", "power", *(pytest.param(name, marks=pytest.mark.slow) for name in ("batch", "ilif"))]
EXPORTED = ["layer", "ilif", *(pytest.param(name, marks=pytest.mark.slow) for name in ("residuals", "decay"))]


def make(device: str = "cpu", **changes: Any) -> SpikeDecoder:
    torch.manual_seed(0)
    small = {"blocks": 2, "heads": 2, "token_dim": 12, "position_dim": 4, "mlp_ratio": 2, "timesteps": 2}
    config = SpikeDecoderConfig.preset(
        "default-lif", **{**small, "norm": "layer", "max_len": 8, "attention_scale": 1.0, **changes}
    )
    return SpikeDecoder(config).to(device)


def past_warmup(model: SpikeDecoder) -> SpikeDecoder:
    """Where PowerNorm reads what it has moved in earlier passes."""
    for name, buffer in model.named_buffers():
        if name.endswith("iters"):
            buffer.fill_(NormParams.warmup)
    return model


def tokens(batch: int = 2, length: int = 8, device: str = "cpu") -> Tensor:
    return torch.randint(0, 28, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def step(model: SpikeDecoder, loss_of: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one pass."""
    model.zero_grad()
    loss = loss_of(x, x.roll(-1, 1))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **{name: b.clone() for name, b in model.named_buffers()}}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], limit: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    scale = max(t.abs().max().item() for t in want.values() if t.is_floating_point() and t.dim() == 2)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=limit, atol=limit * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_in_one_graph_is_eager_at_every_shape(variant: str) -> None:
    """Batch and length are dynamic: after the first shape nothing is compiled."""
    eager, compiled = (past_warmup(make(blocks=1, **VARIANTS[variant])) for _ in range(2))
    compiled.recompute_activations(compiled.config.neuron == "lif")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss_of = torch.compile(compiled.loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in SHAPES:
        want = step(eager, eager.loss, tokens(*shape))
        compare(step(compiled, loss_of, tokens(*shape)), want)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == counts[:1] * len(SHAPES)


@pytest.mark.parametrize("neurons", [False, True], ids=["norm", "norm_lif"])
def test_compiled_power_norm_reads_its_statistics_before_they_move(neurons: bool) -> None:
    """What a compiled backward pass computes again from a buffer, it would find moved."""

    def gradient(compiled: bool) -> tuple[Tensor, ...]:
        running = (torch.full((4,), 3.0), torch.zeros(4), torch.tensor(NormParams.warmup))
        n = NormParams("power", torch.ones(4), torch.zeros(4), running=running)
        x = torch.linspace(-2, 4, 20).view(5, 4).requires_grad_()

        def of(x: Tensor) -> Tensor:
            return ops.norm_lif(x, n, LIFParams()) * x if neurons else ops.norm(x, n).square()

        torch._dynamo.reset()
        y = torch.compile(of, backend="aot_eager", fullgraph=True)(x) if compiled else of(x)
        return y.detach(), *torch.autograd.grad(y.sum(), x), *running

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("variant", EXPORTED)
def test_exported_is_eager_at_every_shape(variant: str) -> None:
    model = make(blocks=1, **VARIANTS[variant]).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=8)
    program = torch.export.export(model, (tokens(),), dynamic_shapes=({0: batch, 1: length},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert f"spikedecoder.{model.config.neuron}.default" in names
    for shape in [*SHAPES, (1, 3)]:
        with torch.no_grad():
            torch.testing.assert_close(program.module()(tokens(*shape)), model(tokens(*shape)))


@pytest.mark.skipif(which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("variant", ["ilif", pytest.param("layer", marks=pytest.mark.slow)])
def test_packages_of_aotinductor_are_eager_at_every_shape(variant: str, tmp_path: Path) -> None:
    model = make(blocks=1, **VARIANTS[variant]).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=8)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(),), dynamic_shapes=({0: batch, 1: length},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(package)
        for shape in [*SHAPES, (1, 3)]:
            torch.testing.assert_close(packaged(tokens(*shape)), model(tokens(*shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_learns(dtype: torch.dtype) -> None:
    """Products in half precision, with scaled losses in float16; membranes and statistics stay float32."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**12)
    full = step(make(), make().loss, tokens())
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype):
            loss = model.loss(tokens(), tokens().roll(-1, 1))
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(full["loss"].item(), rel=0.05)
    assert losses[-1] < 0.8 * losses[0]
    assert scaler.get_scale() >= 1.0


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    with torch.autocast("cpu", torch.float16):
        loss = model.loss(tokens(), tokens().roll(-1, 1))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**99
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_learns(variant: str, dtype: torch.dtype) -> None:
    model = make(**VARIANTS[variant]).to(dtype)
    loss = model.loss(tokens(), tokens().roll(-1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(make(**VARIANTS[variant]).loss(tokens(), tokens()).item(), rel=0.2)
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("variant", ["batch", "power"])
@pytest.mark.parametrize("levels", [None, 4])
def test_parameters_in_half_precision_beside_statistics_in_float32(variant: str, levels: int | None) -> None:
    """What FSDP's mixed precision makes of a model."""
    ilif = VARIANTS["ilif"] if levels else {}
    model = make(**{**VARIANTS[variant], **ilif, "learn_threshold": False})
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    loss = model.loss(tokens(), tokens().roll(-1, 1))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())
    model.eval()
    with torch.no_grad():
        evaluated = model.loss(tokens(), tokens().roll(-1, 1))
    assert evaluated.item() == pytest.approx(loss.item(), rel=0.3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_create_graph_gives_the_same_gradients_and_no_second_ones(variant: str) -> None:
    model, plain = make(**VARIANTS[variant]), make(**VARIANTS[variant])
    plain.loss(tokens(), tokens().roll(-1, 1)).backward()
    loss = model.loss(tokens(), tokens().roll(-1, 1))
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    for got, want in zip(found, plain.parameters(), strict=True):
        assert torch.equal(got, want.grad)
    with pytest.raises(RuntimeError, match="again"):
        sum(g.square().sum() for g in found).backward()  # type: ignore[union-attr]


def checkpointed(model: SpikeDecoder, reentrant: bool) -> SpikeDecoder:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("variant", ["layer", "batch", "residuals", "decay"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(
    variant: str, recompute: bool, reentrant: bool
) -> None:
    """... and moves running statistics, and the count of their passes, once."""
    plain, model = make(**VARIANTS[variant]), checkpointed(make(**VARIANTS[variant]), reentrant)
    model.recompute_activations(recompute)
    for _ in range(2):
        compare(step(model, model.loss, tokens()), step(plain, plain.loss, tokens()))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_power_norm_refuses_activation_checkpointing(compiled: bool, reentrant: bool) -> None:
    """A repeated pass would normalise by what its first one has moved on. Nothing moves twice."""
    model = checkpointed(past_warmup(make(blocks=1, **VARIANTS["power"])), reentrant)
    plain = past_warmup(make(blocks=1, **VARIANTS["power"]))
    torch._dynamo.reset()
    loss_of = torch.compile(model.loss, backend="aot_eager") if compiled else model.loss
    loss = loss_of(tokens(), tokens().roll(-1, 1))
    with pytest.raises(RuntimeError, match=r"running_phi has moved.*recompute_activations"):
        loss.backward()
    plain.recompute_activations()
    assert torch.equal(plain.loss(tokens(), tokens().roll(-1, 1)), loss)
    for got, want in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", ["batch", "power"])
def test_recomputed_activations_move_statistics_once(variant: str) -> None:
    plain, model = (past_warmup(make(**VARIANTS[variant])) for _ in range(2))
    model.recompute_activations()
    for _ in range(2):
        compare(step(model, model.loss, tokens()), step(plain, plain.loss, tokens()))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["layer", "batch", "decay"])
def test_a_cuda_graph_replays_the_training_step(variant: str) -> None:
    """Capture fails on a host synchronisation or on memory that is not the graph's."""
    with use_backend("triton"):
        eager, model = make("cuda", **VARIANTS[variant]), make("cuda", **VARIANTS[variant])
        model.recompute_activations()
        x = tokens(device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and warms the allocator up
            for _ in range(3):
                step(model, model.loss, x)
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = model.loss(x, x.roll(-1, 1))
            loss.backward()
        for seed in range(2):
            new = torch.randint(0, 28, x.shape, generator=torch.Generator().manual_seed(seed)).cuda()
            x.copy_(new)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
            graph.replay()
            want = step(eager, eager.loss, new)
            torch.testing.assert_close(loss, want["loss"], rtol=1e-4, atol=1e-4)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["layer", "batch"])
def test_a_training_step_asks_the_device_for_nothing(variant: str) -> None:
    with use_backend("triton"):
        model = make("cuda", **VARIANTS[variant])
        x = tokens(device="cuda")
        step(model, model.loss, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.loss(x, x.roll(-1, 1)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_the_defaults_of_torch_change_no_tensor_of_a_model(default: Any) -> None:
    """torch.set_default_dtype and set_default_device are for tensors that the user makes."""
    models = [make(blocks=1, **VARIANTS[name]) for name in ("layer", "ilif", "decay")]
    s, weight = (torch.rand(300, 70) < 0.2).float(), torch.randn(8, 70)
    words, by_columns = ops.pack_spikes(s), weight.t().contiguous().t()
    read = tokens()
    q, threshold = torch.ones(2, 1, 2, 5, 8), torch.full((), 0.5, requires_grad=True)
    x = torch.ones(4, 3, 8, requires_grad=True)

    def results() -> list[Tensor]:
        found = [ops.spike_linear(s, weight), ops.spike_linear(s[:3], by_columns)]
        found += [ops.pack_spikes(s), ops.unpack_spikes(words, 70), ops.spike_linear(words, weight)]
        found += ops.spike_attention(q, q, q, return_state=True)
        spikes, v = ops.lif(x, v_threshold=threshold, return_state=True)
        found += [spikes, v, *torch.autograd.grad(spikes.sum() + v.sum(), (x, threshold))]
        for model in models:
            model.train()
            found += step(model, model.loss, read).values()
            model.eval()
            logits, state = model.prefill(read)
            found += [logits, model.step(read[:, 0], state)[0]]
            for options in ({"temperature": 0.0}, {"seed": 1}, {"seed": 1, "past": "slide"}):
                found.append(model.generate(read[:, :5], 12, **options))
        return found

    wanted = results()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_shapes_without_values(variant: str) -> None:
    """On the meta device, in training, recomputed and read."""
    model, empty = make(**VARIANTS[variant]), make(**VARIANTS[variant]).to("meta")
    read = tokens().to("meta")
    for recompute in {False, model.config.neuron == "lif"}:
        empty.recompute_activations(recompute)
        loss = empty.loss(read, read)
        loss.backward()
        assert loss.is_meta and loss.shape == ()
    for name, parameter in empty.named_parameters():
        assert parameter.grad is not None and parameter.grad.is_meta, name
    with torch.no_grad():
        logits, state = empty.eval().prefill(read)
    wanted, read_state = model.eval().prefill(tokens())
    assert logits.is_meta and logits.shape == wanted.shape and state.nbytes == read_state.nbytes


def test_one_token_passes_the_dispatcher_by_only_where_nothing_watches(monkeypatch):
    """What `spike_linear` gives without a gradient, and all that keeps it on the dispatcher's way."""
    import importlib

    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    from spikedecoder import ext

    if not ext.is_built():
        pytest.skip(ext.NOT_BUILT)
    native = importlib.import_module("spikedecoder.ext.cpu.spike_linear")
    s, bias = (torch.rand(4, 70) < 0.2).float(), torch.randn(8)
    weight = torch.randn(70, 8).t()
    straight, seen = [], []

    def few_rows(*given):
        found = native.few_rows(*given)
        straight.append(found is not None)
        return found

    operator = importlib.import_module("spikedecoder.ops.spike_linear")
    assert operator._few_rows("auto") is operator._few_rows("cpu") is native.few_rows
    # their tensors lie on a GPU, where nothing of the CPU's is asked
    assert not any(operator._few_rows(other) for other in ("triton", "cuda", "reference"))
    monkeypatch.setattr(operator, "_few_rows", lambda requested: few_rows)

    def passes_by(*given):
        """Whether the call was answered before the dispatcher, if it was not refused."""
        straight.clear()
        with contextlib.suppress(TypeError, ValueError, NotImplementedError, BackendError):
            ops.spike_linear(*given)
        return straight[:1] == [True]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        pass

    with use_backend("cpu"):
        y, words = ops.spike_linear(s, weight, bias), ops.pack_spikes(s)
        torch.testing.assert_close(y, ops.spike_linear(s, weight.contiguous(), bias))
        assert torch.equal(ops.spike_linear(words, weight, bias), y)
        assert torch.equal(ops.spike_linear(s.view(2, 1, 2, 70), weight, bias).view(4, 8), y)
        for given in (
            (s, weight, bias),
            (s, weight),
            (words, weight),
            (s, torch.nn.Parameter(weight, False)),
        ):
            assert passes_by(*given)
        for given in (
            (weight, words),
            (s, weight.contiguous()),
            (s[:, :-1], weight),
            (s, weight, bias[1:]),
            (s, weight, torch.randn(16)[::2]),
            (s.double(), weight),
            (s, weight.double()),
            (s.bool(), weight),
            (s.to("meta"), weight),
            (s, torch._neg_view(weight)),
            (s, weight.to_sparse()),
            (s, weight, torch._efficientzerotensor((8,))),
            (s.as_subclass(Marked), weight),
            (s.expand(9, 4, 70), weight),
            (s[:0], weight),
            (words | 1 << 50, weight),
            (s.tolist(), weight),
            (None, None, None),
        ):
            assert not passes_by(*given)
        with Watch():
            assert torch.equal(ops.spike_linear(s, weight, bias), y)
            assert not passes_by(s, weight, bias) and not passes_by(words, weight, bias)
        assert any("spike_linear" in name for name in seen)
        with torch.autocast("cpu"):
            assert ops.spike_linear(s, weight, bias).dtype == torch.bfloat16
        with forward_ad.dual_level():
            assert not passes_by(s, weight, bias)
        for learned in ((s, weight.clone().requires_grad_()), (s.clone().requires_grad_(), weight)):
            assert ops.spike_linear(*learned).requires_grad
            with torch.no_grad():
                assert passes_by(*learned)
        assert ops.spike_linear(s, weight, bias.clone().requires_grad_()).requires_grad
        inside = []
        torch.vmap(lambda x: (inside.append(passes_by(x, weight)), x)[1])(s[None])
        assert inside == [False]
        with pytest.raises(ValueError, match="bits are set beyond"):
            ops.spike_linear(words | 1 << 50, weight)
        monkeypatch.setattr(importlib.import_module("spikedecoder.ext.cpu._memory"), "SEES_TENSORS", False)
        assert not passes_by(s, weight, bias)
        torch.testing.assert_close(ops.spike_linear(s, weight, bias), y)  # in another order of sums, maybe


def test_a_gradient_that_holds_its_negative_is_read_as_what_it_is():
    x, weight = torch.randn(4, 3, 8), torch.randn(8, 8)
    spikes = (x > 0).float()
    for operator in (
        lambda x: ops.lif(x),
        lambda x: ops.ilif(x, levels=3),
        lambda x: ops.binarize(x),
        lambda x: ops.spike_linear(spikes + (x - x.detach()), weight),
    ):
        learned = x.clone().requires_grad_()
        expected, found = (
            torch.autograd.grad(operator(learned), learned, grad)[0]
            for grad in (-torch.ones_like(x), torch._neg_view(torch.ones_like(x)))
        )
        assert expected.any() and torch.equal(expected, found)


def test_a_tangent_is_refused_where_it_would_be_lost():
    x = torch.randn(4, 3, 8)
    for operator in (ops.lif, ops.binarize, lambda x: ops.spike_linear(x, torch.randn(8, 8))):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(operator, (x,), (torch.ones_like(x),))
