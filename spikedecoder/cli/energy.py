"""`spikedecoder energy`: what reading a text costs a model, estimated from the spikes it fires."""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from spikedecoder.energy import Comparison, EnergyTable, Ledger, Measured
    from spikedecoder.model import SpikeDecoder

MOST_TOKENS = 4096


def energy(
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            "-c",
            help="A model's folder, a run's (its best model), or a name on the hub; repeat to compare.",
        ),
    ],
    text: Annotated[Path | None, typer.Option("--text", help="File with the text to read.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to read.")] = None,
    table: Annotated[
        str,
        typer.Option(help="Energies: horowitz-45nm, jouppi-7nm, or a TOML file of your own."),
    ] = "horowitz-45nm",
    memory: Annotated[
        bool, typer.Option("--memory", help="Bill moving weights, activations and state too.")
    ] = False,
    mode: Annotated[
        str,
        typer.Option(help="prompt: whole sequences at once; token: one at a time, as in generation."),
    ] = "prompt",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Also every layer and operation.")] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Read at most so many tokens of the text.")
    ] = MOST_TOKENS,
    errors: Annotated[
        str,
        typer.Option(
            help="Characters or words that the model does not know: strict (an error), drop, or replace."
        ),
    ] = "strict",
    compat: Annotated[
        bool, typer.Option("--compat", help="Also what the original's app would show, errors included.")
    ] = False,
    measured: Annotated[
        bool, typer.Option("--measured", help="Also the joules that this machine counts (RAPL, NVML).")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write every layer and operation to this file.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write bars to this file: .png, .svg or .pdf.")] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one line: a JSON object with all of it.")
    ] = False,
) -> None:
    """Estimate the energy to read a text: of the model, and of the same shapes without spikes, side by side.

    Operations are counted from the spikes that the model fires on the text, and priced by a table of joules.
    """
    from spikedecoder._files import check_writable
    from spikedecoder.cli.inputs import given_text, load
    from spikedecoder.energy import EnergyTable, compare, measure

    words, name = given_text(prompt, text)
    prices = EnergyTable.load(table)
    if picture is not None:
        from spikedecoder.viz import check_picture

        check_picture(picture)
    for file in (csv_file, picture):
        if file is not None:
            check_writable(file)
    ledgers: dict[str, Ledger] = {}
    counted: dict[str, Measured | str] = {}  # the measurement, or why there is none
    for given in dict.fromkeys(checkpoint):
        model, where = load(given, device)
        batches = windows(model, where, words, name, errors, max_tokens)
        ledgers[given] = measure(model, batches, mode=_mode(mode), name=given)
        if measured:
            try:
                counted[given] = _measure_joules(model, batches)
            except ValueError as error:
                counted[given] = str(error)
    comparison = compare(ledgers, prices, memory)
    if csv_file is not None:
        _write_csv(csv_file, ledgers, prices, memory)
    if picture is not None:
        from spikedecoder.viz import energy_bars, save

        save(energy_bars(comparison), picture)
    originals = {name: _original(ledger) for name, ledger in ledgers.items()} if compat else {}
    if json_output:
        print(json.dumps(_as_json(ledgers, comparison, originals, counted, per_layer, memory)))
        return
    _show(ledgers, comparison, originals, counted, per_layer, memory)


def _mode(mode: str) -> Any:
    if mode not in ("prompt", "token"):
        raise ValueError(f"--mode: got {mode!r}, takes prompt or token")
    return mode


def windows(model: SpikeDecoder, where: str, text: str, name: str, errors: str, limit: int) -> list[Tensor]:
    """The first `limit` tokens in windows of the model's context: a batch of full windows, then the rest."""
    import torch

    from spikedecoder.cli.inputs import tokens_of

    ids = tokens_of(model, where, text, errors, f"{name} for {where}")[:limit]
    length = model.config.max_len
    whole = len(ids) // length * length
    full = torch.tensor(ids[:whole], dtype=torch.int64).reshape(-1, length)
    rest = torch.tensor([ids[whole:]], dtype=torch.int64)
    return [batch for batch in (full, rest) if batch.numel()]


def _measure_joules(model: SpikeDecoder, batches: list[Tensor]) -> Measured:
    import torch

    from spikedecoder.energy import measured_joules

    batches = [batch.to(model.device) for batch in batches]

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return measured_joules(run, device=str(model.device))


def _original(ledger: Ledger) -> dict[str, Any]:
    try:
        estimate = ledger.joules(compat=True)
    except ValueError as error:
        return {"joules": None, "reason": str(error).removeprefix("compat: ")}
    return {"joules": estimate.joules, "per_token": estimate.per_token, "label": estimate.assumptions[0]}


def _write_csv(path: Path, ledgers: dict[str, Ledger], table: EnergyTable, memory: bool) -> None:
    from spikedecoder._files import write_bytes
    from spikedecoder.energy.ledger import COLUMNS

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["checkpoint", *COLUMNS])
    for name, ledger in ledgers.items():
        writer.writerows([name, *line] for line in ledger.lines(ledger.joules(table, memory)))
    write_bytes(path, out.getvalue().encode())


def _as_json(
    ledgers: dict[str, Ledger],
    comparison: Comparison,
    originals: dict[str, dict[str, Any]],
    counted: dict[str, Measured | str],
    per_layer: bool,
    memory: bool,
) -> dict[str, Any]:
    from dataclasses import asdict

    models = {}
    for name, ledger in ledgers.items():
        values = ledger.to_dict()
        if per_layer:
            estimate = ledger.joules(comparison.table, memory)
            for row in values["rows"]:
                arithmetic, moved = estimate.rows[row["layer"], row["operation"]]
                row["estimated_joules"] = arithmetic  # as in the CSV
                row["estimated_memory_joules"] = moved if memory else None
        else:
            del values["rows"]
        if name in originals:
            values["compat"] = originals[name]
        if name in counted:
            m = counted[name]
            values["measured"] = (
                {"joules": None, "reason": m} if isinstance(m, str) else {**asdict(m), "per_run": m.per_run}
            )
        models[name] = values
    return {**comparison.to_dict(), "models": models}


def _show(
    ledgers: dict[str, Ledger],
    comparison: Comparison,
    originals: dict[str, dict[str, Any]],
    counted: dict[str, Measured | str],
    per_layer: bool,
    memory: bool,
) -> None:
    from spikedecoder.energy.units import si

    for name, ledger in ledgers.items():
        _say(_title(name, ledger))
        entries = comparison.of(name)
        reference = next((e.estimate.joules for e in entries if e.variant == "ANN, fp32"), None)
        lines = [["estimate", "per token", "in all", "arithmetic", "memory", "of fp32 ANN"]]
        for entry in entries:
            e = entry.estimate
            share = f"{e.joules / reference:.1%}" if reference else "-"
            moved = si(e.memory) if memory else "left out"
            lines.append([entry.variant, si(e.per_token), si(e.joules), si(e.arithmetic), moved, share])
        _table(lines, left=1)
        _say_more(name, comparison, originals, counted)
        if per_layer:
            _table(_layers(ledger, comparison.table, memory), left=3)
        _say()
    _say("Every figure is an estimate. It rests on this:")
    for line in comparison.assumptions:
        _say(textwrap.fill(line, 100, initial_indent="  - ", subsequent_indent="    "))


def _table(lines: list[list[str]], left: int) -> None:
    """Print columns as wide as they need to be, the first `left` aligned left; no number is ever cut."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        _say("  " + "  ".join(cells).rstrip())


def _say(text: str = "") -> None:
    encoding = sys.stdout.encoding or "utf-8"  # characters that the terminal lacks become ?
    print(text.encode(encoding, "replace").decode(encoding))


def _title(name: str, ledger: Ledger) -> str:
    rate = ledger.rate
    fired = "no spikes reach a Linear" if rate is None else f"mean input rate of its Linears {rate:.1%}"
    form = "one token at a time" if ledger.mode == "token" else "whole sequences at once"
    return f"{name}: {ledger.tokens:,} tokens in {ledger.sequences:,} sequence(s), {form}; {fired}"


def _say_more(
    name: str,
    comparison: Comparison,
    originals: dict[str, dict[str, Any]],
    counted: dict[str, Measured | str],
) -> None:
    from spikedecoder.energy.units import si

    arithmetic = {entry.variant: entry.estimate.arithmetic for entry in comparison.of(name)}
    for even in comparison.break_even.get(name, ()):
        limit = "at no rate" if even.overall is None else f"at a mean input rate of {even.overall:.1%}"
        if not any(arithmetic[f"{model}, {even.number_format}"] for model in ("this model", "ANN")):
            limit = "both cost nothing"
        _say(f"  break-even with the ANN in {even.number_format}, arithmetic only: {limit}")
    if name in originals:
        found = originals[name]
        _say(f"  compat: {found.get('reason') or si(found['joules']) + ' in all; ' + found['label']}")
    m = counted.get(name)
    if isinstance(m, str):
        _say(f"  {m}; the estimates above stand alone")
    elif m is not None:
        _say(
            f"  measured while this program computed it: {si(m.per_run)} a pass ({m.source}; {m.runs} passes "
            f"in {m.seconds:.1f} s; the whole package, idle power included)"
        )


def _layers(ledger: Ledger, prices: EnergyTable, memory: bool) -> list[list[str]]:
    from spikedecoder.energy.units import si

    lines = [["layer", "operation", "kind", "count", "rate", "arithmetic", *(["memory"] if memory else [])]]
    estimate = ledger.joules(prices, memory)
    for row in ledger.rows:
        costs = estimate.rows[row.layer, row.operation]
        rate = "" if row.rate is None else f"{row.rate:.1%}"
        shown = [si(cost) for cost in costs[: 1 + memory]]
        lines.append([row.layer, row.operation, row.kind, f"{row.count:,}", rate, *shown])
    return lines
