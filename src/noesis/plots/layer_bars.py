"""Bars of layers: what soulprints say of each, and how much each changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .. import files
from ..errors import BadValue
from ..numerics import Floats, Ints
from .names import run_names
from .style import (
    CROWDED,
    FIRST,
    LOUD,
    PALE,
    QUIET,
    ROW,
    SECOND,
    SOFT,
    TALLEST,
    add_legend,
    check_order,
    check_path,
    height_of,
    in_turn,
    label_axis,
    label_rows,
    new_figure,
    set_frame,
    set_title,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# ---------------------------------------------------------------- what is drawn


class Averaged(Protocol):
    """A soulprint: float64 [layers]."""

    means: Floats
    stds: Floats
    layers: list[str]
    order: Ints | None
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


def bars(
    soulprints: Sequence[Averaged], path: files.PathLike | None = None, *, order: Literal["run", "names"] = "run"
) -> Figure:
    """Draw mean and standard deviation per layer, of one soulprint or of two.

    Layers are matched by name; a layer that only one soulprint has, has one bar. Where a few
    layers dwarf the others, the axis is linear up to the median and goes by powers of ten beyond. Runs are
    named by what differs in their meta.

    Args:
        soulprints: one or two.
        order: of the layers: `"run"` as they run, if that is known, or `"names"` as they are in the soulprints.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.

    Returns:
        The figure.

    Raises:
        NoesisError: when there are none or more than two, they have no layers, the suffix is
            unknown, or matplotlib is missing.

    Examples:
        >>> import noesis
        >>> from noesis.plots import bars
        >>> figure = bars([noesis.Soulprint([0.0, 1.0], [1.0, 2.0], ["conv", "head"])])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['mean', 'std']
    """
    check_path(path)
    if not 1 <= len(soulprints) <= 2:
        raise BadValue(f"{len(soulprints)} soulprints", "one or two", "Draw them in pairs")
    check_order(order)
    names = list(dict.fromkeys(name for each in soulprints for name in _layers(each, order)))
    if not names:
        raise BadValue("The soulprint has no layers", "at least one", "Record a run first")
    figure = new_figure(10.0, height_of(len(names), per_row=ROW if len(soulprints) == 1 else ROW * 1.3))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [PALE if len(soulprints) == 2 and len(names) > CROWDED else FIRST, SECOND]
    for axes, title, kind in ((left, "mean", "means"), (right, "std", "stds")):
        columns = [_by_name(each, kind, names) for each in soulprints]
        _layer_bars(axes, columns, colours)
        _scale(axes, np.concatenate(columns))
        label_axis(axes, "x", f"{title} of the layer's output, averaged over steps")
        set_title(axes, title)
    known = order == "run" and all(each.order is not None for each in soulprints)
    label_rows(left, names, "layer, in the order they run" if known else "layer")
    right.tick_params(axis="y", length=0, labelleft=False)
    if len(soulprints) == 2:
        add_legend(figure, colours, run_names([each.meta for each in soulprints]))
    return written(figure, path)


def effects(
    rows: Sequence[Changed], path: files.PathLike | None = None, *, layers: int | None = None, note: str = ""
) -> Figure:
    """Draw how much each layer changed, the first row on top, significant ones in another colour.

    Args:
        rows: of a comparison, such as `noesis.compare(a, b).rows[:25]`.
        path: where to write it too, as `.png`, `.svg` or `.pdf`.
        layers: how many layers were compared, where rows are some of them.
        note: small print beneath the title, such as which runs these are.

    Returns:
        The figure.

    Raises:
        NoesisError: when there are no rows, the suffix is unknown, or matplotlib is missing.

    Examples:
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
    draw_effects(figure.add_subplot(), rows, title="effect by layer", layers=layers, note=note)
    return written(figure, path)


def draw_effects(axes: Axes, rows: Sequence[Changed], *, title: str, layers: int | None = None, note: str = "") -> None:
    """Draw `effects` into given axes."""
    size = np.array([row.effect for row in rows])
    judged = any(row.changed is not None for row in rows)
    colours = [FIRST if not judged else LOUD if row.changed else QUIET for row in rows]
    places = np.arange(len(rows))
    axes.barh(places, size, height=0.74 if len(rows) <= CROWDED else 1.0, color=colours, linewidth=0)
    set_frame(axes, grid="x")
    label_rows(axes, [row.layer for row in rows], "layer")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    largest = float(np.max(size, initial=0.0)) or 1.0
    axes.set_xlim(0, largest * 1.02)
    if len(rows) * ROW <= TALLEST:  # else there is no room beside each bar
        axes.set_xlim(0, largest * (1.3 if judged else 1.14))
        for place, row in enumerate(rows):
            text = f"{row.effect:.2g}" + ("" if row.q_value is None else f"   q {_q(row.q_value)}")
            axes.text(row.effect + largest * 0.012, place, text, va="center", fontsize=7, color=SOFT)
    label_axis(axes, "x", "effect: shift of the mean in standard deviations, and log ratio of the stds")
    if layers is not None and layers > len(rows):
        title += f", {len(rows)} of {layers} layers"
    key = {}
    if judged:
        meaning = {True: ("changed", LOUD), False: ("within the noise of the baseline", QUIET)}
        present = {bool(row.changed) for row in rows}
        key = dict(meaning[state] for state in (True, False) if state in present)
    set_title(axes, title, note, key)


def _q(value: float) -> str:
    return f"{value:.1g}" if value >= 1e-12 else "< 1e-12"


# ---------------------------------------------------------------- parts of pictures


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


def _layers(soulprint: Averaged, order: str) -> list[str]:
    """Its layers as they run, or as they are in it."""
    if order == "names" or soulprint.order is None:
        return soulprint.layers
    return [soulprint.layers[at] for at in in_turn(soulprint.order)]


def _scale(axes: Axes, values: Floats) -> None:
    """Linear, or where a few bars dwarf the others linear up to their median only."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    if size.size > 2 and size.max() > 30 * np.median(size):
        least, most = float(np.median(size)), float(size.max())
        axes.set_xscale("symlog", linthresh=least)
        # Its own ticks stand in the linear part too, one over the other.
        powers = np.arange(np.floor(np.log10(most)), np.log10(least), -1)
        step = max(1, -(-len(powers) // 3))
        from_zero = powers - np.log10(least) + 1  # in powers of ten, of which the linear part is as wide as one
        shown = 10.0 ** powers[from_zero >= 0.7 * step][::step]
        signs = [sign for sign in (-1, 1) if (np.nan_to_num(values) * sign > 0).any()]
        axes.set_xticks([0.0, *(sign * tick for sign in signs for tick in shown)])
    else:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axes.xaxis.get_offset_text().set(color=SOFT, fontsize=8)


def _finite(column: Floats) -> Floats:
    return np.where(np.isfinite(column), column, np.nan)


def _by_name(soulprint: Averaged, kind: str, names: list[str]) -> Floats:
    """Means or stds in the order of `names`, NaN where the soulprint lacks the layer."""
    known = dict(zip(soulprint.layers, getattr(soulprint, kind), strict=True))
    return np.array([known.get(name, np.nan) for name in names])
