"""The space to search: dimensions over fields of the model and the training, and how to walk it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, get_args, get_origin

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.data import Tokenizer
from spikedecoder.fields import check_field, coerce
from spikedecoder.training import TrainConfig

_TABLES: dict[str, dict[str, Any]] = {
    "model": typing.get_type_hints(SpikeDecoderConfig),
    "train": typing.get_type_hints(TrainConfig),
}
# these change the held-out text or its tokens, so bits of different values could not be compared
_MEASURE = ("vocab_size", "pad_id", "tokenizer", "min_count", "val_fraction", "eval_tokens")
SAMPLERS = ("tpe", "grid", "random")
_STUDY = ("sampler", "trials", "seed", "prune", "startup")
_MOST = 10_000  # most points of a grid


@dataclass(frozen=True)
class Dimension:
    """One field and the values that it may take: `choices`, or `low` to `high`.

    table: "model" or "train". log: values are spread evenly in the logarithm. step: only the values low,
    low + step, ... points: how many values a grid takes from the range. integer: the field takes whole
    numbers.
    """

    name: str
    table: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    points: int | None = None
    integer: bool = False

    @classmethod
    def parse(cls, name: str, spec: Any) -> Dimension:
        """From a TOML value such as { low = 1e-3, high = 1e-2, log = true } or { choices = [2, 4] }.

        Raises ValueError naming the field and what is wrong.
        """
        what = f"space: {name}"
        check_field(name, [n for fields in _TABLES.values() for n in fields], "space")
        if name in _MEASURE:
            raise ValueError(f"{what}: changes what is measured, so trials could not be compared")
        if name == "neuron":
            raise ValueError(
                f"{what}: one kind refuses what the other takes (levels, timesteps); takes a search for "
                "each, from the presets default and default-lif"
            )
        table = "model" if name in _TABLES["model"] else "train"
        kind = _TABLES[table][name]
        if not isinstance(spec, Mapping):
            raise ValueError(
                f"{what}: got {spec!r}, takes {{ choices = [...] }} or {{ low = .., high = .. }}"
            )
        for key in spec:
            check_field(key, ("choices", "low", "high", "log", "step", "points"), what)
        if "choices" in spec:
            if len(spec) > 1:
                raise ValueError(f"{what}: got choices and {', '.join(k for k in spec if k != 'choices')}")
            return cls(name, table, _choices(what, spec["choices"], name, kind))
        number = _number(kind)
        if number is None:
            raise ValueError(f"{what}: takes choices: its values are no numbers")
        for end in ("low", "high"):
            if end not in spec:
                raise ValueError(f"{what}: got no {end}, takes low and high, or choices")
        integer = number is int
        ends = [coerce(f"{what}: {end}", spec[end], number) for end in ("low", "high")]
        low, high = ends
        log, step, points = spec.get("log", False), spec.get("step"), spec.get("points")
        if not isinstance(log, bool):
            raise ValueError(f"{what}: log: got {log!r}, takes true or false")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"{what}: got {low} to {high}, takes low < high, both finite")
        if log and low <= 0:
            raise ValueError(f"{what}: low: got {low} with log, takes a number > 0")
        if step is not None:
            step = coerce(f"{what}: step", step, number)
            if not (step > 0 and math.isfinite(step)) or log:
                raise ValueError(f"{what}: step: got {step}{' with log' if log else ''}, takes > 0, no log")
        if points is not None and (not isinstance(points, int) or isinstance(points, bool) or points < 2):
            raise ValueError(f"{what}: points: got {points!r}, takes an integer >= 2")
        return cls(name, table, (), low, high, log, step, points, integer)

    def suggest(self, trial: Any) -> Any:
        """A value for this trial, drawn by the study's sampler."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.integer:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def values(self) -> tuple[Any, ...]:
        """The values that a grid takes; ValueError for a range without step or points, or too many values."""
        if self.choices:
            return self.choices
        if self.step is not None:
            n = (self.high - self.low) / self.step + 1 + 1e-9
        elif self.points is not None:
            n = self.points
        else:
            raise ValueError(f"space: {self.name}: a grid needs choices, step, or points = N for this range")
        if n >= _MOST + 1:  # before the values are made
            raise ValueError(f"space: {self.name}: a grid of more than {_MOST:,} values, takes up to as many")
        if self.step is not None:
            found = [self.low + i * self.step for i in range(math.floor(n))]
        else:
            low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
            spread = [low + (high - low) * i / (n - 1) for i in range(math.floor(n))]
            found = [math.exp(x) if self.log else x for x in spread]
            found[0], found[-1] = self.low, self.high
        whole = [round(x) for x in found] if self.integer else found
        return tuple(dict.fromkeys(whole))


@dataclass(frozen=True)
class Search:
    """What to search and how; see `from_dict`. model, train: the fields that are the same in every trial."""

    space: tuple[Dimension, ...]
    preset: str = "default"
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sampler: str = "tpe"
    trials: int = 20
    seed: int = 0
    prune: bool = True
    startup: int = 5

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "search") -> Search:
        """From a TOML file's tables [space], [model], [train], [study] and its key preset.

        [study]: sampler (tpe, grid or random), trials (a grid runs all its points), seed, prune (stop a trial
        that is worse than the median of the others at the same step), startup (so many trials end before any
        is pruned, and are random before TPE begins). Raises ValueError naming the key.
        """
        try:
            return cls._parse(values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> Search:
        for name in values:
            check_field(name, ("preset", "model", "train", "space", "study"), "the file")
        tables = {name: values.get(name, {}) for name in ("model", "train", "space", "study")}
        for name, content in tables.items():
            if not isinstance(content, Mapping):
                raise ValueError(f"{name}: got {content!r}, takes a table [{name}]")
        if not tables["space"]:
            raise ValueError("space: got no field to search, takes a table [space]")
        space = tuple(Dimension.parse(name, spec) for name, spec in tables["space"].items())
        fixed: dict[str, dict[str, Any]] = {}
        for table in ("model", "train"):
            for name in tables[table]:
                check_field(name, tuple(_TABLES[table]), f"[{table}]")
                if name in tables["space"]:
                    raise ValueError(f"{name}: stands in [space] and in [{table}], takes one of them")
            fixed[table] = {n: None if v == "none" else v for n, v in tables[table].items()}
        study = dict(tables["study"])
        for name in study:
            check_field(name, _STUDY, "[study]")
        defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.name in _STUDY}
        for name, value in study.items():
            study[name] = coerce(f"study: {name}", value, type(defaults[name]))
        if study.get("sampler", "tpe") not in SAMPLERS:
            raise ValueError(f"study: sampler: got {study['sampler']!r}, takes {', '.join(SAMPLERS)}")
        for name, low in (("trials", 1), ("seed", 0), ("startup", 1)):
            if study.get(name, low) < low:
                raise ValueError(f"study: {name}: got {study[name]}, takes an integer >= {low}")
        preset = values.get("preset", "default")
        SpikeDecoderConfig.preset(preset)
        search = cls(space, preset, fixed["model"], fixed["train"], **study)
        if search.sampler == "grid":
            search = dataclasses.replace(search, trials=len(search.grid()))
        search.settings({})
        return search

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the dimensions' values; ValueError if there are too many."""
        values = [dimension.values() for dimension in self.space]
        if math.prod(map(len, values)) > _MOST:
            raise ValueError(
                f"space: a grid of {math.prod(map(len, values)):,} trials, takes up to {_MOST:,}"
            )
        names = [dimension.name for dimension in self.space]
        return [dict(zip(names, point, strict=True)) for point in product(*values)]

    def suggest(self, trial: Any) -> dict[str, Any]:
        if self.sampler == "grid":  # its trials were queued with all their values
            return {d.name: trial.suggest_categorical(d.name, d.values()) for d in self.space}
        return {d.name: d.suggest(trial) for d in self.space}

    def overrides(self, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The fields of a trial that differ from the preset's, by table."""
        found = {"model": dict(self.model), "train": dict(self.train)}
        for dimension in self.space:
            if dimension.name in params:
                found[dimension.table][dimension.name] = params[dimension.name]
        # five evaluations of a trial unless set otherwise: pruning needs some before the end
        steps = TrainConfig.preset(self.preset, **found["train"]).steps
        found["train"].setdefault("eval_every", max(1, steps // 5))
        return found

    def settings(self, params: Mapping[str, Any]) -> TrainConfig:
        return TrainConfig.preset(self.preset, **self.overrides(params)["train"])

    def config(self, params: Mapping[str, Any], tokenizer: Tokenizer) -> SpikeDecoderConfig:
        vocabulary = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
        return SpikeDecoderConfig.preset(self.preset, **{**self.overrides(params)["model"], **vocabulary})

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a study to go on: all but the number of trials, prune and startup."""
        space = {d.name: dataclasses.asdict(d) for d in self.space}
        for values in space.values():
            values["choices"] = list(values["choices"])
        return {
            "preset": self.preset,
            "model": self.model,
            "train": self.train,
            "space": space,
            "sampler": self.sampler,
            "seed": self.seed,
        }


def _choices(what: str, values: Any, name: str, kind: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{what}: choices: got {values!r}, takes a list of values")
    found = tuple(coerce(f"{what}: {name}", None if v == "none" else v, kind) for v in values)
    for value in found:
        if isinstance(value, float) and not math.isfinite(value):  # NaN would not equal the study's NaN
            raise ValueError(f"{what}: choices: got {value}, takes finite numbers")
    if len(set(found)) != len(found):
        raise ValueError(f"{what}: choices: a value stands there twice")
    return found


def _number(kind: Any) -> type | None:
    """int or float if a field takes such numbers (perhaps None too), else None."""
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if get_origin(kind) is typing.Literal:
        return None
    return next((k for k in options if k in (int, float)), None)
