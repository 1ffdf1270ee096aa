"""Pictures of traces, soulprints, comparisons and scores; needs the extra `viz`.

Every picture is a `matplotlib.figure.Figure` of its own: pyplot and its global state stay out, and
colours and sizes are set here, whatever the style of the session. Layer names are data: no mathtext,
no TeX, no line breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .. import files
from ..errors import BadValue
from ..numerics import Floats
from .style import (
    CROWDED,
    FIRST,
    LOUD,
    MISSING,
    PALE,
    QUIET,
    ROW,
    SECOND,
    SOFT,
    TALLEST,
    add_legend,
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


#: One per set of scores.
SETS = (FIRST, SECOND, LOUD, "#3a9278", "#7a57a8", SOFT)
#: Bins of a histogram, and the largest score that has a place of its own.
BINS, LARGEST = 60, 1e100


# ---------------------------------------------------------------- what is drawn


class Averaged(Protocol):
    """A soulprint: float64 [layers]."""

    means: Floats
    stds: Floats
    layers: list[str]
    meta: dict[str, Any]


class Changed(Protocol):
    """A row of a comparison."""

    @property
    def layer(self) -> str:
        """Its name."""
        ...

    @property
    def effect(self) -> float:
        """How much it changed."""
        ...

    @property
    def changed(self) -> bool | None:
        """Whether that is more than noise; None where that is not known."""
        ...

    @property
    def q_value(self) -> float | None:
        """How surely."""
        ...


# ---------------------------------------------------------------- pictures


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


def bars(soulprints: Sequence[Averaged], path: files.PathLike | None = None) -> Figure:
    """Draw mean and standard deviation per layer, of one soulprint or of two.

    Layers are matched by name; a layer that only one soulprint has, has one bar. Where a few
    layers dwarf the others, the axis is linear up to the median and goes by powers of ten beyond.

    Args:
        soulprints: one or two.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure.

    Raises:
        NoesisError: when there are none or more than two, they have no layers, the suffix is
            unknown, or matplotlib is missing.

    Example:
        >>> import noesis
        >>> from noesis.plots import bars
        >>> figure = bars([noesis.Soulprint([0.0, 1.0], [1.0, 2.0], ["conv", "head"])])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['mean', 'std']
    """
    check_path(path)
    if not 1 <= len(soulprints) <= 2:
        raise BadValue(f"{len(soulprints)} soulprints", "one or two", "Draw them in pairs")
    names = list(dict.fromkeys(name for each in soulprints for name in each.layers))
    if not names:
        raise BadValue("The soulprint has no layers", "at least one", "Record a run first")
    figure = new_figure(10.0, height_of(len(names), per_row=ROW if len(soulprints) == 1 else ROW * 1.3))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [PALE if len(soulprints) == 2 and len(names) > CROWDED else FIRST, SECOND]
    for axes, title, kind in ((left, "mean", "means"), (right, "std", "stds")):
        columns = [_by_name(each, kind, names) for each in soulprints]
        _layer_bars(axes, columns, colours)
        _scale(axes, np.concatenate(columns))
        set_title(axes, title)
    label_rows(left, names)
    right.tick_params(axis="y", length=0, labelleft=False)
    if len(soulprints) == 2:
        add_legend(figure, colours, _run_names(soulprints))
    return written(figure, path)


def effects(rows: Sequence[Changed], path: files.PathLike | None = None) -> Figure:
    """Draw how much each layer changed, the first row on top, significant ones in another colour.

    Args:
        rows: of a comparison, such as `noesis.compare(a, b).rows[:25]`.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure.

    Raises:
        NoesisError: when there are no rows, the suffix is unknown, or matplotlib is missing.

    Example:
        >>> import noesis
        >>> from noesis.plots import effects
        >>> a = noesis.Soulprint([0.0, 1.0], [1.0, 1.0], ["conv", "head"])
        >>> b = noesis.Soulprint([0.0, 1.5], [1.0, 1.0], ["conv", "head"])
        >>> [label.get_text() for label in effects(noesis.compare(a, b).rows).axes[0].get_yticklabels()]
        ['head', 'conv']
    """
    check_path(path)
    if not rows:
        raise BadValue("The comparison has no rows", "at least one", "Compare runs with a layer in common")
    figure = new_figure(8.0, height_of(len(rows)))
    draw_effects(figure.add_subplot(), rows, title="effect by layer")
    return written(figure, path)


def histograms(
    scores: Mapping[str, ArrayLike], path: files.PathLike | None = None, *, title: str = "surprise (nats)"
) -> Figure:
    """Draw how the scores of a few sets of inputs are spread, such as normal and strange ones, on one axis.

    All sets share their bins, and each is drawn as shares of itself, so that sets of any size compare. Where the
    scores of one set dwarf another's, the axis goes over from linear to powers of ten about where the smaller ones end.
    Scores that are infinite or NaN have no place on it; a note says how many there are.

    Args:
        scores: float [N] by name of the set, up to six.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.
        title: shown above.

    Returns:
        The figure.

    Raises:
        NoesisError: when there is no set or more than six, a set is empty, the suffix is unknown, or matplotlib is
            missing.

    Example:
        >>> from noesis.plots import histograms
        >>> figure = histograms({"test": [1.0, 1.5, 2.0], "noise": [30.0, float("inf")]})
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['test (3)', 'noise (2)']
        >>> figure.axes[0].get_title(loc="right")
        'not finite, and not shown: 1 of noise'
    """
    check_path(path)
    sets = {str(name): np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    _check_sets(sets)
    figure = new_figure(8.0, 3.6)
    draw_histograms(figure.add_subplot(), sets, title=title)
    add_legend(figure, list(SETS[: len(sets)]), [f"{name} ({len(values)})" for name, values in sets.items()])
    return written(figure, path)


# ---------------------------------------------------------------- parts of pictures


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


def draw_effects(axes: Axes, rows: Sequence[Changed], *, title: str) -> None:
    """Draw `effects` into given axes."""
    size = np.array([row.effect for row in rows])
    judged = any(row.changed is not None for row in rows)
    colours = [FIRST if not judged else LOUD if row.changed else QUIET for row in rows]
    places = np.arange(len(rows))
    axes.barh(places, size, height=0.74 if len(rows) <= CROWDED else 1.0, color=colours, linewidth=0)
    set_frame(axes, grid="x")
    label_rows(axes, [row.layer for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    largest = float(np.max(size, initial=0.0)) or 1.0
    axes.set_xlim(0, largest * 1.02)
    if len(rows) * ROW <= TALLEST:  # else there is no room beside each bar
        axes.set_xlim(0, largest * (1.3 if judged else 1.14))
        for place, row in enumerate(rows):
            text = f"{row.effect:.2g}" + ("" if row.q_value is None else f"   q {_q(row.q_value)}")
            axes.text(row.effect + largest * 0.012, place, text, va="center", fontsize=7, color=SOFT)
    axes.set_xlabel("shift of the mean in standard deviations, and log ratio of the stds", color=SOFT, fontsize=8)
    set_title(axes, title)
    if judged:
        shown = [(LOUD, "changed", True), (QUIET, "within the noise of the baseline", False)]
        present = [(colour, text) for colour, text, state in shown if any(bool(row.changed) is state for row in rows)]
        add_legend(axes, [colour for colour, _ in present], [text for _, text in present])


def draw_histograms(axes: Axes, sets: Mapping[str, Floats], *, title: str) -> None:
    """Draw `histograms` into given axes, without the legend."""
    finite = {name: np.clip(values[np.isfinite(values)], -LARGEST, LARGEST) for name, values in sets.items()}
    edges = _bins(axes, [values for values in finite.values() if values.size])
    for (name, values), colour in zip(finite.items(), SETS, strict=False):
        share = np.histogram(values, edges)[0] / len(sets[name])
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.35, linewidth=0)
        axes.stairs(share, edges, color=colour, linewidth=1.2)
    set_frame(axes, grid="x")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the set", color=SOFT, fontsize=8)
    set_title(axes, title)
    missing = {name: len(sets[name]) - len(values) for name, values in finite.items()}
    lost = ", ".join(f"{count} of {shortened(name, 24)}" for name, count in missing.items() if count)
    if lost:
        add_note(axes, f"not finite, and not shown: {lost}")


def _q(value: float) -> str:
    return f"{value:.1g}" if value >= 1e-12 else "< 1e-12"


# ---------------------------------------------------------------- scales


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


def _scale(axes: Axes, values: Floats) -> None:
    """Linear, or where a few bars dwarf the others linear up to their median only."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    if size.size > 2 and size.max() > 30 * np.median(size):
        axes.set_xscale("symlog", linthresh=float(np.median(size)))
    else:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axes.xaxis.get_offset_text().set(color=SOFT, fontsize=8)


def _bins(axes: Axes, sets: list[Floats]) -> Floats:
    """Edges of bins that are drawn equally wide; scales the axis where some sets dwarf others."""
    whole = np.concatenate([*sets, np.zeros(0)])
    low, high = (float(whole.min()), float(whole.max())) if whole.size else (0.0, 1.0)
    if not high > low:
        room = abs(low) * 0.5 or 1.0
        low, high = low - room, high + room
    sizes = [np.quantile(np.abs(values), [0.98, 0.5]).tolist() for values in sets]
    most, usual = min(sizes, default=[0.0, 0.0])
    if usual > 1 / LARGEST and max(-low, high) > 10 * most:
        # Smooth, unlike symlog, whose corner would look like a peak.
        axes.set_xscale("asinh", linear_width=usual)
        powers = 10.0 ** np.arange(np.ceil(np.log10(usual)), np.log10(max(-low, high)) + 1)
        powers = powers[thinned(len(powers), 10)]
        ticks = np.concatenate([-powers[::-1], [0.0], powers])
        axes.set_xticks(ticks[(ticks >= low) & (ticks <= high)])
    drawn = axes.xaxis.get_transform()
    first, last = drawn.transform(np.array([low, high]))
    edges: Floats = drawn.inverted().transform(np.linspace(first, last, BINS + 1))
    edges[0], edges[-1] = low, high  # there and back again is not exact
    return edges


# ---------------------------------------------------------------- bars


def _layer_bars(axes: Axes, columns: list[Floats], colours: list[str]) -> None:
    count = len(columns[0])
    places = np.arange(count)
    if count <= CROWDED:
        thick = 0.76 / len(columns)
        for index, (column, colour) in enumerate(zip(columns, colours, strict=False)):
            at = places + (index - (len(columns) - 1) / 2) * thick
            axes.barh(at, _finite(column), height=thick, color=colour, linewidth=0)
    else:
        axes.barh(places, _finite(columns[0]), height=1.0, color=colours[0], linewidth=0)
        for column in columns[1:]:
            axes.vlines(_finite(column), places - 0.5, places + 0.5, color=colours[1], linewidth=2)
    set_frame(axes, grid="x")
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_ylim(count - 0.4, -0.6)


def _finite(column: Floats) -> Floats:
    return np.where(np.isfinite(column), column, np.nan)


def _by_name(soulprint: Averaged, kind: str, names: list[str]) -> Floats:
    """Means or stds in the order of `names`, NaN where the soulprint lacks the layer."""
    known = dict(zip(soulprint.layers, getattr(soulprint, kind), strict=True))
    return np.array([known.get(name, np.nan) for name in names])


def _run_names(soulprints: Sequence[Averaged]) -> list[str]:
    """What tells the runs apart, from their meta, or just a and b."""
    for key in ("run", "prompt", "seed"):
        found = [str(each.meta[key]) for each in soulprints if each.meta.get(key) is not None]
        if len(found) == len(set(found)) == len(soulprints):
            return [f"{letter}: {text}" for letter, text in zip("ab", found, strict=False)]
    return ["a", "b"]


# ---------------------------------------------------------------- checks and files


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


def _check_sets(sets: Mapping[str, Floats]) -> None:
    if not 1 <= len(sets) <= len(SETS):
        raise BadValue(
            f"{len(sets)} sets of scores", f"one to {len(SETS)}", 'Pass {"test": surprise.score, "noise": other.score}'
        )
    for name, values in sets.items():
        if values.ndim != 1 or not values.size:
            raise BadValue(
                f"The scores of {name!r} have shape {values.shape}", "[N], at least one", "Pass surprise.score"
            )
