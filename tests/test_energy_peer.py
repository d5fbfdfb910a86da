"""The ledger beside the op counters of SpikingJelly 2.0, where they count the same thing.

Needs spikingjelly 2 (`pip install spikingjelly==2.0.0`); skipped without it. Where they differ, and why:
docs/energy.md.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy

op_counter = pytest.importorskip("spikingjelly.activation_based.op_counter")


def model_of(**changes) -> SpikeDecoder:
    torch.manual_seed(0)
    base = {"vocab_size": 17, "max_len": 16, "token_dim": 20, "position_dim": 12, "heads": 4, "blocks": 2}
    config = SpikeDecoderConfig(**{**base, "embedding_gain": 2.0, "attention_scale": 1.0, **changes})
    return SpikeDecoder(config).eval()


def counted(*products) -> tuple[int, int]:
    """(accumulates, multiply-accumulates) that SpikingJelly counts in calls without arguments."""
    synops, macs = op_counter.SynOpCounter(), op_counter.MACCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode([synops, macs]):
        for product in products:
            product()
    return synops.get_total(), macs.get_total()


@pytest.mark.parametrize(
    "changes",
    [{}, {"spike_degree": 2}, {"spike_degree": 0}, {"reunite": "concatenate"}, {"timesteps": 1}],
    ids=str,
)
def test_every_linear_and_the_totals_agree(changes):
    model, ids = (
        model_of(**changes),
        torch.randint(0, 17, (2, 16), generator=torch.Generator().manual_seed(1)),
    )
    inputs: dict[str, torch.Tensor] = {}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [
        m.register_forward_hook(lambda _m, x, _y, name=name: inputs.update({name: x[0].detach()}))
        for name, m in linears.items()
    ]
    ledger = energy.measure(model, ids)
    for handle in handles:
        handle.remove()
    totals = [0, 0]
    for name, module in linears.items():
        x = inputs[name].flatten(0, -2)
        accumulates, macs = counted(lambda x=x, m=module: F.linear(x, m.weight))
        row = ledger.row(name.removesuffix(".linear"), "linear")
        ours = (row.count, 0) if row.kind == "ac" else (0, row.count)
        assert (accumulates, macs) == ours, name
        totals = [totals[0] + accumulates, totals[1] + macs]
    assert max(totals) > 0
    rows = [r for r in ledger.rows if r.operation == "linear"]
    assert totals == [sum(r.count for r in rows if r.kind == kind) for kind in ("ac", "mac")]


def test_the_attention_state_agrees_and_the_quadratic_form_is_causal_here():
    model, ids = model_of(), torch.randint(0, 17, (2, 16), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    attention = model.blocks[0].attention.attention_lif
    handle = attention.register_forward_pre_hook(lambda _m, x: seen.update(q=x[0], k=x[1], v=x[2]))
    token, prompt = (energy.measure(model, ids, mode=mode) for mode in ("token", "prompt"))
    handle.remove()
    # [T, B, S, E] -> [T * B * H, S, d]
    q, k, v = (x.unflatten(-1, (4, -1)).transpose(2, 3).flatten(0, 2) for x in (seen[n] for n in "qkv"))
    layer = "blocks.0.attention.attention_lif"
    written, _ = counted(lambda: torch.bmm(k.transpose(1, 2), v))
    assert written == token.row(layer, "state += k^T v").count > 0
    full, _ = counted(lambda: torch.bmm(q, k.transpose(1, 2)))
    causal = int((q @ k.transpose(1, 2)).tril().sum())
    row = prompt.row(layer, "q k^T")
    # it counts d accumulates or one per spike of one factor, for all pairs; here both must spike, causally
    assert row.add == causal < full
