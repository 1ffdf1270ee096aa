"""Scales of colours: which numbers a heat map tells apart.

Robust: far outliers get a colour of their own and do not squeeze the rest. Where sizes span more than two powers of
ten, colours go by powers of ten, through zero where there are zeros or both signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..numerics import Floats

#: Powers of ten that a linear scale still shows.
LINEAR_DECADES = 2.0
#: Powers of ten below the median size that are shown of numbers of both signs.
DECADES_TO_ZERO = 2.0


@dataclass(frozen=True)
class Scale:
    """From numbers to colours.

    Attributes:
        norm: matplotlib's `Normalize`, or a subclass of it.
        diverging: whether zero is in the middle.
        extend: which ends of the colour bar have numbers beyond them: "neither", "min", "max" or "both".
    """

    norm: Any
    diverging: bool
    extend: str


def scale_of(finite: Floats) -> Scale:
    """The scale that shows these numbers, float64 [N]."""
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    if not finite.size:
        return Scale(Normalize(0.0, 1.0), diverging=False, extend="neither")
    low, high = robust_limits(finite)
    diverging = low < 0 < high
    decades = _decades(finite, diverging)
    if decades is None:
        if diverging:
            low, high = -max(-low, high), max(-low, high)
        elif not high > low:
            room = abs(low) * 0.5 or 1.0
            low, high = low - room, high + room
        norm: Any = Normalize(low, high)
    else:
        least, most = decades
        if finite.min() > 0:
            norm = LogNorm(least, most)
        else:
            low, high = (-most, most) if diverging else (-most, 0.0) if high <= 0 else (0.0, most)
            norm = SymLogNorm(least, vmin=low, vmax=high, base=10)
    return Scale(norm, diverging, _beyond(finite, norm.vmin, norm.vmax))


def linear_scale(finite: Floats) -> Scale:
    """A scale by the numbers themselves, float64 [N], as far below zero as above, and with nothing beyond it."""
    from matplotlib.colors import Normalize

    most = float(np.abs(finite).max(initial=0.0)) or 1.0
    return Scale(Normalize(-most, most), diverging=True, extend="neither")


def scaled_rows(table: Floats) -> tuple[Floats, list[str]]:
    """Each row from 0 to 1 by a scale of its own, and in words from where to where that goes."""
    from matplotlib.colors import Normalize

    shares, ranges = np.full(table.shape, np.nan), []
    for row, share in zip(table, shares, strict=True):
        known = np.isfinite(row)
        if not known.any():
            ranges.append("")
            continue
        low, high = robust_limits(row[known])
        if low == high:
            share[known] = 0.5
            ranges.append(f"{low:.3g}")
            continue
        decades = _decades(row[known], low < 0 < high)
        norm = Normalize(low, high) if decades is None else scale_of(row[known]).norm
        share[known] = np.ma.getdata(norm(row[known], clip=True))
        ranges.append(f"{norm.vmin:.3g} … {norm.vmax:.3g}" + ("" if decades is None else " (log)"))
    return shares, ranges


def robust_limits(finite: Floats) -> tuple[float, float]:
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


def _decades(finite: Floats, diverging: bool) -> tuple[float, float] | None:
    """The smallest and the largest size that are shown by powers of ten; None where a linear scale shows them."""
    sizes = np.log10(np.abs(finite[finite != 0]))
    if not sizes.size:
        return None
    low, high = robust_limits(sizes)
    if diverging:  # what passes through zero is small somewhere, which is no finding
        low = max(low, float(np.quantile(sizes, 0.1)), float(np.median(sizes)) - DECADES_TO_ZERO)
    if high - low <= LINEAR_DECADES:
        return None
    numbers = np.finfo(np.float64)
    return max(10.0**low, float(numbers.tiny)), 10.0 ** min(high, np.log10(numbers.max) - 1e-12)


def _beyond(finite: Floats, low: float, high: float) -> str:
    """Which ends of a colour bar need an arrow."""
    # Powers of logarithms round.
    room = 1e-9 * max(abs(low), abs(high))
    below, above = bool((finite < low - room).any()), bool((finite > high + room).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
