"""The configuration: validated, serialisable, with presets."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.fields import explained
from spikedecoder.params import ILIFParams
from spikedecoder.training import TrainConfig

ILIF = {"neuron": "ilif", "levels": 4, "timesteps": 1}


@pytest.mark.parametrize("kind", [SpikeDecoderConfig, TrainConfig])
def test_every_field_is_explained(kind):
    said = explained(kind)
    assert list(said) and {*said} == {field.name for field in dataclasses.fields(kind)}
    for name, entry in said.items():
        names, _, text = entry.partition(": ")
        assert name in names.split(", ") and len(text) > 1 and "\n" not in entry


def test_round_trip_through_json():
    config = SpikeDecoderConfig.preset("original-char", v_reset=None, spiking_head=True)
    assert SpikeDecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", SpikeDecoderConfig.presets())
def test_presets_are_valid(name):
    config = SpikeDecoderConfig.preset(name)
    assert config.embed_dim % config.heads == 0


def test_original_presets_are_the_models_of_the_original():
    char = SpikeDecoderConfig.preset("original-char")
    assert (char.vocab_size, char.max_len, char.embed_dim, char.heads, char.blocks) == (30, 256, 80, 5, 12)
    assert (char.timesteps, char.hidden_dim, char.token_encoding, char.position_encoding) == (
        4,
        1280,
        "learned",
        "static",
    )
    assert (char.token_shift, char.mlp_token_shift, char.embedding_gain) == (1, 1, 1.0)
    word = SpikeDecoderConfig.preset("original-word")
    assert (word.max_len, word.embed_dim, word.blocks, word.heads) == (128, 120, 20, 5)


def test_a_presets_pad_is_of_its_own_vocabulary():
    for name in ("original-char", "original-char-ann"):
        own = SpikeDecoderConfig.preset(name)
        assert own.pad_id == 28 == SpikeDecoderConfig.preset(name, vocab_size=own.vocab_size).pad_id
        assert SpikeDecoderConfig.preset(name, vocab_size=65).pad_id is None
        assert SpikeDecoderConfig.preset(name, vocab_size=65, pad_id=3).pad_id == 3


def test_the_default_preset_shifts_tokens_and_is_small():
    config = SpikeDecoderConfig.preset("default")
    assert config.token_shift > 1 and config.mlp_token_shift > 1 and config.spike_degree == 4
    assert sum(p.numel() for p in SpikeDecoder(config).parameters()) < 1_000_000


def test_every_field_is_described():
    doc = SpikeDecoderConfig.__doc__
    missing = [f.name for f in dataclasses.fields(SpikeDecoderConfig) if f.name not in doc]
    assert missing == []


def test_numbers_of_the_wrong_kind_are_taken_where_nothing_is_lost():
    assert SpikeDecoderConfig(tau=2).tau == 2.0
    assert isinstance(SpikeDecoderConfig(tau=2).tau, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": 0}, "timesteps: got 0, takes 1 to 65536"),
        ({"timesteps": 10**12}, "timesteps: got 1000000000000, takes 1 to 65536"),
        ({"vocab_size": 10**5000}, "vocab_size: got an integer of 16610 bits, takes one of at most 64"),
        ({"max_len": 10**10}, "max_len: got 10000000000, takes 1 to 16777216"),
        ({"mlp_ratio": 10**18}, "mlp_ratio: got 1000000000000000000, takes 1 to 65536"),
        (
            {"vocab_size": 2**20, "token_encoding": "one-hot"},
            "token_encoding: got 'one-hot' with 268435456 channels, takes at most 2097152",
        ),
        ({"heads": 5}, "heads: got 5, takes a divisor of the 96 channels"),
        ({"heads": 0}, "heads: got 0"),
        ({"vocab_size": -1}, "vocab_size: got -1"),
        ({"vocab_size": 2.5}, r"vocab_size: got 2.5 \(float\), takes int"),
        ({"vocab_size": True}, "vocab_size: got True"),
        ({"spike_degree": 5}, "spike_degree: got 5, takes 0 to 4"),
        ({"spiking_residuals": 3}, "spiking_residuals: got 3, takes 0 to 2"),
        (
            {"token_encoding": "three-hot"},
            "token_encoding: got 'three-hot', takes one of learned, one-hot, two-hot",
        ),
        ({"position_encoding": "rotary"}, "position_encoding: got 'rotary'"),
        ({"norm": "rms"}, "norm: got 'rms'"),
        ({"surrogate": "step"}, "surrogate: got 'step', takes one of sigmoid"),
        ({"reunite": "max"}, "reunite: got 'max'"),
        ({"tau": 0.5}, "tau: got 0.5"),
        ({"tau": "2"}, "tau: got '2'"),
        ({"v_threshold": float("inf")}, "v_threshold: got inf"),
        ({"v_threshold": 0.0}, r"v_threshold: got 0.0, takes a number above 0.0 \(v_reset\)"),
        ({"v_threshold": -1.0, "v_reset": None}, "v_threshold: got -1.0, takes a number above 0.0"),
        ({"v_threshold": 0.5, "v_reset": 0.5}, "v_threshold: got 0.5, takes a number above 0.5"),
        ({"surrogate_alpha": 0.0}, "surrogate_alpha: got 0.0, takes a finite number > 0"),
        ({"position_bias": float("nan")}, "position_bias: got nan"),
        ({"tau": 10**400}, "tau: got an integer beyond the range of floats"),
        ({"attention_dropout": 1.0}, "attention_dropout: got 1.0"),
        ({"mlp_dropout": -0.1}, "mlp_dropout: got -0.1"),
        ({"attention_scale": 0.0}, "attention_scale: got 0.0"),
        ({"embedding_gain": float("nan")}, "embedding_gain: got nan"),
        ({"embedding_std": 0.0}, "embedding_std: got 0.0"),
        ({"residual_init": -1.0}, "residual_init: got -1.0"),
        ({"neuron": "izhikevich"}, "neuron: got 'izhikevich', takes one of lif, ilif"),
        ({"levels": 4}, "levels: got 4, takes None with neuron='lif', as the preset default-lif has"),
        ({"neuron": "ilif", "levels": 4, "timesteps": 2}, "the preset default-lif has neurons of several"),
        ({"blocks": 10**12}, "blocks: got 1000000000000, takes 1 to 1024"),
        ({"neuron": "ilif", "timesteps": 1}, "levels: got None, takes 1 to 15"),
        ({"neuron": "ilif", "levels": 4}, "timesteps: got 4, takes 1 with neuron='ilif'"),
        ({**ILIF, "levels": 0}, "levels: got 0, takes 1 to 15"),
        ({**ILIF, "levels": 16}, "levels: got 16, takes 1 to 15"),
        ({**ILIF, "tau": 3.0}, "tau: got 3.0, takes 2.0 with neuron='ilif'"),
        ({**ILIF, "v_reset": -0.5}, "v_reset: got -0.5, takes None"),
        ({**ILIF, "learn_threshold": True}, "learn_threshold: got True, takes False"),
        ({**ILIF, "surrogate": "atan"}, "surrogate: got 'atan', takes 'sigmoid'"),
        ({**ILIF, "v_threshold": 0.0}, "v_threshold: got 0.0, takes a finite number > 0"),
        ({"token_shift": 0}, "token_shift: got 0"),
        ({"token_shift": 97}, "token_shift: got 97, takes 1 to 96"),
        ({"mlp_token_shift": 300}, "mlp_token_shift: got 300"),
        ({"decay_fastest": 0.0, "decay_slowest": 0.9}, "decay_fastest: got 0.0"),
        ({"decay_fastest": 1e-46, "decay_slowest": 0.9}, "decay_fastest: got 1e-46, takes .* 1e-45 or more"),
        ({"decay_fastest": 0.9, "decay_slowest": 0.5}, "decay_fastest: got 0.9, takes at most decay_slowest"),
        ({"decay_fastest": 0.9}, "both below 1 or both 1"),
        *(
            ({"decay_fastest": 0.5, "decay_slowest": value}, r"decay_slowest: got .*, takes a number in \(0")
            for value in (-0.1, 1.5, float("nan"), float("inf"))
        ),
        ({"pad_id": 30}, "pad_id: got 30"),
        (
            {"spike_degree": 0, "position_encoding": "binary"},
            "position_encoding: got 'binary', takes static or learned",
        ),
        (
            {"combine_position": True, "token_encoding": "two-hot"},
            "combine_position: got True with two-hot tokens",
        ),
        ({"float_reunite": True, "spiking_head": False}, "float_reunite: got True without a spiking head"),
        ({"hedas": 2}, "unknown field 'hedas'; did you mean heads"),
        ({"zzz": 2}, "unknown field 'zzz'; known: vocab_size"),
    ],
)
def test_bad_values_name_the_field_what_it_got_and_what_it_takes(changes, message):
    with pytest.raises(ValueError, match=message):
        SpikeDecoderConfig.from_dict(changes)


def test_ilif_takes_what_it_has():
    config = SpikeDecoderConfig.from_dict({**ILIF, "v_reset": None, "v_threshold": 0.5})
    assert config.neurons == ILIFParams(4, 0.5) and (config.binary_timesteps, config.spike_levels) == (3, 4)
    assert SpikeDecoderConfig().binary_timesteps == 4 and SpikeDecoderConfig().spike_levels == 1
    with pytest.raises(ValueError, match="recompute: got True, takes False with neuron='ilif'"):
        SpikeDecoder(config).recompute_activations()


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: got 'huge', takes one of default"):
        SpikeDecoderConfig.preset("huge")
