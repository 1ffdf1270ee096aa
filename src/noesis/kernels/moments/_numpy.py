"""The CPU path of `moments` without Numba, and for float64: NumPy and torch, in blocks that stay in the cache."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import layout, rows
from ..layout import BASE, CALLS, COUNTS, FIELDS, ORDER, SEQUENCE, SLOT
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
    target = slab[control[SLOT], :, layer]  # [rows, SLOTS]
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 a row of float64 holds infinity
        if samples:
            _observe_samples(x, samples, count_zeros, target[1 : 1 + samples], order)
        else:
            _observe_whole(storage_order(x), count_zeros, target[0], order)


def _observe_whole(x: Tensor, count_zeros: bool, target: NDArray[np.float32], order: int) -> None:
    measured = _measure(x, count_zeros)
    calls = int(target[CALLS])
    if calls:
        measured, order = _union(target.tolist(), measured), int(target[ORDER])
    target[:] = _packed(measured, calls + 1, order)


def _observe_samples(x: Tensor, samples: int, count_zeros: bool, target: NDArray[np.float32], order: int) -> None:
    split = by_sample(x, samples)
    if split.shape[1] < SHORT:
        measured: Any = measure_reference(split, count_zeros).numpy()
    else:
        measured = [_measure(storage_order(sample), count_zeros) for sample in split]
    _merge(target, measured, order)


def _merge(target: NDArray[np.float32], measured: Any, order: int) -> None:
    new = np.array(measured, dtype=np.float64)
    new[:, CALLS] = 1
    new[:, ORDER] = order
    if target[:, CALLS].any():
        old = rows.unpack(target, np.empty_like(new))
        new = rows.combine(np.stack([old, new]))
    rows.pack(new, target)


def _packed(row: tuple[float, ...], calls: int, order: int) -> tuple[float, ...]:
    """The slots of a row; `rows.pack` for one row, without arrays."""
    if row[layout.COUNT] < BASE and row[layout.NONFINITE] < BASE:
        return (*row[:CALLS], calls, order, 0.0, 0.0, 0.0)
    counts, rest = row[: len(COUNTS)], row[len(COUNTS) : CALLS]
    return (*(count % BASE for count in counts), *rest, calls, order, *(count // BASE for count in counts))


def _union(slots: list[float], row: tuple[float, ...]) -> tuple[float, ...]:
    """The row of a packed row's elements and another's; `rows.combine` for two, without arrays."""
    counts = [slots[field] + BASE * slots[len(FIELDS) + position] for position, field in enumerate(COUNTS)]
    count, nonfinite, zeros = (held + new for held, new in zip(counts, row, strict=False))
    if row[layout.COUNT] == 0 or counts[0] == 0:
        filled = slots if row[layout.COUNT] == 0 else row
        return (count, nonfinite, zeros, *filled[len(COUNTS) : CALLS], 0.0, 0.0)
    _, _, _, mean, std, absolute, low, high, *_ = slots
    _, _, _, mean_2, std_2, absolute_2, low_2, high_2, *_ = row
    w, w_2 = counts[0] / count, row[layout.COUNT] / count
    whole = w * mean + w_2 * mean_2
    d, d_2 = mean - whole, mean_2 - whole
    spread = math.sqrt(w * (std * std + d * d) + w_2 * (std_2 * std_2 + d_2 * d_2))
    absolute = w * absolute + w_2 * absolute_2
    return (count, nonfinite, zeros, whole, spread, absolute, min(low, low_2), max(high, high_2), 0.0, 0.0)


def _measure(x: Tensor, count_zeros: bool) -> tuple[float, ...]:
    """The fields of a whole tensor of any shape whose order of elements does not matter."""
    if 0 < x.numel() <= SMALL:
        return _measure_small(x.double().numpy().reshape(-1), count_zeros)
    if x.dim() == 1 and 0 < x.numel() <= BLOCK:
        return _measure_block(x, count_zeros)
    size = BLOCK_ALONE if torch.get_num_threads() == 1 else BLOCK
    blocks = [_measure_block(part, count_zeros) for part in _blocks(x, size)]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return (0.0,) * len(FIELDS)
    merged: tuple[float, ...] = tuple(rows.combine(np.array(blocks)).tolist())
    return merged


def _blocks(x: Tensor, size: int) -> list[Tensor]:
    """Contiguous 1-D pieces of at most `size` elements; a tensor with gaps is copied piece by piece."""
    if x.dim() == 1:
        return list(x.split(size)) if x.numel() else []
    if x.numel() <= size:
        return [x.reshape(-1)] if x.numel() else []
    step = max(1, size * x.shape[0] // x.numel())
    return [piece for part in x.split(step) for piece in _blocks(part[0] if part.shape[0] == 1 else part, size)]


def _measure_small(x: NDArray[np.float64], count_zeros: bool) -> tuple[float, ...]:
    """In float64 by NumPy, whose calls cost half as much as torch's; there all else is overhead."""
    high, low = float(np.maximum.reduce(x)), float(np.minimum.reduce(x))
    if not (math.isfinite(high) and math.isfinite(low)):
        finite = x[np.isfinite(x)]
        if finite.size == 0:
            return (0.0, float(x.size), *(0.0,) * (len(FIELDS) - 2))
        count, _, *rest = _measure_small(finite, count_zeros)
        return (count, x.size - count, *rest)
    if low == high:
        return (float(x.size), 0.0, x.size * float(low == 0), low, 0.0, abs(low), low, high, 0.0, 0.0)
    mean = float(np.add.reduce(x)) / x.size
    centred = x - mean
    variance = float(centred.dot(centred)) / x.size
    absolute = abs(mean) if low >= 0 or high <= 0 else float(np.add.reduce(np.absolute(x))) / x.size
    zeros = float(x.size - np.count_nonzero(x)) if count_zeros else 0.0
    return (float(x.size), 0.0, zeros, mean, math.sqrt(variance), absolute, low, high, 0.0, 0.0)


def _measure_block(x: Tensor, count_zeros: bool) -> tuple[float, ...]:
    if x.dtype not in (torch.float32, torch.float64):
        x = _scratch(1, x).copy_(x)
    size = x.numel()
    high, low = _extremes(x)  # a NaN anywhere makes both NaN
    if not (math.isfinite(high) and math.isfinite(low)):
        finite = x[x.isfinite()]
        if finite.numel() == 0:
            return (0.0, float(size), *(0.0,) * (len(FIELDS) - 2))
        count, _, *rest = _measure_block(finite, count_zeros)
        return (count, size - count, *rest)
    if low == high:
        return (float(size), 0.0, size * float(low == 0), low, 0.0, abs(low), low, high, 0.0, 0.0)
    total = x.sum().item()
    if low >= 0 or high <= 0:
        absolute, squares = abs(total), _squares(x)
    else:
        magnitude = torch.abs(x, out=_scratch(0, x))
        absolute, squares = magnitude.sum().item(), _squares(magnitude)
    if not (_TINY < squares < math.inf and math.isfinite(total)) and x.dtype != torch.float64:
        return _measure_block(x.double(), count_zeros)  # the squares leave float32, the values do not
    mean = total / size
    variance = squares / size - mean * mean
    # Squares about zero are sums shifted by the pivot 0. That pivot is as good as the mean while
    # the mean is within two standard deviations of it; otherwise the block is read once more.
    if not variance * 4 > mean * mean:
        centred = torch.sub(x, mean, out=_scratch(0, x))
        shift = centred.sum().item() / size
        variance = max(_squares(centred) / size - shift * shift, 0.0)
        mean += shift
    zeros = float(size - torch.count_nonzero(x).item()) if count_zeros else 0.0
    return (float(size), 0.0, zeros, mean, math.sqrt(variance), absolute / size, low, high, 0.0, 0.0)


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
