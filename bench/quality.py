"""What makes spikes learn: equal text, shapes, parameters and tokens, one change at a time, beside ANN twins.

    python bench/quality.py --out bench/results/quality-small                      (every row, two seeds)
    python bench/quality.py --rows "default; GPT, ALiBi, shifts" --seeds 0,1,2 --text book.txt --out runs/book
    python bench/quality.py --size medium --device cuda --length 512 --steps 8000 --out bench/results/medium

Every row of `quality_rows.py` is trained with every seed by the same loop: windows, optimiser and schedule
of `TrainConfig`. Each run records held-out bits per token, during training and at the end; bits with contexts
of 4 and 16 times the training length; spike rate; estimated energy; tokens per second. A run is one file
under OUT/, so that an interrupted study can go on and several processes can work on it at once. The table and
the pictures are drawn from those files. OUT.json keeps them all, and is enough to go on with a study.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from quality_report import KINDS_OF_ENERGY, draw, render
from quality_rows import ROWS, Row, slug
from quality_tried import TRIED
from quality_twin import GPT

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, __version__, energy
from spikedecoder._files import write_bytes
from spikedecoder.checkpoint import write_json
from spikedecoder.data import Corpus, WindowSampler, held_out_batches, ngram_bits, prepare_corpus
from spikedecoder.spike_stats import SpikeCounter
from spikedecoder.training import TrainConfig

LONGER = (1, 4, 16)  # contexts, in training lengths
CURVE = 8  # points of the curve of held-out bits
PRICES = "horowitz-45nm"


def build(row: Row, corpus: Corpus, length: int) -> SpikeDecoder | GPT:
    vocabulary = corpus.tokenizer.vocab_size
    if row.kind == "gpt":
        return GPT(vocabulary, max_len=length, **row.model)
    fixed = {"vocab_size": vocabulary, "pad_id": corpus.tokenizer.pad_id, "max_len": length}
    if row.kind == "preset":
        return SpikeDecoder(SpikeDecoderConfig.preset(**row.model, **fixed))
    return SpikeDecoder(SpikeDecoderConfig(**row.model, **fixed))


@torch.no_grad()
def held_out_bits(model: SpikeDecoder | GPT, corpus: Corpus, length: int, limit: int | None = None) -> float:
    """Mean bits per held-out token, in windows of `length` that start without context."""
    total, count = 0.0, 0
    model.eval()
    batch = max(1, 2048 // length)
    device = next(model.parameters()).device
    for tokens, targets in held_out_batches(
        corpus.val, length, batch, limit, pad_id=corpus.tokenizer.pad_id or 0
    ):
        counted = int((targets != -100).sum())
        total += float(model.loss(tokens.to(device), targets.to(device))) * counted
        count += counted
    model.train()
    return total / count / math.log(2)


def run(row: Row, seed: int, corpus: Corpus, steps: int, length: int, device: str) -> dict[str, Any]:
    """Train one row with one seed, and evaluate it."""
    settings = TrainConfig(steps=steps, seed=seed, **row.train)
    torch.manual_seed(seed)
    model = build(row, corpus, length)
    if row.tried is not None:
        assert isinstance(model, SpikeDecoder)
        TRIED[row.tried](model)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(settings.weight_decay), settings.lr, betas=(settings.beta1, settings.beta2)
    )
    sampler = WindowSampler(corpus.train, length, settings.batch_size, seed)
    per_step, curve, seconds = settings.batch_size * length, [], 0.0
    for step in range(steps):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        tokens, targets = sampler.batch(step)
        loss = model.loss(tokens.to(device), targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begin
        if (step + 1) % max(1, steps // CURVE) == 0:
            curve.append(((step + 1) * per_step, held_out_bits(model, corpus, length, 16_384)))
    longer = {str(n): held_out_bits(model, corpus, n * length) for n in LONGER if row.reads_past(n)}
    result = {
        "row": row.name,
        "seed": seed,
        "bits": longer["1"],
        "curve": curve,
        "longer": longer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": round(steps * per_step / seconds),
        "spike_rate": None,
        "energy": {},
    }
    if isinstance(model, SpikeDecoder) and model.config.spiking_attention and row.tried is None:
        result |= spikes_and_energy(model.eval(), corpus, length)
    return result


@torch.no_grad()
def spikes_and_energy(model: SpikeDecoder, corpus: Corpus, length: int) -> dict[str, Any]:
    """Mean spike rate, and joules per token of each kind: the model's own, and its non-spiking twins'."""
    tokens, _ = next(held_out_batches(corpus.val, length, 16))
    tokens = tokens.to(model.device)
    with SpikeCounter(model) as counter:
        model(tokens)
    rates = counter.rates()
    estimates: dict[str, dict[str, float]] = {}
    for kind, (mode, memory) in KINDS_OF_ENERGY.items():
        ledger = energy.measure(model, tokens, mode=mode)
        for entry in energy.compare({"": ledger}, PRICES, memory=memory).entries:
            estimates.setdefault(entry.variant, {})[kind] = entry.estimate.per_token
    return {"spike_rate": sum(rates.values()) / len(rates), "energy": estimates}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="*", help="text files; default: the built-in text")
    parser.add_argument("--tokenizer", default="char")
    parser.add_argument("--steps", type=int, default=800, help="of 8 windows (medium: 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--seeds", default="0,1", help="separated by commas")
    parser.add_argument(
        "--size", default="small", choices=ROWS, help="medium: 14 million parameters, for a GPU"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", help="their names, separated by semicolons; default: all")
    parser.add_argument(
        "--out", default="bench/results/quality-small", help="folder of the runs; beside it .json, .md, .png"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only the table and the pictures, from what is there"
    )
    options = parser.parse_args()
    rows = {row.name: row for row in ROWS[options.size]}
    names = [n.strip() for n in options.rows.split(";")] if options.rows else list(rows)
    for name in names:
        if name not in rows:
            parser.error(f"--rows: got {name!r}, takes {'; '.join(rows)}")
    out = Path(options.out)
    if not options.draw:
        corpus = prepare_corpus(options.text, tokenizer=options.tokenizer)
        study = describe(corpus, options)
        prepare(out, study, parser)
        for seed in map(int, options.seeds.split(",")):
            for name in names:
                work(out, rows[name], seed, corpus, options)
    study, runs = gather(out)
    table = render(study, runs, list(rows.values()))
    write_bytes(out.with_suffix(".md"), table.encode())
    print(table)
    draw(study, runs, list(rows.values()), out.with_suffix(".png"))


def gather(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The study and its runs, from the files under OUT/ (then kept together as OUT.json) or from OUT.json."""
    together = out.with_suffix(".json")
    if (out / "study.json").exists():
        study = json.loads((out / "study.json").read_text())
        runs = [json.loads(p.read_text()) for p in sorted(out.glob("run-*.json"))]
        write_json(together, {**study, "runs": runs})
    else:
        study = json.loads(together.read_text())
        runs = study.pop("runs")
    return study, runs


def describe(corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a study have in common."""
    return {
        "text": corpus.name,
        "characters": corpus.characters,
        "vocabulary": corpus.tokenizer.vocab_size,
        "held_out": len(corpus.val) - 1,
        "tokenizer": options.tokenizer,
        "steps": options.steps,
        "length": options.length,
        "baselines": ngram_bits(corpus.train, corpus.val, corpus.tokenizer.vocab_size),
        "prices": PRICES,
    }


def prepare(out: Path, study: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.json"
    if not path.exists() and out.with_suffix(".json").exists():  # restore its runs, to go on from them
        kept = json.loads(out.with_suffix(".json").read_text())
        for result in kept.pop("runs"):
            write_json(out / f"run-{slug(result['row'])}-{result['seed']}.json", result)
        write_json(path, kept)
    if not path.exists():
        machine = f"{platform.machine()}, torch {torch.__version__}, spikedecoder {__version__}"
        write_json(path, {**study, "date": time.strftime("%Y-%m-%d"), "machine": machine})
        return
    earlier = json.loads(path.read_text())
    for key, value in study.items():
        if json.loads(json.dumps(value)) != earlier[key]:
            parser.error(f"--out: {out} holds a study of another {key}; takes a folder of its own")


def work(out: Path, row: Row, seed: int, corpus: Corpus, options: argparse.Namespace) -> None:
    """Run one row with one seed, unless its result is there or another process works on it."""
    path = out / f"run-{slug(row.name)}-{seed}.json"
    claim = path.with_suffix(".claim")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if not path.exists():
            print(f"seed {seed}  {row.name}: another process is at it (else delete {claim})", flush=True)
        return
    try:
        if not path.exists():
            result = run(row, seed, corpus, options.steps, options.length, options.device)
            write_json(path, result)
            print(f"seed {seed}  {row.name}: {result['bits']:.4f}", flush=True)
    finally:
        claim.unlink()


if __name__ == "__main__":
    main()
