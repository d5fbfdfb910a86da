"""Accumulate-only is a fact: every matrix product of a fully spiking model has an operand of 0 and 1.

The whole forward pass is walked operator by operator, so that no product can hide in a module; every
operator that isn't known to do without products must show a binary operand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_model import VARIANTS, _config, _model
from torch.utils._python_dispatch import TorchDispatchMode

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.kinds import kind_of
from spikedecoder.ops import use_backend
from spikedecoder.spike_stats import spiking_layers

# operators of ours that hold a product, and the arguments that must be binary
SPIKING_PRODUCTS = {
    "spikedecoder::spike_linear": (0,),
    "spikedecoder::spike_attention": (0, 1, 2),
    "spikedecoder::spike_attention_lif": (0, 1, 2),
}
DENSE_PRODUCTS = ("mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "addmv", "mv", "dot")
TOKENS = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(3))


def is_binary(x: torch.Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


class Products(TorchDispatchMode):
    """Collects, for every matrix product that runs, its name and whether it accumulates only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        short = name.partition("::")[2]
        if "attention" in short or "linear" in short or "conv" in short:
            binary = name in SPIKING_PRODUCTS and all(is_binary(args[i]) for i in SPIKING_PRODUCTS[name])
            self.seen.append((name, binary))
        elif short in DENSE_PRODUCTS:
            operands = args[1:3] if short.startswith(("add", "badd")) else args[:2]  # behind what is added
            self.seen.append((name, any(is_binary(x) for x in operands)))
        return func(*args, **(kwargs or {}))


def products(model: SpikeDecoder, backend: str = "reference") -> list[tuple[str, bool]]:
    with torch.no_grad(), use_backend(backend), Products() as mode:
        model.eval()(TOKENS)
    return mode.seen


def expected(model: SpikeDecoder) -> int:
    """Products of the architecture: q, k, v, the attention, its projection, two of the MLP; and the head.

    An unrolled attention is one product for each triple of timesteps of q, k and v.
    """
    triples = model.config.spike_levels.bit_length() ** 3
    return (6 + triples) * model.config.blocks + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_product_of_a_fully_spiking_model_accumulates_only(variant: dict[str, Any]) -> None:
    model = _model(variant)
    with torch.no_grad():  # neurons that fire, at rates that differ
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.unroll()
    seen = products(model)
    floats = [name for name, binary in seen if not binary]
    if kind_of(model.config) == "fully spiking":
        assert len(seen) == expected(model) and not floats
    elif kind_of(model.config) == "SpikeDecoder":
        # its head reads means or sums over timesteps, or the real-valued stream: one product, and no other
        assert len(seen) == expected(model) and len(floats) <= 1
    elif model.config.spike_degree == 0 and not model.config.attention_only:
        assert len(floats) == len(seen)


@pytest.mark.parametrize("reunite", ["average", "accumulate"])
@pytest.mark.parametrize("timesteps", [2, 3, 4])
def test_a_head_that_reads_counts_is_sums_of_spikes_too(reunite: str, timesteps: int) -> None:
    """Linear(counts) unrolls into one product with binary input for each timestep."""
    model = _model({"reunite": reunite, "timesteps": timesteps}).eval()
    head = model.head
    spikes: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    head.lif.register_forward_hook(lambda _module, _inputs, s: spikes.append(s))
    head.linear.register_forward_hook(lambda _module, inputs, _y: read.append(inputs[0]))
    with torch.no_grad():
        logits = model(TOKENS)
    (s,), (x,) = spikes, read
    assert is_binary(s) and s.any() and not s.all()
    counts = x * timesteps if reunite == "average" else x
    torch.testing.assert_close(counts, s.sum(0), rtol=0, atol=1e-6 if timesteps == 3 else 0)
    w, b = head.linear.weight, head.linear.bias
    unrolled = sum(s[t] @ w.T for t in range(timesteps)) / (timesteps if reunite == "average" else 1) + b
    torch.testing.assert_close(logits, unrolled, rtol=1e-5, atol=1e-5)


ILIF = {"neuron": "ilif", "timesteps": 1, "levels": 4}
_SHAPE = {"vocab_size", "max_len", "token_dim", "position_dim", "heads", "blocks", "mlp_ratio"}
DEFAULT = {k: v for k, v in SpikeDecoderConfig.preset("default").to_dict().items() if k not in _SHAPE}
DECAY = {"decay_fastest": 0.75, "decay_slowest": 0.96, "token_shift": 3, "mlp_token_shift": 2}


def both_forms(model: SpikeDecoder) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Logits, and integers by layer, of the model as it was trained and unrolled."""
    results = []
    for unrolled in (False, True):
        model.unroll(unrolled)
        integers: dict[str, torch.Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda _m, _i, s, name=name, to=integers: to.update({name: s}))
            for name, layer in spiking_layers(model)
        ]
        with torch.no_grad():
            results.append((model.eval()(TOKENS), integers))
        for handle in handles:
            handle.remove()
    return results


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_unrolled_ilif_is_bit_for_bit_what_was_trained(backend: str) -> None:
    """Sums that no order changes: weights in eighths. Norms are the same function of the same numbers."""
    model = _model({**ILIF, "norm": "batch"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear" in name:
                parameter.copy_((8 * parameter + torch.randn_like(parameter)).round() / 8)
    with use_backend(backend):
        (trained, integers), (unrolled, again) = both_forms(model)
    assert torch.equal(trained, unrolled)
    used = torch.cat([s.flatten() for s in integers.values()]).unique()
    assert used.tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(integers[name], again[name]) for name in integers)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({**ILIF, **DECAY}, torch.float64),
        ({**ILIF, **DECAY}, torch.float32),
        (DEFAULT, torch.float64),
        (DEFAULT, torch.float32),
    ],
    ids=["float64", "float32", "default-float64", "default-float32"],
)
def test_unrolled_ilif_is_what_was_trained_to_the_order_of_sums(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model = _model(changes).to(dtype)
    model.unroll()
    assert all(binary for _, binary in products(model))
    (trained, integers), (unrolled, again) = both_forms(model)
    assert all(torch.equal(integers[name], again[name]) for name in integers)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(trained, unrolled, rtol=limit, atol=limit)
    # the recurrent form, unrolled too
    logits, state = model.prefill(TOKENS[:, :7])
    more, _ = model.prefill(TOKENS[:, 7:], state)
    torch.testing.assert_close(torch.cat([logits, more], 1), trained, rtol=limit, atol=limit)
    # and the gradients
    found = []
    for on in (False, True):
        model.unroll(on)
        model.zero_grad()
        model.loss(TOKENS, TOKENS.roll(-1, 1)).backward()
        found.append([p.grad for p in model.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
@pytest.mark.parametrize("changes", [{**ILIF, **DECAY}, DEFAULT], ids=["decay", "default"])
def test_sixteen_bits_round_once_in_both_forms(changes: dict[str, Any], dtype: Any) -> None:
    autocast = dtype == "autocast"
    model = _model(changes).to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (trained, integers), (unrolled, again) = both_forms(model)
    assert all(torch.equal(integers[name], again[name]) for name in integers)
    assert trained.dtype == unrolled.dtype
    torch.testing.assert_close(trained.float(), unrolled.float(), rtol=0, atol=1e-6)


def test_the_walk_finds_integers_that_are_not_unrolled() -> None:
    model = _model(ILIF)
    assert kind_of(model.config) == "fully spiking"
    assert [binary for _, binary in products(model)].count(False) == 7 * model.config.blocks + 1


def test_the_walk_finds_a_product_of_floats() -> None:
    model = _model({"reunite": "concatenate"})
    assert kind_of(model.config) == "fully spiking"
    fc1 = model.blocks[1].mlp.fc1.linear
    hook = fc1.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.5,))
    assert [binary for _, binary in products(model)].count(False) == 1
    hook.remove()
    assert all(binary for _, binary in products(model))
    # computed by torch instead of by an operator of ours, it is found too
    fc1.register_forward_hook(lambda *_: None)  # or one operator holds it together with its norm and neurons
    fc1.forward = lambda s: torch.nn.functional.linear(s * 0.5, fc1.weight, fc1.bias)
    assert [binary for _, binary in products(model)].count(False) == 1


def test_there_are_fully_spiking_models_among_the_variants() -> None:
    kinds = [kind_of(_config(**v.values[0])) for v in VARIANTS]
    assert kinds.count("fully spiking") > 5 and "SpikeDecoder" in kinds and "non-spiking" in kinds
