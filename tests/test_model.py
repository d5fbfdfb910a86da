"""The model: every variant runs, is causal, learns where it should, and refuses what it cannot do."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from awake import awake

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.activity import record
from spikedecoder.nn.embedding import binary_code, sinusoid
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.nn.norm import Norm

SMALL = {
    "vocab_size": 11,
    "max_len": 12,
    "token_dim": 14,
    "position_dim": 10,
    "heads": 2,
    "blocks": 2,
    "mlp_ratio": 2,
}
SMALL["v_threshold"] = 0.5  # at 1 a first LIF on an embedding of 0 and 1 stays silent


def _config(**changes):
    return SpikeDecoderConfig.from_dict({**SMALL, **changes})


def _variants():
    for degree in range(5):
        yield {"spike_degree": degree}
    yield {"attention_only": True, "spike_degree": 2}
    yield {"attention_only": True, "spike_degree": 0}
    for token, position in itertools.product(
        ("learned", "one-hot", "two-hot", "binary"), ("static", "learned", "linear", "binary")
    ):
        yield {"token_encoding": token, "position_encoding": position, "heads": 1}
    for position in ("static", "learned"):
        yield {"combine_position": True, "position_encoding": position}
        yield {"float_embedding": True, "position_encoding": position}
    for norm, residuals in itertools.product(("layer", "batch", "power"), (0, 1, 2)):
        yield {"norm": norm, "spiking_residuals": residuals}
    for degree, residuals in itertools.product((2, 3), (1, 2)):
        yield {"spike_degree": degree, "spiking_residuals": residuals, "first_block_residual_lif": True}
    for reunite in ("average", "accumulate", "concatenate", "final"):
        yield {"reunite": reunite}
        yield {"reunite": reunite, "float_reunite": True}
        yield {"reunite": reunite, "spiking_head": False, "spike_degree": 3}
    yield {"spike_degree": 3, "spiking_head": True}
    for t in (1, 7):
        yield {"timesteps": t}
    ilif = {"neuron": "ilif", "timesteps": 1, "levels": 4}
    yield ilif
    yield {**ilif, "spiking_residuals": 2, "levels": 3, "attention_norm": True, "norm": "batch"}
    yield {**ilif, "token_shift": 3, "mlp_token_shift": 2, "decay_fastest": 0.75, "decay_slowest": 0.96}
    yield {**ilif, "spike_degree": 2, "levels": 1}
    yield {"first_block_residual_lif": True, "learn_threshold": True}
    yield {"token_shift": 4, "mlp_token_shift": 3, "embedding_gain": 2.0}
    yield {"token_shift": 12, "spike_degree": 0}
    yield {"decay_fastest": 0.7, "decay_slowest": 0.98}
    yield {"attention_norm": True}
    yield {
        "attention_norm": True,
        "norm": "power",
        "decay_fastest": 0.7,
        "decay_slowest": 0.98,
        "learn_threshold": True,
    }
    yield {"v_reset": None, "tau": 1.5, "v_threshold": 0.5, "surrogate": "atan", "surrogate_alpha": 2.0}
    yield {"decay_input": False, "detach_reset": False}


VARIANTS = [pytest.param(v, id="-".join(f"{k}={x}" for k, x in v.items())) for v in _variants()]


def _model(variant, seed=0):
    torch.manual_seed(seed)
    return awake(SpikeDecoder(_config(**variant)), 0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_causal_and_every_parameter_learns(variant):
    model = _model(variant).double()
    tokens = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(1))
    loss = model.loss(tokens, tokens.roll(-1, 1))
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        if "bias" in name and variant.get("norm") == "batch":
            continue  # a bias before a BatchNorm cannot matter
        assert p.grad is not None, f"{name} gets no gradient"
        assert p.grad.isfinite().all()
    model.eval()
    with torch.no_grad():
        whole = model(tokens)
        assert whole.shape == (3, 12, 11)
        changed = tokens.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % 11
        torch.testing.assert_close(model(changed)[:, :7], whole[:, :7], rtol=1e-9, atol=1e-9)
        assert not torch.equal(model(changed)[:, 7:], whole[:, 7:])
        torch.testing.assert_close(model(tokens[:, :5]), whole[:, :5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_of_spike_linears_are_spikes(variant):
    model = _model(variant).train()
    seen = []

    def check(module, args):
        seen.append(module)
        assert torch.isin(args[0], torch.arange(module.levels + 1)).all()

    for module in model.modules():
        if isinstance(module, SpikeLinear):
            module.register_forward_pre_hook(check)
    model(torch.randint(0, 11, (2, 12)))
    degree = 4 if variant.get("spike_degree") is None else variant["spike_degree"]
    attention = degree >= 2 or variant.get("attention_only", False)
    mlp = degree >= 3 and not variant.get("attention_only", False)
    assert len(seen) >= 2 * (4 * attention + 2 * mlp)


def test_the_fully_spiking_model_multiplies_only_spikes():
    """Every matmul of degree 4 but the head's mean over timesteps takes spikes."""
    dense = [
        name
        for name, m in SpikeDecoder(_config()).named_modules()
        if isinstance(m, torch.nn.Linear) and not isinstance(m, SpikeLinear)
    ]
    assert dense == ["head.linear"]
    assert isinstance(SpikeDecoder(_config(reunite="concatenate")).head.linear, SpikeLinear)


def test_degree_zero_and_its_spiking_twin_have_the_same_width():
    spiking, ann = _config(), _config(spike_degree=0)
    assert spiking.embed_dim == ann.embed_dim


def test_calls_leave_nothing_behind():
    model = _model({}).eval()
    tokens = torch.randint(0, 11, (2, 12))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first, second = model(tokens), model(tokens)
    assert torch.equal(first, second)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_rows_of_a_batch_do_not_touch_each_other():
    model = _model({}).eval()
    tokens = torch.randint(0, 11, (4, 12))
    together = model(tokens)
    for i in range(4):
        torch.testing.assert_close(model(tokens[i : i + 1]), together[i : i + 1])


def test_pad_is_ignored_by_the_loss():
    tokens = torch.tensor([[1, 2, 3, 0, 0]])
    targets = torch.tensor([[2, 3, 4, 0, 0]])
    model = SpikeDecoder(_config(pad_id=0)).eval()
    only = model.loss(tokens[:, :3], targets[:, :3])
    torch.testing.assert_close(model.loss(tokens, targets), only)
    torch.testing.assert_close(model.loss(tokens, targets.masked_fill(targets == 0, -100)), only)


def test_where_training_starts():
    torch.manual_seed(0)
    model = SpikeDecoder(_config(residual_init=0.25, embedding_std=2.0, vocab_size=400))
    for block in model.blocks:
        behind = {block.attention.proj.norm, block.mlp.fc2.norm}
        norms = [m for m in block.modules() if isinstance(m, Norm)]
        assert behind < set(norms)
        assert all((m.weight == (0.25 if m in behind else 1.0)).all() for m in norms)
    assert 1.9 < model.embedding.token.weight.std().item() < 2.1


def test_embedding_gain_wakes_the_first_attention():
    """At tau = 2 an input of exactly 1 never reaches the threshold 1; times 2 it does at once."""
    rates = {}
    for gain in (1.0, 2.0):
        torch.manual_seed(0)
        model = SpikeDecoder(_config(embedding_gain=gain, timesteps=8, v_threshold=1.0))
        lif = model.blocks[0].attention.input_lif
        lif.register_forward_hook(lambda m, a, out, g=gain: rates.__setitem__(g, out.mean().item()))
        model(torch.randint(0, 11, (2, 12)))
    assert rates[1.0] == 0 and rates[2.0] > 0.1


def test_parameter_groups():
    model = SpikeDecoder(_config(learn_threshold=True, norm="power"))
    decayed, kept = model.parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight", "v_threshold"}
    assert all("linear.weight" in names[id(p)] or "v_threshold" in names[id(p)] for p in decayed["params"])
    assert all("linear.weight" not in names[id(p)] for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    for wrong, error in (("x", TypeError), (None, TypeError), (-0.1, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=r"weight_decay: got .*, takes a finite number >= 0"):
            model.parameter_groups(wrong)


def test_half_precision_by_autocast():
    model = _model({})
    tokens = torch.randint(0, 11, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(tokens, tokens)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compile_and_export_equal_eager():
    model = _model({"token_shift": 2}).train()
    tokens = torch.randint(0, 11, (2, 12))
    eager = model(tokens)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), eager)
    model.eval()
    exported = torch.export.export(model, (tokens,)).module()
    assert torch.equal(exported(tokens), model(tokens))


def test_binary_codes():
    numbers = torch.arange(30)
    fixed = binary_code(numbers, 5, "fixed-width")
    assert len({tuple(row) for row in fixed.tolist()}) == 30
    assert fixed[6].tolist() == [0, 0, 1, 1, 0]
    original = binary_code(numbers, 5, "left-aligned")
    for i in range(30):
        assert "".join(map(str, original[i].tolist())) == bin(i)[2:].ljust(5, "0")


def test_sinusoid_goes_on_and_does_not_depend_on_where_it_starts():
    table = sinusoid(torch.arange(50), 6)
    assert table.dtype == torch.float32 and table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(sinusoid(torch.arange(20, 50), 6), table[20:])


@pytest.mark.parametrize(
    ("variant", "tokens", "error", "message"),
    [
        ({}, torch.zeros(3, dtype=torch.int64), ValueError, r"tokens: got shape \(3,\)"),
        ({}, torch.zeros(0, 3, dtype=torch.int64), ValueError, r"tokens: got shape \(0, 3\)"),
        ({}, torch.zeros(1, 3), TypeError, "tokens: got torch.float32"),
        ({}, [[1, 2]], TypeError, "tokens: got list"),
        ({}, torch.tensor([[0, 11]]), ValueError, "tokens: got ids from 0 to 11, takes 0 to 10"),
        ({}, torch.tensor([[-1, 2]]), ValueError, "tokens: got ids from -1 to 2"),
        (
            {"position_encoding": "learned"},
            torch.zeros(1, 13).long(),
            ValueError,
            "max_len = 12 with learned positions",
        ),
        (
            {"position_encoding": "binary"},
            torch.zeros(1, 13).long(),
            ValueError,
            "max_len = 12 with binary positions",
        ),
        (
            {"token_encoding": "one-hot"},
            torch.zeros(1, 13).long(),
            ValueError,
            "max_len = 12 with one-hot tokens",
        ),
    ],
)
def test_bad_tokens(variant, tokens, error, message):
    with pytest.raises(error, match=message):
        SpikeDecoder(_config(heads=1, **variant))(tokens)


def test_targets_of_another_shape():
    tokens = torch.zeros(2, 5).long()
    with pytest.raises(ValueError, match=r"targets: got shape \(2, 4\), takes that of tokens, \(2, 5\)"):
        SpikeDecoder(_config()).loss(tokens, tokens[:, 1:])


@pytest.mark.parametrize("token_encoding", ["learned", "one-hot", "two-hot", "binary"])
def test_ids_of_32_bits_are_those_of_64(token_encoding):
    model = SpikeDecoder(_config(token_encoding=token_encoding, vocab_size=7, heads=1)).eval()
    tokens = torch.randint(0, 7, (2, 6))
    narrow = tokens.int()
    assert torch.equal(model(narrow), model(tokens))
    assert torch.equal(model.loss(narrow, narrow.roll(-1, 1)), model.loss(tokens, tokens.roll(-1, 1)))
    for ids in (narrow, tokens):
        logits, state = model.prefill(ids[:, :5])
        torch.testing.assert_close(logits, model(tokens[:, :5]))
        torch.testing.assert_close(model.step(ids[:, 5], state)[0], model(tokens)[:, 5])


def test_a_hook_on_all_modules_sees_each():
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", blocks=1)).eval()
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long))
        assert set(seen) >= {m for m in model.modules() if not isinstance(m, torch.nn.ModuleList)}
        seen.clear()
        model.generate(torch.zeros(1, 4, dtype=torch.long), 1)
        assert model.head.lif in seen
    finally:
        hook.remove()


@pytest.mark.parametrize("wrong", [-1, 11, -101])
def test_targets_that_no_token_is(wrong):
    model, tokens = SpikeDecoder(_config()), torch.zeros(2, 5).long()
    targets = tokens.clone()
    targets[0, 0] = -100  # left out
    assert model.loss(tokens, targets).isfinite()
    targets[0, 0] = wrong
    with pytest.raises(ValueError, match=r"targets: got ids from .* takes 0 to 10") as error:
        model.loss(tokens, targets)
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize("tokens", [[[1, 2, 3]], None, torch.zeros(3).long(), torch.zeros(1, 3)], ids=repr)
def test_a_loss_of_tokens_of_another_kind(tokens):
    with pytest.raises((TypeError, ValueError), match="tokens: got"):
        SpikeDecoder(_config()).loss(tokens, torch.zeros(1, 3).long())


@pytest.mark.parametrize("targets", [torch.ones(2, 3), [1, 2], None], ids=repr)
def test_targets_of_another_kind(targets):
    model, tokens = SpikeDecoder(_config()), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"targets: got (torch.float32|list|NoneType), takes an int64 or"):
        model.loss(tokens, targets)


def test_static_positions_go_on_past_the_context():
    assert SpikeDecoder(_config())(torch.zeros(1, 40).long()).shape == (1, 40, 11)


def test_config_must_be_a_config():
    with pytest.raises(TypeError, match="config: got dict"):
        SpikeDecoder({"vocab_size": 3})


@pytest.mark.parametrize(("fastest", "slowest"), [(1e-20, 1e-20), (1e-45, 0.96), (0.75, 1 - 1e-12)])
def test_the_first_and_the_last_decay_are_those_of_the_config(fastest, slowest):
    """Also where 1 - decay rounds to 1."""
    config = SpikeDecoderConfig.preset(
        "default-lif", decay_fastest=fastest, decay_slowest=slowest, blocks=1, vocab_size=11
    )
    assert config.decays[0] == fastest and config.decays[-1] == slowest
    assert config.decays == sorted(config.decays)
    model, tokens = SpikeDecoder(config), torch.randint(0, 11, (1, 9))
    model.loss(tokens, tokens).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decays_are_never_rounded(dtype):
    config = SpikeDecoderConfig.preset("default-lif", decay_slowest=0.999, blocks=1)
    attention = SpikeDecoder(config).to(dtype).blocks[0].attention.attention_lif
    exact = torch.tensor(config.decays, dtype=torch.promote_types(dtype, torch.float32))
    assert torch.equal(attention.decay, exact)
    assert torch.equal(attention.float().decay, exact.float())


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_meta_gets_its_decays(assign):
    config = SpikeDecoderConfig.preset("default-lif", blocks=1, max_len=16)
    good = SpikeDecoder(config).eval()
    with torch.device("meta"):
        model = SpikeDecoder(config)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(good.state_dict(), assign=assign)
    tokens = torch.randint(0, 28, (2, 8))
    assert torch.equal(model.eval()(tokens), good(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spike_degree", [0, 4])
def test_the_gradient_of_a_token_table_in_half_precision_is_summed_in_float32(dtype, spike_degree):
    """A sum of 4096 ones in bfloat16 would end at 256."""
    shape = {
        "vocab_size": 8,
        "max_len": 64,
        "token_dim": 8,
        "combine_position": True,
        "heads": 2,
        "blocks": 1,
    }
    settings = {"token_encoding": "learned", "position_encoding": "learned", "spike_degree": spike_degree}
    model = SpikeDecoder(SpikeDecoderConfig.from_dict({**shape, **settings}))
    found = []
    for m in (model.to(dtype), copy.deepcopy(model).double()):
        m.zero_grad()
        out = m.embedding(torch.arange(2).repeat(64, 64), torch.arange(128) % 64, m.dtype)
        out.backward(torch.ones_like(out))
        found.append(m.embedding.token.weight.grad)
    assert found[0].dtype == dtype
    torch.testing.assert_close(found[0].double(), found[1], rtol=0.01, atol=0)


def test_scores_of_integers_are_recorded_exactly():
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "max_len": 32, "token_dim": 63, "position_dim": 1, "heads": 1, "blocks": 1}
    model = SpikeDecoder(SpikeDecoderConfig.preset("default", **shape)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Norm):
                module.weight.mul_(12)
    got = {}
    part = model.blocks[0].attention.attention_lif
    part.register_forward_pre_hook(lambda _, inputs: got.update(q=inputs[0], k=inputs[1]))
    tokens = torch.randint(8, (1, 32))
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            (scores,) = record(model, tokens, scores=True).scores.values()
        expected = (got["q"].double() @ got["k"].double().transpose(-1, -2)).tril()
        assert expected.max() > 256 and torch.equal(scores.double().squeeze(), expected.squeeze())
