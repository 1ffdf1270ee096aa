"""The algebra of a row in Triton: `rows` for kernels.

A row is a value per field that is measured, in the order of `layout.FIELDS`, with counts in int64: scalars, or tensors
of rows side by side. (Triton before 3.3 cannot keep such a tuple under one name.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout
from .layout_triton import (
    ABS_MEAN,
    COUNT,
    INFINITY,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    STD,
    ZEROS,
)

BASE = tl.constexpr(int(layout.BASE))


@triton.jit
def _unpack_count(p_slots, p_high, m):
    low = tl.load(p_slots, mask=m, other=0.0).to(tl.int64)
    return low + tl.load(p_high, mask=m, other=0.0).to(tl.int64) * BASE


@triton.jit
def _pack_count(p_slots, p_high, count):
    tl.store(p_slots, (count % BASE).to(tl.float32))
    tl.store(p_high, (count // BASE).to(tl.float32))


@triton.jit
def unpack(p_slots, m, FIELDS: tl.constexpr):
    """`rows.unpack`: what was measured, from float32 slots."""
    return (
        _unpack_count(p_slots + COUNT, p_slots + FIELDS, m),
        _unpack_count(p_slots + NONFINITE, p_slots + FIELDS + 1, m),
        _unpack_count(p_slots + ZEROS, p_slots + FIELDS + 2, m),
        tl.load(p_slots + MEAN, mask=m, other=0.0),
        tl.load(p_slots + STD, mask=m, other=0.0),
        tl.load(p_slots + ABS_MEAN, mask=m, other=0.0),
        tl.load(p_slots + MIN, mask=m, other=0.0),
        tl.load(p_slots + MAX, mask=m, other=0.0),
    )


@triton.jit
def pack(p_slots, count, nonfinite, zeros, mean, std, abs_mean, low, high, FIELDS: tl.constexpr):
    """`rows.pack`: what was measured, into float32 slots."""
    _pack_count(p_slots + COUNT, p_slots + FIELDS, count)
    _pack_count(p_slots + NONFINITE, p_slots + FIELDS + 1, nonfinite)
    _pack_count(p_slots + ZEROS, p_slots + FIELDS + 2, zeros)
    tl.store(p_slots + MEAN, mean)
    tl.store(p_slots + STD, std)
    tl.store(p_slots + ABS_MEAN, abs_mean)
    tl.store(p_slots + MIN, low)
    tl.store(p_slots + MAX, high)


@triton.jit
def combine(count, nonfinite, zeros, mean, std, abs_mean, low, high):
    """`rows.combine`: the parts lie along the first axis.

    In float32 by halves, and relative to the largest spread: neither differences nor squares leave it.
    """
    total = tl.sum(count, 0)
    filled = count > 0
    w = count.to(mean.dtype) / tl.maximum(total, 1).to(mean.dtype)
    whole = tl.sum(w * mean, 0)
    d = tl.where(filled, 0.5 * mean - 0.5 * whole, 0.0)
    h = tl.where(filled, 0.5 * std, 0.0)
    scale = tl.full([], 1.0, mean.dtype)
    if mean.dtype == tl.float32:
        scale = tl.max(tl.maximum(tl.abs(d), h), 0)
        scale = tl.where(scale > 0, scale, 1.0)
    spread = 2.0 * scale * tl.sqrt(tl.sum(w * ((h / scale) * (h / scale) + (d / scale) * (d / scale)), 0))
    lowest = tl.min(tl.where(filled, low, INFINITY), 0)
    highest = tl.max(tl.where(filled, high, -INFINITY), 0)
    return (
        total,
        tl.sum(nonfinite, 0),
        tl.sum(zeros, 0),
        whole,
        spread,
        tl.sum(w * abs_mean, 0),
        tl.where(total > 0, lowest, 0.0),
        tl.where(total > 0, highest, 0.0),
    )


@triton.jit
def _both(one, other):
    """Two parts along the first axis."""
    both = tl.join(one, other)
    if one.type.is_block():
        both = tl.trans(both)
    return both


@triton.jit
def union(
    count, nonfinite, zeros, mean, std, abs_mean, low, high,
    count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2,
):  # fmt: skip
    """`combine` for two parts."""
    return combine(
        _both(count, count2),
        _both(nonfinite, nonfinite2),
        _both(zeros, zeros2),
        _both(mean, mean2),
        _both(std, std2),
        _both(abs_mean, abs_mean2),
        _both(low, low2),
        _both(high, high2),
    )
