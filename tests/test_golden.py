"""The model against the original's own numbers, in float64, to 1e-9.

Every NAME.json (+ NAME.safetensors) in tests/golden, or in the folder named by SPIKEDECODER_GOLDEN.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikedecoder.compat.convert import convert_original, rename_tensors

FOLDER = Path(os.environ.get("SPIKEDECODER_GOLDEN") or Path(__file__).parent / "golden")
CASES = sorted(FOLDER.glob("*.json"))
ALPHABET = "abcdefghijklmnopqrstuvwxyz.'P "
BOUND = {"rtol": 1e-9, "atol": 1e-9}


def _tokens(texts, case):
    alphabet = case["config"].get("dictionary") or ALPHABET
    number = {token: i for i, token in enumerate(alphabet)}
    return torch.tensor([[number[token] for token in text] for text in texts])


def _section(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def test_there_are_cases():
    assert CASES, f"no golden cases in {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path):
    case = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    model = convert_original(
        _section(tensors, "state."), case["config"], kind=case["kind"], dim_hid=case["dim_hid"]
    )
    assert model.dtype == torch.float64
    inputs, targets = _tokens(case["inputs"], case), _tokens(case["targets"], case)

    model.train()
    logits = model(inputs)
    torch.testing.assert_close(logits, tensors["out.train_logits"], **BOUND)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, tensors["out.train_loss"].reshape(()), **BOUND)
    loss.backward()

    expected = rename_tensors(_section(tensors, "grad."), model.config)
    # a bias before a BatchNorm has gradient 0, summed from terms as large as the largest gradient
    largest = max((g.abs().max().item() for g in expected.values()), default=1.0)
    bound = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, largest)}
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None, f"no gradient for {name}"
            torch.testing.assert_close(
                parameter.grad, expected[name], **bound, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert parameter.grad is None or not parameter.grad.any(), f"a gradient for {name}"

    after = rename_tensors(_section(tensors, "after."), model.config)
    buffers = dict(model.named_buffers())
    assert after.keys() <= buffers.keys()
    for name, buffer in after.items():
        torch.testing.assert_close(buffers[name], buffer, **BOUND, msg=lambda m, n=name: f"{n}: {m}")

    model.eval()
    with torch.no_grad():
        logits = model(inputs)
    torch.testing.assert_close(logits, tensors["out.eval_logits"], **BOUND)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, tensors["out.eval_loss"].reshape(()), **BOUND)
