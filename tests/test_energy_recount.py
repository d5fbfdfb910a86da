"""Every row of the ledger, and every joule, against a second count: `recount.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awake import awake
from recount import Recount, price

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy

SMALL = {
    "vocab_size": 7,
    "max_len": 8,
    "token_dim": 6,
    "position_dim": 2,
    "heads": 2,
    "blocks": 2,
    "mlp_ratio": 2,
    "timesteps": 4,
    "attention_scale": 4.0,  # so that its neurons fire
    "v_threshold": 0.5,
}


def ilif(levels: int, **changes: Any) -> dict[str, Any]:
    return {"neuron": "ilif", "levels": levels, "timesteps": 1, **changes}


DECAY = {"decay_fastest": 0.7, "decay_slowest": 0.9}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"timesteps": 1},
    {"spike_degree": 0},
    {"spike_degree": 0, "norm": "batch", "token_shift": 2, "embedding_gain": 2.0},
    {"spike_degree": 1},
    {"spike_degree": 1, "reunite": "concatenate"},
    {"spike_degree": 1, "embedding_gain": 2.0, "token_encoding": "two-hot", "position_encoding": "binary"},
    {"spike_degree": 2, "token_shift": 2},
    {"spike_degree": 2, "reunite": "concatenate"},
    {"spike_degree": 2, "attention_only": True},
    {"spike_degree": 2, "spiking_residuals": 2, "spiking_head": True},
    {"spike_degree": 3},
    {**DECAY, "v_reset": None},
    {"spiking_residuals": 1, "attention_norm": True, "norm": "power"},
    {"spiking_residuals": 2, "first_block_residual_lif": True, "v_reset": -0.2, "norm": "batch"},
    {"token_shift": 3, "mlp_token_shift": 2, "embedding_gain": 2.0, "learn_threshold": True},
    *[{"reunite": r} for r in ("accumulate", "concatenate", "final")],
    *[{"reunite": r, "float_reunite": True} for r in ("average", "accumulate", "concatenate", "final")],
    *[{"reunite": r, "spiking_head": False} for r in ("average", "accumulate", "concatenate", "final")],
    {"combine_position": True},
    {"combine_position": True, "float_embedding": True, "embedding_gain": 2.0},
    {"float_embedding": True, "embedding_gain": 2.0, "position_encoding": "learned"},
    {"token_encoding": "one-hot", "max_len": 4, "heads": 1},
    {"token_encoding": "binary", "position_encoding": "linear", "heads": 1},
    ilif(5, v_threshold=0.4),
    ilif(1, spike_degree=3, spiking_residuals=2),
    ilif(3, spike_degree=2, embedding_gain=2.0),
    ilif(7, reunite="accumulate", heads=1, decay_fastest=0.5, decay_slowest=0.5),
    ilif(15, v_threshold=1.0, token_shift=3, attention_norm=True, norm="batch", **DECAY),
    {"token_dim": 46},  # the weights fill a larger memory, and so does the state of two blocks
]


pytestmark = pytest.mark.usefixtures("one_thread")


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in variant.items()) or "default"


@pytest.mark.parametrize("mode", ["prompt", "token"])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_row_and_joule_equals_a_second_count(variant: dict[str, Any], mode: Any) -> None:
    torch.manual_seed(0)
    model = awake(SpikeDecoder(SpikeDecoderConfig.from_dict({**SMALL, **variant})).eval(), 1.0)
    ids = torch.randint(0, 7, (2, min(6, model.config.max_len)))

    ledger, counted = energy.measure(model, ids, mode=mode), Recount(model, ids, mode)
    rows = {(row.layer, row.operation): row for row in ledger.rows}
    assert rows.keys() == counted.rows.keys()
    for key, expected in counted.rows.items():
        assert {name: getattr(rows[key], name) for name in expected} == dict(expected), key
    if model.config.spiking_attention:
        assert all(row.events for row in ledger.rows if row.kind == "lif"), "a layer is silent"

    parameters = sum(p.numel() for p in model.parameters())
    for number_format, narrow in (("fp32", None), ("fp16", None), ("int8", None), ("int8", 3)):
        arithmetic, memory, places = price(counted, number_format, narrow, parameters)
        bare, full = (
            ledger.joules(memory=m, number_format=number_format, activation_bits=narrow)
            for m in (False, True)
        )
        assert bare.joules == pytest.approx(arithmetic, rel=1e-9) and bare.memory == 0
        assert (full.arithmetic, full.memory) == pytest.approx((arithmetic, memory), rel=1e-9)
        assert full.joules == pytest.approx(arithmetic + memory, rel=1e-9) and full.placement == places
