"""The table of operator cases, shared by parity tests, ahead-of-time compilation and benchmarks.

A case names an operator, shapes and options; `make_inputs` builds its tensors. A new operator adds its
rows to `_rows` and the maker of its inputs to `_MAKERS`; tests and benchmarks then pick it up without being
edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spikedecoder import ops
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.surrogate import SURROGATES

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row. `shape` means what the operator's maker in `_MAKERS` reads it as. `exact`: on these inputs
    (dyadic currents, integer sums) all backends must agree bit for bit in the forward pass."""

    operator: str
    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"


def _rows() -> Iterator[Case]:
    for t in (1, 2, 3, 4, 8, 16):
        yield Case("lif", f"T{t}", (t, 2, 5, 33))
    yield Case("lif", "empty", (4, 0, 5, 8))
    yield Case("lif", "one", (4, 1))
    yield Case("lif", "one-neuron", (4,))
    yield Case("lif", "wide", (4, 3, 7, 130))
    yield Case("lif", "soft-reset", (4, 2, 3, 40), {"v_reset": None})
    yield Case("lif", "reset-half", (4, 2, 3, 40), {"v_reset": -0.5})
    yield Case("lif", "no-decay-input", (4, 2, 3, 40), {"decay_input": False})
    yield Case("lif", "attached-reset", (4, 2, 3, 40), {"detach_reset": False})
    yield Case("lif", "attached-soft-reset", (4, 2, 3, 40), {"detach_reset": False, "v_reset": None})
    yield Case("lif", "threshold-half", (4, 2, 3, 40), {"v_threshold": 0.5})
    yield Case("lif", "tau-1.7", (5, 2, 3, 40), {"tau": 1.7}, exact=False)
    yield Case("lif", "tau-4", (8, 2, 3, 40), {"tau": 4.0})
    yield Case("lif", "threshold-scalar", (4, 2, 3, 40), {"threshold": ()})
    yield Case("lif", "threshold-channel", (4, 2, 3, 40), {"threshold": (40,)})
    yield Case("lif", "threshold-soft", (4, 2, 3, 40), {"threshold": (40,), "v_reset": None})
    yield Case("lif", "state", (4, 2, 3, 40), {"v_init": True, "return_state": True})
    for row in SURROGATES.values():
        yield Case("lif", row.name, (4, 2, 3, 40), {"surrogate": row.name, "alpha": row.default_alpha})
        steep = {"surrogate": row.name, "alpha": 1.5 * row.default_alpha}
        attached = {**steep, "v_reset": None, "detach_reset": False}
        yield Case("lif", f"{row.name}-attached-soft", (4, 2, 3, 40), attached)
        for name, neuron in (("steep", steep), ("attached-soft", attached)):
            options: dict[str, Any] = {"norm": "layer", "neuron": neuron}
            yield Case("norm_lif", f"{row.name}-{name}", (4, 2, 3, 20), options, exact=False)

    yield Case("binarize", "matrix", (7, 33))
    yield Case("binarize", "empty", (0, 4))
    yield Case("ilif", "D1", (7, 33), {"levels": 1})
    yield Case("ilif", "D4", (3, 5, 64), {"levels": 4, "v_threshold": 0.5})
    yield Case("ilif", "D15", (2, 130), {"levels": 15, "v_threshold": 0.3})
    yield Case("ilif", "empty", (0, 4), {"levels": 4})
    for c in (1, 63, 64, 65, 130):
        yield Case("pack_spikes", f"C{c}", (3, 4, c))
    yield Case("pack_spikes", "empty", (0, 70))

    for name, extent, n in (
        ("n4", (2, 9, 96), 4),
        ("n3", (2, 2, 5, 40), 3),
        ("uneven", (2, 3, 11, 37), 5),
        ("short", (3, 2, 24), 6),
        ("empty-groups", (2, 4, 3), 5),
        ("empty", (2, 0, 8), 2),
    ):
        yield Case("token_shift", name, extent, {"n": n})

    for norm in ("layer", "batch", "power"):
        yield Case("norm", norm, (2, 3, 5, 36), {"norm": norm}, exact=False)
        for training in (True, False):
            mode = "train" if training else "eval"
            options = {"norm": norm, "training": training}
            yield Case("norm_lif", f"{norm}-{mode}", (4, 2, 5, 36), options, exact=False)
            yield Case("norm_ilif", f"{norm}-{mode}", (3, 5, 36), {**options, "levels": 4}, exact=False)
    past = {"norm": "power", "past_warmup": True}
    yield Case("norm_lif", "power-past-warmup", (4, 2, 5, 36), past, exact=False)
    yield Case("norm_ilif", "power-past-warmup", (3, 5, 36), {**past, "levels": 4}, exact=False)
    for name, size in (("C80", (3, 7, 80)), ("C300", (5, 300)), ("one", (1, 36)), ("empty", (2, 0, 36))):
        yield Case("norm", f"layer-{name}", size, {"norm": "layer"}, exact=False)
    yield Case("norm_lif", "wide", (4, 2, 3, 200), {"norm": "layer"}, exact=False)
    yield Case("norm_lif", "threshold", (4, 2, 3, 36), {"norm": "layer", "threshold": ()}, exact=False)

    options = {"norm": "layer", "levels": 15, "v_threshold": 0.3}
    yield Case("norm_ilif", "wide", (4, 2, 200), options, exact=False)
    yield Case("norm_ilif", "one", (1, 33), options, exact=False)
    yield Case("norm_ilif", "empty", (2, 0, 8), options, exact=False)

    for norm in ("layer", "batch", "power"):
        yield Case("linear_norm_lif", norm, (3, 2, 5, 70, 36), {"norm": norm}, exact=False)
    yield Case("linear_norm_lif", "power-past-warmup", (3, 2, 5, 70, 36), past, exact=False)
    yield Case("linear_norm", "layer", (3, 2, 5, 70, 36), {"norm": "layer"}, exact=False)

    for op in ("spike_attention", "spike_attention_lif"):
        for s, d in ((1, 8), (5, 16), (64, 16), (65, 18), (130, 20), (96, 32), (70, 64)):
            yield Case(op, f"S{s}-d{d}", (2, 2, 3, s, d))
        yield Case(op, "S40-d128", (2, 1, 1, 40, 128))
        yield Case(op, "decay", (2, 2, 3, 100, 16), {"decay": True}, exact=False)
        yield Case(op, "scale", (3, 1, 2, 40, 16), {"scale": 0.5})
    for shape in ((), (3, 1, 1), (20,), (3, 1, 20)):  # scalar, per head, per channel, both
        name = "threshold-" + "x".join(map(str, shape or (1,)))
        yield Case("spike_attention_lif", name, (2, 2, 3, 33, 20), {"threshold": shape})
    yield Case("spike_attention", "integers", (1, 2, 2, 66, 16), {"levels": 4})
    yield Case(
        "spike_attention", "integers-decay", (1, 2, 2, 66, 16), {"levels": 15, "decay": True}, exact=False
    )
    yield Case(
        "spike_attention",
        "integers-state",
        (1, 2, 3, 33, 8),
        {"levels": 4, "state": True, "return_state": True},
    )
    yield Case("spike_attention", "integers-d70", (2, 1, 2, 67, 70), {"levels": 3})
    yield Case(
        "spike_attention",
        "integers-state-decay",
        (1, 2, 4, 130, 24),
        {"levels": 3, "state": True, "return_state": True, "decay": True},
        exact=False,
    )
    yield Case("spike_attention", "state", (2, 2, 3, 70, 16), {"state": True, "return_state": True})
    yield Case(
        "spike_attention",
        "state-decay",
        (2, 2, 3, 70, 16),
        {"state": True, "return_state": True, "decay": True},
        exact=False,
    )

    for m, k, n in ((1, 80, 80), (40, 80, 160), (33, 130, 24), (0, 80, 80), (64, 512, 80)):
        yield Case("spike_linear", f"{m}x{k}x{n}", (m, k, n), exact=False)
    yield Case("spike_linear", "no-bias", (10, 80, 48), {"bias": False}, exact=False)
    yield Case("spike_linear", "silent", (10, 80, 48), {"rate": 0.0}, exact=False)
    yield Case("spike_linear", "saturated", (10, 80, 48), {"rate": 1.0}, exact=False)


CASES: tuple[Case, ...] = tuple(_rows())


def cases(*operators: str) -> list[Case]:
    """The rows of these operators; all rows without arguments."""
    return [case for case in CASES if not operators or case.operator in operators]


def dyadic(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Multiples of 1/8 in [-2, 4): exact in every dtype, as is the membrane potential at tau = 2, T <= 16."""
    return torch.randint(-16, 32, shape, generator=generator) / 8


def spikes(shape: tuple[int, ...], generator: torch.Generator, rate: float = 0.2) -> Tensor:
    """Random spikes, float32: 1 with probability `rate`, else 0."""
    return (torch.rand(shape, generator=generator) < rate).float()


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """The case's keyword arguments: tensors in `dtype` on `device`, some of which require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    inputs = _MAKERS[case.operator](case, generator)
    return {name: _place(value, dtype, device) for name, value in inputs.items()}


def _place(value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, Tensor):
        wants_grad = value.requires_grad
        value = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        return value.requires_grad_(wants_grad)
    if isinstance(value, NormParams):
        tensors = {n: _place(getattr(value, n), dtype, device) for n in ("weight", "bias")}
        running = tuple(_place(t.clone(), dtype, device) for t in value.running)
        return NormParams(value.kind, **tensors, training=value.training, running=running)
    return value


def _lif_inputs(case: Case, generator: torch.Generator) -> Inputs:
    options = dict(case.options)
    inputs: Inputs = {"x": dyadic(case.shape, generator).requires_grad_()}
    threshold = options.pop("threshold", None)
    if threshold is not None:
        inputs["v_threshold"] = (torch.randint(4, 12, threshold, generator=generator) / 8).requires_grad_()
    if options.pop("v_init", False):
        inputs["v_init"] = dyadic(case.shape[1:], generator).requires_grad_()
    return {**inputs, **options}


def _norm_params(case: Case, generator: torch.Generator) -> NormParams:
    kind, c = case.options["norm"], case.shape[-1]
    weight = (torch.rand(c, generator=generator) + 0.5).requires_grad_()
    bias = (torch.randn(c, generator=generator) * 0.5 + 0.5).requires_grad_()
    second = torch.rand(c, generator=generator) + 0.5
    running: tuple[Tensor, ...] = ()
    if kind == "batch":
        running = (torch.randn(c, generator=generator) * 0.1, second)
    elif kind == "power":
        running = (second, torch.zeros(c), torch.tensor(0))
        if case.options.get("past_warmup"):  # then running_phi and ema_gz are read
            running = (second, torch.randn(c, generator=generator) * 0.5, torch.tensor(NormParams.warmup))
    return NormParams(kind, weight, bias, training=case.options.get("training", True), running=running)


def _norm_inputs(case: Case, generator: torch.Generator) -> Inputs:
    x = torch.randn(case.shape, generator=generator).requires_grad_()
    inputs: Inputs = {"x": x, "n": _norm_params(case, generator)}
    if case.operator == "norm_lif":
        inputs["p"] = LIFParams(**case.options.get("neuron", {}))
        if "threshold" in case.options:
            inputs["threshold"] = torch.full(case.options["threshold"], 0.75).requires_grad_()
    if case.operator == "norm_ilif":
        inputs["p"] = ILIFParams(case.options["levels"], case.options.get("v_threshold", 1.0))
    return inputs


def _attention_inputs(case: Case, generator: torch.Generator) -> Inputs:
    t, b, h, s, d = case.shape
    # as a model makes them: [T, B, S, H, d] in memory
    q, k, v = (spikes((t, b, s, h, d), generator, 0.3).transpose(2, 3).requires_grad_() for _ in range(3))
    levels = case.options.get("levels", 1)
    if levels > 1:
        q, k, v = (
            torch.randint(0, levels + 1, (t, b, s, h, d), generator=generator).float().transpose(2, 3)
            for _ in range(3)
        )
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    inputs: Inputs = {"q": q, "k": k, "v": v, "scale": case.options.get("scale", 0.125)}
    if levels > 1:
        inputs["levels"] = levels
    if case.options.get("decay"):
        inputs["decay"] = 1 - 2.0 ** -torch.arange(2, 2 + h).float()
    if case.options.get("state"):
        inputs["state"] = torch.randint(0, 9, (t, b, h, d, d), generator=generator).float().requires_grad_()
    for option in ("return_state", "dropout"):
        if option in case.options:
            inputs[option] = case.options[option]
    if case.operator == "spike_attention_lif":
        inputs["p"] = LIFParams()
        if "threshold" in case.options:
            threshold = torch.randint(1, 8, case.options["threshold"], generator=generator) / 8
            inputs["threshold"] = threshold.requires_grad_()
    return inputs


def _linear_inputs(case: Case, generator: torch.Generator) -> Inputs:
    m, k, n = case.shape
    bias = torch.randn(n, generator=generator).requires_grad_() if case.options.get("bias", True) else None
    return {
        "s": spikes((m, k), generator, case.options.get("rate", 0.15)).requires_grad_(),
        "weight": (torch.randn(n, k, generator=generator) / k**0.5).requires_grad_(),
        "bias": bias,
    }


def _linear_norm_inputs(case: Case, generator: torch.Generator) -> Inputs:
    *rows, k, n = case.shape
    inputs: Inputs = {
        "s": spikes((*rows, k), generator).requires_grad_(),
        "weight": (torch.randn(n, k, generator=generator) / k**0.5).requires_grad_(),
        "bias": torch.randn(n, generator=generator).requires_grad_(),
        "n": _norm_params(case, generator),
    }
    if case.operator == "linear_norm_lif":
        inputs["p"] = LIFParams()
        inputs["threshold"] = torch.tensor(0.75).requires_grad_()
    return inputs


_MAKERS: dict[str, Callable[[Case, torch.Generator], Inputs]] = {
    "lif": _lif_inputs,
    "binarize": lambda case, g: {"x": torch.randn(case.shape, generator=g).requires_grad_()},
    # a wide range, including ties and values on the borders of the window
    "ilif": lambda case, g: {"x": (2 * dyadic(case.shape, g)).requires_grad_(), **case.options},
    "token_shift": lambda case, g: {"x": dyadic(case.shape, g).requires_grad_(), **case.options},
    "pack_spikes": lambda case, g: {"spikes": spikes(case.shape, g, 0.4)},
    "norm": _norm_inputs,
    "norm_lif": _norm_inputs,
    "norm_ilif": _norm_inputs,
    "spike_attention": _attention_inputs,
    "spike_attention_lif": _attention_inputs,
    "spike_linear": _linear_inputs,
    "linear_norm": _linear_norm_inputs,
    "linear_norm_lif": _linear_norm_inputs,
}

CALLS: dict[str, Callable[..., Any]] = {name: getattr(ops, name) for name in _MAKERS}


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that get a gradient, by name."""
    found = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    norm = inputs.get("n")
    if isinstance(norm, NormParams):
        found |= {"n.weight": norm.weight, "n.bias": norm.bias}
    return found


def run(case: Case, inputs: Inputs, backward: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """Call the operator; results by name: "out", "out.1", ..., "grad.NAME" and "running.i".

    The incoming gradients are fixed random numbers of `seed`.
    """
    outs = CALLS[case.operator](**inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    results = {("out" if i == 0 else f"out.{i}"): out.detach().clone() for i, out in enumerate(outs)}
    wanted = leaves(inputs)
    if backward and wanted:
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs])
        results |= {f"grad.{name}": g for name, g in zip(wanted, found, strict=True)}
    if isinstance(inputs.get("n"), NormParams):
        results |= {f"running.{i}": t.detach().clone() for i, t in enumerate(inputs["n"].running)}
    return results


def flipped(actual: Tensor, expected: Tensor) -> float:
    """Fraction of spikes that differ."""
    return (actual != expected).double().mean().item() if actual.numel() else 0.0
