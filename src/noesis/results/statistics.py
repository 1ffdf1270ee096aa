"""The statistics of a trace: one table of them, and how they follow from the fields of a row."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels import layout, rows
from ..numerics import Floats


class Statistic(NamedTuple):
    """One statistic of a layer's output.

    Attributes:
        name: as in `trace.stats`.
        of: from rows [..., fields] to it.
        field: of the row, that it gives back; None where it follows from others.
        back: from it, and the number of elements, to that field.
        counts: whether it is a number of elements: exact, 0 where a layer did not run, added up over layers.
        optional: whether it has to be asked for.
        needs: other statistics that come with it, without which it cannot be merged.
        scale_free: whether it stays as it is where all elements are scaled.
    """

    name: str
    of: Callable[[Floats], Floats]
    field: int | None
    back: Callable[[Floats, Floats], Floats] = lambda values, count: values
    counts: bool = False
    optional: bool = False
    needs: tuple[str, ...] = ()
    scale_free: bool = False


def _of_field(name: str, *, counts: bool = False, optional: bool = False) -> Statistic:
    field = layout.FIELDS.index(name)
    return Statistic(name, lambda row: row[..., field], field, counts=counts, optional=optional)


def _std(row: Floats) -> Floats:
    unbiased: Floats = rows.sample_std(row[..., layout.STD], row[..., layout.COUNT])
    return unbiased


def _population_std(std: Floats, count: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return std * np.sqrt(np.where(count > 1, count - 1, 0) / np.where(count > 0, count, 1))


def _rms(row: Floats) -> Floats:
    return np.hypot(row[..., layout.MEAN], row[..., layout.STD])


def _skewness(row: Floats) -> Floats:
    return np.where(_differ(row), row[..., layout.SKEWNESS], np.nan)


def _kurtosis(row: Floats) -> Floats:
    return np.where(_differ(row), row[..., layout.KURTOSIS] - 3, np.nan)


def _differ(row: Floats) -> NDArray[np.bool_]:
    """Whether elements differ; where they do, the fourth moment over the squared variance is at least 1."""
    return row[..., layout.KURTOSIS] > 0


def _or_zero(values: Floats) -> Floats:
    return np.where(np.isnan(values), 0.0, values)


#: In the order of a trace's last axis.
TABLE = (
    _of_field("count", counts=True),
    _of_field("mean"),
    Statistic("std", _std, layout.STD, _population_std),
    _of_field("abs_mean"),
    _of_field("min"),
    _of_field("max"),
    _of_field("nonfinite", counts=True),
    _of_field("zeros", counts=True, optional=True),
    Statistic("rms", _rms, None, optional=True),
    Statistic(
        *("skewness", _skewness, layout.SKEWNESS, lambda skewness, _: _or_zero(skewness)),
        optional=True, needs=("kurtosis",), scale_free=True,
    ),
    Statistic(
        *("kurtosis", _kurtosis, layout.KURTOSIS, lambda excess, _: _or_zero(excess + 3)),
        optional=True, needs=("skewness",), scale_free=True,
    ),
)  # fmt: skip
ALWAYS = tuple(each.name for each in TABLE if not each.optional)
OPTIONAL = tuple(each.name for each in TABLE if each.optional)
COUNTS = tuple(each.name for each in TABLE if each.counts)
SCALE_FREE = tuple(each.name for each in TABLE if each.scale_free)
_BY_NAME = {each.name: each for each in TABLE}


def asked_for(names: Collection[str]) -> tuple[str, ...]:
    """The statistics of a trace, in their order, where these were asked for; some come with others."""
    wanted = {*names, *(need for name in names for need in _BY_NAME[name].needs)}
    return tuple(each.name for each in TABLE if not each.optional or each.name in wanted)


def fields_for(stats: Collection[str]) -> int:
    """How many fields a row needs for these statistics."""
    fields = (_BY_NAME[name].field for name in stats)
    more = any(field is not None and field >= layout.REQUIRED for field in fields)
    return len(layout.FIELDS) if more else layout.REQUIRED


def stats_of(unpacked: Floats, stats: tuple[str, ...]) -> Floats:
    """Statistics [..., stats] from rows [..., fields]; NaN where there was no element, but for counts."""
    measured = unpacked[..., layout.COUNT] > 0
    columns = [
        known.of(unpacked) if known.counts else np.where(measured, known.of(unpacked), np.nan)
        for known in (_BY_NAME[name] for name in stats)
    ]
    return np.stack(columns, axis=-1)


def fields_of(values: Floats, stats: tuple[str, ...]) -> Floats:
    """Rows [..., FIELDS] from statistics [..., stats]; what is not in the statistics, or did not run, is 0."""
    unpacked = np.zeros((*values.shape[:-1], len(layout.FIELDS)))
    count = np.nan_to_num(values[..., stats.index("count")])
    for place, name in enumerate(stats):
        known = _BY_NAME.get(name)
        if known is None or known.field is None:  # of another noesis, or one that follows from fields
            continue
        # Of a layer without one finite number, that is counted and nothing else is known.
        there = ~np.isnan(values[..., place]) if known.counts else count > 0
        unpacked[..., known.field] = np.where(there, known.back(values[..., place], count), 0.0)
        for need in known.needs:
            if need not in stats:  # so that the whole of several rows is not known either
                unpacked[..., _BY_NAME[need].field] = np.nan
    return unpacked
