"""A training step as one CUDA graph: on a GPU for real, elsewhere all of it but the capture."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import StopAt, corpus, files, settings, tiny  # noqa: F401

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.data import Corpus
from spikedecoder.presets import PRESETS
from spikedecoder.training import TrainConfig, TrainResult, train
from spikedecoder.training import graph as module
from spikedecoder.training.graph import BEFORE, GraphedStep, why_not

DROPOUT = {"attention_dropout": 0.2, "mlp_dropout": 0.2}
VARIANTS: dict[str, dict[str, Any]] = {
    "layer": {},
    "layer-dropout": DROPOUT,
    "batch": {"norm": "batch", "learn_threshold": True},
    "power": {"norm": "power"},
    "learned": {"position_encoding": "learned", "token_encoding": "learned"},
    "residuals": {"spiking_residuals": 2, "reunite": "concatenate", "v_reset": None},
    "decay": {"decay_fastest": 0.9, "decay_slowest": 0.99, "attention_norm": True, "token_shift": 3},
    "ilif": {"neuron": "ilif", "levels": 4, "timesteps": 1, "v_reset": None, "norm": "batch"},
    "softmax": {"spike_degree": 0, **DROPOUT},
}


# --- when it is used ---


@pytest.mark.parametrize(
    ("changes", "device", "processes", "reason"),
    [
        ({}, "cuda", 1, None),
        ({"mixed_precision": "bf16", "recompute": True}, "cuda", 1, None),
        ({"cuda_graph": False}, "cuda", 1, "cuda_graph is off"),
        ({}, "cpu", 1, "the model is on cpu"),
        ({}, "mps", 1, "the model is on mps"),
        ({}, "cuda", 2, "processes exchange gradients"),
        ({"compile": True}, "cuda", 1, "torch.compile has its own"),
        ({"grad_accum": 2}, "cuda", 1, "accumulation adds"),
        ({"mixed_precision": "fp16"}, "cuda", 1, "fp16 scales"),
    ],
)
def test_why_not(changes: dict[str, Any], device: str, processes: int, reason: str | None) -> None:
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    got = why_not(settings(**changes), accelerator)
    assert got is None if reason is None else got is not None and reason in got


def test_runs_from_before_the_setting_go_on_and_may_change_it(corpus: Corpus, tmp_path: Path) -> None:
    c = settings(steps=4)
    train(tiny(corpus), corpus, c, out=tmp_path / "run", reporter=StopAt(2))
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    assert run["train"].pop("cuda_graph") is True
    path.write_text(json.dumps(run))
    assert TrainConfig.from_dict(run["train"]) == c
    off = c.replace(cuda_graph=False)
    assert train(tiny(corpus), corpus, off, out=tmp_path / "run", resume=True).step == 4
    assert json.loads(path.read_text())["train"]["cuda_graph"] is False


# --- the step itself, without the capture ---


def batch(seed: int, config: SpikeDecoderConfig, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (2, config.max_len), generator=generator).to(device)
    return tokens, tokens.roll(-1, 1)


def make(corpus: Corpus, device: str = "cpu", **changes: Any) -> SpikeDecoder:
    torch.manual_seed(0)
    return SpikeDecoder(tiny(corpus, **changes)).to(device)


def plainly(model: SpikeDecoder) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model.loss(tokens, targets)
        loss.backward()
        return loss.detach()

    return backward


def stepwise(model: SpikeDecoder, backward: Callable[[Tensor, Tensor], Tensor], steps: int) -> list[Any]:
    """Losses and gradients of steps that change the weights, each with a seed of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: list[Any] = []
    for i in range(steps):
        torch.manual_seed(i)
        loss = backward(*batch(i, model.config, str(model.device)))
        found.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()(batch(99, model.config, str(model.device))[0])
        model.train()
    return found


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_loss(corpus: Corpus, variant: str, device: str) -> None:
    """Losses, gradients, weights and running statistics, one batch, one seed after the other."""
    eager, model = make(corpus, device, **VARIANTS[variant]), make(corpus, device, **VARIANTS[variant])
    keys = list(model.state_dict())
    step = GraphedStep(plainly(model), model.parameters())
    want, got = stepwise(eager, plainly(eager), BEFORE + 4), stepwise(model, step, BEFORE + 4)
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(got, want, **exact)
    exact = exact if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), **exact)
    assert list(model.state_dict()) == keys and model.training
    counts = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(int(count) == BEFORE + 4 for count in counts)
    assert bool(counts) == (model.config.norm == "batch" and model.config.spike_degree > 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_makes_the_dropout_of_a_replay(corpus: Corpus, device: str) -> None:
    model = make(corpus, device, **DROPOUT)
    step, inputs = GraphedStep(plainly(model), model.parameters()), batch(0, model.config, device)
    losses = []
    for seed in (0, 1) * 4:
        torch.manual_seed(seed)
        losses.append(step(*inputs).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    assert losses[::2] == pytest.approx(losses[:1] * 4, rel=1e-5)
    assert losses[1::2] == pytest.approx(losses[1:2] * 4, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_the_call_before_is_left_in_gradient_or_loss(corpus: Corpus, device: str) -> None:
    model = make(corpus, device)
    step = GraphedStep(plainly(model), model.parameters())
    losses, gradients = [], []
    for _ in range(BEFORE + 3):  # without zero_grad
        losses.append(step(*batch(0, model.config, device)))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(3.0)
    for other in gradients:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)
    step(*batch(1, model.config, device))
    torch.testing.assert_close(losses, losses[:1] * len(losses))
    with pytest.raises(ValueError, match=r"batch: got shape \(1, 16\), captured is \(2, 16\)"):
        step(*(t[:1] for t in batch(0, model.config, device)))


@pytest.mark.parametrize("variant", ["layer-dropout", "batch"])
def test_a_run_is_the_same_run(
    corpus: Corpus, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evaluations between steps, stopped and resumed; and nothing keeps the step alive behind it."""
    config, c = tiny(corpus, **VARIANTS[variant]), settings(eval_every=3)
    train(config, corpus, c, out=tmp_path / "plain")
    made: list[weakref.ref[GraphedStep]] = []

    class Watched(GraphedStep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(module, "why_not", lambda *_: None)
    monkeypatch.setattr(module, "GraphedStep", Watched)
    gc.disable()
    try:
        result = train(config, corpus, c, out=tmp_path / "whole")
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()
    assert all(p.grad is None for p in result.model.parameters())
    assert files(tmp_path / "whole" / "last") == files(tmp_path / "plain" / "last")
    train(config, corpus, c, out=tmp_path / "run", reporter=StopAt(5))
    train(config, corpus, c, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run" / "last") == files(tmp_path / "plain" / "last")


# --- what a capture would refuse ---

HOST = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Refuse(TorchDispatchMode):
    """No value is read on the host, and no tensor made there to be copied to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(HOST), f"{name} waits for the device"
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        assert not by_mask, f"{name} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", [*VARIANTS, *PRESETS])
def test_a_step_asks_the_device_for_nothing(
    corpus: Corpus, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which in PRESETS:
        small = {"max_len": 8, "token_dim": 12, "heads": 1, "blocks": 1, "vocab_size": 30}
        model = SpikeDecoder(SpikeDecoderConfig.preset(which, **small))
    else:
        model = make(corpus, **VARIANTS[which])
    monkeypatch.setattr(model, "_check", lambda *_: None)  # looks at ids on the CPU only
    inputs = batch(0, model.config)
    with use_backend("reference"), Refuse():
        plainly(model)(*inputs)
    with pytest.raises(AssertionError, match="waits for the device"), Refuse():
        model.loss(*inputs).item()


# --- on a GPU ---


def run_of(corpus: Corpus, out: Path, variant: str, **changes: Any) -> tuple[TrainResult, list[float]]:
    same = {"steps": BEFORE + 5, "eval_every": 3, "lr": 1e-3, "batch_size": 4, "device": "cuda"}
    result = train(tiny(corpus, **VARIANTS[variant]), corpus, settings(**same, **changes), out=out)
    return result, json.loads((out / "last" / "trainer.json").read_text())["recent_losses"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_with_and_without(
    corpus: Corpus, tmp_path: Path, variant: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = []

    def counted(self: GraphedStep, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        captures.append(stream)
        return original(self, stream)

    original = GraphedStep._capture
    monkeypatch.setattr(GraphedStep, "_capture", counted)
    plain, wanted = run_of(corpus, tmp_path / "plain", variant, mixed_precision=precision, cuda_graph=False)
    assert not captures
    graphed, losses = run_of(corpus, tmp_path / "graph", variant, mixed_precision=precision)
    assert len(captures) == 1 and len(losses) == BEFORE + 5
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert graphed.evaluation is not None and plain.evaluation is not None
    assert graphed.evaluation.loss == pytest.approx(plain.evaluation.loss, rel=1e-3)
    torch.testing.assert_close(graphed.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_replay_does_not_wait_for_the_device(corpus: Corpus) -> None:
    model = make(corpus, "cuda", norm="batch")
    step, inputs = GraphedStep(plainly(model), model.parameters()), batch(0, model.config, "cuda")
    for _ in range(BEFORE + 1):
        step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_cannot_be_captured_says_how_to_go_on(corpus: Corpus, tmp_path: Path) -> None:
    """In a process of its own: a capture that failed leaves the stream unusable."""
    import subprocess
    import sys

    script = """
import torch
from spikedecoder.training.graph import BEFORE, GraphedStep
p = torch.nn.Parameter(torch.ones(3, device="cuda"))
def backward(x, y):
    loss = (p * x * float(y.sum())).sum()
    loss.backward()
    return loss.detach()
step = GraphedStep(backward, [p])
for _ in range(BEFORE + 1):
    step(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "train with cuda_graph=false" in done.stderr
