"""`spikedecoder sweep`: search for settings."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spikedecoder.sweep import SweepResult

_CURVES = 8  # learning curves in the picture


def sweep(
    search: Annotated[
        Path, typer.Argument(help="TOML file with a table space, and perhaps model, train, study, preset.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the study; one that holds this study already goes on.")
    ],
    text: Annotated[list[str] | None, typer.Option("--text", help="Text file to learn; repeatable.")] = None,
    corpus: Annotated[str | None, typer.Option(help="builtin, or war-and-peace (downloaded once).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that run trials side by side.")] = 1,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in all, instead of the file's; a grid runs all points.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Result as a JSON object, the last line of standard output.")
    ] = False,
) -> None:
    """Search for the settings with the lowest held-out bits per token. Run it again to go on.

    Writes OUT/results.csv, OUT/best.toml (for `spikedecoder train --config`), and pictures of the trials.
    See docs/sweep.md for the TOML file.

    Exit code: 0 done, 1 no trial succeeded, 2 wrong input, 130 interrupted.
    """
    from spikedecoder.cli.settings import load_toml
    from spikedecoder.sweep import Search
    from spikedecoder.sweep import sweep as run
    from spikedecoder.training import TrainingError

    if text and corpus:
        raise ValueError("--text and --corpus: got both, takes one of them")
    if text and "-" in text:
        raise ValueError("--text: got -, takes files: every trial reads the text")
    wanted = Search.from_dict(load_toml(search, "sweep"), str(search))
    if trials is not None:
        if wanted.sampler == "grid":
            raise ValueError("--trials: not together with a grid, which runs all its points")
        wanted = dataclasses.replace(wanted, trials=trials)
    texts = [str(Path(path).resolve()) for path in text] if text else None
    result = run(wanted, out, texts=texts, corpus=corpus, jobs=jobs, say=_quiet if as_json else print)
    pictures = _draw(result)
    if as_json:
        print(json.dumps(_as_json(result, pictures)))
    else:
        _show(result, pictures, text, corpus)
    if result.interrupted:
        raise typer.Exit(130)
    if result.best is None:
        reason = next((t["error"] for t in result.trials if t["error"]), "none was run")
        raise TrainingError(f"sweep: no trial came to its end; the first says: {reason}")


def _quiet(_: str) -> None:
    pass


def _draw(result: SweepResult) -> list[Path]:
    """Draw the pictures, if there is something to show and matplotlib is installed; returns their paths."""
    from spikedecoder import viz

    seen = [t for t in result.trials if t["state"] in ("complete", "pruned") and t["bits"] is not None]
    if not seen:
        return []
    best = sorted(seen, key=lambda t: t["bits"])[:_CURVES]
    runs = {f"trial {t['number']}": result.out / "trials" / t["folder"] for t in best}
    try:
        return [
            viz.save(viz.sweep_history(result.trials), result.out / "history.png"),
            viz.save(viz.sweep_slices(result.trials), result.out / "slices.png"),
            viz.save(viz.loss_curves(runs), result.out / "curves.png"),
        ]
    except ValueError as error:
        if "matplotlib" not in str(error):
            raise
        return []


def _as_json(result: SweepResult, pictures: list[Path]) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    values["out"] = str(result.out)
    values["best_file"] = str(result.best_file) if result.best_file else None
    return {**values, "pictures": list(map(str, pictures))}


def _show(result: SweepResult, pictures: list[Path], text: list[str] | None, corpus: str | None) -> None:
    from spikedecoder.sweep.worker import describe

    order = sorted(result.trials, key=lambda t: (t["state"] != "complete", t["bits"] or float("inf")))
    print(f"{'trial':>5}  {'bits':>7}  {'state':<8}  settings")
    for t in order[:20]:
        bits = "-" if t["bits"] is None else f"{t['bits']:.4f}"
        print(f"{t['number']:>5}  {bits:>7}  {t['state']:<8}  {t['error'] or describe(t['params'])}")
    if len(order) > 20:
        print(f"... and {len(order) - 20} more in {result.out / 'results.csv'}")
    for picture in pictures:
        print(picture)
    if result.interrupted:
        print("stopped; the same command goes on")
    elif result.best_file is not None:
        source = [x for path in text or () for x in ("--text", path)]
        source += ["--corpus", corpus] if corpus else []
        command = shlex.join(["spikedecoder", "train", "--config", str(result.best_file), *source])
        print(f"train the best again, or longer (--max-steps): {command}")
