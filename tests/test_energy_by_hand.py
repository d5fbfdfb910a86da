"""The energy ledger against cases whose every operation, bit and joule is counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spikedecoder import SpikeDecoderConfig, energy
from spikedecoder.nn.attention import AttentionLIF
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.nn.neuron import ILIF, LIF
from spikedecoder.params import ILIFParams, LIFParams

# hand-counted: 3 spikes in, 2 neurons, 2 outputs, T = 2, one token


def two_layers(v_reset=0.0):
    first, second = SpikeLinear(3, 2), SpikeLinear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
        first.bias.zero_()
    return nn.Sequential(first, LIF(LIFParams(tau=2.0, v_reset=v_reset)), second)


# channel 0 spikes at both timesteps, channel 1 at the second: three spikes
SPIKES = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).reshape(2, 1, 1, 3)


def test_every_operation_of_two_layers_by_hand():
    model = two_layers()
    with energy.Recorder(model) as recorder:
        model(SPIKES)
    ledger = recorder.ledger()
    assert (ledger.sequences, ledger.tokens, ledger.pairs) == (1, 1, 1)
    assert [(r.layer, r.operation) for r in ledger.rows] == [
        ("0", "linear"),
        ("0", "bias"),
        ("1", "LIF"),
        ("2", "linear"),
    ]
    linear, bias, lif, out = ledger.rows
    # 3 input spikes x 2 outputs accumulate; nothing is multiplied
    assert (linear.kind, linear.count, linear.add, linear.mul) == ("ac", 6, 6, 0)
    assert (linear.events, linear.slots, linear.rate) == (3, 6, 0.5)
    # 2 timesteps x 2 outputs
    assert (bias.count, bias.add, bias.mul) == (4, 4, 0)
    # neuron 0 gets 2, 2: h = 1 fires both times. neuron 1 gets 0, 1: h = 0.5 never fires.
    # 4 updates: (x - v) / tau + v is 2 additions and 1 multiplication; 1 comparison, 1 choice
    assert (lif.kind, lif.count, lif.add, lif.mul, lif.compare) == ("lif", 4, 8, 4, 8)
    assert (lif.events, lif.slots, lif.rate) == (2, 4, 0.5)
    # 2 spikes x 2 outputs, no bias
    assert (out.kind, out.count, out.add, out.mul) == ("ac", 4, 4, 0)
    # by hand, pJ at 45 nm: additions 6 + 4 + 8 + 8 (comparisons) + 4 = 30 at 0.9, multiplications 4 at 3.7
    assert ledger.joules().joules == pytest.approx((30 * 0.9 + 4 * 3.7) * 1e-12, rel=1e-12)
    # int8 weights: the linears' 14 additions at 0.1; the neurons stay fp32
    int8 = ledger.joules(number_format="int8")
    assert int8.joules == pytest.approx((14 * 0.1 + 16 * 0.9 + 4 * 3.7) * 1e-12, rel=1e-12)
    # memory by hand, words of 32 bits. Weights, once for the sequence: 6 + 2 bias + 4 = 12. Activations: the
    # first reads 6 bits, writes 4 words; the LIF reads 4 words, writes 4 bits; the second reads 4 bits and
    # writes 4 words.
    # State: 4 updates read and write. All fits in 8 kB: 10 pJ / 64 bit.
    memory = ledger.joules(memory=True)
    assert memory.placement == dict.fromkeys(("weights", "activations", "state"), "sram_8kB")
    per_bit = 10 / 64 * 1e-12
    assert memory.by_memory["weights"] == pytest.approx(12 * 32 * per_bit)
    assert memory.by_memory["activations"] == pytest.approx(((4 + 4 + 4) * 32 + 6 + 4 + 4) * per_bit)
    assert memory.by_memory["state"] == pytest.approx(8 * 32 * per_bit)
    assert memory.arithmetic == ledger.joules().joules
    assert memory.joules == pytest.approx(memory.arithmetic + sum(memory.by_memory.values()))


def test_soft_reset_subtracts_where_a_spike_is():
    model = two_layers(v_reset=None)
    with energy.Recorder(model) as recorder:
        model(SPIKES)
    row = recorder.ledger().row("1", "LIF")
    # neuron 0: h = 1 fires, v = 0; again. 2 spikes: 2 more additions, 1 comparison an update
    assert (row.events, row.add, row.compare) == (2, 8 + 2, 4)


def test_a_dense_input_is_billed_as_macs_zeros_included():
    model = nn.Sequential(nn.Linear(3, 2))
    with energy.Recorder(model) as recorder:
        model(torch.tensor([[[0.0, 1.0, 0.0]]]))
    row = recorder.ledger().row("0", "linear")
    assert (row.kind, row.count, row.add, row.mul) == ("mac", 6, 6, 6)


def test_attention_by_hand():
    """q, k, v of 2 tokens, one head of 2, T = 1, written out."""
    config = SpikeDecoderConfig.from_dict({"heads": 1, "timesteps": 1, "token_dim": 1, "position_dim": 1})
    attention = AttentionLIF(config)
    q, k, v = (
        torch.tensor(rows, dtype=torch.float32).reshape(1, 1, 2, 2)
        for rows in ([[1, 1], [0, 1]], [[1, 0], [0, 1]], [[0, 1], [1, 1]])
    )
    for mode in ("prompt", "token"):
        with energy.Recorder(attention, mode) as recorder:
            attention(q, k, v)
        rows = {r.operation: r for r in recorder.ledger().rows}
        assert rows["scale"].mul == 4
        if mode == "prompt":
            # scores: (0,0) 1; (1,0) 0; (1,1) 1. q spikes meet 2 x 1 keys at token 0, 1 x 2 at token 1
            assert (rows["q k^T"].add, rows["q k^T"].logic, rows["q k^T"].mul) == (2, 4, 0)
            # scores that are not 0 of 3 pairs: 2; the first adds itself to 1 spike of v, the second to 2
            assert (rows["(q k^T) v"].add, rows["(q k^T) v"].events, rows["(q k^T) v"].slots) == (3, 2, 3)
        else:
            # k spikes x v spikes: 1 x 1 + 1 x 2; 3 q spikes read a row of 2
            assert (rows["state += k^T v"].add, rows["q state"].add) == (3, 6)
            assert rows["state += k^T v"].held == 4


def test_integers_are_billed_as_the_spikes_they_stand_for():
    """I-LIF of 3 levels: 4 currents of one neuron, then a Linear 1 -> 2."""
    model = nn.Sequential(ILIF(ILIFParams(3, 0.5)), SpikeLinear(1, 2, levels=3))
    x = torch.tensor([-1.0, 0.3, 1.1, 9.0]).reshape(1, 1, 4, 1)  # 00, 01, 10, 11: of two timesteps
    with energy.Recorder(model) as recorder:
        model(x)
    neuron, linear = recorder.ledger().row("0", "LIF"), recorder.ledger().row("1", "linear")
    # 4 currents added, 4 spikes subtract the threshold; 8 comparisons
    assert (neuron.events, neuron.slots, neuron.add, neuron.mul, neuron.compare) == (4, 8, 8, 0, 8)
    assert (linear.kind, linear.events, linear.slots, linear.add, linear.mul) == ("ac", 4, 8, 8, 0)
    assert linear.activation_bits == 8 and recorder.ledger().rate == 0.5
    # between the timesteps 4 x 2 sums are shifted
    assert recorder.ledger().row("1", "shift").add == 8
    with energy.Recorder(model[1]), pytest.raises(ValueError, match="other values than integers from 0 to 3"):
        model[1](torch.tensor([[[4.0]]]))


def test_attention_of_integers_is_billed_as_that_of_their_spikes():
    settings = {"heads": 1, "timesteps": 1, "token_dim": 1, "position_dim": 1, "neuron": "ilif", "levels": 3}
    attention = AttentionLIF(SpikeDecoderConfig.from_dict(settings))
    q, k, v = (
        torch.tensor(rows, dtype=torch.float32).reshape(1, 1, 2, 2)
        for rows in ([[3, 1], [0, 1]], [[1, 0], [0, 3]], [[0, 3], [2, 1]])
    )
    for mode in ("prompt", "token"):
        with energy.Recorder(attention, mode) as recorder:
            attention(q, k, v)
        rows = {r.operation: r for r in recorder.ledger().rows}
        if mode == "prompt":
            # scores: (0,0) 2; (1,0) 0; (1,1) 2. ANDs: 3 spikes x 1 key x 2 timesteps, 1 x 2 x 2
            assert (rows["q k^T"].add, rows["q k^T"].logic) == (4, 10)
            assert (rows["q k^T"].events, rows["q k^T"].slots) == (4, 8)
            # either score adds itself to the 2 spikes of v at its token
            assert (rows["(q k^T) v"].add, rows["(q k^T) v"].mul) == (4, 0)
        else:
            # k spikes x v spikes: 1 x 2 + 2 x 2; 4 q spikes read a row of 2
            assert (rows["state += k^T v"].add, rows["q state"].add) == (6, 8)


def test_spikes_that_are_none():
    model = two_layers()
    with energy.Recorder(model), pytest.raises(ValueError, match="input of 0 is not spikes"):
        model(SPIKES * 0.5)
    with energy.Recorder(model), pytest.raises(ValueError, match="input of 0 holds NaN"):
        model(SPIKES * math.nan)
