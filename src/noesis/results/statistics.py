"""The statistics of a trace, and how they follow from the fields of a row."""

from __future__ import annotations

import numpy as np

from ..kernels import layout, rows
from ..numerics import Floats

ALWAYS = ("count", "mean", "std", "abs_mean", "min", "max", "nonfinite")
OPTIONAL = ("zeros", "rms")


def stats_of(unpacked: Floats, stats: tuple[str, ...]) -> Floats:
    """Statistics [..., stats] from rows [..., FIELDS]."""
    count = unpacked[..., layout.COUNT]
    measured = count > 0
    columns = []
    for name in stats:
        if name in ("count", "nonfinite", "zeros"):
            columns.append(unpacked[..., layout.FIELDS.index(name)])
            continue
        if name == "std":
            value = rows.sample_std(unpacked[..., layout.STD], count)
        elif name == "rms":
            value = np.hypot(unpacked[..., layout.MEAN], unpacked[..., layout.STD])
        else:
            value = unpacked[..., layout.FIELDS.index(name)]
        columns.append(np.where(measured, value, np.nan))
    return np.stack(columns, axis=-1)


def fields_of(values: Floats, stats: tuple[str, ...]) -> Floats:
    """Rows [..., FIELDS] from statistics [..., stats]; what is not in the statistics, or did not run, is 0."""
    unpacked = np.zeros((*values.shape[:-1], len(layout.FIELDS)))
    count = np.nan_to_num(values[..., stats.index("count")])
    for name in stats:
        if name in layout.FIELDS:  # of a layer without one finite number, that is counted and nothing else is known
            known = ~np.isnan(values[..., stats.index(name)]) if name in ("count", "nonfinite", "zeros") else count > 0
            unpacked[..., layout.FIELDS.index(name)] = np.where(known, values[..., stats.index(name)], 0.0)
    with np.errstate(invalid="ignore"):
        shrink = np.sqrt(np.where(count > 1, count - 1, 0) / np.where(count > 0, count, 1))
    unpacked[..., layout.STD] *= shrink
    return unpacked
