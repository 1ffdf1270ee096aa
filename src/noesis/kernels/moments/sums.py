"""One row in plain numbers, as sums, which add up: as Python runs it, and as Numba compiles it (`_numba`).

A row here holds what is measured, the fields before `CALLS`, with the sum of squares about the mean in the place of
`std` and the sum of |x| in that of `abs_mean`; an empty one has infinite extremes. `rows` does the same to arrays.
"""

from __future__ import annotations

import math
from typing import Any

from ..layout import (
    ABS_MEAN,
    BASE,
    CALLS,
    COUNT,
    COUNTS,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    ORDER,
    STD,
    ZEROS,
)


def load(slots: Any, row: Any) -> None:
    """Slots of the slab as sums."""
    for field in range(CALLS):
        row[field] = slots[field]
    highs = len(slots) - len(COUNTS)
    for position, field in enumerate(COUNTS):
        row[field] += slots[highs + position] * BASE
    row[STD] = row[STD] * row[STD] * row[COUNT]
    row[ABS_MEAN] *= row[COUNT]
    if row[COUNT] == 0:
        row[MIN], row[MAX] = math.inf, -math.inf


def join(whole: Any, part: Any) -> None:
    """Add to `whole` the elements of `part` (Chan, Golub, LeVeque 1979, in its form for two)."""
    count = whole[COUNT] + part[COUNT]
    whole[NONFINITE] += part[NONFINITE]
    if part[COUNT] > 0:
        apart = part[MEAN] - whole[MEAN]
        whole[STD] += part[STD] + apart * apart * (whole[COUNT] * (part[COUNT] / count))
        whole[MEAN] += apart * (part[COUNT] / count)
        whole[ABS_MEAN] += part[ABS_MEAN]
        whole[MIN], whole[MAX] = min(whole[MIN], part[MIN]), max(whole[MAX], part[MAX])
        whole[ZEROS] += part[ZEROS]
    whole[COUNT] = count


def store(row: Any, slots: Any, order: int) -> None:
    """Sums into slots of the slab, one call later."""
    count = max(row[COUNT], 1.0)
    row[STD] = math.sqrt(row[STD] / count)
    row[ABS_MEAN] /= count
    if row[COUNT] == 0:
        row[MIN] = row[MAX] = 0.0
    highs = len(slots) - len(COUNTS)
    for position, field in enumerate(COUNTS):
        high = row[field] // BASE
        slots[highs + position] = high
        row[field] -= high * BASE
    for field in range(CALLS):
        slots[field] = row[field]
    if slots[CALLS] == 0:
        slots[ORDER] = order
    slots[CALLS] += 1
