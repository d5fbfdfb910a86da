"""Compare models with each other and with non-spiking twins; find the spike rates where these break even."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikedecoder.energy.baseline import ann_ledger, equal_bits
from spikedecoder.energy.ledger import Estimate, Ledger
from spikedecoder.energy.table import DEFAULT_TABLE, EnergyTable


@dataclass(frozen=True)
class Entry:
    """One entry of a comparison: a model, or its non-spiking twin, in one number format.

    model: its name. variant: which of the two, and the format: "ANN, int8". baseline: True for the twin.
    """

    model: str
    variant: str
    estimate: Estimate
    baseline: bool

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain data: its names and the sums of its estimate."""
        names = ("joules", "per_token", "arithmetic", "memory", "by_kind", "by_memory", "number_format")
        values = {name: getattr(self.estimate, name) for name in names}
        return {"model": self.model, "variant": self.variant, "baseline": self.baseline, **values}


@dataclass(frozen=True)
class BreakEven:
    """Input spike rates (per input, timestep and token) at which arithmetic costs as much as the twin's.

    rate: the measured mean over all Linears on spikes.
    overall: the mean rate at which the whole model would break even if all its spike-driven operations scaled
        in proportion. None if it breaks even at no rate (its other operations alone cost as much as the
        twin), if no spike reached a Linear, or if spike-driven operations cost nothing.
    layers: (measured rate, break-even rate) of each layer, for its Linear, shifts and bias alone. If the
        latter is above 1, the layer is cheaper at any rate; None means that additions are free.
    """

    number_format: str
    rate: float | None
    overall: float | None
    layers: dict[str, tuple[float, float | None]]

    def to_dict(self) -> dict[str, Any]:
        """The rates as plain data."""
        layers = {name: {"rate": r, "break_even": limit} for name, (r, limit) in self.layers.items()}
        return {
            "number_format": self.number_format,
            "rate": self.rate,
            "overall": self.overall,
            "layers": layers,
        }


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Every figure is an estimate that rests on `assumptions`.

    entries: `of(model)` selects those of one model. break_even: by name of each spiking model, for fp32 and
    int8.
    """

    entries: tuple[Entry, ...]
    break_even: dict[str, tuple[BreakEven, ...]]
    table: EnergyTable
    assumptions: tuple[str, ...]

    def of(self, model: str) -> list[Entry]:
        """The entries of one model: itself in each format, then its twins."""
        return [entry for entry in self.entries if entry.model == model]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, the table's energies included."""
        return {
            "estimate": True,
            "table": self.table.to_dict(),
            "entries": [entry.to_dict() for entry in self.entries],
            "break_even": {name: [b.to_dict() for b in each] for name, each in self.break_even.items()},
            "assumptions": list(self.assumptions),
        }


def compare(
    ledgers: Sequence[Ledger] | Mapping[str, Ledger],
    table: str | Path | EnergyTable = DEFAULT_TABLE,
    memory: bool | Mapping[str, str] = False,
) -> Comparison:
    """Estimate each model in fp32 and int8, and beside each spiking model the same shapes without spikes.

    The non-spiking twin is an ordinary transformer in fp32, in int8, and with int8 weights and activations of
    log2(T + 1) bits (rounded up, at most 8), which carry as much as T timesteps of spikes. With I-LIF neurons
    of D levels T is T * D; where attention does not spike it is 1.

    ledgers: named by the keys of the mapping, else by their own names (numbered if missing or repeated).
    table, memory: as in `Ledger.joules`.

    Raises TypeError, ValueError: a single Ledger, none, one of a spiking model other than a SpikeDecoder, or
    something else.
    """
    if isinstance(ledgers, Ledger):
        raise TypeError("ledgers: got a Ledger, takes several: a list, or a mapping of names to them")
    named = dict(ledgers) if isinstance(ledgers, Mapping) else _named(ledgers)
    if not named:
        raise ValueError("ledgers: got none, takes at least one")
    table = EnergyTable.load(table)
    entries: list[Entry] = []
    break_even: dict[str, tuple[BreakEven, ...]] = {}
    said: dict[str, None] = {}  # a dict keeps the order and drops duplicates
    for name, ledger in named.items():
        if not isinstance(ledger, Ledger):
            raise TypeError(f"ledgers: got {type(ledger).__name__} for {name!r}, takes a Ledger")
        twin = None if ledger.rate is None else ann_ledger(ledger)
        kinds: list[tuple[str, Ledger, dict[str, Any]]] = [
            ("this model, fp32", ledger, {}),
            ("this model, int8", ledger, {"number_format": "int8"}),
        ]
        if twin is not None:
            kinds += [("ANN, fp32", twin, {}), ("ANN, int8", twin, {"number_format": "int8"})]
            assert ledger.config is not None
            c = ledger.config
            steps = c.timesteps * c.spike_levels if c.spiking_attention else 1  # one pass
            bits = min(8, equal_bits(steps))
            narrow = {"number_format": "int8", "activation_bits": bits}
            kinds.append((f"ANN, int8 x {bits} bit", twin, narrow))
            break_even[name] = tuple(break_even_rate(ledger, table, f) for f in ("fp32", "int8"))
        for variant, source, options in kinds:
            estimate = source.joules(table, memory, **options)
            entries.append(Entry(name, variant, estimate, baseline=source is twin))
            for line in estimate.assumptions:
                about = f"{name}: {variant}, " if line.startswith("memory:") else ""
                said[about + line] = None
    twin_note = "the ANN has the same shapes, one pass in place of T, softmax and GELU; accuracies may differ"
    return Comparison(tuple(entries), break_even, table, (*said, twin_note))


def _named(ledgers: Sequence[Ledger]) -> dict[str, Ledger]:
    named: dict[str, Ledger] = {}
    for i, ledger in enumerate(ledgers):
        name = getattr(ledger, "name", "") or f"model {i + 1}"
        base, n = name, 2
        while name in named:
            name, n = f"{base} ({n})", n + 1
        named[name] = ledger
    return named


def break_even_rate(
    ledger: Ledger, table: str | Path | EnergyTable, number_format: str = "fp32"
) -> BreakEven:
    """The spike rates at which arithmetic in `number_format` costs as much as the twin's in that format."""
    table = EnergyTable.load(table)
    twin = ann_ledger(ledger)
    own, other = (x.joules(table, number_format=number_format) for x in (ledger, twin))
    add = table.multiply_add(number_format)[1] * 1e-12
    layers: dict[str, tuple[float, float | None]] = {}
    driven = 0.0  # joules that scale with the number of spikes
    for row in ledger.rows:
        if row.kind != "ac":
            continue
        driven += own.rows[row.layer, row.operation][0]
        if row.operation == "linear" and row.rate is not None:
            dense = sum(other.rows.get((row.layer, part), (0.0, 0.0))[0] for part in ("linear", "bias"))
            fixed = sum(own.rows.get((row.layer, part), (0.0, 0.0))[0] for part in ("bias", "shift"))
            full = row.slots * row.fan_out * add  # if every input were a spike
            layers[row.layer] = (row.rate, max(0.0, dense - fixed) / full if full else None)
    rate, overall = ledger.rate, None
    left = other.arithmetic - (own.arithmetic - driven)
    if rate and driven > 0 and left > 0:
        overall = rate * left / driven
    return BreakEven(number_format, rate, overall, layers)
