"""From flags, --set and a TOML file to the settings of a model and of a training run."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.fields import check_field, explained, parse_assignment
from spikedecoder.training import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_OF_THE_TEXT = ("vocab_size", "pad_id")
MODEL_FIELDS = tuple(f.name for f in dataclasses.fields(SpikeDecoderConfig))
TRAIN_FIELDS = tuple(f.name for f in dataclasses.fields(TrainConfig))


@dataclass
class Overrides:
    """The fields that are to differ from the preset's."""

    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str, value: Any, what: str) -> None:
        check_field(name, (*MODEL_FIELDS, *TRAIN_FIELDS), what)
        (self.model if name in MODEL_FIELDS else self.train)[name] = value


def collect(file: Path | None, flags: Mapping[str, Any], assignments: Iterable[str]) -> Overrides:
    """The TOML file, then the flags that were given, then each --set: later ones win."""
    overrides = read_toml(file) if file is not None else Overrides()
    for name, value in flags.items():
        if value is not None:
            overrides.set(name, value, "flag")
    for text in assignments:
        overrides.set(*parse_assignment(text), "--set")
    return overrides


def load_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{what}: {path}: no such file") from None
    except OSError as error:
        raise OSError(f"{what}: {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{what}: {path}: not a TOML file ({error})") from None


def read_toml(path: Path) -> Overrides:
    """Read a file with tables [model] and [train], and optionally a key `preset` before them."""
    values = load_toml(path, "--config")
    for name in values:
        check_field(name, ("preset", "model", "train"), f"--config: {path}")
    overrides = Overrides(preset=values.get("preset"))
    for table, fields, target in (
        ("model", MODEL_FIELDS, overrides.model),
        ("train", TRAIN_FIELDS, overrides.train),
    ):
        content = values.get(table, {})
        if not isinstance(content, dict):
            raise ValueError(f"--config: {path}: {table}: got {content!r}, takes a table [{table}]")
        for name, value in content.items():
            check_field(name, fields, f"--config: {path}: [{table}]")
            # TOML has no null
            target[name] = None if value == "none" else value
    return overrides


def to_toml(preset: str, overrides: Overrides) -> str:
    """The preset with these overrides as a file for `read_toml`: all fields, with what their docstrings say,
    but those that the text determines."""
    model = SpikeDecoderConfig.preset(preset, **overrides.model)
    settings = TrainConfig.preset(preset, **overrides.train)
    lines = ['# "none" is None.', f"preset = {json.dumps(preset)}"]
    for table, fields, values in (("model", MODEL_FIELDS, model), ("train", TRAIN_FIELDS, settings)):
        lines += ["", f"[{table}]"]
        said, before = explained(type(values)), ""
        for name in fields:
            if name not in _OF_THE_TEXT:
                if (comment := said.get(name, "")) != before:
                    lines += ["", *textwrap.wrap(comment, 100, initial_indent="# ", subsequent_indent="#   ")]
                value, before = getattr(values, name), comment
                lines.append(f"{name} = {json.dumps('none' if value is None else value)}")
    return "\n".join(lines) + "\n"


def model_config(preset: str, changes: Mapping[str, Any], tokenizer: Any) -> SpikeDecoderConfig:
    """The preset with changes and the tokenizer's vocabulary; ValueError if `changes` contradict that."""
    for name in _OF_THE_TEXT:
        takes = getattr(tokenizer, name)
        if changes.get(name, takes) != takes:
            raise ValueError(
                f"{name}: got {changes[name]}, but the tokenizer of the text has {takes}; leave it out, "
                "it is taken from there"
            )
    vocabulary = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
    return SpikeDecoderConfig.preset(preset, **{**changes, **vocabulary})
