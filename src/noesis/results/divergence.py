"""Where two traces part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..numerics import Floats, Ints
from .common_steps import common_steps
from .runs import Recorded
from .statistics import COUNTS


class Divergence(NamedTuple):
    """Where two traces part: the first step (its number in `a`) and, in order of execution, the first layer."""

    step: int
    layer: str
    stat: str
    a: float
    b: float


def first_divergence(a: Recorded, b: Recorded, tolerance: float = 1e-5) -> Divergence | None:
    """The earliest step, and in order of execution the earliest layer, at which two traces differ.

    Args:
        a: a trace.
        b: another of the same input; for its steps see `common_steps`, layers are matched by name.
        tolerance: in standard deviations of the layer at that step (in its size, for a constant
            layer); counts of elements, of non-finite elements and of calls have to be equal.

    Returns:
        The divergence, or None when the traces are the same in the steps that both have.
    """
    places = {name: at for at, name in enumerate(b.layers)}
    names = [name for name in a.layers if name in places]
    at_a, at_b = [at for at, name in enumerate(a.layers) if name in places], [places[name] for name in names]
    stats = [name for name in a.stats if name in b.stats]
    for i, j in common_steps(a, b):
        step = int(a.steps[i])
        left, right = a.values[i, at_a], b.values[j, at_b]
        scale = pooled_std(left[:, a.stats.index("std")], right[:, b.stats.index("std")])
        for at in np.argsort(_running_order(a.order[i, at_a]), kind="stable"):
            calls = float(a.calls[i, at_a[at]]), float(b.calls[j, at_b[at]])
            if calls[0] != calls[1]:
                return Divergence(step, names[at], "calls", *calls)
            for stat in stats:
                one, other = left[at, a.stats.index(stat)], right[at, b.stats.index(stat)]
                if one == other or (np.isnan(one) and np.isnan(other)):
                    continue
                unit = scale[at] if scale[at] > 0 else max(abs(one), abs(other))
                if stat in COUNTS or not abs(one - other) <= tolerance * unit:
                    return Divergence(step, names[at], stat, float(one), float(other))
    return None


def _running_order(order: Ints) -> Floats:
    return np.where(order > 0, order, np.inf)


def pooled_std(std_a: Floats, std_b: Floats) -> Floats:
    """The standard deviation that two of them have in common."""
    return np.sqrt((std_a**2 + std_b**2) / 2)
