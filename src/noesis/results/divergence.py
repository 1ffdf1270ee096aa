"""Where two traces part, beyond what their dtypes round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..numerics import Floats, Ints
from .common_steps import common_steps
from .runs import Recorded, Stepwise
from .statistics import SCALE_FREE

#: Standard deviations that two runs may be apart unless asked otherwise: some eighty times what float32 resolves.
TOLERANCE = 1e-5
#: Units of the coarser dtype's resolution that statistics over many elements may be apart: twice the most that was seen
#: between float32 and bfloat16 or float16, in seven language models, denoisers and encoders of up to 32 blocks.
ROUNDINGS = 4
#: How much further extremes, which are single elements, and the number of zeros may be apart.
SINGLE = 3
#: What a dtype resolves, as `torch.finfo(dtype).eps` says.
RESOLUTION = {
    "float64": 2.0**-23,  # rows are float32
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}


class Divergence(NamedTuple):
    """Where two traces part: the first step (its number in `a`) and, in order of execution, the first layer."""

    step: int
    layer: str
    stat: str
    a: float
    b: float


def first_divergence(a: Recorded, b: Recorded, tolerance: float | None = None) -> Divergence | None:
    """The earliest step, and in order of execution the earliest layer, at which two traces differ.

    Counts of elements, of non-finite elements and of calls have to be equal. The mean, std, abs_mean and rms of a layer
    may be `tolerance` standard deviations apart (of its size, for a constant layer); extremes, which are single
    elements, three times that, of their own size and a standard deviation; as many zeros three times that share;
    skewness and kurtosis, which have no unit, that share of themselves and 1.

    Args:
        a: a trace.
        b: another of the same input; for its steps see `common_steps`, layers are matched by name.
        tolerance: 0 for any bit that differs. By default 1e-5, or where a run computed in a coarser dtype than float32
            four times its resolution (3.1 % in bfloat16, 0.4 % in float16), in the size of the layer's elements.

    Returns:
        The divergence, or None when the traces are the same in the steps that both have.
    """
    return next((where for where, _ in divergences(a, b, allowed(a, b, tolerance))), None)


def divergences(a: Stepwise, b: Stepwise, within: tuple[float, float]) -> Iterator[tuple[Divergence, float]]:
    """Every number at which two traces differ, the first first, and how many times what is allowed they are apart.

    For `within` see `allowed`, for the rest `first_divergence`. What has to be equal is infinitely many times too far
    apart, as NaN is from a number.
    """
    places = {name: at for at, name in enumerate(b.layers)}
    names = [name for name in a.layers if name in places]
    at_a, at_b = [at for at, name in enumerate(a.layers) if name in places], [places[name] for name in names]
    stats = [name for name in a.stats if name in b.stats]
    for i, j in common_steps(a, b):
        one = dict(zip(a.stats, a.values[i, at_a].T, strict=True))
        other = dict(zip(b.stats, b.values[j, at_b].T, strict=True))
        values = {"calls": (a.calls[i, at_a], b.calls[j, at_b])} | {stat: (one[stat], other[stat]) for stat in stats}
        excess = {stat: _excess(x, y, _most(stat, one, other, *within)) for stat, (x, y) in values.items()}
        order = np.argsort(_running_order(a.order[i, at_a]), kind="stable")
        anywhere = np.any([each > 1 for each in excess.values()], axis=0)
        for layer in order[anywhere[order]]:
            for stat, (x, y) in values.items():
                if excess[stat][layer] > 1:
                    where = Divergence(int(a.steps[i]), names[layer], stat, float(x[layer]), float(y[layer]))
                    yield where, float(excess[stat][layer])


def allowances(run: Stepwise, within: tuple[float, float]) -> Floats:
    """How far each number of a run may be from another run's, float64 [steps, layers, stats]; see `allowed`."""
    of = dict(zip(run.stats, np.moveaxis(run.values, -1, 0), strict=True))
    each = [np.broadcast_to(_most(stat, of, of, *within), run.values.shape[:-1]) for stat in run.stats]
    return np.stack(each, axis=-1)


def allowed(a: Stepwise, b: Stepwise, tolerance: float | None) -> tuple[float, float]:
    """How far two runs may be apart: in standard deviations of a layer, and in the size of its elements."""
    return (TOLERANCE, ROUNDINGS * resolution(a, b)) if tolerance is None else (tolerance, 0.0)


def resolution(*runs: Stepwise) -> float:
    """What the coarsest dtype among runs resolves, of their parameters or of autocast."""
    return max(RESOLUTION.get(name, RESOLUTION["float32"]) for run in runs for name in _dtypes(run.meta))


def rounding(dtypes: Iterable[str]) -> float:
    """How far numbers computed in some dtypes may be apart, in their own size, before it is more than rounding.

    Examples:
        >>> from noesis.results.divergence import rounding
        >>> rounding(["float32"]), rounding(["float32", "bfloat16"])
        (1e-05, 0.03125)
    """
    coarsest = max((RESOLUTION.get(name, 0.0) for name in dtypes), default=0.0)
    return max(TOLERANCE, ROUNDINGS * coarsest if coarsest > RESOLUTION["float32"] else 0.0)


def _dtypes(meta: dict[str, Any]) -> list[str]:
    given = [meta.get("dtype"), meta.get("autocast")]
    # A run of several calls of a pipeline may have one for each.
    return ["float32", *(str(name) for each in given for name in (each if isinstance(each, list) else [each]))]


def _most(stat: str, one: dict[str, Floats], other: dict[str, Floats], base: float, rounding: float) -> Floats:
    """How far apart a statistic of two runs may be [layers]; see `allowed` for the last two."""
    if not base or stat in ("calls", "count", "nonfinite"):
        return np.zeros(())
    with np.errstate(invalid="ignore", over="ignore"):
        x, y = one[stat], other[stat]
        widest = max(base, rounding)
        spread = pooled_std(one["std"], other["std"])
        largest = np.maximum(np.abs(x), np.abs(y))
        if stat == "zeros":
            found = SINGLE * widest * one["count"] + (2 if rounding >= base else 0)  # an element or two of few
        elif stat in ("min", "max"):
            found = SINGLE * widest * (spread + largest)
        elif stat in SCALE_FREE:
            found = widest * (1 + largest)
        else:
            size = np.maximum(np.hypot(one["mean"], one["std"]), np.hypot(other["mean"], other["std"]))
            found = np.maximum(base * np.where(spread > 0, spread, largest), rounding * size)
        return np.asarray(found, dtype=np.float64)


def _excess(x: Floats, y: Floats, most: Floats) -> Floats:
    """How many times further apart than they may be numbers are [layers]."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        times = np.abs(x - y) / most
    equal = (x == y) | (np.isnan(x) & np.isnan(y))
    return np.where(equal, 0.0, np.where(np.isnan(times), np.inf, times))


def _running_order(order: Ints) -> Floats:
    return np.where(order > 0, order, np.inf)


def pooled_std(std_a: Floats, std_b: Floats) -> Floats:
    """The standard deviation that two of them have in common."""
    return np.sqrt((std_a**2 + std_b**2) / 2)
