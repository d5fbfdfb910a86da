"""The study's table and pictures, from the files of its runs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Literal

from quality_rows import Row

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more
_T95 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09),
)


def collect(runs: list[dict[str, Any]], rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each row that has any, in the order of the rows."""
    by_row: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for result in runs:
        by_row.setdefault(result["row"], []).append(result)
    return {name: found for name, found in by_row.items() if found}


def mean(runs: list[dict[str, Any]], key: str = "bits") -> float:
    return statistics.mean(r[key] for r in runs)


def half_width(runs: list[dict[str, Any]]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean bits; None for one seed."""
    n = len(runs)
    if n < 2:
        return None
    return _T95[min(n - 1, len(_T95)) - 1] * statistics.stdev(r["bits"] for r in runs) / math.sqrt(n)


# for each kind of energy estimate: its mode in the package, and whether memory is counted
KINDS_OF_ENERGY: dict[str, tuple[Literal["prompt", "token"], bool]] = {
    "arithmetic": ("prompt", False),
    "with memory": ("prompt", True),
    "written, arithmetic": ("token", False),
    "written, with memory": ("token", True),
}


def best_ann(by_row: dict[str, list[dict[str, Any]]], rows: list[Row]) -> str | None:
    names = [row.name for row in rows if row.ann and row.name in by_row]
    return min(names, key=lambda name: mean(by_row[name]), default=None)


def render(study: dict[str, Any], runs: list[dict[str, Any]], rows: list[Row]) -> str:
    """The study as Markdown."""
    by_row = collect(runs, rows)
    twin = best_ann(by_row, rows)
    factors = sorted({int(n) for r in runs for n in r["longer"]})
    lines = [
        f"{study['date']}: {study['text']} ({study['characters']:,} characters, {study['vocabulary']} "
        f"different tokens), {study['steps']} steps of 8 x {study['length']} tokens; held-out bits per token "
        f"over all {study['held_out']:,} held-out tokens. {study['machine']}.",
        "",
        *([study["note"], ""] if "note" in study else []),  # where runs were added later
        "n-gram models of the same text: "
        + ", ".join(f"{name} {bits:.3f}" for name, bits in study["baselines"].items())
        + ".",
        "",
        "± is the 95 % confidence interval over seeds (Student's t; two seeds make it wide). Columns with a "
        "factor: bits where windows are so many times as long as in training. Energy: estimated arithmetic "
        f"per token of a text that is read at once ({study['prices']}), with int8 weights, and in fp32. "
        "Tokens/s: of training, on a machine that other runs shared.",
        "",
        "| model | bits | ± | seeds | over the best ANN | "
        + " | ".join(f"{n}x" for n in factors if n > 1)
        + " | spikes | nJ int8 | nJ fp32 | tokens/s | parameters |",
        "|---" * (10 + len(factors) - 1) + "|",
    ]
    for name, found in by_row.items():
        bits, half = mean(found), half_width(found)
        over = "" if twin is None else f"{100 * (bits / mean(by_row[twin]) - 1):+.1f} %"
        longer = [
            f"{statistics.mean(r['longer'][str(n)] for r in found):.3f}"
            if str(n) in found[0]["longer"]
            else ""
            for n in factors
            if n > 1
        ]
        rate = "" if found[0]["spike_rate"] is None else f"{100 * mean(found, 'spike_rate'):.1f} %"
        joules = [own_energy(found, number_format) for number_format in ("int8", "fp32")]
        cells = [name, f"{bits:.3f}", "" if half is None else f"{half:.3f}", str(len(found)), over, *longer]
        cells += [
            rate,
            *("" if j is None else f"{1e9 * j:.0f}" for j in joules),
            f"{max(r['tokens_per_second'] for r in found):,}",
            f"{found[0]['parameters']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *twins_energy(by_row)]) + "\n"


def own_energy(runs: list[dict[str, Any]], number_format: str) -> float | None:
    """Joules per token of the model's own arithmetic."""
    values = [r["energy"][f"this model, {number_format}"]["arithmetic"] for r in runs if r["energy"]]
    return statistics.mean(values) if values else None


def twins_energy(by_row: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Table of the energy per token of the default, and of its shapes without spikes."""
    runs = by_row.get("default") or next((r for r in by_row.values() if r[0]["energy"]), None)
    if not runs or not runs[0]["energy"]:
        return []
    kinds = [kind for kind in KINDS_OF_ENERGY if all(kind in r["energy"]["this model, int8"] for r in runs)]
    lines = [
        f'The shapes of "{runs[0]["row"]}", estimated nJ per token of a text that is read at once'
        + (", and of one that is written token by token:" if len(kinds) > 2 else ":"),
        "",
        "| | " + " | ".join(kinds) + " |",
        "|---" * (1 + len(kinds)) + "|",
    ]
    for variant in runs[0]["energy"]:
        values = [statistics.mean(r["energy"][variant][kind] for r in runs) for kind in kinds]
        lines.append(f"| {variant} | " + " | ".join(f"{1e9 * v:.0f}" for v in values) + " |")
    return lines


def draw(study: dict[str, Any], runs: list[dict[str, Any]], rows: list[Row], path: Path) -> None:
    """Four panels: every row's bits; bits against tokens seen, against energy, and against T."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_row, anns = collect(runs, rows), {row.name for row in rows if row.ann}
    bars = max(5.5, 0.17 * len(by_row))  # inches: each row's name legible
    layout: dict[str, Any] = {"width_ratios": [1.25, 1], "height_ratios": [bars, 5.5]}
    fig, axes = plt.subplots(2, 2, figsize=(13, bars + 5.5), constrained_layout=True, **layout)
    _bars(axes[0, 0], by_row, anns, study["baselines"])
    _curves(axes[0, 1], by_row, anns)
    _against_energy(axes[1, 0], by_row, rows, best_ann(by_row, rows))
    _against_timesteps(axes[1, 1], by_row, rows)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _bars(
    ax: Any, by_row: dict[str, list[dict[str, Any]]], anns: set[str], baselines: dict[str, float]
) -> None:
    names = sorted(by_row, key=lambda name: -mean(by_row[name]))
    for i, name in enumerate(names):
        bits = [r["bits"] for r in by_row[name]]
        ax.barh(i, mean(by_row[name]), color="tab:gray" if name in anns else "tab:orange")
        ax.plot([min(bits), max(bits)], [i, i], color="black", linewidth=2)
        ax.text(max(bits) + 0.02, i, f"{mean(by_row[name]):.2f}", va="center", fontsize=8)
    ax.axvline(baselines["trigram"], color="tab:blue", linestyle=":", linewidth=1)
    ax.text(baselines["trigram"], len(names) - 0.4, "trigram", color="tab:blue", fontsize=8, ha="center")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlim(left=min(mean(r) for r in by_row.values()) - 0.3)
    ax.set_xlabel("held-out bits per token (black: range over seeds; gray: non-spiking)")


def _curves(ax: Any, by_row: dict[str, list[dict[str, Any]]], anns: set[str]) -> None:
    shown = (
        "original recipe",
        "+ token shift 4",
        "+ residual init 0.3",
        "default",
        "GPT, ALiBi",
        "GPT, ALiBi, shifts, lr 8e-3",
    )
    for name, found in by_row.items():
        if name in shown:
            tokens = [point[0] / 1e6 for point in found[0]["curve"]]
            bits = [statistics.mean(r["curve"][i][1] for r in found) for i in range(len(tokens))]
            ax.plot(tokens, bits, "--" if name in anns else "-", marker=".", label=name)
    ax.set_xlabel("million tokens seen")
    ax.set_ylabel("bits per token on the first 16 384 held out")
    ax.legend(fontsize=8, frameon=False)


def _against_energy(
    ax: Any, by_row: dict[str, list[dict[str, Any]]], rows: list[Row], twin: str | None
) -> None:
    """All rows; those of the ladder and of the timesteps are labelled."""
    named = {row.name for row in rows if row.name[0] == "+" or row.steps is not None or row.name == "default"}
    points = [
        (name, 1e9 * joules, mean(found), "o")
        for name, found in by_row.items()
        if (joules := own_energy(found, "int8")) is not None
    ]
    runs = by_row.get("default")
    if runs and twin is not None:
        for variant in (v for v in runs[0]["energy"] if v.startswith("ANN, int8")):
            joules = statistics.mean(r["energy"][variant]["arithmetic"] for r in runs)
            points.append((variant, 1e9 * joules, mean(by_row[twin]), "s"))
    taken: list[tuple[float, float]] = []
    for name, x, y, marker in sorted(points, key=lambda point: (point[3] != "s", point[2])):
        ax.plot(x, y, marker, color="tab:gray" if marker == "s" else "tab:orange")
        near = any(abs(x - left) < 45 and abs(y - at) < 0.03 for left, at in taken)
        if (name in named or marker == "s") and not near:
            taken.append((x, y))
            ax.annotate(name, (x, y), fontsize=7, xytext=(5, -2), textcoords="offset points")
    ax.set_xlabel(
        "estimated nJ per token, int8 (gray: the best ANN's bits, at the energy of the default's shapes)"
    )
    ax.set_ylabel("held-out bits per token")


def _against_timesteps(ax: Any, by_row: dict[str, list[dict[str, Any]]], rows: list[Row]) -> None:
    """LIF, and I-LIF whose integers take as many binary timesteps as they have digits."""
    lines: dict[str, list[tuple[int, float]]] = {"LIF": [], "I-LIF": []}
    for row in rows:
        if row.name in by_row and row.steps is not None:
            lines["LIF" if row.kind == "spike" and "levels" not in row.model else "I-LIF"].append(
                (row.steps, mean(by_row[row.name]))
            )
    for name, points in lines.items():
        if points:
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    ax.legend(fontsize=8, frameon=False)
    ax.set_xlabel("binary timesteps of one token")
    ax.set_ylabel("held-out bits per token")
