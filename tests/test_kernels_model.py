"""A whole model on the Triton kernels: the losses and gradients of the reference, step for step."""

from __future__ import annotations

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.nn.linear import LinearNormLIF
from spikedecoder.testing import Case, cases, make_inputs

pytest.importorskip("triton")
from spikedecoder.kernels import _launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.triton_interpreter]


def losses(
    backend: str, steps: int, lr: float = 0.05, batches: int = 1000, **changes: object
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, and the last step's gradients; the batches come again after `batches` steps."""
    torch.manual_seed(0)
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=2, token_dim=12, position_dim=4, mlp_ratio=2, timesteps=2, **changes
    )
    model = SpikeDecoder(config).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found, gradients = [], {}
    with use_backend(backend):
        for step in range(steps):
            generator = torch.Generator().manual_seed(step % batches)
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
def test_the_loss_curve_is_that_of_the_reference() -> None:
    """Spikes at the threshold drift apart step by step; what is learned must not (mean of 4 steps, 2 %)."""
    curves = (losses(backend, 16, lr=0.5, batches=2)[0] for backend in ("reference", "triton"))
    expected, actual = (torch.tensor(curve).view(-1, 4).mean(1) for curve in curves)
    assert expected[-1] < 0.9 * expected[0], f"the reference does not learn: {expected.tolist()}"
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_inference_runs_linear_norm_lif_in_one_kernel(norm: str) -> None:
    """... and with a hook on the Linear the parts, to the same logits."""
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=2, token_dim=12, position_dim=4, mlp_ratio=2, timesteps=2, norm=norm
    )
    model = SpikeDecoder(config).to(DEVICE).eval()
    tokens = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    with use_backend("triton"), torch.no_grad(), _launch.record(9) as launches:
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


def test_compiled_is_eager() -> None:
    """The whole model in one graph, by inductor; the operators stay calls of the kernels."""
    torch.manual_seed(0)
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=1, token_dim=6, position_dim=2, mlp_ratio=1, timesteps=2
    )
    model = SpikeDecoder(config).to(DEVICE)
    tokens = torch.randint(0, 28, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
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
        arguments = (inputs["q"], inputs["k"], inputs["v"], 0.125, None, None, [], True, "triton", 1)
        torch.library.opcheck(torch.ops.spikedecoder.spike_attention.default, arguments)
