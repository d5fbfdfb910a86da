"""`spikedecoder generate`: text from a trained model."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spikedecoder.data import Tokenizer
    from spikedecoder.generation import Prediction
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
    min_p: Annotated[
        float | None,
        typer.Option(help="Choose among tokens at least this share as probable as the most probable one."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that the text contains already are less likely; 1 is off.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends a continuation, not part of it; repeat for several."),
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
    past: Annotated[
        str,
        typer.Option(
            help="Beyond the model's context: slide (go on from the last half of it), or continue (just go "
            "on; spiking attention with static positions only)."
        ),
    ] = "slide",
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Tokens/s, spike rates, operations, estimated energy; on standard error."
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
    json_output: Annotated[
        bool,
        typer.Option("--json", help="Print one line: a JSON object with the text and what went with it."),
    ] = False,
) -> None:
    """Continue a prompt, or write from nothing, with a trained model. Text appears as it is generated."""
    # imported here to keep `--help` fast
    from spikedecoder.cli.inputs import load, tokenizer_of
    from spikedecoder.generation import SamplingParams, encode_prompt
    from spikedecoder.generation.detokenize import check_stop_strings
    from spikedecoder.generation.sampling import fresh_seed
    from spikedecoder.generation.window import Context

    seed = fresh_seed() if seed is None else seed
    sampling = SamplingParams(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    strings = check_stop_strings(stop)
    model, where = load(checkpoint, device)
    tokenizer = tokenizer_of(model, where)
    Context.of(model, None, past)
    texts = _prompts(prompt)
    ids = [encode_prompt(tokenizer, text, errors) for text in texts]
    options = {"top": top, "stop": strings, "past": past}

    if json_output:
        result = _as_json(model, tokenizer, where, texts, ids, tokens, sampling, options, stats)
        _print(json.dumps(result) + "\n")
        return
    written: list[list[int]] = []
    seconds = 0.0
    for i, start in enumerate(ids):
        own = dataclasses.replace(sampling, seed=(seed + i) % 2**63)
        _print("\n" * (i > 0))
        begin = time.perf_counter()
        try:
            written.append(_to_terminal(model, tokenizer, start, tokens, own, options))
        except Exception:
            _print("\n")  # the message follows, on a line of its own
            raise
        seconds += time.perf_counter() - begin
    if stats:
        print(_report(_stats(model, ids, written, seconds, past)), file=sys.stderr)


def _prompts(given: list[str] | None) -> list[str]:
    texts = []
    for text in given or [""]:
        if text == "-":
            from spikedecoder.data import read_text_files

            # read as training text is
            text = "".join(read_text_files(["-"])).removesuffix("\n")
        texts.append(text)
    return texts


def _to_terminal(
    model: SpikeDecoder,
    tokenizer: Tokenizer,
    start: list[int],
    tokens: int,
    sampling: Any,
    options: dict[str, Any],
) -> list[int]:
    """Print a text as it is generated; returns its new ids."""
    from spikedecoder.generation import stream_tokens

    shown = options["top"] > 0
    _print(tokenizer.decode(start) if start else "")
    _print("\n" * shown)
    written = []
    for new in stream_tokens(model, tokenizer, start, tokens, sampling, **options):
        written.append(new.token)
        if shown:
            candidates = "  ".join(f"{name!r} {p:.3f}" for name, p in _named(tokenizer, new.predictions))
            _print(f"{new.text!r:<12} <- {candidates}\n")
        else:
            _print(new.text)
    if not shown:
        _print("\n")
    return written


def _stats(
    model: SpikeDecoder, prompts: list[list[int]], tokens: list[list[int]], seconds: float, past: str
) -> dict[str, Any]:
    from spikedecoder.generation import start_token
    from spikedecoder.generation.stats import text_cost

    cost = text_cost(model, [p or [start_token(model)] for p in prompts], tokens, past=past)
    energy = cost.ledger.joules()
    total = sum(map(len, tokens))
    return {
        "tokens_per_second": total / seconds if total else 0.0,
        "spike_rate": cost.spike_rate,
        "spike_rates": cost.spike_rates,
        "accumulates_per_token": cost.accumulates,
        "multiply_accumulates_per_token": cost.multiply_accumulates,
        "joules_per_token": energy.per_token,  # of the tokens read; both are estimates
        "joules": energy.joules,
        "tokens_read": cost.tokens,
        "tokens_read_again": cost.again,
        "energy_table": energy.table,
    }


def _report(stats: dict[str, Any]) -> str:
    from spikedecoder.energy.units import si

    lines = [f"{stats['tokens_per_second']:.1f} tokens/s"]
    if stats["spike_rate"] is not None:
        lines.append(f"spikes per neuron and timestep: {stats['spike_rate']:.4f} (mean of the layers)")
        width = max(map(len, stats["spike_rates"]))
        lines += [f"  {name:<{width}}  {rate:.4f}" for name, rate in stats["spike_rates"].items()]
    again = stats["tokens_read_again"]
    outgrown = f" ({again:,} of them again, where the context was full)" if again else ""
    lines += [
        f"{stats['tokens_read']:,} tokens read{outgrown}; for each of them",
        f"  {stats['accumulates_per_token']:,.0f} accumulates, "
        f"{stats['multiply_accumulates_per_token']:,.0f} multiply-accumulates; "
        f"{si(stats['joules_per_token'])} of arithmetic estimated with {stats['energy_table']}, "
        f"{si(stats['joules'])} for all",
    ]
    return "\n".join(lines)


def _as_json(
    model: SpikeDecoder,
    tokenizer: Tokenizer,
    where: str,
    texts: list[str],
    ids: list[list[int]],
    tokens: int,
    sampling: Any,
    options: dict[str, Any],
    stats: bool,
) -> dict[str, Any]:
    """The first prompt's result at the top level, every prompt's under "samples"."""
    from spikedecoder.generation.generate import collect
    from spikedecoder.generation.text import prepare_text

    begin = time.perf_counter()
    result = collect(prepare_text(model, tokenizer, ids, tokens, sampling, **options))
    seconds = time.perf_counter() - begin
    samples: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        new = result.tokens[i]
        before = tokenizer.decode(result.prompts[i]) if result.prompts[i] else ""
        sample: dict[str, Any] = {
            "prompt": text,
            "text": before + result.completions[i],
            "completion": result.completions[i],
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
        **({"stats": _stats(model, ids, result.tokens, seconds, options["past"])} if stats else {}),
    }


def _named(tokenizer: Tokenizer, predictions: list[Prediction]) -> list[tuple[str, float]]:
    return [(tokenizer.tokens[p.token], p.probability) for p in predictions if p.token < tokenizer.vocab_size]


# A vocabulary may come from anywhere: what moves a terminal's cursor, sets its title, or turns lines round.
_COMMANDS = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _print(text: str) -> None:
    if sys.stdout.isatty():
        text = _COMMANDS.sub("\N{REPLACEMENT CHARACTER}", text)
    encoding = sys.stdout.encoding or "utf-8"  # characters that the terminal lacks become ?
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
