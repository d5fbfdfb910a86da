"""The operation ledger of a measurement, and its conversion to joules."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.energy.rows import KINDS, Row
from spikedecoder.energy.table import DEFAULT_TABLE, MEMORIES, SPECIAL_IN_MACS, EnergyTable

STATE_BITS = 32  # membrane potentials, sums of spikes
_PICO = 1e-12
CLASSES = ("weights", "activations", "state")
COLUMNS = (
    "layer",
    "operation",
    "kind",
    "count",
    "rate",
    "add",
    "mul",
    "compare",
    "logic",
    "special",
    "estimated_joules",
    "estimated_memory_joules",
    "mode",
    "table",
    "number_format",
    "note",
)


@dataclass(frozen=True)
class Estimate:
    """Estimated energy in joules of everything in a ledger; `per_token` is the mean per token.

    joules: arithmetic + memory (0 if memory is left out); `by_layer` gives this sum for each layer.
    rows: (arithmetic, memory) of each (layer, operation).
    by_kind: arithmetic by kind of operation. by_memory: memory by what is moved: weights, activations, state.
    placement: the memory that holds each of these three; empty if memory is left out.
    mode: the ledger's. assumptions: what the estimate rests on, in words.
    """

    joules: float
    tokens: int
    arithmetic: float
    memory: float
    rows: dict[tuple[str, str], tuple[float, float]]  # (layer, operation): arithmetic, memory
    by_kind: dict[str, float]
    by_memory: dict[str, float]
    placement: dict[str, str]
    table: str
    number_format: str
    mode: str
    assumptions: tuple[str, ...]

    @property
    def per_token(self) -> float:
        """The mean joules of a token."""
        return self.joules / self.tokens

    def __float__(self) -> float:
        return self.joules

    @property
    def by_layer(self) -> dict[str, float]:
        """The joules of each layer, arithmetic and memory together."""
        sums: dict[str, float] = {}
        for (layer, _), (arithmetic, memory) in self.rows.items():
            sums[layer] = sums.get(layer, 0.0) + arithmetic + memory
        return sums

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data, without `rows`."""
        values = {name: value for name, value in asdict(self).items() if name not in ("rows", "assumptions")}
        extra = {"per_token": self.per_token, "by_layer": self.by_layer}
        return {"estimate": True, **values, **extra, "assumptions": list(self.assumptions)}


@dataclass
class Ledger:
    """All operations of a model on some tokens, by layer.

    mode: "prompt" or "token", see `Recorder`. sequences, tokens: how many were read. pairs: of a token and a
    token that it sees, itself included. parameters: their number. config: None for a model other than a
    SpikeDecoder. Raises ValueError if there are no rows or no tokens.
    """

    rows: list[Row]
    mode: str
    sequences: int
    tokens: int
    pairs: int
    parameters: int
    config: SpikeDecoderConfig | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.rows or self.tokens < 1:
            raise ValueError("energy: the model has seen no input, so there are no operations")

    def row(self, layer: str, operation: str) -> Row:
        """The row of a layer and operation. Raises KeyError if there is none."""
        for row in self.rows:
            if (row.layer, row.operation) == (layer, operation):
                return row
        raise KeyError(f"{layer}: {operation}")

    def totals(self) -> dict[str, Any]:
        """Operation counts by kind, those of elementary operations under "elementary", and `rate`."""
        kinds: dict[str, int] = {kind: sum(r.count for r in self.rows if r.kind == kind) for kind in KINDS}
        names = ("add", "mul", "compare", "logic", "special")
        elementary = {name: sum(getattr(r, name) for r in self.rows) for name in names}
        return {**kinds, "elementary": elementary, "rate": self.rate}

    @property
    def rate(self) -> float | None:
        """Spikes per input, timestep and token over all Linears on spikes; None if there are none."""
        fed = [r for r in self.rows if r.operation == "linear" and r.kind == "ac"]
        slots = sum(r.slots for r in fed)
        return sum(r.events for r in fed) / slots if slots else None

    def joules(
        self,
        table: str | Path | EnergyTable = DEFAULT_TABLE,
        memory: bool | Mapping[str, str] = False,
        *,
        number_format: str = "fp32",
        activation_bits: int | None = None,
        compat: bool = False,
    ) -> Estimate:
        """The energy of the operations, priced by `table`.

        table: a name, a TOML file or an EnergyTable; see `EnergyTable.load`.
        memory: False leaves memory out. True puts weights, activations and state each in the smallest memory
            that holds them; a mapping such as {"weights": "dram"} places some of them by hand.
        number_format: "fp32", "fp16" or "int8", of weights and activations. Neurons, norms, softmax, GELU and
            residual sums stay fp32; sums of spikes are int32, or fp32 where attention has a decay.
        activation_bits: with int8 weights, the bits of an activation, 1 to 8; None is 8.
        compat: the original program's formulas instead, with no other argument; see `original_estimate`.

        Raises TypeError, ValueError: naming the argument, or the table's entry.
        """
        table = EnergyTable.load(table)
        if compat:
            from spikedecoder.energy.original import original_estimate

            given = {
                "table": table != EnergyTable.load(DEFAULT_TABLE),
                "memory": memory is not False,
                "number_format": number_format != "fp32",
                "activation_bits": activation_bits is not None,
            }
            if any(given.values()):
                names = ", ".join(name for name, is_given in given.items() if is_given)
                raise ValueError(f"compat: got True with {names}, takes no other argument beside it")
            return original_estimate(self)
        word = {"fp32": 32, "fp16": 16, "int8": 8}.get(number_format, 0)
        matmul = table.multiply_add(number_format, activation_bits)
        if activation_bits is not None and (number_format != "int8" or not 1 <= activation_bits <= 8):
            raise ValueError(
                f"activation_bits: got {activation_bits!r} with {number_format}, takes 1 to 8 with int8"
            )
        bits = {"weights": float(word), "activations": float(activation_bits or word), "state": STATE_BITS}
        placement = self._placement(memory, bits) if memory is not False else {}
        costs: dict[tuple[str, str], tuple[float, float]] = {}
        by_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        by_memory = dict.fromkeys(placement, 0.0)
        for r in self.rows:
            mul, add = matmul
            if r.arithmetic == "activations" and activation_bits is not None:
                mul *= activation_bits / 8  # both factors are narrow
            if r.arithmetic == "counts":
                mul, add = 0.0, table.int32_add
            elif r.arithmetic == "values":
                mul, add = table.fp32_mul, table.fp32_add
            special = SPECIAL_IN_MACS * (table.fp32_mul + table.fp32_add)
            energy = r.mul * mul + (r.add + r.compare) * add + r.logic * table.logic + r.special * special
            moved = {
                "weights": r.weight_words * bits["weights"],
                "activations": r.activation_words * bits["activations"] + r.activation_bits,
                "state": r.state_words * bits["state"] + r.cache_words * bits["activations"],
            }
            fetched = 0.0
            for kind, where in placement.items():
                cost = moved[kind] * table.per_bit(where)
                by_memory[kind] += cost * _PICO
                fetched += cost
            costs[r.layer, r.operation] = energy * _PICO, fetched * _PICO
            by_kind[r.kind] += energy * _PICO
        arithmetic, total_memory = sum(by_kind.values()), sum(by_memory.values())
        return Estimate(
            joules=arithmetic + total_memory,
            tokens=self.tokens,
            arithmetic=arithmetic,
            memory=total_memory,
            rows=costs,
            by_kind=by_kind,
            by_memory=by_memory,
            placement=placement,
            table=table.name,
            number_format=number_format if activation_bits is None else f"int8 x {activation_bits} bit",
            mode=self.mode,
            assumptions=assumptions(self.mode, table, placement),
        )

    def _placement(self, memory: bool | Mapping[str, str], bits: Mapping[str, float]) -> dict[str, str]:
        chosen = {} if memory is True else dict(memory) if isinstance(memory, Mapping) else None
        if chosen is None:
            raise TypeError(f"memory: got {memory!r}, takes a bool or a mapping of {', '.join(CLASSES)}")
        for kind, where in chosen.items():
            if kind not in CLASSES or where not in MEMORIES:
                raise ValueError(
                    f"memory: got {kind!r}: {where!r}, takes {', '.join(CLASSES)} in {', '.join(MEMORIES)}"
                )
        widest = max(r.activation_words * bits["activations"] + r.activation_bits for r in self.rows)
        held = {
            "weights": self.parameters * bits["weights"] / 8,
            "activations": widest / self.tokens / 8,
            "state": sum(r.held * bits["state"] + r.cache_held * bits["activations"] for r in self.rows) / 8,
        }
        return {kind: chosen.get(kind) or EnergyTable.smallest_memory(held[kind]) for kind in CLASSES}

    def to_dict(self) -> dict[str, Any]:
        """Counts as plain data; no joules."""
        rows = [{**asdict(row), "rate": row.rate} for row in self.rows]
        head = {"name": self.name, "mode": self.mode, "sequences": self.sequences, "tokens": self.tokens}
        head |= {"pairs": self.pairs, "parameters": self.parameters}
        config = self.config.to_dict() if self.config is not None else None
        return {**head, "config": config, "totals": self.totals(), "rows": rows}

    def to_csv(self, estimate: Estimate | None = None) -> str:
        """CSV with one line per row and the columns COLUMNS. The joules are those of `estimate`, by default
        `self.joules()`; those of memory are empty if it is left out."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self.lines(estimate))
        return out.getvalue()

    def lines(self, estimate: Estimate | None = None) -> list[list[Any]]:
        """The values of COLUMNS for each row."""
        estimate = self.joules() if estimate is None else estimate
        lines = []
        for r in self.rows:
            arithmetic, memory = estimate.rows.get((r.layer, r.operation), (0.0, 0.0))
            values = {**asdict(r), "rate": r.rate, "estimated_joules": arithmetic}
            values["estimated_memory_joules"] = memory if estimate.placement else None
            values |= {name: getattr(estimate, name) for name in ("mode", "table", "number_format")}
            lines.append([values[name] for name in COLUMNS])
        return lines


def assumptions(mode: str, table: EnergyTable, placement: Mapping[str, str]) -> tuple[str, ...]:
    """What an estimate rests on, in words."""
    weights = "once per token" if mode == "token" else "once per sequence"
    said = [
        f"an estimate from operation counts, not a measurement; energies: {table.source}",
        "spikes are counted as they occurred; a layer on anything but spikes is billed dense, zeros included",
        "neurons, norms, softmax, GELU and residual sums are fp32, sums of spikes int32 (fp32 where "
        "attention decays), in every format",
        "no figure in the source: a comparison or choice = an addition, a shift = an int32 addition, a 1-bit "
        f"AND = int8_add / 8, exp, tanh, 1/x, 1/sqrt(x) = {SPECIAL_IN_MACS} fp32 multiply-accumulates",
        "token shift and the split into heads are addressing and cost nothing; control, event routing, "
        "clock, leakage and idle circuits are not billed",
    ]
    if mode == "token":
        said.append("attention in its recurrent form (softmax: with a cache), one token at a time")
    else:
        said.append("attention in its causal quadratic form, whole sequences at once")
    if placement:
        said += [
            "weights, activations and state each lie in one memory, the smallest that holds them unless "
            "placed by hand; energy per bit is a 64th of a 64-bit access",
            f"weights are fetched {weights} (by a layer on spikes in token mode: the columns of inputs that "
            "spiked), activations written and read once, a potential read and written at each timestep "
            f"({STATE_BITS} bits)",
            "memory: " + ", ".join(f"{kind} in {memory}" for kind, memory in placement.items()),
        ]
    else:
        said.append("moving data between memory and arithmetic is left out; it is often the larger part")
    return tuple(said)
