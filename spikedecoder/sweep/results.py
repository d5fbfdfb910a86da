"""The results of trials: a table, and the best settings as a file."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from spikedecoder.sweep.space import Search
from spikedecoder.sweep.study import counted, folder_of

RESULTS, BEST = "results.csv", "best.toml"


def read_trials(study: Any) -> list[dict[str, Any]]:
    """A dict per trial, in the order in which they began.

    number. state: complete, pruned, fail, running or waiting. bits: the lowest held-out bits per token, of a
    pruned trial the last; None before the first evaluation. step: of the last evaluation. params, seconds,
    folder, error, spike_rate, parameters: None if not known.
    """
    rows = []
    for trial in counted(study):
        last = max(trial.intermediate_values, default=None)
        lowest = min(trial.intermediate_values.values(), default=None)
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "bits": trial.value if trial.value is not None else lowest,
                "step": last,
                "params": dict(trial.params),
                "seconds": trial.duration.total_seconds() if trial.duration else None,
                "folder": folder_of(trial),
                "error": trial.user_attrs.get("error"),
                "spike_rate": trial.user_attrs.get("spike_rate"),
                "parameters": trial.user_attrs.get("parameters"),
            }
        )
    return rows


def to_csv(trials: list[dict[str, Any]], search: Search) -> str:
    names = [d.name for d in search.space]
    columns = ["number", "state", "bits", "step", "seconds", "spike_rate", "parameters", "folder", "error"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns[:3], *names, *columns[3:]])
    for trial in trials:
        values = [trial[name] for name in columns]
        params = [trial["params"].get(name) for name in names]
        writer.writerow([*values[:3], *params, *values[3:]])
    return out.getvalue()


def best_toml(search: Search, trial: dict[str, Any]) -> str:
    """The settings of a trial as `spikedecoder train --config` reads them."""
    overrides = search.overrides(trial["params"])
    lines = [
        f"# trial {trial['number']} of a sweep: {trial['bits']:.4f} held-out bits per token",
        f"preset = {json.dumps(search.preset)}",
    ]
    for table, values in overrides.items():
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A number, a boolean, a string or None as TOML; JSON's notation serves for all of them."""
    return json.dumps("none" if value is None else value)
