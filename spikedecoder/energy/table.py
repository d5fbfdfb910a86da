"""Energy tables, the cost of each operation and memory access: those of the package, and a user's own."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from spikedecoder.fields import check_field

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

DEFAULT_TABLE = "horowitz-45nm"
_TABLES = resources.files("spikedecoder.energy")

ARITHMETIC = ("fp32_mul", "fp32_add", "fp16_mul", "fp16_add", "int8_mul", "int8_add", "int32_add")
# capacity in bytes, the smallest first
MEMORIES: dict[str, float] = {"sram_8kB": 8e3, "sram_32kB": 32e3, "sram_1MB": 1e6, "dram": math.inf}
_MOST = 1e12  # pJ, one joule: sums over any number of operations stay finite
# The sources have no figure for an exponential, tanh, reciprocal or square root: billed as this many MACs.
SPECIAL_IN_MACS = 4


@dataclass(frozen=True)
class EnergyTable:
    """Energy in pJ of each operation and of each memory access of 64 bits.

    A comparison, or a choice between two values, is billed as an addition of the same format; a shift as an
    int32 addition; a 1-bit AND as an eighth of an int8 addition; exp, tanh, 1/x and 1/sqrt(x) as 4
    multiply-accumulates. The sources have no figures for these.
    """

    name: str
    source: str
    fp32_mul: float
    fp32_add: float
    fp16_mul: float
    fp16_add: float
    int8_mul: float
    int8_add: float
    int32_add: float
    sram_8kB: float
    sram_32kB: float
    sram_1MB: float
    dram: float

    def __post_init__(self) -> None:
        for name in (*ARITHMETIC, *MEMORIES):
            object.__setattr__(self, name, _energy(name, getattr(self, name), self.name))

    @property
    def logic(self) -> float:
        """pJ of a 1-bit AND."""
        return self.int8_add / 8

    def multiply_add(self, number_format: str, activation_bits: int | None = None) -> tuple[float, float]:
        """pJ of (multiplication, addition) in `number_format`: "fp32", "fp16" or "int8", else ValueError.

        int8 products are summed in int32. With `activation_bits`, an int8 weight is multiplied by an
        activation of that many bits, at a cost in proportion to them.
        """
        if number_format == "int8":
            share = 1.0 if activation_bits is None else activation_bits / 8
            return self.int8_mul * share, self.int32_add
        if number_format not in ("fp32", "fp16"):
            raise ValueError(f"number_format: got {number_format!r}, takes fp32, fp16 or int8")
        return getattr(self, f"{number_format}_mul"), getattr(self, f"{number_format}_add")

    def per_bit(self, memory: str) -> float:
        """pJ to move one bit to or from `memory`, a name in MEMORIES, else ValueError."""
        if memory not in MEMORIES:
            raise ValueError(f"memory: got {memory!r}, takes one of {', '.join(MEMORIES)}")
        return getattr(self, memory) / 64

    @staticmethod
    def smallest_memory(n_bytes: float) -> str:
        """The smallest memory that holds `n_bytes`."""
        return next(name for name, capacity in MEMORIES.items() if n_bytes <= capacity)

    def to_dict(self) -> dict[str, Any]:
        """Name, source and every energy in pJ as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the tables that come with the package."""
        return tuple(
            sorted(p.name.removesuffix(".toml") for p in _TABLES.iterdir() if p.name[-5:] == ".toml")
        )

    @classmethod
    def load(cls, table: str | Path | EnergyTable) -> EnergyTable:
        """A table by its name, or from a TOML file with [arithmetic] and [memory] in pJ (and name, source).

        Raises ValueError for an unknown name, or naming an entry that is missing, unknown or not a number
        from 0 to 1e12; FileNotFoundError or IsADirectoryError for a path that is not a file; TypeError.
        """
        if isinstance(table, EnergyTable):
            return table
        if not isinstance(table, (str, Path)):
            raise TypeError(f"table: got {type(table).__name__}, takes a name, a TOML file or an EnergyTable")
        if str(table) in cls.names():
            return cls._parse((_TABLES / f"{table}.toml").read_bytes(), str(table), str(table))
        path = Path(table)
        if not path.is_file():
            if path.is_dir():
                raise IsADirectoryError(f"table: {path}: a folder, takes a TOML file")
            if path.suffix == ".toml" or len(path.parts) > 1:
                raise FileNotFoundError(f"table: {path}: no such file")
            raise ValueError(f"table: got {str(table)!r}, takes {', '.join(cls.names())} or a TOML file")
        return cls._parse(path.read_bytes(), str(path), path.stem)

    @classmethod
    def _parse(cls, data: bytes, where: str, name: str) -> EnergyTable:
        try:
            values = tomllib.loads(data.decode("utf-8-sig"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"table: {where}: not a TOML file ({error})") from None
        for key in values:
            check_field(key, ("name", "source", "arithmetic", "memory"), f"table: {where}")
        found: dict[str, Any] = {}
        for section, keys in (("arithmetic", ARITHMETIC), ("memory", tuple(MEMORIES))):
            content = values.get(section, {})
            if not isinstance(content, dict):
                raise ValueError(f"table: {where}: {section}: got {content!r}, takes a table [{section}]")
            for key in content:
                check_field(key, keys, f"table: {where}: [{section}]")
            for key in keys:
                if key not in content:
                    raise ValueError(f"table: {where}: [{section}] has no {key}; takes a number of pJ")
                found[key] = _energy(key, content[key], where)
        for key, default in (("name", name), ("source", f"the user's own table, {Path(where).name}")):
            found[key] = values.get(key, default)
            if not isinstance(found[key], str):
                raise ValueError(f"table: {where}: {key}: got {found[key]!r}, takes a string")
        return cls(**found)


def _energy(name: str, value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value <= _MOST):
        raise ValueError(f"table: {where}: {name}: got {value!r}, takes a number of pJ from 0 to {_MOST:g}")
    return float(value)
