"""200 training steps on text, reference beside Triton; without a GPU under the interpreter.

    TRITON_INTERPRET=1 python bench/loss_curve.py --out bench/results/loss-curve-interpreter.json
    python bench/loss_curve.py --device cuda --out loss-curve.json

A spike at the threshold may fall either way where sums are taken in another order, so two runs drift apart
step by step; what they learn must not. Bound: the mean loss of each 50 steps within 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend
from spikedecoder.data import CharTokenizer, WindowSampler, builtin_text

WINDOW, BOUND = 50, 0.02


def curve(backend: str, device: str, steps: int) -> tuple[list[float], float]:
    """(the mean loss of each WINDOW steps, seconds)."""
    tokenizer = CharTokenizer.original()
    config = SpikeDecoderConfig.preset(
        "original-char", blocks=1, heads=1, token_dim=6, position_dim=2, mlp_ratio=1, timesteps=2, max_len=8
    )
    torch.manual_seed(0)
    model = SpikeDecoder(config).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2, betas=(0.9, 0.95))
    sampler = WindowSampler(tokenizer.encode(builtin_text()[:20_000]), config.max_len, 2, seed=0)
    losses = []
    start = time.perf_counter()
    with use_backend(backend):
        for step in range(steps):
            inputs, targets = (t.to(device) for t in sampler.batch(step))
            loss = model.loss(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    seconds = time.perf_counter() - start
    return torch.tensor(losses).view(-1, WINDOW).mean(1).tolist(), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200, help=f"a multiple of {WINDOW}")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "steps": options.steps,
        "window": WINDOW,
        "bound": BOUND,
        "device": options.device,
    }
    for backend in ("reference", "triton"):
        means, seconds = curve(backend, options.device, options.steps)
        found[backend] = [round(mean, 5) for mean in means]
        found[f"{backend}_seconds"] = round(seconds, 1)
    pairs = zip(found["triton"], found["reference"], strict=True)
    found["largest_difference"] = round(max(abs(a / b - 1) for a, b in pairs), 6)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    learnt = found["reference"][-1] < 0.95 * found["reference"][0]
    return 0 if learnt and found["largest_difference"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
