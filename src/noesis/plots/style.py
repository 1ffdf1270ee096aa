"""How noesis' pictures look: colours, frames, labels, files. They need the extra `viz`.

Every picture is a `matplotlib.figure.Figure` of its own: pyplot and its global state stay out, and
colours and sizes are set here, whatever the style of the session. Layer names are data: no mathtext,
no TeX, no line breaks.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import files
from ..errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 150
INK, SOFT, GRID = "#24292f", "#6e7781", "#d8dee4"
MISSING = "#c9ced4"
FIRST, SECOND, PALE = "#2f6db3", "#e0812c", "#a5c0e0"
QUIET, LOUD = "#9fb3c8", "#c8385a"
#: Inches a row of labels needs to be read, and the tallest a picture gets.
ROW, TALLEST = 0.21, 15.0
#: Characters of a layer name that are shown.
LONGEST_LABEL = 40
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


def label_rows(axes: Axes, labels: Sequence[Any]) -> None:
    """Name the rows of axes, all of them or as many as there is room for."""
    room = int(inches_of(axes)[1] / (ROW * 0.72))
    _label(axes.yaxis, labels, room, LONGEST_LABEL)


def label_columns(axes: Axes, labels: Sequence[Any]) -> None:
    """Name the columns of axes, as many as there is room for."""
    room = max(4, int(inches_of(axes)[0] * 1.6))
    texts = [str(label) for label in labels]
    longest = max(len(text) for text in texts)
    upright = longest > 6
    _label(axes.xaxis, texts, room * (2 if upright else 1), LONGEST_LABEL)
    if upright:
        axes.tick_params(axis="x", labelrotation=90)


def _label(axis: Any, labels: Sequence[Any], room: int, longest: int) -> None:
    shown = thinned(len(labels), room)
    axis.set_ticks(shown)
    # parse_math and usetex off: `$` and `_` in a name are characters of the name.
    axis.set_ticklabels(
        [shortened(labels[at], longest) for at in shown], parse_math=False, usetex=False, color=INK, fontsize=8
    )


def thinned(count: int, room: int) -> list[int]:
    """Every n-th of `count` places, n being 1, 2 or 5 times a power of ten, so that `room` suffices.

    Example:
        >>> from noesis.plots import thinned
        >>> thinned(4, 10), thinned(40, 10)
        ([0, 1, 2, 3], [0, 5, 10, 15, 20, 25, 30, 35])
    """
    steps = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    step = next(step for step in steps if -(-count // step) <= max(room, 1))
    return list(range(0, count, step))


def shortened(name: Any, longest: int = LONGEST_LABEL) -> str:
    """A name on one line; of a long dotted one the words before the last are cut, its numbers are not.

    Example:
        >>> from noesis.plots import shortened
        >>> shortened("down_blocks.1.attentions.0.transformer_blocks.5.attn1.to_q")
        'down_bl…1.attenti…0.transfo…5.attn1.to_q'
    """
    text = "".join(char if char.isprintable() else "·" for char in str(name))
    *words, last = text.split(".")
    kept = [len(word) for word in words]

    def cut() -> str:
        # A cut word's ellipsis stands for its dot too.
        ends = ("." if size == len(word) else "…" for word, size in zip(words, kept, strict=True))
        return "".join(word[:size] + end for word, size, end in zip(words, kept, ends, strict=True)) + last

    while len(cut()) > longest and max(kept, default=0) > 3:
        kept[kept.index(max(kept))] -= 1
    text = cut()
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[-tail:]}"


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


def set_title(axes: Axes, text: str) -> None:
    """A title above axes, to the left."""
    axes.set_title(
        shortened(text, 90), loc="left", fontsize=11, color=INK, fontweight="bold", parse_math=False, usetex=False
    )


def add_note(axes: Axes, text: str) -> None:
    """A remark above axes, to the right."""
    axes.set_title(text, loc="right", fontsize=8, color=SOFT)


def add_legend(where: Figure | Axes, colours: list[str], texts: list[str]) -> None:
    """Coloured squares with words: above axes, or in the upper right corner of a figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
    if isinstance(where, Figure):
        place = {"loc": "outside upper right"}
    handles = [Patch(color=colour, linewidth=0) for colour in colours]
    legend = where.legend(handles, ["-"] * len(texts), ncols=2, frameon=False, fontsize=8, handlelength=1.0, **place)
    # Set afterwards: a legend leaves out labels that begin with an underscore.
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set(parse_math=False, usetex=False, color=INK)
        entry.set_text(shortened(text, 48))


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
