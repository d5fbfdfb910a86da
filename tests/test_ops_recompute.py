"""What operators keep for backward: bits and statistics; the same results as when they keep everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, ops, use_backend
from spikedecoder.params import LIFParams, NormParams
from spikedecoder.testing import Case, cases, leaves, make_inputs, run

pytestmark = pytest.mark.triton_interpreter
BACKENDS = ("reference", "cpu", "triton")
SCRIPT = Path(__file__).parent.parent / "bench" / "activations.py"


def kept(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    """What the operator saves, the leaves left out."""
    own = {t.data_ptr() for t in leaves(inputs).values() if t.dim() != 0}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run(case, inputs, backward=False)
    return [t for t in saved if t.data_ptr() not in own]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("linear_norm_lif", "linear_norm"), ids=str)
def test_recomputed_is_kept(case: Case, backend: str) -> None:
    with use_backend(backend):
        want = run(case, make_inputs(case) | {"recompute": False})
        got = run(case, make_inputs(case) | {"recompute": True})
        saved = kept(case, make_inputs(case) | {"recompute": True})
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(got["out"], want["out"])
    rows, inputs, outputs = 3 * 2 * 5, case.shape[-2], case.shape[-1]
    floats = [t for t in saved if t.dtype.is_floating_point]
    assert [t.shape for t in saved if t.dtype == torch.int64] == [(3, 2, 5, -(-inputs // 64))]
    assert max(t.numel() for t in floats) == (rows if case.name == "layer" else outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [c for c in cases("lif", "norm_lif") if c.name in ("wide", "state", "batch-train", "power-train")],
    ids=str,
)
def test_neurons_keep_what_they_are_given(case: Case, backend: str) -> None:
    """x itself, and of a norm the statistics: nothing else of its size."""
    inputs, saved = make_inputs(case), []
    with (
        use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        run(case, inputs, backward=False)
    x, given = inputs["x"], {t.data_ptr() for t in leaves(inputs).values()}
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    statistics = [t.numel() for t in saved if t.data_ptr() not in given]
    size = x.numel() // x.shape[-1] if case.name == "wide" else x.shape[-1]  # a number a row, or a channel
    assert set(statistics) == ({size} if case.operator == "norm_lif" else set())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("spike_attention", {}),
        ("spike_attention", {"decay": True, "state": True, "return_state": True}),
        ("spike_attention_lif", {"decay": True}),
    ],
    ids=str,
)
def test_attention_keeps_bits(operator: str, options: dict[str, Any], backend: str) -> None:
    case = Case(operator, "small", (2, 2, 3, 9, 18), options, exact=False)
    with use_backend("reference"):
        want = run(case, make_inputs(case))
    with use_backend(backend):
        got = run(case, make_inputs(case))
        saved = kept(case, make_inputs(case))
    assert torch.equal(got["out"], want["out"]) or operator == "spike_attention"
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)
    t, b, h, s, d = case.shape
    words = [x for x in saved if x.dtype == torch.int64]
    assert [x.shape for x in words] == [(t, b, s, -(-h * d // 64))] * 3
    assert all(x.shape[-2:] != (s, d) for x in saved)


def gradients(backend: str, recompute: bool, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = SpikeDecoderConfig.preset(
        "default-lif", blocks=2, heads=2, token_dim=12, position_dim=4, mlp_ratio=2, timesteps=2, max_len=8,
        **changes,
    )  # fmt: skip
    model = SpikeDecoder(config)
    model.recompute_activations(recompute)
    tokens = torch.randint(0, 28, (2, 8), generator=torch.Generator().manual_seed(1))
    with use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.loss(tokens, tokens.roll(-1, 1))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found | dict(model.named_buffers())


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float32), ("cpu", torch.float32), ("reference", torch.bfloat16)],
    ids=str,
)
def test_a_model_that_recomputes_learns_the_same(backend: str, dtype: torch.dtype, norm: str) -> None:
    want = gradients(backend, False, dtype, norm=norm)
    got = gradients(backend, True, dtype, norm=norm)
    assert got.keys() == want.keys() and torch.equal(got["loss"], want["loss"])
    scale = max(t.abs().max().item() for n, t in want.items() if n.endswith("weight"))
    for name, value in want.items():
        limit = 1e-5 if dtype == torch.float32 else 2e-2  # sums of half-precision terms, in another order
        torch.testing.assert_close(got[name], value, rtol=limit, atol=limit * scale)


def test_evaluation_and_hooks_see_the_linear_as_ever() -> None:
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", blocks=1, max_len=8))
    model.recompute_activations()
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, n=name: seen.append(n))
    for grad in (False, True):
        seen.clear()
        with torch.set_grad_enabled(grad):
            model(torch.zeros(1, 3, dtype=torch.int64))
        assert {"blocks.0.mlp.fc1.linear", "blocks.0.mlp.fc2.linear", "blocks.0.mlp.fc2.norm"} <= {*seen}
    model.recompute_activations(False)
    assert not any(getattr(module, "recompute", False) for module in model.modules())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["linear_norm_lif", "linear_norm"])
def test_opcheck(operator: str, backend: str) -> None:
    i = make_inputs(cases(operator)[0])
    s, weight, bias, n = i["s"], i["weight"], i["bias"], i["n"]
    with use_backend("reference"):
        current, words = torch.nn.functional.linear(s, weight, bias).detach(), ops.pack_spikes(s.detach())
    arguments: tuple[Any, ...] = (s, current, words, weight, bias, n.weight, n.bias)
    if operator == "linear_norm":
        arguments += (1e-5, torch.float32, "triton" if backend == "triton" else "reference", backend)
    else:
        settings = (None, None, i["threshold"], None, None, None, 1e-5, True, None, *LIFParams().flat())
        arguments += (*settings, backend, backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if backend == "triton":  # the interpreter is slow
        tests = tests[:3]
    torch.library.opcheck(getattr(torch.ops.spikedecoder, operator).default, arguments, test_utils=tests)
    torch.library.opcheck(
        torch.ops.spikedecoder.spike_linear_from_words.default,
        (words, s.shape[-1], weight.detach(), bias.detach(), backend),
    )


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("activations", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["activations"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, "cpu"), (torch.float32, "triton"), (torch.bfloat16, "triton")],
    ids=str,
)
def test_the_readme_models_step_keeps_an_eighth(dtype: torch.dtype, backend: str) -> None:
    config = SpikeDecoderConfig.preset("original-char")
    found = load_script().measure(config, 32, 256, dtype, backend)
    assert 0 < found["bits, recomputed"] <= found["eager reference"] / 8
    assert found["bits, recomputed"] < found["bits"] < found["eager reference"]


def test_counting_is_counting() -> None:
    """Against tensors that are there: a Linear and a LIF keep their inputs."""
    script = load_script()
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", blocks=1, max_len=8))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with use_backend("cpu"):
        real = script.saved_bytes(model, tokens)
    fake = script.measure(model.config, 2, 8, torch.float32, "cpu")["bits"]
    assert real == pytest.approx(fake, rel=0.05)


def test_bad_input() -> None:
    n = NormParams("layer", torch.ones(5), torch.zeros(5))
    with pytest.raises(ValueError, match="s: got 3 channels"):
        ops.linear_norm_lif(torch.ones(2, 3), torch.ones(5, 4), None, n, LIFParams())
    with pytest.raises(ValueError, match="x: got 6 channels"):
        ops.linear_norm_lif(torch.ones(2, 4), torch.ones(6, 4), None, n, LIFParams())
    with pytest.raises(ValueError, match="x: got T = 0 timesteps"):
        ops.linear_norm_lif(torch.ones(0, 4), torch.ones(5, 4), None, n, LIFParams())
    with pytest.raises(ValueError, match="v_threshold: got shape"):
        threshold = torch.ones(3)
        ops.linear_norm_lif(torch.ones(2, 4), torch.ones(5, 4), None, n, LIFParams(), threshold=threshold)
    with pytest.raises(ValueError, match="bias: got shape"):
        ops.linear_norm(torch.ones(2, 4), torch.ones(5, 4), torch.ones(4), n)
