"""``spikedecoder doctor --checkpoint``: what is wrong with a model, layer by layer, and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from spikedecoder._files import finite

if TYPE_CHECKING:
    from spikedecoder.diagnosis import Diagnosis

_WINDOWS = 4  # how many windows of the model's context are read


def examine_checkpoint(checkpoint: str, text: Path | None, json_output: bool) -> None:
    """Let the model read a little text (None: the built-in text) and report on its neurons."""
    import torch

    from spikedecoder.cli.inputs import load, read_text, tokenizer_of
    from spikedecoder.data import builtin_text
    from spikedecoder.diagnosis import diagnose
    from spikedecoder.generation.text import named

    model, where = load(checkpoint, "auto")
    tokenizer, length = tokenizer_of(model, where), model.config.max_len
    # assuming at most about 20 characters per token
    words = (builtin_text() if text is None else read_text(text))[: 20 * _WINDOWS * (length + 1)]
    unknown = tokenizer.unknown(words)
    ids = tokenizer.encode(words, errors="drop")[: _WINDOWS * length + 1]
    if len(ids) < 2:
        raise ValueError(f"--text: holds {len(ids)} tokens that {where} knows, takes two or more")
    length = min(length, len(ids) - 1)
    count = (len(ids) - 1) // length * length
    read = torch.from_numpy(ids[: count + 1].astype("int64"))
    tokens, targets = read[:-1].reshape(-1, length), read[1:].reshape(-1, length)
    diagnosis = diagnose(model, tokens, targets)
    if json_output:
        values = {"checkpoint": where, "tokens": count, "unknown": unknown, **diagnosis.to_dict()}
        print(json.dumps(finite(values), allow_nan=False))
    else:
        _show(where, count, diagnosis, integers=model.config.neuron == "ilif")
        if unknown:
            print(f"The model does not know, and did not read: {named(unknown)}")


def _show(where: str, tokens: int, diagnosis: Diagnosis, integers: bool) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{where}, reading {tokens:,} tokens", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for title in ("fires", "dead", "saturated", "flat", "gradient", "threshold"):
        table.add_column(title, justify="right", no_wrap=True)
    for x in diagnosis.layers:
        shares = (f"{100 * share:.1f} %" for share in (x.rate, x.dead, x.saturated, x.flat))
        gradient = "none" if x.gradient is None else f"{x.gradient:.1e}"
        table.add_row(x.name, *shares, gradient, f"{x.threshold:.3g}")
    # print at full width: a narrow terminal then breaks lines instead of cutting figures
    whole = Measurement.get(console, console.options.update(width=1000), table).maximum
    Console(highlight=False, width=whole).print(table)
    if integers:
        saturated = "always at their largest integer"
        flat = "currents beyond the levels, where no gradient passes"
    else:
        saturated = "that always fired"
        flat = "membrane potentials where the surrogate has less than 1 % of its steepest slope"
    console.print(
        f"fires: spikes per neuron and timestep. dead: neurons that never fired. saturated: {saturated}. "
        f"flat: {flat}. gradient: root mean square of what reaches the spikes."
    )
    if not diagnosis.findings:
        console.print("Nothing is wrong.")
    for finding in diagnosis.findings:
        console.print(finding, markup=False)
