"""Names of array types, and what stands in for NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def no_nan(scores: Floats) -> Floats:
    """NaN is stranger than any number."""
    return as_floats(np.where(np.isnan(scores), np.inf, scores))


def as_floats(values: NDArray[np.floating[Any]]) -> Floats:
    """What `np.where` gives, whose dtype type checkers cannot see."""
    return values.astype(np.float64, copy=False)
