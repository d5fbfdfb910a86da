"""Figures of spikes: raster, rates, membrane potentials, attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from spikedecoder.activity import Activity, choose
from spikedecoder.fields import at_least
from spikedecoder.ops._check import of_type
from spikedecoder.viz._figure import COLOURS, SPIKE, check_index, figure, look, token_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def raster(
    activity: Activity,
    layer: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    sequence: int = 0,
    columns: int | None = None,
) -> Figure:
    """Which neuron of a layer fired at which token: one panel for each timestep.

    layer: its name; None is the first. labels: the text of each token, shown if there are at most 40.
    sequence: its index in the batch. columns: panels side by side; None is 4 for at most 40 tokens, else 2.
    """
    of_type("activity", activity, Activity)
    name = activity.layer(layer)
    spikes = activity.spikes[name]
    check_index("sequence", sequence, spikes.shape[1])
    t, _, s, n = spikes.shape
    with look():
        columns = min(t, columns or (4 if s <= 40 else 2))
        rows = -(-t // columns)
        width = max(2.2, min(4.5, 0.5 + 0.11 * s))
        fig = figure(max(4.5, width * columns + 0.6), max(2.4, min(4.0, 0.9 + n * 0.025)) * rows + 0.4)
        axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for ax in axes[t:]:
            ax.set_visible(False)
        for i, ax in enumerate(axes[:t]):
            fired = spikes[i, sequence]
            ax.imshow(
                fired.T.float().numpy(),
                aspect="auto",
                cmap=_binary(),
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            ax.set_title(f"timestep {i + 1}: {float(fired.float().mean()):.1%} fire")
            ax.yaxis.get_major_locator().set_params(integer=True)
            if i % columns == 0:
                ax.set_ylabel("neuron")
            ax.set_xlabel("token")
            token_ticks(ax, labels if s <= 40 else None, s)
        fig.suptitle(_title(f"Spikes of {name}", activity))
        return fig


def spike_rates(activity: Activity) -> Figure:
    """Spike rate of each layer at each timestep, and its shares of dead neurons (never fired) and saturated
    ones (always fired)."""
    of_type("activity", activity, Activity)
    activity.layer(None)  # raises if there is none
    rates = activity.rates()
    names = list(rates)
    longest = max(len(r) for r in rates.values())
    grid = torch.full((len(names), longest), float("nan"))
    for i, r in enumerate(rates.values()):
        grid[i, : len(r)] = r
    dead, saturated = list(activity.dead().values()), list(activity.saturated().values())
    with look():
        fig = figure(7.2, max(2.2, 0.26 * len(names) + 1.3))
        left, right = fig.subplots(1, 2, sharey=True, width_ratios=[max(2, longest * 0.55), 2.4])
        top = max(0.01, float(grid.nan_to_num().max()))
        image = left.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=top)
        left.set_yticks(range(len(names)), names)
        left.set_xticks(range(longest), [str(i + 1) for i in range(longest)])
        left.set_xlabel("timestep")
        left.set_title("spikes per neuron")
        for i in range(len(names)):
            for j in range(longest):
                value = float(grid[i, j])
                if value == value and longest <= 10:
                    colour = "black" if value > 0.6 * top else "white"
                    left.text(j, i, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=7)
        fig.colorbar(image, ax=left, format=lambda x, _: f"{x:.0%}", location="left", pad=0.02, aspect=30)
        places = torch.arange(len(names)).numpy()
        right.barh(places - 0.18, dead, height=0.34, color=COLOURS[0], label="dead: never fired")
        right.barh(places + 0.18, saturated, height=0.34, color=COLOURS[1], label="saturated: always fired")
        right.set_xlim(0, 1)
        right.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        right.tick_params(axis="y", left=False, labelleft=False)
        right.set_xlabel("share of neurons")
        fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        fig.suptitle(_title("How often each layer fires", activity))
        return fig


def potentials(activity: Activity, layers: Sequence[str] | None = None, *, bins: int = 60) -> Figure:
    """Histogram of membrane potentials before the reset, by layer; a line marks the threshold.

    activity: recorded with ``potentials=True``, else ValueError. layers: their names; None is all.
    """
    recorded = _recorded(activity, "potentials")
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise TypeError(f"layers: got {type(layers).__name__}, takes names of layers")
    names = [choose("layers", n, recorded) for n in (recorded if layers is None else layers)]
    if not names:
        raise ValueError("layers: got none, takes at least one, or None for all")
    at_least("bins", bins, 1)
    with look():
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        fig = figure(max(4.3, 2.6 * columns + 0.4), 1.75 * rows + 0.5)
        axes = fig.subplots(rows, columns, squeeze=False).flatten()
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
            values = activity.potentials[name].flatten().float()
            threshold = activity.thresholds[name]
            if len(values) > 1_000_000:  # an evenly spaced sample is enough
                values = values[:: len(values) // 500_000]
            low, high = (float(torch.quantile(values[:1_000_000], q)) for q in (0.002, 0.998))
            low, high = min(low, threshold) - 0.1, max(high, threshold) + 0.1
            ax.hist(values.clamp(low, high).numpy(), bins=bins, range=(low, high), color=COLOURS[0])
            ax.axvline(threshold, color=COLOURS[1], lw=1.2)
            over = float((activity.potentials[name] >= threshold).float().mean())
            ax.set_title(f"{name}\n{over:.1%} reach {threshold:.3g}", fontsize=8)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            if i + columns >= len(names):
                ax.set_xlabel("membrane potential")
        fig.suptitle(_title("Membrane potentials before the reset; line: threshold", activity))
        return fig


def attention_map(
    activity: Activity,
    layer: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    sequence: int = 0,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Causal scores q k^T of one attention layer, summed over the timesteps, or the weights of a softmax
    attention: one panel for each head.

    activity: recorded with ``scores=True``, else ValueError. layer: its name; None is the first. labels: the
    text of each token, shown if there are at most 40. sequence: its index in the batch. heads: their numbers,
    from 0 on; None is all.
    """
    recorded = _recorded(activity, "scores")
    name = choose("layer", layer, recorded)
    scores = recorded[name]
    check_index("sequence", sequence, scores.shape[0])
    if heads is not None and not isinstance(heads, Iterable):
        raise TypeError(f"heads: got {heads!r}, takes numbers of heads, or None for all")
    numbers = range(scores.shape[1]) if heads is None else heads
    chosen = [check_index("heads", h, scores.shape[1]) for h in numbers]
    if not chosen:
        raise ValueError("heads: got none, takes at least one, or None for all")
    s = scores.shape[-1]
    hidden = torch.ones(s, s).triu(1).bool()
    top = max(1.0, float(scores[sequence].max()))
    with look():
        columns = min(2, len(chosen)) if s > 16 else min(4, len(chosen))
        rows = -(-len(chosen) // columns)
        side = max(2.2, min(4.2, 0.8 + 0.11 * s))
        fig = figure(side * columns + 1.0, side * rows + 0.9)
        axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for ax in axes[len(chosen) :]:
            ax.set_visible(False)
        for i, (ax, h) in enumerate(zip(axes, chosen, strict=False)):
            seen = scores[sequence, h].float().masked_fill(hidden, float("nan")).numpy()
            image = ax.imshow(seen, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
            ax.set_title(f"head {h + 1}")
            ax.set_xlabel("key" if i + columns >= len(chosen) else "")
            ax.set_ylabel("query" if i % columns == 0 else "")
            token_ticks(ax, labels if s <= 40 else None, s)
            token_ticks(ax, labels if s <= 40 else None, s, axis="y")
        fig.colorbar(image, ax=axes.tolist(), label=activity.score, shrink=0.8)
        fig.suptitle(_title(f"Attention scores of {name}", activity))
        return fig


def _title(what: str, activity: Activity) -> str:
    return f"{what}\n{activity.note}" if activity.note else what


def _binary() -> object:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#FFFFFF", SPIKE])


def _recorded(activity: Activity, what: Literal["potentials", "scores"]) -> dict[str, torch.Tensor]:
    """The activity's potentials or scores. Raises ValueError if they were not recorded."""
    of_type("activity", activity, Activity)
    found: dict[str, torch.Tensor] = getattr(activity, what)
    if not found:
        raise ValueError(f"activity: holds no {what}; record it with {what}=True")
    if not all(x.numel() for x in found.values()):
        raise ValueError("activity: holds no tokens, takes at least one")
    return found
