"""What all figures share: matplotlib imported only when needed, one style, files written atomically."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikedecoder.fields import is_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
# distinguishable with red-green colour blindness (Okabe and Ito, 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
SPIKE = "#0B2545"
_LOOK = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": "cycler('color', [{}])".format(", ".join(map(repr, COLOURS))),
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    # a model's text may hold any character; $ must not start a formula
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
}


def matplotlib() -> Any:
    try:
        import matplotlib as module
    except ImportError:
        raise ValueError(
            "plots need matplotlib, which is not installed: pip install 'spikedecoder[viz]'"
        ) from None
    return module


def look() -> Any:
    """The package's style, as a context."""
    return matplotlib().rc_context(_LOOK)


def figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches, that needs no window and no global state."""
    matplotlib()
    from matplotlib.figure import Figure

    # below matplotlib's limit of 2^16 pixels a side
    return Figure(figsize=(min(width, 100), min(height, 100)), layout="constrained")


def save(fig: Figure, path: str | Path) -> Path:
    """Write the figure, whole or not at all; the suffix of `path` chooses png, svg or pdf. Returns the path.

    Raises ValueError for another suffix, TypeError for an argument of another type.
    """
    from spikedecoder._files import write_bytes

    path = check_picture(path)
    if not hasattr(fig, "savefig"):
        raise TypeError(f"fig: got {type(fig).__name__}, takes a figure")
    write_bytes(path, render(fig, path.suffix[1:].lower()))
    return path


def render(fig: Figure, kind: str = "png") -> bytes:
    """The figure as the bytes of a file: png, svg or pdf."""
    buffer = io.BytesIO()
    with look(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # drawn as a box
        fig.savefig(buffer, format=kind)
    return buffer.getvalue()


def check_picture(path: str | Path) -> Path:
    """`path` as a Path, if a figure can be written there.

    Raises ValueError if its suffix is not one of FORMATS or matplotlib is missing, TypeError if it is not a
    str or Path.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"picture: got {type(path).__name__}, takes a str or Path")
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"picture: got {str(path)!r}, takes a file that ends in {', '.join(FORMATS)}")
    matplotlib()
    return path


def check_index(name: str, value: object, size: int) -> int:
    """`value`, if it is an integer from 0 to `size` - 1; else raises ValueError."""
    if not is_integer(value) or not 0 <= value < size:
        raise ValueError(f"{name}: got {value!r}, takes 0 to {size - 1}")
    return int(value)


def shown(token: str) -> str:
    """A token as a tick label of at most 12 characters, with signs for whitespace."""
    named = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return named if len(named) <= 12 else named[:11] + "…"


def token_ticks(ax: Axes, labels: Sequence[str] | None, n: int, axis: str = "x", size: float = 7) -> None:
    """Label n tokens along an axis: each with its text if there is room, else with numbers."""
    room = 80 if axis == "x" else 60
    target = ax.xaxis if axis == "x" else ax.yaxis
    if labels is None or n > room:
        target.set_label_text("token" if axis == "x" else target.label.get_text() or "token")
        locator: Any = target.get_major_locator()
        locator.set_params(integer=True)
        return
    if not hasattr(labels, "__len__"):
        raise TypeError(f"labels: got {type(labels).__name__}, takes the text of each token")
    if len(labels) != n:
        raise ValueError(f"labels: got {len(labels)}, takes {n}, one for each token")
    names = [shown(label) for label in labels]
    turn = axis == "x" and max(map(len, names)) > 2
    target.set_ticks(range(n), names, fontsize=size, rotation=90 if turn else 0)
    target.set_tick_params(length=2)
