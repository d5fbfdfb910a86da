"""`spikedecoder generate`: text from a trained model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spikedecoder.data import Tokenizer
    from spikedecoder.generation import GeneratedToken, Prediction
    from spikedecoder.model import SpikeDecoder


def generate(
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            "-c",
            help="A model's folder, a run's folder (its best model), or a name on the hub.",
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Text to continue; repeat for several; - reads standard input."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=0, help="Tokens to generate for each prompt.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1 safer, above 1 wilder; 0 always takes the most probable token.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most probable tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the fewest tokens that hold this share of probability.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed, same text. Prompt i (from 0) uses seed + i. Default: a fresh one."),
    ] = None,
    errors: Annotated[
        str,
        typer.Option(
            help="Characters or words that the model does not know: strict (an error), drop, or replace."
        ),
    ] = "strict",
    top: Annotated[int, typer.Option("--top", min=0, help="Show the k best predictions for each token.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
    json_output: Annotated[
        bool,
        typer.Option("--json", help="Print one line: a JSON object with the text and what went with it."),
    ] = False,
) -> None:
    """Continue a prompt, or write from nothing, with a trained model. Text appears as it is written.

    A text longer than the model's context goes on from the last half of it.
    """
    # heavy imports stay out of `--help`
    from spikedecoder.generation import SamplingParams, encode_prompt, suppressed_ids
    from spikedecoder.generation.sampling import fresh_seed

    seed = fresh_seed() if seed is None else seed
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    model, where = load(checkpoint, device)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{where}: has no tokenizer.json, so its tokens cannot be turned into text")
    texts = _prompts(prompt)
    ids = [encode_prompt(tokenizer, text, errors) for text in texts]
    options = {"top": top, "suppress": suppressed_ids(model)}

    if json_output:
        _print(json.dumps(_as_json(model, tokenizer, where, texts, ids, tokens, sampling, options)) + "\n")
        return
    for i, start in enumerate(ids):
        own = SamplingParams(temperature, top_k, top_p, (seed + i) % 2**63)
        _print("\n" * (i > 0))
        _to_terminal(model, tokenizer, start, tokens, own, options)


def load(checkpoint: str, device: str) -> tuple[SpikeDecoder, str]:
    """The model and the folder, or hub name, that it came from."""
    import torch

    from spikedecoder.model import SpikeDecoder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = find_checkpoint(checkpoint)
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: got {device!r}, which this machine cannot use ({reason})") from None
    return SpikeDecoder.from_pretrained(where, device=target), where


def find_checkpoint(checkpoint: str) -> str:
    """The folder with a model in it: `checkpoint` itself, or its best/ or last/; else a hub name as it is."""
    folder = Path(checkpoint)
    if not folder.exists():
        if checkpoint.count("/") > 1 or checkpoint.startswith((".", "/", "~")) or not checkpoint:
            raise ValueError(f"--checkpoint: {checkpoint!r}: no such folder")
        return checkpoint
    if not folder.is_dir():
        raise ValueError(f"--checkpoint: {checkpoint!r} is a file, takes a folder with config.json in it")
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    raise ValueError(f"--checkpoint: {checkpoint!r} has no config.json, nor have best/ or last/ in it")


def _prompts(given: list[str] | None) -> list[str]:
    texts = []
    for text in given or [""]:
        if text == "-":
            try:
                text = sys.stdin.read().removesuffix("\n")
            except UnicodeDecodeError as error:
                reason = f"standard input is no {error.encoding} text ({error.reason})"
                raise ValueError(f"--prompt -: {reason}") from None
        texts.append(text)
    return texts


def _to_terminal(
    model: SpikeDecoder,
    tokenizer: Tokenizer,
    start: list[int],
    tokens: int,
    sampling: Any,
    options: dict[str, Any],
) -> None:
    from spikedecoder.generation import stream
    from spikedecoder.generation.text import pieces

    shown = options["top"] > 0
    _print(tokenizer.decode(start) if start else "")
    _print("\n" * shown)
    kept: list[GeneratedToken] = []

    def ids() -> Iterator[int]:
        for new in stream(model, [start], tokens, sampling, **options):
            kept.append(new)
            yield new.token

    for piece in pieces(tokenizer, start, ids()):
        if shown:
            candidates = "  ".join(f"{name!r} {p:.3f}" for name, p in _named(tokenizer, kept[-1].predictions))
            _print(f"{piece!r:<12} <- {candidates}\n")
        else:
            _print(piece)
    if not shown:
        _print("\n")


def _as_json(
    model: SpikeDecoder,
    tokenizer: Tokenizer,
    where: str,
    texts: list[str],
    ids: list[list[int]],
    tokens: int,
    sampling: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The first prompt's result at the top, every prompt's under "samples"."""
    import spikedecoder.generation as generation

    begin = time.perf_counter()
    result = generation.generate(model, ids, tokens, sampling, **options)
    seconds = time.perf_counter() - begin
    samples: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        new = result.tokens[i]
        whole, before = tokenizer.decode(result.sequences[i]), tokenizer.decode(result.prompts[i])
        sample: dict[str, Any] = {
            "prompt": text,
            "text": whole,
            "completion": whole[len(before) :],
            "tokens": len(new),
            "token_ids": new,
            "finish": result.finish[i],
        }
        if options["top"]:
            sample["predictions"] = [
                [{"token": name, "probability": p} for name, p in _named(tokenizer, at)]
                for at in result.predictions[i]
            ]
        samples.append(sample)
    total = sum(map(len, result.tokens))
    return {
        **samples[0],
        "tokens_per_second": total / seconds if total else 0.0,
        "seed": result.seed,
        "checkpoint": where,
        "samples": samples,
    }


def _named(tokenizer: Tokenizer, predictions: list[Prediction]) -> list[tuple[str, float]]:
    return [(tokenizer.tokens[p.token], p.probability) for p in predictions if p.token < tokenizer.vocab_size]


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal that lacks a character gets a ? for it
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
