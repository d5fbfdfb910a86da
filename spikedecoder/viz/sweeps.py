"""Figures of a sweep's trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spikedecoder.viz._figure import COLOURS, figure, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_history(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out bits per token of each trial, in the order in which they began, and the best so far.

    trials: mappings with number, state ("complete", "pruned", ...) and bits, as `spikedecoder.sweep` makes
        them. Raises ValueError if none has held-out bits.
    """
    complete, pruned = _kinds(trials)
    best, line = float("inf"), []
    for trial in complete:
        best = min(best, trial["bits"])
        line.append((trial["number"], best))
    with look():
        fig = figure(6.4, 3.4)
        ax = fig.subplots()
        if line:
            ax.step(*zip(*line, strict=True), where="post", color=COLOURS[0], lw=1, label="best so far")
        _dots(ax, [t["number"] for t in complete], [t["number"] for t in pruned], complete, pruned)
        ax.set_xlabel("trial")
        ax.set_ylabel("held-out bits per token")
        ax.locator_params(axis="x", integer=True)
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return fig


def sweep_slices(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out bits per token against each setting that was searched, one panel each.

    trials: as for `sweep_history`, with params, a mapping of settings to values.
    """
    complete, pruned = _kinds(trials)
    names = list(dict.fromkeys(name for t in (*complete, *pruned) for name in t["params"]))
    if not names:
        raise ValueError("trials: got none with params, takes at least one")
    with look():
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        fig = figure(2.6 * columns + 0.6, 2.2 * rows + 0.6)
        axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
        for ax in axes.flatten()[len(names) :]:
            ax.set_visible(False)
        for i, (ax, name) in enumerate(zip(axes.flatten(), names, strict=False)):
            values = [t["params"].get(name) for t in (*complete, *pruned)]
            places = _places(ax, values)
            _dots(ax, places[: len(complete)], places[len(complete) :], complete, pruned)
            ax.set_xlabel(name)
            if i % columns == 0:
                ax.set_ylabel("bits per token")
        fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return fig


def _kinds(
    trials: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    known = [t for t in trials if t["bits"] is not None]
    complete, pruned = ([t for t in known if t["state"] == state] for state in ("complete", "pruned"))
    if not complete and not pruned:
        raise ValueError("trials: got none that has held-out bits, takes at least one")
    return complete, pruned


def _dots(ax: Any, x: list[Any], x_pruned: list[Any], complete: list[Any], pruned: list[Any]) -> None:
    ax.plot(x, [t["bits"] for t in complete], "o", ms=4.5, color=COLOURS[0], label="complete")
    ax.plot(x_pruned, [t["bits"] for t in pruned], "x", ms=4.5, color=COLOURS[1], label="stopped early")


def _places(ax: Any, values: list[Any]) -> list[Any]:
    """Positions on the axis: numbers as they are (a wide range on a log axis), other values by rank."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        if min(numbers) > 0 and max(numbers) >= 5 * min(numbers):
            from matplotlib.ticker import LogLocator, NullFormatter

            ax.set_xscale("log")
            # plain numbers: the usual labels are formulas, which _LOOK turns off
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        elif all(isinstance(v, int) for v in numbers):
            ax.locator_params(axis="x", integer=True)
        return numbers
    different = sorted(dict.fromkeys(values), key=str)
    ax.set_xticks(range(len(different)), [str(v) for v in different])
    ax.set_xlim(-0.5, len(different) - 0.5)
    return [different.index(v) for v in values]
