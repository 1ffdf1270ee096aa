"""The CPU kernel of `norms`: a tensor, its gradient and what it was before, each read once.

A tile of each lies in the first cache while it is summed, in float64, and while what was before becomes what is now.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types

from ..moments._numba import FLOAT32, KINDS, REORDER, pointer, widen
from .reference import GRADIENT, UPDATE, VALUE

__all__ = ["KINDS", "observe"]

#: Elements of a tile; three of them in float32 are 24 KB.
TILE = 2048


@njit(fastmath=REORDER)
def _squares(x: Any) -> Any:
    total = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value * value
    return total


@njit(fastmath=REORDER)
def _squares_apart(x: Any, y: Any) -> Any:
    total = 0.0
    for i in range(x.size):
        apart = np.float64(x[i]) - np.float64(y[i])
        total += apart * apart
    return total


@njit
def _copy(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = x[i]


@njit
def _renew(before: int, now: int, kind: int, start: int, stop: int) -> None:
    """Make some elements what they are now, as integers, which are faster to copy."""
    if kind == FLOAT32:
        _copy(carray(pointer(now, np.int32), stop)[start:stop], carray(pointer(before, np.int32), stop)[start:stop])
    else:
        _copy(carray(pointer(now, np.int16), stop)[start:stop], carray(pointer(before, np.int16), stop)[start:stop])


@njit
def _tile(address: int, kind: int, start: int, stop: int, buffer: Any) -> Any:
    """Some elements in float32, where they are or as a copy."""
    if kind == FLOAT32:
        return carray(pointer(address, np.float32), stop)[start:stop]
    bits = buffer[: stop - start]
    widen(carray(pointer(address, np.int16), stop)[start:stop], kind, bits)
    return bits.view(np.float32)


@njit(types.void(types.int64[:, ::1], types.float64[:, ::1]))
def observe(jobs: Any, rows: Any) -> None:
    """Write the norms of some tensors, and leave in what was before what is now.

    Args:
        jobs: a row per tensor: the addresses of its first element, of that of its gradient and of that of what it was
            before, where 0 is none; the number of elements; the type of the tensor and of what it was, one of
            `KINDS`; that of the gradient; and its place in `rows`.
        rows: float64 [3, tensors].
    """
    buffers = np.empty((3, TILE), np.int32)
    for job in range(jobs.shape[0]):
        now, gradient, before, size, kind, gradient_kind, place = jobs[job]
        values, gradients, updates = 0.0, 0.0, 0.0
        for start in range(0, size, TILE):
            stop = min(size, start + TILE)
            here = _tile(now, kind, start, stop, buffers[0])
            values += _squares(here)
            if gradient != 0:
                gradients += _squares(_tile(gradient, gradient_kind, start, stop, buffers[1]))
            if before != 0:
                updates += _squares_apart(here, _tile(before, kind, start, stop, buffers[2]))
                _renew(before, now, kind, start, stop)
        rows[VALUE, place], rows[GRADIENT, place] = math.sqrt(values), math.sqrt(gradients)
        rows[UPDATE, place] = math.sqrt(updates)
