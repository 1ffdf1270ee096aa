"""The CPU kernel of `pooling`: one read of a float32 output, compiled by Numba.

Imported late and only where Numba is installed. Sums are shifted by each channel's first element, as in
`pooling._triton`, and carried over into float64 block by block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types

from ..moments._numba import REORDER, pointer
from .reference import LEAST_SQUARE

#: Positions summed in float32 before they are carried over.
BLOCK = 256


@njit(fastmath=REORDER)
def _add_rows(rows: Any, pivot: Any, sums: Any, squares: Any) -> None:
    """Where the channels of a position follow each other in memory: rows [positions, channels]."""
    for position in range(rows.shape[0]):
        row = rows[position]
        for channel in range(row.size):
            apart = row[channel] - pivot[channel]
            sums[channel] += apart
            squares[channel] += apart * apart


@njit(fastmath=REORDER)
def _add_run(run: Any, pivot: Any) -> Any:
    """Where the positions of a channel do: sum and sum of squares of some of them."""
    total, squares = np.float32(0), np.float32(0)
    for position in range(run.size):
        apart = run[position] - pivot
        total += apart
        squares += apart * apart
    return total, squares


_SIGNATURE = types.void(
    types.intp, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.boolean,
    types.float32[:, ::1],
)  # fmt: skip


@njit(_SIGNATURE)
def pool(
    address: int,
    samples: int,
    positions: int,
    channels: int,
    s_sample: int,
    s_position: int,
    s_channel: int,
    spread: bool,
    buffer: Any,
) -> None:
    """Write the means over positions, and the spreads beside them, of an output [samples, positions, channels].

    Args:
        address: of the first element, float32.
        samples: size of the first dimension.
        positions: of the second.
        channels: of the third.
        s_sample: strides, in elements.
        s_position: likewise.
        s_channel: likewise.
        spread: whether the standard deviation is wanted.
        buffer: float32 [room, width].
    """
    extent = (samples - 1) * s_sample + (positions - 1) * s_position + (channels - 1) * s_channel + 1
    x = carray(pointer(address, np.float32), extent)
    total, totals = np.empty(channels), np.empty(channels)
    pivot = np.empty(channels, np.float32)
    some, some_squares = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for sample in range(samples):
        start = sample * s_sample
        total[:] = 0
        totals[:] = 0
        for channel in range(channels):
            pivot[channel] = x[start + channel * s_channel]
        for first in range(0, positions, BLOCK):
            count = min(BLOCK, positions - first)
            if s_channel == 1:
                some[:] = 0
                some_squares[:] = 0
                for position in range(first, first + count):
                    begin = start + position * s_position
                    _add_rows(x[begin : begin + channels].reshape(1, channels), pivot, some, some_squares)
                for channel in range(channels):
                    total[channel] += some[channel]
                    totals[channel] += some_squares[channel]
            else:
                for channel in range(channels):
                    begin = start + channel * s_channel + first * s_position
                    run = x[begin : begin + (count - 1) * s_position + 1 : s_position]
                    one, square = _add_run(run, pivot[channel])
                    total[channel] += one
                    totals[channel] += square
        for channel in range(channels):
            shift = total[channel] / positions
            buffer[sample, channel] = pivot[channel] + shift
            if spread:
                variance = max(totals[channel] / positions - shift * shift, LEAST_SQUARE)
                buffer[sample, channels + channel] = math.sqrt(variance)
