"""Heat maps: tables of numbers as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .. import files
from ..errors import BadValue
from ..numerics import Floats
from .style import (
    LOUD,
    MISSING,
    SOFT,
    add_note,
    check_path,
    height_of,
    inches_of,
    label_columns,
    label_rows,
    new_figure,
    set_frame,
    set_title,
    shortened,
    thinned,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def heat_map(
    values: ArrayLike,
    row_labels: Sequence[Any],
    column_labels: Sequence[Any],
    *,
    title: str,
    path: files.PathLike | None = None,
) -> Figure:
    """Draw numbers as colours, with what is not finite in grey.

    Colours leave outliers out (far beyond the 2nd and 98th percentile; the colour bar then ends in an
    arrow), so that one does not hide the rest. They run around a white zero where both signs occur, and
    by powers of ten where positive numbers span more than two of them.

    Args:
        values: float64 [rows, columns].
        row_labels: one per row, such as layers; thinned when there is no room for all.
        column_labels: one per column, such as steps.
        title: shown above.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure.

    Raises:
        NoesisError: when there is nothing to draw, labels do not fit, the suffix is unknown, or
            matplotlib is missing.

    Example:
        >>> from noesis.plots import heat_map
        >>> figure = heat_map([[1.0, 2.0], [3.0, float("nan")]], ["conv", "head"], [0, 1], title="std")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['conv', 'head']
    """
    table = np.asarray(values, dtype=np.float64)
    check_path(path)
    _check_table(table, len(row_labels), len(column_labels))
    figure = new_figure(float(np.clip(3.6 + 0.12 * table.shape[1], 6.4, 13.0)), height_of(len(table)))
    draw_heat_map(figure.add_subplot(), table, row_labels, column_labels, title=title)
    return written(figure, path)


def token_map(
    values: Floats,
    tokens: Sequence[Any],
    layers: Sequence[Any],
    *,
    loud: Sequence[bool],
    breaks: Sequence[int],
    least: float,
    title: str,
    path: files.PathLike | None = None,
) -> Figure:
    """Draw how far apart two runs are, layers by tokens, with what is not finite in red.

    1 - cosine is half the squared angle: by square roots, colours go by the angle and small ones show.

    Args:
        values: 1 - cosine, float64 [tokens, layers].
        tokens: one label per token.
        layers: one label per layer.
        loud: whether a token's label is bold.
        breaks: tokens before which a dashed line says that some were left out.
        least: colours reach up to this at least, so that noise stays dark.
        title: shown above.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure.

    Raises:
        NoesisError: when the suffix is unknown, or matplotlib is missing.

    Example:
        >>> import numpy as np
        >>> from noesis.plots import token_map
        >>> figure = token_map(
        ...     np.array([[0.0], [0.5]]), ["a", "b"], ["fc"], loud=[False, True], breaks=[1], least=1e-6, title="1 of 2"
        ... )
        >>> [label.get_fontweight() for label in figure.axes[0].get_xticklabels()]
        ['normal', 'bold']
    """
    check_path(path)
    figure = new_figure(min(max(6.4, 2.5 + 0.2 * len(tokens)), 42.0), min(max(2.6, 1.8 + 0.21 * len(layers)), 15.0))
    axes = figure.add_subplot()
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    finite = np.isfinite(values)
    image = axes.imshow(
        values.T,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad=LOUD),
        norm=PowerNorm(0.5, 0.0, float(np.max(values, initial=least, where=finite))),
    )
    figure.colorbar(image, ax=axes, label="1 - cosine", pad=0.01)
    for axis, labels, room in ((axes.xaxis, tokens, 200), (axes.yaxis, layers, 70)):
        shown = thinned(len(labels), room)
        axis.set_ticks(shown)
        # A dollar sign in a token is no formula.
        axis.set_ticklabels([shortened(labels[at]) for at in shown], parse_math=False, usetex=False, fontsize=8)
    axes.tick_params(axis="x", labelrotation=90)
    for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if loud[int(at)] else "normal")
    for at in breaks:
        axes.axvline(at - 0.5, color=MISSING, linestyle="--", linewidth=1)
    axes.set_title(title, loc="left", fontsize=10)
    if not finite.all():
        axes.set_title("red: not finite", loc="right", fontsize=8)
    return written(figure, path)


def draw_heat_map(
    axes: Axes, table: Floats, row_labels: Sequence[Any], column_labels: Sequence[Any], *, title: str
) -> None:
    """Draw `heat_map` into given axes, with its colour bar beside it."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    finite = table[np.isfinite(table)]
    norm, signed, extend = _norm(finite)
    colours = colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad=MISSING)
    image = axes.imshow(
        np.ma.masked_invalid(table), aspect="auto", cmap=colours, norm=norm, interpolation="nearest", resample=False
    )
    set_frame(axes)
    label_rows(axes, row_labels)
    label_columns(axes, column_labels)
    set_title(axes, title)
    tall = inches_of(axes)[1] / 0.16  # a bar 0.16 inches wide, however tall the picture
    bar = axes.figure.colorbar(image, ax=axes, extend=extend, extendfrac=0.02, pad=0.015, fraction=0.05, aspect=tall)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=SOFT, labelsize=8, length=2, which="both")
    if type(norm) is Normalize:  # powers of ten have good labels already
        bar.ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        bar.ax.yaxis.get_offset_text().set(color=SOFT, fontsize=8)
    if not np.isfinite(table).all():
        add_note(axes, "grey: no value")


def _check_table(table: Floats, rows: int, columns: int) -> None:
    if table.ndim != 2 or not table.size:
        raise BadValue(
            f"The table to draw has shape {table.shape}", "[rows, columns], at least one of each", "Run the model first"
        )
    if table.shape != (rows, columns):
        raise BadValue(
            f"A table of shape {table.shape} with {rows} row and {columns} column labels",
            "one label for each row and column",
            "Pass as many labels",
        )


# ---------------------------------------------------------------- colours


def _norm(finite: Floats) -> tuple[Any, bool, str]:
    """Colour limits; whether zero is in the middle; which ends of the colour bar need an arrow."""
    from matplotlib.colors import LogNorm, Normalize

    if not finite.size:
        return Normalize(0.0, 1.0), False, "neither"
    low, high = _limits(finite)
    if low < 0 < high:
        low, high = -max(-low, high), max(-low, high)
        return Normalize(low, high), True, _beyond(finite, low, high)
    if low > 0 and high > 100 * low:
        return LogNorm(low, high), False, _beyond(finite, low, high)
    if not high > low:
        room = abs(low) * 0.5 or 1.0
        low, high = low - room, high + room
    return Normalize(low, high), False, _beyond(finite, low, high)


def _limits(finite: Floats) -> tuple[float, float]:
    """The range, less what lies further outside the 2nd to 98th percentile than these are apart."""
    low, high = float(finite.min()), float(finite.max())
    ordered = np.sort(finite)
    # At least one value on each side may be an outlier, also in a small table.
    cut = max(1, int(0.02 * ordered.size))
    if ordered.size <= 4 * cut:
        return low, high
    inner_low, inner_high = float(ordered[cut]), float(ordered[-1 - cut])
    width = inner_high - inner_low
    if width > 0:
        low = low if inner_low - low <= width else inner_low
        high = high if high - inner_high <= width else inner_high
    return low, high


def _beyond(finite: Floats, low: float, high: float) -> str:
    """Which ends of a colour bar need an arrow."""
    below, above = bool((finite < low).any()), bool((finite > high).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
