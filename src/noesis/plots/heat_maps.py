"""Heat maps: tables of numbers as colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import files
from ..errors import BadValue
from ..numerics import Floats
from .names import shortened, shortened_names
from .scales import Scale, linear_scale, scale_of, scaled_rows
from .style import (
    ABOVE,
    BELOW,
    LOUD,
    MISSING,
    SOFT,
    check_path,
    height_of,
    inches_of,
    label_axis,
    label_columns,
    label_rows,
    new_figure,
    set_frame,
    set_title,
    thinned,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mask = NDArray[np.bool_]
#: Cells that have a cross at most, beside their colour.
MOST_CROSSES = 500


def heat_map(
    values: ArrayLike,
    row_labels: Sequence[Any],
    column_labels: Sequence[Any],
    *,
    title: str,
    row_axis: str = "row",
    column_axis: str = "column",
    colour_bar: str | None = None,
    scale: Literal["all", "row", "linear"] = "all",
    nonfinite: ArrayLike | None = None,
    path: files.PathLike | None = None,
) -> Figure:
    """Draw numbers as colours; what is not finite in red, and crossed.

    Far outliers have a colour of their own, and do not hide the rest. Colours run around a white zero where both signs
    occur. Where sizes span more than two powers of ten they go by powers of ten, through zero where there are zeros or
    both signs.

    Args:
        values: float64 [rows, columns]; NaN where there is no value.
        row_labels: one per row, such as layers; thinned when there is no room for all.
        column_labels: one per column, such as steps.
        title: shown above.
        row_axis: what rows are, such as "layer".
        column_axis: what columns are.
        colour_bar: what the numbers are, with their unit; the title by default.
        scale: `"all"` for one scale, `"row"` for one per row, whose range is written beside it, or `"linear"` for one
            that is even around zero, with no number beyond it, for numbers whose size means something by itself.
        nonfinite: bool [rows, columns], which cells to mark as not finite; infinities are, by default.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure.

    Raises:
        NoesisError: when there is nothing to draw, labels do not fit, the suffix is unknown, or
            matplotlib is missing.

    Examples:
        >>> from noesis.plots import heat_map
        >>> figure = heat_map([[1.0, 2.0], [3.0, float("inf")]], ["conv", "head"], [0, 1], title="std")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['conv', 'head']
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['NaN or infinity']
    """
    table = np.asarray(values, dtype=np.float64)
    check_path(path)
    _check_table(table, len(row_labels), len(column_labels))
    figure = map_figure(row_labels, table.shape[1], scale)
    draw_heat_map(
        figure.add_subplot(),
        table,
        row_labels,
        column_labels,
        title=title,
        row_axis=row_axis,
        column_axis=column_axis,
        colour_bar=title if colour_bar is None else colour_bar,
        scale=scale,
        nonfinite=None if nonfinite is None else np.asarray(nonfinite, dtype=bool),
    )
    return written(figure, path)


def map_figure(row_labels: Sequence[Any], columns: int, scale: str = "all") -> Figure:
    """A figure with room for a heat map: its labels, its columns, and the range of each row where it has its own."""
    longest = max(map(len, shortened_names(row_labels)), default=0)
    labels = 0.065 * longest + (1.3 if scale == "row" else 0.0)
    wide = float(np.clip(2.6 + labels + 0.12 * columns, 5.0 + labels, 13.0))
    return new_figure(round(wide, 1), height_of(len(row_labels)))


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

    Examples:
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
    _colour_bar(axes, image, "1 - cosine", "neither")
    for axis, labels, room in ((axes.xaxis, tokens, 200), (axes.yaxis, layers, 70)):
        shown = thinned(len(labels), room)
        axis.set_ticks(shown)
        # A dollar sign in a token is no formula.
        axis.set_ticklabels([shortened(labels[at]) for at in shown], parse_math=False, usetex=False, fontsize=8)
    label_axis(axes, "x", "token")
    label_axis(axes, "y", "layer")
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
    axes: Axes,
    table: Floats,
    row_labels: Sequence[Any],
    column_labels: Sequence[Any],
    *,
    title: str,
    row_axis: str,
    column_axis: str,
    colour_bar: str,
    scale: Literal["all", "row", "linear"] = "all",
    nonfinite: Mask | None = None,
    missing: str = "no value",
    note: str = "",
) -> None:
    """Draw `heat_map` into given axes, with its colour bar beside it.

    `missing` says why there are cells without a value, `note` is small print beneath the title.
    """
    loud = np.isinf(table) if nonfinite is None else nonfinite
    _check_options(table, scale, loud)
    key = {"NaN or infinity": LOUD} if loud.any() else {}
    if (np.isnan(table) & ~loud).any():
        key[missing] = MISSING
    table = np.where(loud, np.nan, table)  # what is left of such a layer is no measure for others
    set_frame(axes)
    label_rows(axes, row_labels, row_axis)
    label_columns(axes, column_labels, column_axis)
    if scale == "row":
        _draw_rows(axes, table, colour_bar)
    else:
        key |= _draw_table(axes, table, colour_bar, linear_scale if scale == "linear" else scale_of)
    _mark(axes, loud)
    set_title(axes, title, note, key)


def _draw_table(axes: Axes, table: Floats, colour_bar: str, scaling: Callable[[Floats], Scale]) -> dict[str, str]:
    """One scale for all; what the colours beyond it mean."""
    from matplotlib.colors import Normalize, SymLogNorm

    known = table[np.isfinite(table)]
    scale = scaling(known)
    image = _image(axes, table, "BrBG_r" if scale.diverging else "viridis", scale.norm)
    bar = _colour_bar(axes, image, colour_bar, scale.extend)
    if type(scale.norm) is Normalize:  # powers of ten have good labels already
        bar.ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        bar.ax.yaxis.get_offset_text().set(color=SOFT, fontsize=8)
    elif isinstance(scale.norm, SymLogNorm):  # next to zero, labels would lie upon each other
        low, high, least = scale.norm.vmin, scale.norm.vmax, scale.norm.linthresh
        bar.set_ticks([at for at in bar.get_ticks() if low <= at <= high and (at == 0 or abs(at) >= least)])
    key = {}
    if scale.extend in ("max", "both"):
        key[f"above the scale, up to {known.max():.3g}"] = ABOVE
    if scale.extend in ("min", "both"):
        key[f"below the scale, down to {known.min():.3g}"] = BELOW
    return key


def _draw_rows(axes: Axes, table: Floats, colour_bar: str) -> None:
    """A scale for each row, whose range is written to its right."""
    from matplotlib.colors import Normalize

    shares, ranges = scaled_rows(table)
    image = _image(axes, shares, "viridis", Normalize(0.0, 1.0))
    bar = _colour_bar(axes, image, f"{colour_bar}, each row by itself", "neither")
    bar.set_ticks([0.0, 1.0], labels=["lowest", "highest"])
    beside = axes.secondary_yaxis("right")
    shown = [round(at) for at in axes.get_yticks()]
    beside.set_yticks(shown, [ranges[at] for at in shown])
    beside.tick_params(length=0, labelsize=7, labelcolor=SOFT)
    beside.spines["right"].set_visible(False)


def _image(axes: Axes, table: Floats, colours: str, norm: Any) -> Any:
    from matplotlib import colormaps

    return axes.imshow(
        np.ma.masked_invalid(table),
        aspect="auto",
        cmap=colormaps[colours].with_extremes(bad=MISSING, under=BELOW, over=ABOVE),
        norm=norm,
        interpolation="nearest",
        resample=False,
    )


def _colour_bar(axes: Axes, image: Any, text: str, extend: str) -> Any:
    wide, tall = inches_of(axes)
    # 0.16 inches wide, however tall the picture.
    place: dict[str, Any] = {"pad": 0.015, "fraction": float(np.clip(0.4 / wide, 0.03, 0.1)), "aspect": tall / 0.16}
    bar = axes.figure.colorbar(image, ax=axes, extend=extend, extendfrac=0.03, **place)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=SOFT, labelsize=8, length=2, which="both")
    label_axis(bar.ax, "y", text)
    return bar


def _mark(axes: Axes, loud: Mask) -> None:
    """Cells in red, and a cross, which has the same size however small the cells are, where a row becomes red."""
    from matplotlib.colors import ListedColormap

    if not loud.any():
        return
    axes.imshow(
        np.ma.masked_where(~loud, np.ones(loud.shape)),
        aspect="auto",
        cmap=ListedColormap([LOUD]),
        interpolation="nearest",
        resample=False,
    )
    begins = loud & ~np.pad(loud, ((0, 0), (1, 0)))[:, :-1]
    columns, rows = np.nonzero(begins.T)  # by column, so that of too many the first have a cross
    axes.scatter(
        columns[:MOST_CROSSES],
        rows[:MOST_CROSSES],
        s=30,
        marker="X",
        color=LOUD,
        edgecolors="white",
        linewidths=0.7,
        clip_on=False,
        zorder=3,
    )


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


def _check_options(table: Floats, scale: str, nonfinite: Mask) -> None:
    if scale not in ("all", "row", "linear"):
        raise BadValue(f"scale={scale!r}", '"all", "row" or "linear"', 'Pass scale="row" for a scale per row')
    if nonfinite.shape != table.shape:
        raise BadValue(
            f"nonfinite of shape {nonfinite.shape} for a table of shape {table.shape}",
            "a bool for each number",
            "Pass one of the same shape",
        )
