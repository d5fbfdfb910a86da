"""Energy estimates from measured spikes: operation ledgers, energy tables, non-spiking baselines.

    ledger = energy.measure(model, tokens)
    ledger.joules("horowitz-45nm", memory=True).per_token  # J
    energy.compare([ledger])

What is counted, and what the figures rest on: docs/energy.md.
"""

from spikedecoder.energy.baseline import ann_ledger, equal_bits, twin_config
from spikedecoder.energy.compare import BreakEven, Comparison, Entry, break_even_rate, compare
from spikedecoder.energy.ledger import Estimate, Ledger
from spikedecoder.energy.measure import measure
from spikedecoder.energy.meter import Measured, measured_joules
from spikedecoder.energy.original import original_estimate
from spikedecoder.energy.record import Recorder
from spikedecoder.energy.rows import Row
from spikedecoder.energy.table import DEFAULT_TABLE, EnergyTable

__all__ = [
    "DEFAULT_TABLE",
    "BreakEven",
    "Comparison",
    "EnergyTable",
    "Entry",
    "Estimate",
    "Ledger",
    "Measured",
    "Recorder",
    "Row",
    "ann_ledger",
    "break_even_rate",
    "compare",
    "equal_bits",
    "measure",
    "measured_joules",
    "original_estimate",
    "twin_config",
]
