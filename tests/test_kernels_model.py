"""A whole model on the Triton kernels: the losses and gradients of the reference, step for step."""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.nn.linear import LinearNormLIF
from spikedecoder.ops._dispatch import OPERATORS
from spikedecoder.testing import Case, cases, make_inputs

pytest.importorskip("triton")
from spikedecoder.kernels import _launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.triton_interpreter]


def losses(backend: str, steps: int, **changes: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, and the last step's gradients."""
    torch.manual_seed(0)
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=2, token_dim=12, position_dim=4, mlp_ratio=2, timesteps=2, **changes
    )
    model = SpikeDecoder(config).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found, gradients = [], {}
    with use_backend(backend):
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 28, (2, 9), generator=generator).to(DEVICE)
            loss = model.loss(tokens, tokens.roll(-1, 1))
            optimizer.zero_grad()
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            found.append(loss.item())
    return found, gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "batch", "learn_threshold": True},
        {"spiking_residuals": 2, "surrogate": "atan", "surrogate_alpha": 2.0, "v_reset": None},
    ],
    ids=["layer", "batch", "spiking residuals"],
)
def test_a_model_learns_the_same(changes: dict[str, object]) -> None:
    expected, want = losses("reference", 2, **changes)
    actual, got = losses("triton", 2, **changes)
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert got.keys() == want.keys()
    # some are zero but for rounding, as that of a bias before a BatchNorm
    largest = max(gradient.norm() for gradient in want.values())
    for name, gradient in want.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp(min=0.05 * largest)
        assert error < 1e-3, f"{name}: relative error {error:.2g}"


@pytest.mark.slow
def test_200_steps_on_text_are_those_of_the_reference() -> None:
    """On a GPU, where other sums may move a spike, the mean of each 50 steps, within 2 %."""
    curve = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "loss_curve.py"))
    want = curve["train"]("reference", DEVICE)
    means = torch.tensor(want[0]).view(-1, 50).mean(1)
    assert len(want[0]) == 200 and means[-1] < 0.95 * means[0]
    assert all(way.norm() > 0 for way in want[1].values())
    with _counted() as kernels:
        got = curve["train"]("triton", DEVICE)
    # q, k and v are packed for attention's backward by what "auto" takes, which is Triton on a GPU only
    packed = {"pack_kernel": 9, "unpack_kernel": 3} if DEVICE == "cuda" else {"pack_kernel": 6}
    assert {name: n // 200 for name, n in kernels.items()} == {
        "binarize_forward": 1, "binarize_backward": 1, "lif_forward": 3, "lif_backward": 4,
        "norm_forward": 2, "norm_backward": 2, "norm_lif_forward": 4, "norm_lif_backward": 4,
        "attention_lif_forward": 1, "attention": 4, "linear_forward": 6, "linear_weight_grad": 6,
        "add_parts": 12, **packed,
    }  # fmt: skip
    if DEVICE == "cuda":
        torch.testing.assert_close(torch.tensor(got[0]).view(-1, 50).mean(1), means, rtol=0.02, atol=0)
        return
    loss, way = curve["differences"](got, want)
    assert loss <= curve["LOSS_BOUND"] and way <= curve["WAY_BOUND"]


@contextlib.contextmanager
def _counted() -> Iterator[collections.Counter[str]]:
    """How often each kernel is launched."""
    counts: collections.Counter[str] = collections.Counter()
    real = _launch.launch

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counts[kernel.__name__] += 1
        real(kernel, *args, **kwargs)

    for name in OPERATORS:
        if importlib.util.find_spec(f"spikedecoder.kernels.{name}"):
            importlib.import_module(f"spikedecoder.kernels.{name}")
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for n, m in sys.modules.items() if n.startswith("spikedecoder.kernels.")]:
            if getattr(module, "launch", None) is real:
                patch.setattr(module, "launch", launch)
        yield counts


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_inference_runs_linear_norm_lif_in_one_kernel(norm: str) -> None:
    """... and with a hook on the Linear the parts, to the same logits."""
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=2, token_dim=12, position_dim=4, mlp_ratio=2, timesteps=2, norm=norm
    )
    model = SpikeDecoder(config).to(DEVICE).eval()
    tokens = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    with use_backend("triton"), torch.no_grad(), _launch.record(80) as launches:
        model(tokens)
    fused = [launch for launch in launches if launch.kernel.__name__ == "linear_norm_lif_forward"]
    sites = [m for m in model.modules() if isinstance(m, LinearNormLIF)]
    assert len(fused) == len(sites) > 0
    with torch.no_grad(), use_backend("reference"):
        want = model(tokens)
    seen: list[object] = []
    for hooked in (False, True):
        for site in sites if hooked else ():
            site.linear.register_forward_hook(lambda *_: seen.append(_))
        with torch.no_grad(), use_backend("triton"):
            torch.testing.assert_close(model(tokens), want, rtol=1e-4, atol=1e-4)
        assert len(seen) == len(sites) * hooked


def tiny() -> tuple[SpikeDecoder, torch.Tensor]:
    """A model, and tokens."""
    torch.manual_seed(0)
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=1, token_dim=6, position_dim=2, mlp_ratio=1, timesteps=2
    )
    tokens = torch.randint(0, 28, (2, 9), generator=torch.Generator().manual_seed(1))
    return SpikeDecoder(config).to(DEVICE), tokens.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_references(dtype: torch.dtype) -> None:
    model, tokens = tiny()
    found = {}
    for backend in ("reference", "triton"):
        model.zero_grad()
        with use_backend(backend), torch.autocast(DEVICE, dtype):
            loss = model.loss(tokens, tokens.roll(-1, 1))
        (64 * loss).backward()  # as a scaler does, for float16
        assert loss.dtype == torch.float32
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        head = model.head.linear.weight.grad
        assert head is not None
        found[backend] = loss.detach(), head.clone()
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


def test_exported_is_eager() -> None:
    model, tokens = tiny()
    program = torch.export.export(model.eval(), (tokens,))
    with torch.no_grad(), use_backend("triton"):
        torch.testing.assert_close(program.module()(tokens), model(tokens))


def test_compiled_is_eager() -> None:
    """The whole model in one graph, by inductor; the operators stay calls of the kernels."""
    model, tokens = tiny()
    with use_backend("triton"):
        eager = model.loss(tokens, tokens.roll(-1, 1))
        want = torch.autograd.grad(eager, list(model.parameters()), allow_unused=True)
        compiled = torch.compile(model.loss, fullgraph=True)(tokens, tokens.roll(-1, 1))
        got = torch.autograd.grad(compiled, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", cases("lif")[3:4] + cases("spike_attention")[:1], ids=str)
def test_opcheck(case: Case) -> None:
    inputs = make_inputs(case, torch.float32, DEVICE)
    if case.operator == "lif":
        arguments = (inputs["x"], None, None, 2.0, 1.0, 0.0, True, "sigmoid", 4.0, True, "triton", False)
        torch.library.opcheck(torch.ops.spikedecoder.lif.default, arguments)
    else:
        arguments = (inputs["q"], inputs["k"], inputs["v"], 0.125, *[None] * 5, True, "triton", 1)
        torch.library.opcheck(torch.ops.spikedecoder.spike_attention.default, arguments)
