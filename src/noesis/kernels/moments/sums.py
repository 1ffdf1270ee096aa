"""A row in plain numbers as sums, which add up: as Python runs it, and as Numba compiles it (`_numba`).

Sums of powers about the mean stand in the places of `std`, `skewness` and `kurtosis`, and the sum of |x| in that of
`abs_mean`. An empty row has infinite extremes. `rows` does the same to arrays.
"""

from __future__ import annotations

import math
from typing import Any

from ..layout import ABS_MEAN, COUNT, KURTOSIS, MAX, MEAN, MIN, NONFINITE, REQUIRED, SKEWNESS, STD, ZEROS


def to_sums(row: Any) -> None:
    """Turn the fields of a row into sums, in place."""
    count, std = row[COUNT], row[STD]
    row[STD] = std * std * count
    row[ABS_MEAN] *= count
    if count == 0:
        row[MIN], row[MAX] = math.inf, -math.inf
    if len(row) > REQUIRED:
        row[SKEWNESS] *= std * row[STD]
        row[KURTOSIS] *= std * std * row[STD]


def to_fields(row: Any) -> None:
    """Turn sums into the fields of a row, in place."""
    count, squares = max(row[COUNT], 1.0), row[STD]
    row[STD] = math.sqrt(squares / count)
    row[ABS_MEAN] /= count
    if row[COUNT] == 0:
        row[MIN] = row[MAX] = 0.0
    if len(row) > REQUIRED:
        varies = row[STD] > 0
        row[SKEWNESS] = row[SKEWNESS] / squares / row[STD] if varies else 0.0
        row[KURTOSIS] = row[KURTOSIS] / squares / squares * count if varies else 0.0


def join(whole: Any, part: Any) -> None:
    """Add to `whole` the elements of `part`.

    Sources, in their form for two parts: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances"; for the third and fourth powers Pébay 2008, "Formulas for robust, one-pass parallel
    computation of covariances and arbitrary-order statistical moments".
    """
    count = whole[COUNT] + part[COUNT]
    whole[NONFINITE] += part[NONFINITE]
    if part[COUNT] > 0:
        apart = part[MEAN] - whole[MEAN]
        if len(whole) > REQUIRED:
            w, v = whole[COUNT] / count, part[COUNT] / count
            between = apart * apart * (whole[COUNT] * v)
            cubes = 3 * (w * part[STD] - v * whole[STD]) + between * (w - v)
            fourths = 6 * (w * w * part[STD] + v * v * whole[STD]) + between * (w * w - w * v + v * v)
            fourths = 4 * (w * part[SKEWNESS] - v * whole[SKEWNESS]) + apart * fourths
            whole[SKEWNESS] += part[SKEWNESS] + apart * cubes
            whole[KURTOSIS] += part[KURTOSIS] + apart * fourths
        whole[STD] += part[STD] + apart * apart * (whole[COUNT] * (part[COUNT] / count))
        whole[MEAN] += apart * (part[COUNT] / count)
        whole[ABS_MEAN] += part[ABS_MEAN]
        whole[MIN], whole[MAX] = min(whole[MIN], part[MIN]), max(whole[MAX], part[MAX])
        whole[ZEROS] += part[ZEROS]
    whole[COUNT] = count
