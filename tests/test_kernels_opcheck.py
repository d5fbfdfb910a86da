"""Every operator that is registered with torch.library, as its own code calls it: schema, fake kernel,
gradients and the graph that the compiler makes of it agree.

The calls are those of one case of each operator, forward and backward, on Triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spikedecoder import ops, use_backend
from spikedecoder.ops._dispatch import Call, why_not
from spikedecoder.testing import CALLS, CASES, make_inputs, run

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.triton_interpreter]
CASES_OF = {
    "lif": ("threshold-channel", "state"), "ilif": ("D4",), "binarize": ("matrix",), "pack_spikes": ("C65",),
    "norm_lif": ("layer-train", "batch-train", "power-train"), "spike_attention": ("S5-d16", "state-decay"),
    "norm_ilif": ("layer-train", "batch-train", "power-train"),
    "spike_attention_lif": ("S5-d16",), "spike_linear": ("10x80x48", "no-bias"),
    "linear_norm_lif": ("layer", "batch"), "linear_norm": ("layer",),
    "norm": ("layer",),
}  # fmt: skip
DIFFERENTIABLE = {
    "lif", "ilif", "binarize", "norm_lif", "norm_ilif", "spike_attention", "spike_attention_lif",
    "spike_linear", "linear_norm_lif", "linear_norm_lif_fused", "linear_norm", "layer_norm",
}  # fmt: skip
COLLECTIVES = {"sum_over_processes", "gather_from_processes"}  # in test_distributed
CPU_ONLY = {"spike_linear_dense_grads"}
HAS_CPU = (
    DEVICE == "cpu" and why_not("cpu", "spike_linear", Call(torch.device("cpu"), torch.float32, ())) is None
)


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "spikedecoder":
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls() -> dict[Any, tuple[Any, Any]]:
    chosen = [case for case in CASES if case.name in CASES_OF.get(case.operator, ())]
    with use_backend("triton"), _Recorded() as recorded:
        for case in chosen:
            run(case, make_inputs(case, torch.float32, DEVICE))
            if case.operator == "linear_norm_lif":
                CALLS[case.operator](
                    **make_inputs(case, torch.float32, DEVICE), recompute=True
                ).sum().backward()
                with torch.no_grad():
                    CALLS[case.operator](**make_inputs(case, torch.float32, DEVICE))
            if case.operator == "lif":
                with torch.no_grad():
                    CALLS[case.operator](**make_inputs(case, torch.float32, DEVICE), packed=True)
            if case.operator == "pack_spikes":
                words = ops.pack_spikes(make_inputs(case, torch.float32, DEVICE)["spikes"])
                ops.unpack_spikes(words, case.shape[-1], torch.float32)
        if HAS_CPU:
            with use_backend("cpu"):
                case = next(case for case in chosen if case.operator == "spike_linear")
                run(case, make_inputs(case))
    return recorded.calls


def test_opcheck_of_every_registered_operator(calls: dict[Any, tuple[Any, Any]]) -> None:
    registered = {
        name.removeprefix("spikedecoder::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("spikedecoder::")
    }
    seen = {func._schema.name.removeprefix("spikedecoder::") for func in calls}
    assert seen == registered - COLLECTIVES - (set() if HAS_CPU else CPU_ONLY)
    for func, (args, kwargs) in calls.items():
        differentiable = func._schema.name.removeprefix("spikedecoder::") in DIFFERENTIABLE
        torch.library.opcheck(func, tuple(fresh(x, differentiable) for x in args), kwargs)


def fresh(x: Any, requires_grad: bool) -> Any:
    """An argument as a leaf of its own, which the checks may differentiate."""
    if isinstance(x, (list, tuple)):
        return [fresh(y, requires_grad) for y in x]
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().requires_grad_(requires_grad and x.is_floating_point())
