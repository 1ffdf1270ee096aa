"""How far apart directions are."""

from __future__ import annotations

import numpy as np

from .arrays import Floats


def cosine_delta(x: Floats, y: Floats) -> Floats:
    """1 - cosine of the rows of two float64 arrays `[n, width]`, in [0, 2]; NaN where one is not finite.

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import cosine_delta
        >>> cosine_delta(np.array([[3.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 0.0]]))
        array([1., 0.])
    """
    finite = np.asarray(np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1))
    u, v = (_unit(np.where(finite[:, None], rows, 0.0)) for rows in (x, y))
    delta = 0.5 * np.square(u - v).sum(axis=1)
    delta[u.any(axis=1) != v.any(axis=1)] = 1.0
    delta[~finite] = np.nan
    return np.asarray(delta, dtype=np.float64)


def _unit(rows: Floats) -> Floats:
    # By the largest element first: squares of 1e200 overflow, of 1e-200 vanish.
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    norm = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    unit: Floats = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit
