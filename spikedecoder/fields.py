"""Fields of configuration dataclasses: names, types, and values written as text."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import numbers
import re
import sys
import types
from collections.abc import Collection
from typing import Any, Literal, TypeGuard, get_args, get_origin

LEAST = math.ulp(0.0)  # lower bound of numbers that must be positive


def explained(kind: Any) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields, by name: entries "name, name: text" whose further
    lines are indented. Empty where Python drops docstrings (-OO)."""
    names = "|".join(field.name for field in dataclasses.fields(kind))
    found: dict[str, str] = {}
    for entry in re.sub(r"\n +", " ", inspect.cleandoc(kind.__doc__ or "")).splitlines():
        if match := re.match(rf"((?:{names})(?:, (?:{names}))*): ", entry):
            found |= dict.fromkeys(match[1].split(", "), entry)
    return found


def check_field(name: str, known: Collection[str], what: str) -> None:
    """Raise ValueError, suggesting the nearest known name, if `name` is unknown."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
        raise ValueError(f"{what}: unknown field {name!r}{hint}")


def at_least(name: str, value: float, low: int) -> None:
    """Raise ValueError if the integer `value` is less than `low`."""
    if value < low:
        raise ValueError(f"{name}: got {value}, takes an integer >= {low}")


def number(name: str, value: object, takes: str, low: float = -math.inf, high: float = math.inf) -> None:
    """TypeError if `value` is not a number, ValueError if it is not finite or outside [low, high]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes {takes}")
    if not (abs(value) <= sys.float_info.max and low <= value <= high):
        raise ValueError(f"{name}: got {value!r}, takes {takes}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer, numpy's included; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def switch(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes True or False")


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` in the field's type (TOML and JSON may write 1 for 1.0); ValueError if it does not fit."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options:
            raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(str, options))}")
        return value
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in options if h is not type(None))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: got an integer beyond the range of floats, takes a float") from None
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: got an integer of {value.bit_length()} bits, takes one of at most 64")
        return value
    raise ValueError(f"{name}: got {value!r} ({type(value).__name__}), takes {hint.__name__}")


def parse_value(text: str) -> Any:
    """A value typed on a command line: a number, true, false, none or null, JSON, or else a string."""
    word = text.strip()
    if word.lower() in ("none", "null"):
        return None
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    try:
        return json.loads(word) if word[:1] in ("[", "{", '"') else word
    except json.JSONDecodeError:
        return word


def parse_assignment(text: str, what: str = "--set") -> tuple[str, Any]:
    """("key", value) from "key=value", with "_" for "-" in the key; ValueError without a key or "="."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"{what}: got {text!r}, takes key=value")
    return name.strip().replace("-", "_"), parse_value(value)
