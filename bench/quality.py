"""What makes spikes learn: equal text, parameters and tokens, one change at a time, beside ANN twins.

    python bench/quality.py --seeds 2 --steps 800 --out bench/results/quality-small      (about 25 minutes)
    python bench/quality.py --only "default; ann + shift" --text book.txt --tokenizer original-char

Each row of LADDER is trained through `spikedecoder.training.train` with every seed. Reported: held-out bits
per token at the end of the run, mean and (from two seeds on) a 95 % confidence half-width by Student's t, the
mean spike rate, and tokens per second. Finished rows are kept in OUT.json, so an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spikedecoder import SpikeDecoderConfig, __version__
from spikedecoder.checkpoint import write_bytes, write_json
from spikedecoder.data import Corpus, ngram_bits, prepare_corpus
from spikedecoder.training import TrainConfig, train

ORIGINAL: dict[str, Any] = {"token_shift": 1, "mlp_token_shift": 1, "embedding_gain": 1.0}
SHIFT4: dict[str, Any] = {**ORIGINAL, "token_shift": 4}
SHIFTS: dict[str, Any] = {**SHIFT4, "mlp_token_shift": 2}
DECAY: dict[str, Any] = {"decay_fastest": 0.75, "decay_slowest": 0.99}
ANN: dict[str, Any] = {"spike_degree": 0}

# name -> (changes to the "default" preset, changes to the training)
LADDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "original recipe": (ORIGINAL, {}),
    "original recipe, BatchNorm": ({**ORIGINAL, "norm": "batch"}, {}),
    "+ embedding gain 2": ({**ORIGINAL, "embedding_gain": 2.0}, {}),
    "+ decay per head": ({**ORIGINAL, "embedding_gain": 2.0, **DECAY}, {}),
    "token shift 4": (SHIFT4, {}),
    "token shift 4, MLP 2": (SHIFTS, {}),
    "default": ({}, {}),
    "default + decay": (DECAY, {}),
    "default + attention norm": ({"attention_norm": True}, {}),
    "default + decay + attention norm": ({**DECAY, "attention_norm": True}, {}),
    "default + decay, MLP shift 4": ({**DECAY, "mlp_token_shift": 4}, {}),
    "default + learned thresholds": ({"learn_threshold": True}, {}),
    "ann": ({**ANN, **ORIGINAL}, {"lr": 2e-3}),
    "ann + shift": ({**ANN, "embedding_gain": 1.0}, {"lr": 2e-3}),
    "ann + shift, lr 4e-3": ({**ANN, "embedding_gain": 1.0}, {"lr": 4e-3}),
}

# two-sided 95 % quantiles of Student's t by degrees of freedom
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}


def run(name: str, seed: int, corpus: Corpus, steps: int, length: int) -> dict[str, Any]:
    """Train one row with one seed."""
    model_changes, train_changes = LADDER[name]
    tokenizer = corpus.tokenizer
    config = SpikeDecoderConfig.preset(
        "default",
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        max_len=length,
        **model_changes,
    )
    settings = TrainConfig.preset(
        "default", steps=steps, seed=seed, eval_every=0, save_every=0, eval_tokens=None, **train_changes
    )
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, corpus, settings, out=Path(folder) / "run").to_dict()
    rates = list(result["spike_rates"].values())
    return {
        "seed": seed,
        "bits": result["val_bits_per_token"],
        "spike_rate": statistics.mean(rates) if rates else None,
        "tokens_per_second": round(result["tokens_per_second"]),
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": result["parameters"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    bits = [r["bits"] for r in runs]
    n = len(bits)
    half = _T95.get(n - 1, 1.96) * statistics.stdev(bits) / math.sqrt(n) if n > 1 else None
    return {
        "bits": statistics.mean(bits),
        "half_width": half,
        "low": min(bits),
        "high": max(bits),
        "seeds": n,
    }


def render(study: dict[str, Any]) -> str:
    """The study as Markdown, best first."""
    rows = sorted(
        ((name, summary(runs), runs) for name, runs in study["runs"].items() if runs),
        key=lambda row: row[1]["bits"],
    )
    best_ann = min((s["bits"] for name, s, _ in rows if name.startswith("ann")), default=None)
    lines = [
        f"{study['date']}: {study['text']} ({study['characters']:,} characters, "
        f"{study['vocabulary']} different tokens), "
        f"{study['steps']} steps of 8 x {study['length']} tokens; held-out bits per token over all "
        f"{study['held_out']:,} held-out tokens. {study['machine']}.",
        "",
        f"`{study['command']}`",
        "",
        "n-gram models of the same text: "
        + ", ".join(f"{name} {bits:.3f}" for name, bits in study["baselines"].items())
        + ".",
        "",
        "| model | bits per token | 95 % ± | seeds | over the best ANN | spikes | parameters | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s, runs in rows:
        over = "" if best_ann is None else f"{100 * (s['bits'] / best_ann - 1):+.1f} %"
        half = "" if s["half_width"] is None else f"{s['half_width']:.3f}"
        rate = runs[0]["spike_rate"]
        spikes = "" if rate is None else f"{100 * statistics.mean(r['spike_rate'] for r in runs):.1f} %"
        speed = max(r["tokens_per_second"] for r in runs)
        lines.append(
            f"| {name} | {s['bits']:.3f} | {half} | {s['seeds']} | {over} | {spikes} | "
            f"{runs[0]['parameters']:,} | {speed:,} |"
        )
    return "\n".join(lines) + "\n"


def draw(study: dict[str, Any], path: Path) -> None:
    """Bits per token of every row, spiking and not, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(((n, summary(r)) for n, r in study["runs"].items() if r), key=lambda row: -row[1]["bits"])
    fig, ax = plt.subplots(figsize=(8, 0.38 * len(rows) + 1.4), constrained_layout=True)
    for i, (name, s) in enumerate(rows):
        color = "tab:gray" if name.startswith("ann") else "tab:orange"
        ax.barh(i, s["bits"], color=color)
        ax.plot([s["low"], s["high"]], [i, i], color="black", linewidth=2)
        ax.text(s["high"] + 0.02, i, f"{s['bits']:.2f}", va="center", fontsize=9)
    for name, bits in study["baselines"].items():
        if name != "unigram":
            ax.axvline(bits, color="tab:blue", linestyle=":", linewidth=1)
            ax.text(bits, len(rows) - 0.35, name, color="tab:blue", fontsize=8, ha="center", va="bottom")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_xlim(left=min(s["low"] for _, s in rows) - 0.3)
    ax.set_xlabel("held-out bits per token (black: range over seeds; gray: non-spiking)")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="*", help="text files; default: the built-in text")
    parser.add_argument("--tokenizer", default="char")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="rows, separated by semicolons; default: all")
    parser.add_argument("--out", default="bench/results/quality-small")
    options = parser.parse_args()
    names = [n.strip() for n in options.only.split(";")] if options.only else list(LADDER)
    for name in names:
        if name not in LADDER:
            parser.error(f"--only: got {name!r}, takes rows of: {'; '.join(LADDER)}")

    corpus = prepare_corpus(options.text, tokenizer=options.tokenizer)
    out = Path(options.out)
    study: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python bench/quality.py --seeds {options.seeds} --steps {options.steps} "
        f"--length {options.length} --tokenizer {options.tokenizer}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"spikedecoder {__version__}",
        "text": corpus.name,
        "characters": corpus.characters,
        "vocabulary": corpus.tokenizer.vocab_size,
        "held_out": len(corpus.val) - 1,
        "steps": options.steps,
        "length": options.length,
        "baselines": ngram_bits(corpus.train, corpus.val, corpus.tokenizer.vocab_size),
        "runs": {},
    }
    json_path = out.with_suffix(".json")
    if json_path.exists():
        earlier = json.loads(json_path.read_text())
        same = all(earlier[k] == study[k] for k in ("text", "characters", "vocabulary", "steps", "length"))
        if not same:
            parser.error(f"--out: {json_path} holds another study; takes a name of its own")
        study["runs"] = earlier["runs"]
    for seed in range(options.seeds):
        for name in names:
            runs = study["runs"].setdefault(name, [])
            if any(r["seed"] == seed for r in runs):
                continue
            runs.append(run(name, seed, corpus, options.steps, options.length))
            print(f"seed {seed}  {name}: {runs[-1]}", flush=True)
            write_json(json_path, study)
            write_bytes(out.with_suffix(".md"), render(study).encode())
    print(render(study))
    try:
        draw(study, out.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no picture")


if __name__ == "__main__":
    main()
