"""The same model trained on the same text learns the same on every backend.

A spike at the threshold may fall either way where sums are taken in another order, so two runs drift apart
step by step; what they learn must not. Bound: the mean loss of each 50 steps within 2 %.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.data import CharTokenizer, WindowSampler, builtin_text
from spikedecoder.ops._dispatch import Call, candidates, why_not

STEPS, WINDOW = 300, 50
# what a fast backend computes these models with, in training
OPERATORS = {
    "default": {"norm_ilif", "ilif", "binarize", "spike_attention"},
    "default-lif": {"norm_lif", "lif", "binarize", "spike_attention_lif", "spike_linear"},
    "original-char": {"norm_lif", "lif", "binarize", "spike_attention_lif", "spike_linear"},
}


class _Watch(TorchDispatchMode):
    """The names of our operators that are called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spikedecoder":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def _curve(preset: str, backend: str, device: str) -> tuple[torch.Tensor, set[str]]:
    """The mean loss of each 50 steps, and the operators of the first."""
    tokenizer = CharTokenizer.original()
    tokens = tokenizer.encode(builtin_text()[:60_000])
    config = SpikeDecoderConfig.preset(
        preset,
        max_len=32,
        token_dim=22,
        position_dim=10,
        blocks=2,
        heads=2,
        vocab_size=tokenizer.vocab_size,
    )
    torch.manual_seed(0)
    model = SpikeDecoder(config).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=4e-3, betas=(0.9, 0.95))
    sampler = WindowSampler(tokens, config.max_len, 8, seed=0)
    losses, watch = [], _Watch()
    with use_backend(backend):
        for step in range(STEPS):
            inputs, targets = (t.to(device) for t in sampler.batch(step))
            with watch if step == 0 else nullcontext():
                loss = model.loss(inputs, targets)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses).reshape(-1, WINDOW).mean(1), watch.names


def _compare(preset: str, backend: str, device: str) -> None:
    for operator in OPERATORS[preset] - {"norm_ilif"}:  # which is where norm_lif is
        reason = why_not(backend, operator, Call(torch.device(device), torch.float32, ()))
        if reason is not None:
            pytest.skip(f"{backend} cannot run {operator} here: {reason}")
    (reference, _), (fast, used) = _curve(preset, "reference", device), _curve(preset, backend, device)
    assert used >= OPERATORS[preset] | {f"{name}_backward" for name in OPERATORS[preset] - {"spike_linear"}}
    # the original learns slowly
    assert reference[-1] < 0.87 * reference[0], f"the reference does not learn: {reference.tolist()}"
    torch.testing.assert_close(fast, reference, rtol=0.02, atol=0)


@pytest.mark.parametrize("preset", OPERATORS)
def test_compiled_cpu_backend_learns_what_the_reference_learns(preset):
    assert "cpu" in candidates(torch.device("cpu"))
    _compare(preset, "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("preset", OPERATORS)
@pytest.mark.parametrize("backend", ["triton"])
def test_gpu_backend_learns_what_the_reference_learns(backend, preset):
    _compare(preset, backend, "cuda")
