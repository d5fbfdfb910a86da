"""Draw the README's picture: held-out bits per token of a run, beside n-gram models of the same text.

spikedecoder train --out runs/picture
python bench/learning.py runs/picture docs/learning.png
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

from spikedecoder.data import ngram_bits, prepare_corpus
from spikedecoder.viz import save
from spikedecoder.viz.reports import read_metrics


def main(run: str, picture: str) -> None:
    corpus = prepare_corpus()
    info = Path(run) / "run.json"
    if not info.is_file():
        sys.exit(f"{run}: holds no run, takes the folder of one on the built-in text")
    fingerprint = json.loads(info.read_text())["fingerprint"]
    if fingerprint != corpus.fingerprint:
        sys.exit(f"{run}: got a run on another text, takes one on the built-in text")
    points = [(x["step"], x["val_loss"] / math.log(2)) for x in read_metrics(run) if "val_loss" in x]
    fig = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.plot(*zip(*points, strict=True), marker="o", ms=3, color="tab:orange", label="fully spiking decoder")
    for name, bits in ngram_bits(corpus.train, corpus.val, corpus.tokenizer.vocab_size).items():
        ax.axhline(bits, color="tab:gray", lw=1, ls=":")
        ax.text(points[-1][0], bits, name, ha="right", va="bottom", fontsize=8, color="tab:gray")
    ax.set_xlabel("step of 1 024 characters")
    ax.set_ylabel("held-out bits per character")
    ax.legend(frameon=False, loc="center")
    save(fig, picture)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
