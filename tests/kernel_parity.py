"""What the tests of the Triton kernels share: a case against the reference, forward and all gradients.

Without a GPU the kernels run under Triton's interpreter, where bfloat16 is cut off instead of rounded: one
unit in the last place is allowed for there.
"""

from __future__ import annotations

import dataclasses

import torch

from spikedecoder import ops
from spikedecoder.params import NormParams
from spikedecoder.testing import Case, Inputs, flipped, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The case's inputs; norms with neurons keep float32 parameters, as under autocast."""
    inputs = make_inputs(case, dtype, device)
    if case.operator not in ("norm", "linear_norm") and isinstance(inputs.get("n"), NormParams):
        inputs["n"] = make_inputs(case, torch.float32, device)["n"]
    return inputs


def compare(case: Case, dtype: torch.dtype, device: str = DEVICE) -> None:
    with ops.use_backend("reference"):
        expected = run(case, inputs_of(case, dtype, device))
    with ops.use_backend("triton"):
        actual = run(case, inputs_of(case, dtype, device))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
    spikes = case.operator in (
        "lif", "ilif", "binarize", "norm_lif", "norm_ilif", "spike_attention_lif", "linear_norm_lif",
    )  # fmt: skip
    flips = flipped(actual["out"], expected["out"]) if spikes else 0.0
    rounds = case.operator == "spike_attention" and dtype != torch.float32  # integers beyond 256 or 2048
    if case.exact and not rounds:
        assert torch.equal(actual["out"], expected["out"])
    assert flips <= 2e-3, f"{flips:.2%} of the spikes differ"
    for name, value in expected.items():
        if name == "out" and spikes:
            continue
        if flips and case.operator == "spike_attention_lif":
            continue  # every later token sees a flipped spike; the other cases and dtypes compare gradients
        error = (actual[name].double() - value.double()).abs()
        if value.dtype == torch.int64:
            assert torch.equal(actual[name], value), name
        # a sum grows with its terms, so its error does
        limit = TOLERANCE[dtype] * (value.double().abs() + value.double().abs().mean().clamp(min=1))
        wrong = (error > limit).double().mean().item() if error.numel() else 0.0
        assert wrong <= 20 * flips, f"{name}: {wrong:.2%} of the elements are off by up to {error.max():.3g}"


def larger(case: Case) -> Case:
    """The same case, as many rows or tokens as fill a GPU a little."""
    shape = list(case.shape)
    grow = {
        "spike_attention": 3,
        "spike_attention_lif": 3,
        "spike_linear": 0,
        "pack_spikes": 0,
        "binarize": 0,
    }
    axis = grow.get(case.operator, -2)
    shape[axis] = shape[axis] * 37 + (5 if shape[axis] else 0)
    return dataclasses.replace(case, shape=tuple(shape), name=f"{case.name}-large")


def random(*shape: int, seed: int = 0, scale: float = 2.0, shift: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + shift).to(DEVICE)
