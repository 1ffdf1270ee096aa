"""The algebra of a row: the statistics of one layer at one step, and how rows merge.

A row is held unpacked as float64 fields, and packed as float32 slots on the device, where a count
takes two slots (`high * 2**24 + low`), so that it stays exact in float32.

The functions work alike on numpy arrays and torch tensors; `xp` is the module of the arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .layout import ABS_MEAN, BASE, CALLS, COUNT, COUNTS, KURTOSIS, MAX, MEAN, MIN, ORDER, REQUIRED, SKEWNESS, STD


def pack(rows: Any, slots: Any) -> Any:
    """Write unpacked rows [..., fields] into float32 slots [..., fields + COUNTS], which may hold fewer fields."""
    fields = width(slots)
    slots[..., :fields] = rows[..., :fields]
    for position, field in enumerate(COUNTS):
        high = rows[..., field] // BASE
        slots[..., field] = rows[..., field] - high * BASE
        slots[..., fields + position] = high
    return slots


def unpack(slots: Any, rows: Any) -> Any:
    """Read float32 slots [..., fields + COUNTS] into unpacked rows [..., fields], which may have room for more."""
    fields = width(slots)
    rows[..., :fields] = slots[..., :fields]
    for position, field in enumerate(COUNTS):
        rows[..., field] += slots[..., fields + position] * BASE
    return rows


def width(slots: Any) -> int:
    """How many fields slots hold."""
    return int(slots.shape[-1]) - len(COUNTS)


def combine(parts: Any, xp: Any = np) -> Any:
    """The row of the union of several disjoint sets of elements, from their rows.

    Args:
        parts: [K, ..., fields], float64; `std` is the population's.
        xp: numpy or torch, the module `parts` comes from.

    Returns:
        [..., fields], exact up to rounding for any split into parts.

    Sources, in their form for K parts: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances"; for the third and fourth moments Pébay 2008, "Formulas
    for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments".

    Examples:
        >>> import numpy as np
        >>> from noesis.kernels.layout import COUNT, FIELDS, MEAN, STD
        >>> from noesis.kernels.rows import combine
        >>> parts = np.zeros((2, len(FIELDS)))
        >>> parts[:, COUNT], parts[:, MEAN] = [1, 3], [0.0, 4.0]
        >>> whole = combine(parts)
        >>> whole[COUNT], whole[MEAN], round(whole[STD], 3)
        (np.float64(4.0), np.float64(3.0), np.float64(1.732))
    """
    whole = xp.zeros_like(parts[0])
    count = parts[..., COUNT]
    filled = count > 0
    total = count.sum(0)
    weight = count / xp.where(total > 0, total, xp.ones_like(total))
    for field in (*COUNTS, CALLS):
        whole[..., field] = parts[..., field].sum(0)
    mean = (weight * parts[..., MEAN]).sum(0)
    spread = parts[..., STD] ** 2 + (parts[..., MEAN] - mean) ** 2
    whole[..., MEAN] = mean
    whole[..., STD] = xp.sqrt((weight * spread).sum(0))
    whole[..., ABS_MEAN] = (weight * parts[..., ABS_MEAN]).sum(0)
    lowest = xp.amin(xp.where(filled, parts[..., MIN], np.inf), 0)
    highest = xp.amax(xp.where(filled, parts[..., MAX], -np.inf), 0)
    whole[..., MIN] = xp.where(total > 0, lowest, 0.0)
    whole[..., MAX] = xp.where(total > 0, highest, 0.0)
    ran = parts[..., CALLS] > 0
    first = xp.amin(xp.where(ran, parts[..., ORDER], np.inf), 0)
    whole[..., ORDER] = xp.where(whole[..., CALLS] > 0, first, 0.0)
    if parts.shape[-1] > REQUIRED:
        whole[..., SKEWNESS], whole[..., KURTOSIS] = _shape(weight, parts, whole, xp)
    return whole


def _shape(weight: Any, parts: Any, whole: Any, xp: Any) -> tuple[Any, Any]:
    """Skewness and kurtosis of the union, from what else is known of it; relative to its std nothing overflows."""
    varies = (whole[..., MAX] > whole[..., MIN]) & (whole[..., STD] > 0)
    unit = xp.where(varies, whole[..., STD], 1.0)
    std = parts[..., STD] / unit
    apart = xp.where(weight > 0, parts[..., MEAN] - whole[..., MEAN], 0.0) / unit
    third, fourth = parts[..., SKEWNESS] * std**3, parts[..., KURTOSIS] * std**4
    skewness = weight * (third + 3 * apart * std**2 + apart**3)
    kurtosis = weight * (fourth + 4 * apart * third + 6 * apart**2 * std**2 + apart**4)
    return xp.where(varies, skewness.sum(0), 0.0), xp.where(varies, kurtosis.sum(0), 0.0)


def sample_std(std: Any, count: Any, xp: Any = np) -> Any:
    """The unbiased standard deviation (as `torch.std`) from the population's; 0 for one element."""
    return std * xp.sqrt(count / xp.where(count > 1, count - 1, xp.ones_like(count)))
