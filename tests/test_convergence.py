"""The same model trained on the same text learns the same on every backend.

A spike at the threshold may fall either way where sums are taken in another order, so two runs drift apart
step by step; what they learn must not. Bound: the mean loss of each 50 steps within 2 %.
"""

from __future__ import annotations

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.data import CharTokenizer, WindowSampler, builtin_text
from spikedecoder.ops._dispatch import Call, candidates, why_not

STEPS, WINDOW = 300, 50
OPERATORS = ("lif", "norm_lif", "spike_attention", "spike_attention_lif", "spike_linear", "binarize")


def _curve(backend: str, device: str) -> torch.Tensor:
    tokenizer = CharTokenizer.original()
    tokens = tokenizer.encode(builtin_text()[:60_000])
    config = SpikeDecoderConfig.preset(
        "default",
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
    losses = []
    with use_backend(backend):
        for step in range(STEPS):
            inputs, targets = (t.to(device) for t in sampler.batch(step))
            loss = model.loss(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses).reshape(-1, WINDOW).mean(1)


def _compare(backend: str, device: str) -> None:
    for operator in OPERATORS:
        reason = why_not(backend, operator, Call(torch.device(device), torch.float32, ()))
        if reason is not None:
            pytest.skip(f"{backend} cannot run {operator} here: {reason}")
    reference, fast = _curve("reference", device), _curve(backend, device)
    assert reference[-1] < 0.85 * reference[0], f"the reference does not learn: {reference.tolist()}"
    torch.testing.assert_close(fast, reference, rtol=0.02, atol=0)


def test_compiled_cpu_backend_learns_what_the_reference_learns():
    assert "cpu" in candidates(torch.device("cpu"))
    _compare("cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"])
def test_gpu_backend_learns_what_the_reference_learns(backend):
    _compare(backend, "cuda")
