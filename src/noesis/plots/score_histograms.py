"""Histograms: how the scores of a few sets of inputs are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .. import files
from ..errors import BadValue
from ..numerics import Floats
from .names import shortened
from .style import (
    FIRST,
    LOUD,
    SECOND,
    SOFT,
    add_legend,
    check_path,
    label_axis,
    new_figure,
    set_frame,
    set_title,
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

    Examples:
        >>> from noesis.plots import histograms
        >>> figure = histograms({"test": [1.0, 1.5, 2.0], "noise": [30.0, float("inf")]})
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['test (3)', 'noise (2)']
        >>> figure.axes[0].texts[0].get_text()
        'not finite, and not shown: 1 of noise'
    """
    check_path(path)
    sets = {str(name): np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    _check_sets(sets)
    figure = new_figure(8.0, 3.6)
    draw_histograms(figure.add_subplot(), sets, title=title)
    add_legend(figure, list(SETS[: len(sets)]), [f"{name} ({len(values)})" for name, values in sets.items()])
    return written(figure, path)


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
    label_axis(axes, "x", title)
    label_axis(axes, "y", "share of the set")
    missing = {name: len(sets[name]) - len(values) for name, values in finite.items()}
    lost = ", ".join(f"{count} of {shortened(name, 24)}" for name, count in missing.items() if count)
    set_title(axes, title, f"not finite, and not shown: {lost}" if lost else "")


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
