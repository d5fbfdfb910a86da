"""Figures of results: predictions while generating, energy, training runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikedecoder.energy.compare import Comparison
from spikedecoder.energy.rows import KINDS
from spikedecoder.fields import at_least
from spikedecoder.generation.sampling import Prediction
from spikedecoder.ops._check import of_type
from spikedecoder.viz._figure import COLOURS, figure, look, shown, token_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND_NAMES = {
    "mac": "multiply-accumulates",
    "ac": "accumulates",
    "lif": "neurons",
    "norm": "norms",
    "lookup": "look-ups",
    "other": "other",
}


def predictions(
    tokens: Sequence[int],
    candidates: Sequence[Sequence[Prediction]],
    names: Sequence[str],
    *,
    rows: int = 12,
    limit: int = 64,
) -> Figure:
    """Heat map of the candidates' probabilities at each generated token; a frame marks the token chosen.

    tokens: the generated ids.
    candidates: the predictions for each of them, as `spikedecoder.generation` returns them with ``top``.
    names: the vocabulary, by id.
    rows: how many candidates to show, those with the largest sum of probabilities.
    limit: how many generated tokens to show, from the first on.

    Raises ValueError if there are no tokens or candidates, or not one list of candidates per token, and for
    rows or a limit below 1.
    """
    at_least("rows", rows, 1)
    at_least("limit", limit, 1)
    if len(tokens) != len(candidates):
        raise ValueError(f"candidates: got {len(candidates)}, takes {len(tokens)}, one list for each token")
    if not tokens or not any(candidates):
        raise ValueError("candidates: got none; generate with top > 0 and at least one token")
    generated = len(tokens)
    tokens, candidates = tokens[:limit], candidates[:limit]
    mass: dict[int, float] = dict.fromkeys(tokens, 0.0)
    for at in candidates:
        for p in at:
            mass[p.token] = mass.get(p.token, 0.0) + p.probability
    kept = sorted(mass, key=lambda token: -mass[token])[:rows]
    grid = [[math.nan] * len(tokens) for _ in kept]
    place = {token: i for i, token in enumerate(kept)}
    for j, at in enumerate(candidates):
        for p in at:
            if p.token in place:
                grid[place[p.token]][j] = p.probability
    with look():
        from matplotlib.patches import Rectangle

        fig = figure(max(4.5, min(12.0, 1.6 + 0.2 * len(tokens))), max(2.2, 1.2 + 0.2 * len(kept)))
        ax = fig.subplots()
        ax.set_facecolor("#EEEEEE")
        image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        for j, token in enumerate(tokens):
            if token in place:
                ax.add_patch(
                    Rectangle((j - 0.5, place[token] - 0.5), 1, 1, fill=False, ec=COLOURS[1], lw=1.3)
                )
        ax.set_yticks(range(len(kept)), [shown(names[token]) for token in kept])
        token_ticks(ax, [names[token] for token in tokens], len(tokens))
        ax.set_xlabel("generated token")
        ax.set_ylabel("candidate")
        fig.colorbar(image, ax=ax, label="probability", pad=0.02)
        few = f" of {len(kept)} of {len(mass)} tokens" if len(kept) < len(mass) else ""
        first = f"; first {len(tokens)} of {generated:,} generated" if len(tokens) < generated else ""
        ax.set_title(f"Predictions{few}{first}; framed: the token chosen")
        return fig


def energy_bars(comparison: Comparison) -> Figure:
    """Bars of estimated energy per token, stacked by kind of operation; models and their twins in groups."""
    of_type("comparison", comparison, Comparison)
    models = list(dict.fromkeys(entry.model for entry in comparison.entries))
    entries = list(comparison.entries)
    per_token = [e.estimate.per_token for e in entries]
    factor, unit = _scale(max(per_token))
    kinds = [k for k in KINDS if any(e.estimate.by_kind.get(k) for e in entries)]
    memories = list(dict.fromkeys(m for e in entries for m in e.estimate.by_memory))
    with look():
        fig = figure(
            7.4, 1.35 + 0.3 * len(entries) + 0.35 * len(models) + 0.16 * (len(kinds) + len(memories))
        )
        ax = fig.subplots()
        places, y = [], 0.0
        for model in models:
            own = [e for e in entries if e.model == model]
            ax.text(0, y - 0.1, f" {_short(model)}", fontweight="bold", va="center", fontsize=8)
            y += 0.85
            for _ in own:
                places.append(y)
                y += 1.0
            y += 0.3
        left = [0.0] * len(entries)
        parts = [
            (_KIND_NAMES[k], COLOURS[i], "", [e.estimate.by_kind[k] for e in entries])
            for i, k in enumerate(KINDS)
            if k in kinds
        ]
        greys = ("#BBBBBB", "#DDDDDD", "#888888")
        parts += [
            (f"memory: {m}", greys[i % 3], "//", [e.estimate.by_memory.get(m, 0.0) for e in entries])
            for i, m in enumerate(memories)
        ]
        for label, colour, hatch, joules in parts:
            values = [j / e.estimate.tokens / factor for j, e in zip(joules, entries, strict=True)]
            ax.barh(
                places,
                values,
                left=left,
                height=0.72,
                color=colour,
                label=label,
                hatch=hatch,
                ec="white",
                lw=0.3,
            )
            left = [a + b for a, b in zip(left, values, strict=True)]
        for place, value in zip(places, left, strict=True):
            ax.text(value, place, f" {value:.3g}", va="center", fontsize=8)
        ax.set_yticks(places, [e.variant for e in entries])
        ax.set_ylim(y - 0.3, -0.6)
        ax.set_xlim(0, max(left) * 1.13 or 1)
        ax.set_xlabel(f"estimated energy per token, {unit}")
        moved = "with memory" if memories else "arithmetic only, memory left out"
        modes = " and ".join(dict.fromkeys(e.estimate.mode for e in entries))
        ax.set_title(f"Estimate ({comparison.table.name}; {modes} mode; {moved})")
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return fig


def loss_curves(runs: Mapping[str, str | Path] | Sequence[str | Path]) -> Figure:
    """Training loss (thin) and held-out loss (dots) of several runs, from the metrics.jsonl of each.

    runs: folders of training runs, or their metrics.jsonl files. A mapping names the runs; otherwise a run is
        named by the last part of its path, or by the whole path if several share that part.

    Raises ValueError, FileNotFoundError: no runs, or one without losses or without the file.
    """
    named = dict(runs) if isinstance(runs, Mapping) else _named(runs)
    if not named:
        raise ValueError("runs: got none, takes at least one")
    read = {name: read_metrics(path) for name, path in named.items()}
    with look():
        fig = figure(6.4, 3.6)
        ax = fig.subplots()
        for i, (name, lines) in enumerate(read.items()):
            colour = COLOURS[i % len(COLOURS)]
            for key, style in (("loss", {"lw": 0.9, "alpha": 0.55}), ("val_loss", {"marker": "o", "ms": 3})):
                points = [(x["step"], x[key]) for x in lines if isinstance(x.get(key), (int, float))]
                if points:
                    label = name if key == "val_loss" else None
                    ax.plot(*zip(*points, strict=True), color=colour, label=label, **style)
            if not any("val_loss" in x for x in lines):
                ax.plot([], [], color=colour, label=name)
        ax.set_xlabel("step")
        ax.set_ylabel("loss, nats per token")
        ax.grid(alpha=0.25)
        ax.set_title("thin: training; dots: held-out text")
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return fig


def _named(runs: Sequence[str | Path]) -> dict[str, Path]:
    paths = list(dict.fromkeys(map(Path, runs)))
    last = Counter(path.name for path in paths)
    return {path.name if path.name and last[path.name] == 1 else str(path): path for path in paths}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without those that a kill cut short or a crash garbled.

    path: the file or the run's folder. Raises FileNotFoundError, or ValueError if it holds no losses.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise FileNotFoundError(f"runs: {file}: no such file; takes a training run's folder") from None
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # no JSON, or a number of thousands of digits
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    if not any("loss" in x or "val_loss" in x for x in lines):
        raise ValueError(f"runs: {file}: holds no losses, takes the metrics.jsonl of a training run")
    return lines


def _scale(joules: float) -> tuple[float, str]:
    for factor, unit in ((1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")):
        if joules >= factor:
            return factor, unit
    return 1e-12, "pJ"


def _short(name: str) -> str:
    return name if len(name) <= 70 else "…" + name[-69:]
