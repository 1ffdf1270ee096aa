"""The CPU path of `moments` without Numba, and for float64: NumPy and torch, in blocks that stay in the cache."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import rows
from ..layout import (
    ABS_MEAN,
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
from .reference import by_sample, measure_reference, storage_order

#: Elements measured at a time: large enough for the threads, small enough for the cache.
BLOCK = 1 << 20
#: The same for larger outputs where one thread works, which has no others to wait for.
BLOCK_ALONE = 1 << 17
#: Elements in one dot product, whose float32 sums lose digits with length.
LONGEST_DOT = 1 << 18
#: Elements up to which torch itself uses one thread.
GRAIN = 1 << 15
#: Elements for which the calls cost more than the arithmetic.
SMALL = 1 << 12
#: Shorter samples than this are measured together, longer ones one by one.
SHORT = 1 << 12
#: Below this, squares in float32 lose digits to underflow.
_TINY = 1e-30
_NO_HIGHS = [0.0] * len(COUNTS)
_BUFFERS = threading.local()


def observe(
    x: Tensor,
    samples: int,
    count_zeros: bool,
    layer: int,
    slab: NDArray[np.float32],
    control: NDArray[np.int64],
) -> None:
    """Merge the moments of `x` into the slab; `.item()` waits for no device here."""
    order = int(control[SEQUENCE]) + 1
    control[SEQUENCE] = order
    target = slab[control[SLOT], :, layer]  # [rows, fields + COUNTS]
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 a row of float64 holds infinity
        if samples:
            _observe_samples(x, samples, count_zeros, target[1 : 1 + samples], order)
        else:
            _observe_whole(storage_order(x), count_zeros, target[0], order)


def _observe_whole(x: Tensor, count_zeros: bool, target: NDArray[np.float32], order: int) -> None:
    fields = rows.width(target)
    row = _measure(x, count_zeros, fields)
    if not target[CALLS]:
        row[CALLS], row[ORDER] = 1.0, order
        target[:] = _slots(row)
        return
    held = target.tolist()
    # Nothing to merge with, or infinities of float64 outputs: arrays keep them as they are.
    if not held[COUNT] or not held[MAX] - held[MIN] < math.inf:
        _merge(target[None], [row], order)
        return
    whole = held[:fields]
    for position, field in enumerate(COUNTS):
        whole[field] += held[fields + position] * BASE
    sums.to_sums(whole)
    sums.to_sums(row)
    sums.join(whole, row)
    sums.to_fields(whole)
    whole[CALLS] += 1
    target[:] = _slots(whole)


def _observe_samples(x: Tensor, samples: int, count_zeros: bool, target: NDArray[np.float32], order: int) -> None:
    split, fields = by_sample(x, samples), rows.width(target)
    if split.shape[1] < SHORT:
        measured: Any = measure_reference(split, count_zeros, fields).numpy()
    else:
        measured = [_measure(storage_order(sample), count_zeros, fields) for sample in split]
    _merge(target, measured, order)


def _merge(target: NDArray[np.float32], measured: Any, order: int) -> None:
    new = np.array(measured, dtype=np.float64)
    new[:, CALLS] = 1
    new[:, ORDER] = order
    if target[:, CALLS].any():
        old = rows.unpack(target, np.empty_like(new))
        new = rows.combine(np.stack([old, new]))
    rows.pack(new, target)


def _slots(row: list[float]) -> list[float]:
    """`rows.pack` for one row, without arrays."""
    slots = row + _NO_HIGHS
    if row[COUNT] >= BASE or row[NONFINITE] >= BASE:
        for position, field in enumerate(COUNTS):
            slots[len(row) + position], slots[field] = divmod(row[field], BASE)
    return slots


def _measure(x: Tensor, count_zeros: bool, fields: int) -> list[float]:
    """The fields of a whole tensor of any shape whose order of elements does not matter."""
    if 0 < x.numel() <= SMALL:
        return _measure_small(x.double().numpy().reshape(-1), count_zeros, fields)
    if x.dim() == 1 and 0 < x.numel() <= BLOCK:
        return _measure_block(x, count_zeros, fields)
    size = BLOCK_ALONE if torch.get_num_threads() == 1 else BLOCK
    blocks = [_measure_block(part, count_zeros, fields) for part in _blocks(x, size)]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return [0.0] * fields
    merged: list[float] = rows.combine(np.array(blocks)).tolist()
    return merged


def _blocks(x: Tensor, size: int) -> list[Tensor]:
    """Contiguous 1-D pieces of at most `size` elements; a tensor with gaps is copied piece by piece."""
    if x.dim() == 1:
        return list(x.split(size)) if x.numel() else []
    if x.numel() <= size:
        return [x.reshape(-1)] if x.numel() else []
    step = max(1, size * x.shape[0] // x.numel())
    return [piece for part in x.split(step) for piece in _blocks(part[0] if part.shape[0] == 1 else part, size)]


def _measure_small(x: NDArray[np.float64], count_zeros: bool, fields: int) -> list[float]:
    """In float64 by NumPy, whose calls cost half as much as torch's; there all else is overhead."""
    row, size = [0.0] * fields, x.size
    high, low = float(np.maximum.reduce(x)), float(np.minimum.reduce(x))
    if not (math.isfinite(high) and math.isfinite(low)):
        finite = x[np.isfinite(x)]
        if finite.size:
            row = _measure_small(finite, count_zeros, fields)
        row[NONFINITE] = size - row[COUNT]
        return row
    row[COUNT], row[MIN], row[MAX] = float(size), low, high
    if low == high:
        row[ZEROS], row[MEAN], row[ABS_MEAN] = size * float(low == 0), low, abs(low)
        return row
    row[MEAN] = mean = float(np.add.reduce(x)) / size
    centred = x - mean
    row[STD] = math.sqrt(float(centred.dot(centred)) / size)
    if fields > REQUIRED and 0 < row[STD] < math.inf:
        centred /= row[STD]
        squared = centred * centred
        row[SKEWNESS], row[KURTOSIS] = float(squared.dot(centred)) / size, float(squared.dot(squared)) / size
    row[ABS_MEAN] = abs(mean) if low >= 0 or high <= 0 else float(np.add.reduce(np.absolute(x))) / size
    if count_zeros:
        row[ZEROS] = size - np.count_nonzero(x)
    return row


def _measure_block(x: Tensor, count_zeros: bool, fields: int) -> list[float]:
    if x.dtype not in (torch.float32, torch.float64):
        x = _scratch(1, x).copy_(x)
    row, size = [0.0] * fields, x.numel()
    high, low = _extremes(x)  # a NaN anywhere makes both NaN
    if not (math.isfinite(high) and math.isfinite(low)):
        finite = x[x.isfinite()]
        if finite.numel():
            row = _measure_block(finite, count_zeros, fields)
        row[NONFINITE] = size - row[COUNT]
        return row
    row[COUNT], row[MIN], row[MAX] = float(size), low, high
    if low == high:
        row[ZEROS], row[MEAN], row[ABS_MEAN] = size * float(low == 0), low, abs(low)
        return row
    total = x.sum().item()
    if low >= 0 or high <= 0:
        absolute, squares = abs(total), _squares(x)
    else:
        magnitude = torch.abs(x, out=_scratch(0, x))
        absolute, squares = magnitude.sum().item(), _squares(magnitude)
    if not (_TINY < squares < math.inf and math.isfinite(total)) and x.dtype != torch.float64:
        return _measure_block(x.double(), count_zeros, fields)  # the squares leave float32, the values do not
    mean = total / size
    variance = squares / size - mean * mean
    # Squares about zero are sums shifted by the pivot 0. That pivot is as good as the mean while
    # the mean is within two standard deviations of it; otherwise the block is read once more.
    if not variance * 4 > mean * mean:
        centred = torch.sub(x, mean, out=_scratch(0, x))
        shift = centred.sum().item() / size
        variance = max(_squares(centred) / size - shift * shift, 0.0)
        mean += shift
    row[MEAN], row[STD], row[ABS_MEAN] = mean, math.sqrt(variance), absolute / size
    if fields > REQUIRED and 0 < row[STD] < math.inf:
        row[SKEWNESS], row[KURTOSIS] = _shape(x, mean, row[STD])
    if count_zeros:
        row[ZEROS] = size - torch.count_nonzero(x).item()
    return row


def _shape(x: Tensor, mean: float, std: float) -> tuple[float, float]:
    """Skewness and kurtosis of a block, which is scaled so that its fourth powers fit."""
    sums_of = np.zeros(4)
    for piece in x.split(LONGEST_DOT):
        z = torch.sub(piece, mean).div_(std)
        squared = z * z
        sums_of += [z.sum().item(), _squares(z), torch.dot(z, squared).item(), _squares(squared)]
    # Subtracted in float32, the mean is not quite 0 afterwards: powers about it from those about 0.
    rest, second, third, fourth = (sums_of / x.numel()).tolist()
    variance = second - rest**2
    skewness = (third - 3 * rest * second + 2 * rest**3) / variance**1.5
    return skewness, (fourth - 4 * rest * third + 6 * rest**2 * second - 3 * rest**4) / variance**2


def _extremes(x: Tensor) -> tuple[float, float]:
    if _alone(x):
        values = x.numpy()
        return float(np.maximum.reduce(values)), float(np.minimum.reduce(values))
    return x.amax().item(), x.amin().item()


def _squares(x: Tensor) -> float:
    if x.numel() > LONGEST_DOT:
        return sum(map(_squares, x.split(LONGEST_DOT)))
    if _alone(x):
        values = x.numpy()
        return float(values.dot(values))
    return float(torch.dot(x, x).item())


def _alone(x: Tensor) -> bool:
    """Whether one thread works on `x`; NumPy's extremes and dot product are faster then."""
    return x.numel() <= GRAIN or torch.get_num_threads() == 1


def _scratch(which: int, x: Tensor) -> Tensor:
    """Room for a block like `x`, the same at every call: fresh memory costs more than the arithmetic."""
    if x.dtype == torch.float64:
        return torch.empty_like(x)
    if not hasattr(_BUFFERS, "pair"):  # one pair per thread
        with torch.inference_mode(False):  # whoever calls first; an inference tensor could not be reused
            _BUFFERS.pair = [torch.empty(BLOCK, dtype=torch.float32, device="cpu") for _ in range(2)]
    buffer: Tensor = _BUFFERS.pair[which]
    return buffer.narrow(0, 0, x.numel())
