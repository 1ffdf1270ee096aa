"""How noesis' pictures look: colours, frames, labels, files. They need the extra `viz`.

Every picture is a `matplotlib.figure.Figure` of its own: pyplot and its global state stay out, and
colours and sizes are set here, whatever the style of the session. Layer names are data: no mathtext,
no TeX, no line breaks.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import files
from ..errors import BadValue, require
from ..numerics import Ints
from .names import shortened, shortened_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 150
INK, SOFT, GRID = "#24292f", "#6e7781", "#d8dee4"
MISSING, ABOVE, BELOW = "#c9ced4", "#ff8c1a", "#111111"
FIRST, SECOND, PALE = "#2f6db3", "#e0812c", "#a5c0e0"
QUIET, LOUD = "#9fb3c8", "#c8385a"
#: Inches a row of labels needs to be read, and the tallest a picture gets.
ROW, TALLEST = 0.21, 15.0
#: Inches that a letter of small print is wide, and points that a line of it is high.
LETTER = 0.057
LINE = 14
#: More rows than this are drawn without gaps, and a second run as marks on the bars of the first.
CROWDED = 60


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, inches wide and high, that leaves room for its labels."""
    require("matplotlib", extra="viz", purpose="plots")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")


def height_of(rows: int, per_row: float = ROW) -> float:
    """Inches: room for every label until the picture would become too tall to look at."""
    return float(np.clip(1.3 + per_row * rows, 2.6, TALLEST))


def inches_of(axes: Axes) -> tuple[float, float]:
    """Width and height of the picture, or of the part of it that the axes are in."""
    figure = axes.figure
    return figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi


def label_rows(axes: Axes, labels: Sequence[Any], kind: str) -> None:
    """Name the rows of axes, all of them or as many as there is room for, and say of what kind they are."""
    room = int(inches_of(axes)[1] / (ROW * 0.72))
    shown = _label(axes.yaxis, labels, room)
    label_axis(axes, "y", kind + _how_many(len(labels), len(shown)))


def label_columns(axes: Axes, labels: Sequence[Any], kind: str) -> None:
    """Name the columns of axes, as many as there is room for, and say of what kind they are."""
    room = max(4, int(inches_of(axes)[0] * 1.6))
    upright = max(len(str(label)) for label in labels) > 6
    _label(axes.xaxis, labels, room * (2 if upright else 1))
    label_axis(axes, "x", kind)
    if upright:
        axes.tick_params(axis="x", labelrotation=90)


def label_axis(axes: Axes, which: Literal["x", "y"], text: str) -> None:
    """Say what an axis shows, on lines that are no longer than the picture leaves room for."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    wide, tall = inches_of(axes)
    text = textwrap.fill(text, max(12, int((wide if which == "x" else tall) * 0.7 / LETTER)))
    axis.set_label_text(text, color=SOFT, fontsize=8, parse_math=False, usetex=False)


def _label(axis: Any, labels: Sequence[Any], room: int) -> list[int]:
    shown = thinned(len(labels), room)
    texts = shortened_names(labels)
    axis.set_ticks(shown)
    # parse_math and usetex off: `$` and `_` in a name are characters of the name.
    axis.set_ticklabels([texts[at] for at in shown], parse_math=False, usetex=False, color=INK, fontsize=8)
    return shown


def _how_many(count: int, shown: int) -> str:
    return "" if shown == count else f" ({shown} of {count} are named)"


def thinned(count: int, room: int) -> list[int]:
    """Every n-th of `count` places, n being 1, 2 or 5 times a power of ten, so that `room` suffices.

    Examples:
        >>> from noesis.plots import thinned
        >>> thinned(4, 10), thinned(40, 10)
        ([0, 1, 2, 3], [0, 5, 10, 15, 20, 25, 30, 35])
    """
    steps = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    step = next(step for step in steps if -(-count // step) <= max(room, 1))
    return list(range(0, count, step))


def set_frame(axes: Axes, grid: Literal["x"] | None = None) -> None:
    """Thin lines around axes."""
    axes.set_facecolor("white")
    for side, spine in axes.spines.items():
        spine.set_visible(grid is None or side == "bottom")
        spine.set(color=GRID, linewidth=0.8)
    axes.tick_params(colors=SOFT, labelsize=8, length=2, which="both")
    axes.minorticks_off()
    axes.grid(visible=False)
    if grid is not None:
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)


def set_title(axes: Axes, text: str, note: str = "", key: Mapping[str, str] | None = None) -> None:
    """A title above axes, beneath it a note in small print, and a key: what colours mean, colours by meaning."""
    lines = bool(note) + bool(key)
    text = shortened(text, 90)
    words: dict[str, Any] = {"parse_math": False, "usetex": False}
    axes.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold", pad=6 + LINE * lines, **words)
    if note:
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        at = (0, 6 + LINE * bool(key))
        axes.annotate(shortened(note, 100), (0, 1), at, fontsize=8, color=SOFT, **place, **words)
    if key:
        where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "borderpad": 0.1}
        _legend(axes, list(key.values()), list(key), {**where, "ncols": len(key), "columnspacing": 1.2})


def add_legend(figure: Figure, colours: list[str], texts: list[str]) -> None:
    """Coloured squares with words in the upper right corner of a figure."""
    _legend(figure, colours, texts, {"loc": "outside upper right", "ncols": 2})


def _legend(where: Any, colours: list[str], texts: list[str], place: dict[str, Any]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, linewidth=0) for colour in colours]
    legend = where.legend(handles, ["-"] * len(texts), frameon=False, fontsize=8, handlelength=1.0, **place)
    # Set afterwards: a legend leaves out labels that begin with an underscore.
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set(parse_math=False, usetex=False, color=INK)
        entry.set_text(shortened(text, 48))


def in_turn(order: Ints) -> Ints:
    """Places of layers in the order they run, from when each first ran; those that never ran (0) come last."""
    never = np.iinfo(np.int64).max
    places: Ints = np.argsort(np.where(order > 0, order, never), kind="stable")
    return places


def check_order(order: str) -> None:
    """Refuse an order of layers that there is not."""
    if order not in ("run", "names"):
        raise BadValue(f"order={order!r}", '"run" or "names"', 'Pass order="names" for the order of named_modules()')


def check_path(path: files.PathLike | None) -> None:
    """Refuse an unknown suffix before any work is done."""
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise files.unknown_suffix(Path(path), ", ".join(SUFFIXES))


def written(figure: Figure, path: files.PathLike | None) -> Figure:
    """The figure, and where a path was given, a file of it."""
    if path is not None:
        write_figure(figure, path)
    return figure


def write_figure(figure: Figure, path: files.PathLike) -> Path:
    """Write a figure to `.png`, `.svg` or `.pdf`, whole or not at all."""
    check_path(path)
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes; that is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(data, format=Path(path).suffix.lower()[1:])
    return files.write_bytes(path, data.getvalue())
