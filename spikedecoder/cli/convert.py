"""``spikedecoder convert``: a checkpoint of the original SpikeDecoder as a folder of this package."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikedecoder._files import temporary_folder
from spikedecoder.fields import parse_assignment

if TYPE_CHECKING:
    from spikedecoder.config import SpikeDecoderConfig


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The original's .pt file (a state dict).")],
    folder: Annotated[Path, typer.Argument(help="New folder for the model.")],
    kind: Annotated[
        str | None, typer.Option(help="spiking, partial or nonspiking; default: told from the checkpoint.")
    ] = None,
    options: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML file with the original's keyword arguments (SDconfig, PSDconfig, NSDconfig), "
            "and perhaps dim_hid and dictionary. Default: the log that the original wrote beside it."
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, which no tensor tells.")] = None,
    dim_hid: Annotated[
        int | None,
        typer.Option(help="MLP width in multiples of the channels; default: told from the tensors."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Another keyword argument of the original's; repeatable."
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one line: a JSON object with folder and config.")
    ] = False,
) -> None:
    """Convert a checkpoint of the original SpikeDecoder, number for number.

    The folder works with `spikedecoder generate --checkpoint` and SpikeDecoder.from_pretrained.
    It has a tokenizer if the vocabulary is known: the 30 letters, or a dictionary among the options.
    """
    from spikedecoder.checkpoint import save_folder
    from spikedecoder.compat.convert import convert_original

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; choose a new folder")
    values = _read_options(options) if options is not None else None
    given = dict(parse_assignment(text) for text in set_ or [])
    if heads is not None:
        given["heads"] = heads
    if given:
        values = {**(values or {}), **given}
    width = dim_hid
    if values is not None and "dim_hid" in values:
        width = values.pop("dim_hid") if dim_hid is None else dim_hid
        values.pop("dim_hid", None)
    model = convert_original(checkpoint, values, kind=kind, dim_hid=width)
    model.tokenizer = _tokenizer(values or {}, model.config)
    _write(folder, lambda temporary: save_folder(model, temporary))

    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    if json_output:
        tokenizer = model.tokenizer.kind if model.tokenizer is not None else None
        values = {"folder": str(folder), "parameters": parameters, "tokenizer": tokenizer}
        print(json.dumps({**values, "config": config.to_dict()}))
        return
    print(
        f"{folder}: {config.blocks} blocks, {config.embed_dim} channels, {config.timesteps} timesteps, "
        f"spike degree {config.spike_degree}, {parameters:,} parameters"
    )
    if model.tokenizer is None:
        print("no tokenizer: its vocabulary is unknown; give the original's dictionary among the options")


def _read_options(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        from spikedecoder.cli.settings import load_toml

        return load_toml(path, "--options")
    from spikedecoder.checkpoint import read_json

    return read_json(path)


def _tokenizer(options: dict[str, Any], config: SpikeDecoderConfig) -> Any:
    """The original's tokenizer, or None if it is not known which one that is."""
    from spikedecoder.data import ORIGINAL_ALPHABET, CharTokenizer, WordTokenizer

    dictionary = options.get("dictionary")
    if dictionary is not None:
        return WordTokenizer.original(dictionary)
    return CharTokenizer.original() if config.vocab_size == len(ORIGINAL_ALPHABET) else None


def _write(folder: Path, write: Any) -> None:
    """Let `write` fill a temporary folder, then rename it: `folder` appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(folder.parent, f".{folder.name}.")
    try:
        write(temporary)
        os.replace(temporary, folder)  # replaces an empty folder at most
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
