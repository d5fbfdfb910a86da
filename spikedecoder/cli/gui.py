"""`spikedecoder gui`: the app in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def gui(
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--runs",
            help="Folder in which to look for models; repeatable. What the app trains goes into the first.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option("--checkpoint", "-c", help="A model's or a run's folder; repeatable.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser", help="Open a browser window.")] = False,
) -> None:
    """Write with trained models in a browser, and see predictions, spikes and estimated energy.

    Only this machine can reach the page. If there is no trained model, it offers to train a small one.
    """
    from spikedecoder.app import launch
    from spikedecoder.cli.inputs import find_checkpoint

    for folder in checkpoint or ():
        if not folder.is_dir():
            raise ValueError(f"--checkpoint: '{folder}': no such folder")
        find_checkpoint(str(folder))
    for folder in runs or ():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--runs: '{folder}': a file, takes a folder")
    launch([*(runs or [Path("runs")]), *(checkpoint or [])], port=port, browser=browser)
