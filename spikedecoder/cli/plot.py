"""`spikedecoder plot`: the pictures of `spikedecoder.viz`, from checkpoints and runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikedecoder.cli.energy import MOST_TOKENS, windows
from spikedecoder.cli.inputs import given_text, load, tokens_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spikedecoder.model import SpikeDecoder

FIGURES = ("raster", "rates", "potentials", "attention", "predictions", "energy", "loss")
_SEVERAL = ("energy", "loss")
_OF_TEXT = tuple(f for f in FIGURES if f != "loss")
_TAKEN_BY = {
    "--prompt": _OF_TEXT,
    "--text": _OF_TEXT,
    "--layer": ("raster", "potentials", "attention"),
    "--tokens": ("predictions",),
    "--temperature": ("predictions",),
    "--seed": ("predictions",),
    "--memory": ("energy",),
}


def plot(
    figure: Annotated[
        str,
        typer.Argument(
            help="raster (which neuron fires at which token), rates (of each layer and timestep, dead, "
            "saturated), potentials (histograms), attention (scores by head), predictions (probabilities of "
            "generated tokens), energy (estimates side by side), or loss (training curves of runs)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write: .png, .svg or .pdf.")],
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            "-c",
            help="A model's folder, a run's (its best model), or a name on the hub; for energy and loss "
            "repeat it to compare. loss takes runs.",
        ),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text that the model reads.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="File with that text. raster, rates, potentials and attention show as much of its beginning "
            f"as the model's context holds, energy its first {MOST_TOKENS:,} tokens.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer to draw (blocks.0.mlp.fc1); repeat for potentials. Default: the first."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            "-n",
            min=1,
            help="predictions: tokens to generate, the first 64 are shown; default: 32.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="predictions: as in generate; default: 0.8.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="predictions: same seed, same text; default: 0.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="energy: bill moving data too.")] = False,
    errors: Annotated[
        str, typer.Option(help="Characters or words that the model does not know: strict, drop or replace.")
    ] = "strict",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
) -> None:
    """Draw a model's spikes, attention, predictions or energy, or the training curves of runs."""
    from spikedecoder import viz
    from spikedecoder._files import check_writable

    if figure not in FIGURES:
        raise ValueError(f"figure: got {figure!r}, takes one of {', '.join(FIGURES)}")
    if len(checkpoint) > 1 and figure not in _SEVERAL:
        raise ValueError(f"--checkpoint: got {len(checkpoint)}, {figure} takes one")
    given = dict(
        zip(_TAKEN_BY, (prompt, text, layer or None, tokens, temperature, seed, memory or None), strict=True)
    )
    for option, value in given.items():
        if value is not None and figure not in _TAKEN_BY[option]:
            raise ValueError(f"{option}: got with {figure}, belongs to {', '.join(_TAKEN_BY[option])}")
    check_writable(viz.check_picture(out))
    if figure == "loss":
        fig = viz.loss_curves(list(dict.fromkeys(checkpoint)))
    else:
        words, name = given_text(prompt, text)
        if figure == "energy":
            fig = _energy(checkpoint, words, name, errors, memory, device)
        elif figure == "predictions":
            fig = _predictions(checkpoint[0], words, name, errors, device, tokens or 32, temperature, seed)
        else:
            fig = _activity(figure, checkpoint[0], words, name, errors, device, layer)
    print(viz.save(fig, out))


def _load(checkpoint: str, words: str, name: str, errors: str, device: str) -> tuple[SpikeDecoder, list[int]]:
    """The model and the text's ids."""
    model, where = load(checkpoint, device)
    return model, tokens_of(model, where, words, errors, name)


def _activity(
    figure: str, checkpoint: str, words: str, name: str, errors: str, device: str, layers: list[str] | None
) -> Figure:
    import torch

    from spikedecoder import viz

    if layers and len(layers) > 1 and figure != "potentials":
        raise ValueError(f"--layer: got {len(layers)}, {figure} takes one")
    model, ids = _load(checkpoint, words, name, errors, device)
    given, ids = len(ids), ids[: model.config.max_len]
    wanted: dict[str, Any] = {"potentials": figure == "potentials", "scores": figure == "attention"}
    activity = viz.record(model, torch.tensor([ids]), **wanted)
    if len(ids) < given:
        activity.note = f"first {len(ids):,} of {given:,} tokens"
    labels = [model.tokenizer.tokens[i] for i in ids]
    layer = layers[0] if layers else None
    if figure == "raster":
        return viz.raster(activity, layer, labels=labels)
    if figure == "rates":
        return viz.spike_rates(activity)
    if figure == "potentials":
        return viz.potentials(activity, layers or None)
    return viz.attention_map(activity, layer, labels=labels)


def _predictions(
    checkpoint: str,
    words: str,
    name: str,
    errors: str,
    device: str,
    tokens: int,
    temperature: float | None,
    seed: int | None,
) -> Figure:
    from spikedecoder import viz
    from spikedecoder.generation import SamplingParams, generate
    from spikedecoder.nn.finite import check_finite

    sampling = SamplingParams(0.8 if temperature is None else temperature, seed=seed or 0)
    model, ids = _load(checkpoint, words, name, errors, device)
    check_finite(model)
    result = generate(model, [ids], tokens, sampling, top=12)
    return viz.predictions(result.tokens[0], result.predictions[0], model.tokenizer.tokens)


def _energy(checkpoints: list[str], words: str, name: str, errors: str, memory: bool, device: str) -> Figure:
    from spikedecoder import energy, viz

    ledgers = {}
    for given in dict.fromkeys(checkpoints):
        model, where = load(given, device)
        batches = windows(model, where, words, name, errors, MOST_TOKENS)
        ledgers[given] = energy.measure(model, batches, name=given)
    return viz.energy_bars(energy.compare(ledgers, memory=memory))
