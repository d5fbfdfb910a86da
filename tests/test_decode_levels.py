"""I-LIF in one call of the extension: numbers that every order of sums gives, ties included."""

from __future__ import annotations

import pytest
import torch
from test_decode import DEFAULT, ILIF, TOKENS
from test_model import _model

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, ext
from spikedecoder.generation import Native, Recurrent, open_source
from spikedecoder.generation.native import why_not
from spikedecoder.nn.norm import Norm

pytestmark = [pytest.mark.skipif(not ext.is_built(), reason=ext.NOT_BUILT), pytest.mark.poison_empty]
if ext.is_built():
    from spikedecoder.ext.cpu.decode import Decoder


def dyadic(variant: dict) -> SpikeDecoder:
    """A model that rounds nowhere: weights of few binary digits, norms that divide by 1."""
    model = _model({"norm": "batch", "v_threshold": 0.25, "attention_scale": 2**-9, **variant}).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Norm):
                module.get_buffer("running_var").fill_(1 - 1e-5)
                assert ((module.get_buffer("running_var") + 1e-5).rsqrt() == 1).all()
        for p in model.parameters():
            p.copy_((p * 8).round() / 8)
    return model


@pytest.mark.parametrize(
    "variant",
    [
        {"levels": 15},
        {"levels": 6, "token_shift": 3, "spiking_residuals": 2, "first_block_residual_lif": True},
        {
            "levels": 1,
            "spiking_residuals": 1,
            "float_reunite": True,
            "mlp_token_shift": 3,
            "attention_norm": True,
        },
    ],
)
def test_bit_for_bit_where_sums_are_exact(variant):
    """Logits and states: no integer differs, and currents halfway between two (ties) go up in both."""
    model = dyadic({"neuron": "ilif", "timesteps": 1, **variant})
    counted = []

    def look(module, args):
        u = args[0] / 0.25 + 0.5
        counted.append(u[(u >= 1) & (u <= variant["levels"])])

    hooks = [block.attention.q.lif.register_forward_pre_hook(look) for block in model.blocks]
    with torch.no_grad():
        whole = model(TOKENS)
    for hook in hooks:
        hook.remove()
    ties = sum(int((u == u.round()).sum()) for u in counted)
    assert ties > 20
    decoder = Decoder(model)
    logits, state = decoder.prefill(TOKENS[:, :5])
    parts = [logits]
    for i in range(5, 12):
        logits, state = decoder.step(TOKENS[:, i], state)
        parts.append(logits[:, None])
    assert torch.equal(torch.cat(parts, 1), whole)
    expected = model.prefill(TOKENS)[1]
    for a, e in zip(state.layers, expected.layers, strict=True):
        assert a.keys() == e.keys() and all(torch.equal(a[name], e[name]) for name in e)
    assert float(max(layer["attention.state"].max() for layer in state.layers)) > variant["levels"]


@pytest.mark.parametrize("preset", ["default", "best-small", "best-medium", "default-lif"])
def test_presets_are_written_natively(preset):
    model = SpikeDecoder(SpikeDecoderConfig.preset(preset, blocks=1, vocab_size=11)).eval()
    assert why_not(model) is None and type(open_source(model)) is Native


def test_an_unrolled_model_runs_its_timesteps():
    model = _model(DEFAULT).eval()
    model.unroll()
    assert why_not(model) == "its binary timesteps are run one by one (SpikeDecoder.unroll)"
    assert type(open_source(model)) is Recurrent
    model.unroll(False)
    assert why_not(model) is None


def test_when_the_text_too_long_for_float32_has_left_the_others_are_compiled_again(monkeypatch):
    model = _model({**ILIF, "levels": 15, "max_len": 512}).eval()
    source, alone = Native(model), Native(model)
    long = [i % 7 for i in range(int(model.config.exact_tokens) + 5)]
    source.add([[1, 2, 3], long])
    source.step([4, 4])
    assert source.state.layers[0]["attention.state"].dtype == torch.float64
    source.select([0])
    monkeypatch.setattr(model, "step", lambda *_: pytest.fail("not compiled"))
    alone.add([[1, 2, 3]])
    for token in (4, 5, 6):
        expected = alone.step([token])
        if token > 4:
            torch.testing.assert_close(source.step([token]), expected, rtol=1e-5, atol=1e-5)


def test_a_state_that_somebody_changed_is_looked_at_again():
    """Addresses are kept from step to step: no others may be read, or written to."""
    model = _model({"token_shift": 2}).eval()
    decoder = Decoder(model)
    _, state = decoder.prefill(TOKENS[:, :5])
    _, state = decoder.step(TOKENS[:, 5], state)
    for change in (
        lambda at: at.repeat(2)[: len(at) + 1],
        lambda at: at.int(),
        lambda at: at[:1].expand(len(at)),
        lambda at: torch.stack([at, at], 1)[:, 0],
    ):
        changed = decoder.step(TOKENS[:, 6], state.clone())[1]
        changed.position = change(changed.position)
        with pytest.raises(ValueError, match="state: "):
            decoder.step(torch.zeros(len(changed.position), dtype=torch.int64), changed)
    expected, _ = decoder.step(TOKENS[:, 6], state.clone())
    for layer in state.layers:
        for tensor in layer.values():
            tensor.data = tensor.detach().clone()
    assert torch.equal(decoder.step(TOKENS[:, 6], state)[0], expected)
