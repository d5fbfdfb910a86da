"""Tables of energies: the named ones, a user's own, and what is wrong with a bad one."""

from __future__ import annotations

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, energy

GOOD = """
[arithmetic]
fp32_mul = 1
fp32_add = 1
fp16_mul = 1
fp16_add = 1
int8_mul = 1
int8_add = 1
int32_add = 1
[memory]
sram_8kB = 1
sram_32kB = 1
sram_1MB = 1
dram = 1
"""


def test_named_tables():
    assert energy.EnergyTable.names() == ("horowitz-45nm", "jouppi-7nm")
    horowitz, jouppi = (energy.EnergyTable.load(name) for name in energy.EnergyTable.names())
    assert horowitz.fp32_mul + horowitz.fp32_add == pytest.approx(4.6)
    assert "Horowitz" in horowitz.source and "Jouppi" in jouppi.source
    for name in ("fp32_mul", "fp32_add", "int8_mul", "int8_add", "int32_add", "sram_8kB", "sram_1MB"):
        assert 0 < getattr(jouppi, name) < getattr(horowitz, name)


def test_a_table_of_ones_counts_operations(tmp_path):
    path = tmp_path / "ones.toml"
    path.write_text(GOOD)
    torch.manual_seed(0)
    model = SpikeDecoder(SpikeDecoderConfig(max_len=4, blocks=1, timesteps=2, embedding_gain=2.0))
    ledger = energy.measure(model, torch.tensor([[1, 2, 3]]))
    expected = sum(r.add + r.mul + r.compare + r.logic / 8 + 8 * r.special for r in ledger.rows)
    assert ledger.joules(path).joules == pytest.approx(expected * 1e-12)
    assert ledger.joules(path).table == "ones"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dram = 1", "", r"\[memory\] has no dram"),
        ("fp32_add = 1", "fp32_add = -0.9", "fp32_add: got -0.9"),
        ("fp32_add = 1", "fp32_add = nan", "fp32_add: got nan"),
        ("fp32_add = 1", "fp32_add = 1e308", r"fp32_add: got 1e\+308, takes a number of pJ from 0 to 1e\+12"),
        ("fp32_add = 1", "fp32_add = 'x'", "fp32_add: got 'x'"),
        ("fp32_add = 1", "fp32_add = true", "fp32_add: got True"),
        ("fp32_add = 1", "fp32_add = 1\nfp32_div = 2", "unknown field 'fp32_div'"),
        ("[memory]", "[memories]", "unknown field 'memories'"),
        ("[arithmetic]", "[arithmetic", "not a TOML file"),
        ("[arithmetic]", "arithmetic = 3\n[memory2]", "memory2"),
        ("[arithmetic]", "name = 3\n[arithmetic]", "name: got 3"),
    ],
)
def test_bad_tables_are_named(tmp_path, old, new, message):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        energy.EnergyTable.load(path)


def test_tables_that_are_not_there(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"a folder, takes a TOML file"):
        energy.EnergyTable.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml: no such file"):
        energy.EnergyTable.load("nowhere.toml")
    with pytest.raises(ValueError, match="got 'horowitz', takes horowitz-45nm"):
        energy.EnergyTable.load("horowitz")
    with pytest.raises(TypeError, match="table: got int"):
        energy.EnergyTable.load(3)


def test_a_table_object_serves_as_a_table():
    table = energy.EnergyTable.load("jouppi-7nm")
    assert energy.EnergyTable.load(table) is table
    assert table.smallest_memory(8000) == "sram_8kB" and table.smallest_memory(8001) == "sram_32kB"
    assert table.smallest_memory(1e9) == "dram"
    with pytest.raises(ValueError, match="memory: got 'tape'"):
        table.per_bit("tape")
