"""The CPU kernel of `moments`: one read of the tensor and one call from Python, compiled by Numba.

Imported late and only where Numba is installed (the extra `cpu`); compiling takes about two seconds
per process, at the first tensor. Nothing is cached on disk, since Numba's cache is a pickle.

A tile is read twice while it lies in the first cache: for its sum and extremes, then for what is
measured about its mean (the corrected two-pass algorithm: Chan, Golub, LeVeque 1983, "Algorithms
for computing the sample variance"). Tiles merge in float64. Extremes are compared as integers in
an order of the floats, which NaN cannot escape: a tile with one is read again, element by element.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic

from ..layout import (
    ABS_MEAN,
    ACTIVE,
    BASE,
    CALLS,
    COUNT,
    COUNTS,
    KURTOSIS,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    ORDER,
    REQUIRED,
    SEQUENCE,
    SKEWNESS,
    SLOT,
    STD,
    ZEROS,
)
from . import sums

#: How the kernel is told what it reads.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOAT32, BFLOAT16 = KINDS[torch.float32], KINDS[torch.bfloat16]
#: Elements read at a time: 16 KB, so that their second read comes from the first cache.
TILE = 4096
#: Below this, squares in float32 lose digits to underflow.
TINY = np.float32(1e-30)
#: A sum may be taken in any order, which is the same one each time; NaN and infinity stay what they are.
REORDER = {"reassoc", "contract", "nsz"}
INFINITE, NEGATIVE_INFINITE = np.int32(0x7F800000), np.uint32(0xFF800000)
MAGNITUDE = np.int32(0x7FFFFFFF)
LARGEST, SMALLEST = np.int32(0x7FFFFFFF), np.int32(-0x80000000)

_to_sums, _to_fields, _join = njit(sums.to_sums), njit(sums.to_fields), njit(sums.join)


@intrinsic
def pointer(_context: Any, address: Any, like: Any) -> Any:  # noqa: ARG001 (Numba passes by name)
    """An address as a pointer to elements of a type."""
    target = types.CPointer(like.dtype)

    def code(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.intp, like), code


@njit(fastmath=REORDER)
def widen(narrow: Any, kind: int, bits: Any) -> None:
    """The bits of float16 or bfloat16 elements as those of float32."""
    if kind == BFLOAT16:
        for i in range(narrow.size):
            bits[i] = np.int32(narrow[i]) << np.int32(16)
        return
    floats = bits.view(np.float32)
    for i in range(narrow.size):
        half = np.int32(narrow[i])
        bits[i] = (half & np.int32(0x7FFF)) << np.int32(13)
    for i in range(narrow.size):
        floats[i] *= np.float32(2.0**112)  # the exponents' biases differ by 112; exact, for subnormals too
    for i in range(narrow.size):
        half = np.int32(narrow[i])
        special = INFINITE if (half & np.int32(0x7C00)) == np.int32(0x7C00) else np.int32(0)
        bits[i] |= special | (half & SMALLEST)


@njit
def _extremes(bits: Any) -> Any:
    """The bits of the least and the largest float, which NaN cannot escape, and whether all are finite.

    As integers floats compare in their order, but negative ones backwards: with a sign the largest is the largest
    float, if any is positive, without one the largest is the least float, if any is negative, and with a sign the
    least is the one of the two that is still missing.
    """
    least, largest, largest_of_all = LARGEST, SMALLEST, np.uint32(0)
    for i in range(bits.size):
        least, largest = min(least, bits[i]), max(largest, bits[i])
        largest_of_all = max(largest_of_all, np.uint32(bits[i]))
    low = np.int32(largest_of_all) if largest_of_all > np.uint32(LARGEST) else least
    high = largest if largest >= 0 else least
    return low, high, largest < INFINITE and largest_of_all < NEGATIVE_INFINITE


@njit(fastmath=REORDER)
def _tile(x: Any, bits: Any, count_zeros: bool, row: Any) -> None:
    """The sums of one tile into `row`, see `sums`, but for third and fourth powers."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    low, high, finite = _extremes(bits)
    mean = total / np.float32(x.size)
    shift, squares, absolute = np.float32(0), np.float32(0), np.float32(0)
    for i in range(x.size):
        centred = x[i] - mean
        shift += centred
        squares += centred * centred
        absolute += abs(x[i])
    zeros = 0
    if count_zeros:
        for i in range(x.size):
            zeros += (bits[i] & MAGNITUDE) == 0
    within = squares > TINY and squares < np.inf and absolute < np.inf
    if not finite or not (within or low == high):
        _tile_with_care(x, count_zeros, row)
        return
    row[COUNT], row[NONFINITE], row[ZEROS] = x.size, 0, zeros
    row[MIN], row[MAX] = np.int32(low).view(np.float32), np.int32(high).view(np.float32)
    if low == high:
        row[MEAN], row[STD], row[ABS_MEAN] = row[MIN], 0.0, abs(row[MIN]) * x.size
        return
    correction = np.float64(shift) / x.size
    row[MEAN] = np.float64(mean) + correction
    row[STD] = max(np.float64(squares) - np.float64(shift) * correction, 0.0)
    row[ABS_MEAN] = absolute


@njit(fastmath=REORDER)
def _shape(x: Any, row: Any) -> None:
    """Sums of the third and fourth powers about the mean of a tile, in float64, which holds them."""
    mean, second, third, fourth = row[MEAN], 0.0, 0.0, 0.0
    for i in range(x.size):
        centred = np.float64(x[i]) - mean if math.isfinite(x[i]) else 0.0
        square = centred * centred
        second += square
        third += square * centred
        fourth += square * square
    # In proportion to the sum of squares that is there, which may have been summed in float32.
    ratio = row[STD] / second if second > 0 else 0.0
    row[SKEWNESS], row[KURTOSIS] = third * ratio * math.sqrt(ratio), fourth * ratio * ratio


@njit
def _tile_with_care(x: Any, count_zeros: bool, row: Any) -> None:
    """The same in float64, of the finite elements alone."""
    count, zeros, total, absolute, squares = 0, 0, 0.0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for i in range(x.size):
        value = np.float64(x[i])
        if math.isfinite(value):
            count += 1
            total += value
            absolute += abs(value)
            low, high = min(low, value), max(high, value)
            zeros += value == 0
    mean = total / max(count, 1)
    for i in range(x.size):
        value = np.float64(x[i])
        if math.isfinite(value):
            squares += (value - mean) ** 2
    row[COUNT], row[NONFINITE], row[ZEROS] = count, x.size - count, zeros if count_zeros else 0
    row[MEAN], row[STD], row[ABS_MEAN], row[MIN], row[MAX] = mean, squares, absolute, low, high


@njit
def _sums(x: Any, bits: Any, count_zeros: bool, row: Any) -> None:
    """The sums of one tile into `row`."""
    _tile(x, bits, count_zeros, row)
    if row.size > REQUIRED:
        _shape(x, row)


@njit
def _load(slots: Any, row: Any) -> None:
    """Slots of the slab as sums; `rows.unpack`."""
    for field in range(row.size):
        row[field] = slots[field]
    for position, field in enumerate(COUNTS):
        row[field] += slots[row.size + position] * BASE
    _to_sums(row)


@njit
def _store(row: Any, slots: Any, order: int) -> None:
    """Sums into slots of the slab, one call later; `rows.pack`."""
    _to_fields(row)
    row[ORDER] = row[ORDER] if row[CALLS] > 0 else order
    row[CALLS] += 1
    for position, field in enumerate(COUNTS):
        high = row[field] // BASE
        slots[row.size + position] = high
        row[field] -= high * BASE
    for field in range(row.size):
        slots[field] = row[field]


_SIGNATURE = types.void(
    types.intp, types.int64, types.int64, types.int64, types.boolean, types.int64, types.float32[:, :, :, ::1],
    types.int64[::1],
)  # fmt: skip


@njit(_SIGNATURE)
def observe(
    address: int, size: int, kind: int, samples: int, count_zeros: bool, layer: int, slab: Any, control: Any
) -> None:
    """Merge a dense tensor into the row of its layer, or the rows of its samples.

    Args:
        address: of the first element.
        size: number of elements, all samples together.
        kind: its type, one of `KINDS`.
        samples: number of samples to tell apart; 0 for none.
        count_zeros: whether the field `zeros` is wanted.
        layer: position in the slab.
        slab: float32 [capacity + 1, rows, layers, fields + COUNTS].
        control: int64 [CONTROL].
    """
    if control[ACTIVE] == 0:
        return
    control[SEQUENCE] += 1
    wide = carray(pointer(address, np.float32), size)
    wide_bits = carray(pointer(address, np.int32), size)
    narrow = carray(pointer(address, np.int16), size)
    buffer = np.empty(TILE if kind != FLOAT32 else 0, np.int32)
    fields = slab.shape[3] - len(COUNTS)
    pair = np.empty((2, fields))
    whole, part = pair[0], pair[1]
    first, count = (1, samples) if samples else (0, 1)
    each = size // max(count, 1)
    for sample in range(count):
        slots = slab[control[SLOT], first + sample, layer]
        _load(slots, whole)
        for start in range(sample * each, (sample + 1) * each, TILE):
            stop = min((sample + 1) * each, start + TILE)
            if kind == FLOAT32:
                _sums(wide[start:stop], wide_bits[start:stop], count_zeros, part)
            else:
                bits = buffer[: stop - start]
                widen(narrow[start:stop], kind, bits)
                _sums(bits.view(np.float32), bits, count_zeros, part)
            _join(whole, part)
        _store(whole, slots, control[SEQUENCE])
