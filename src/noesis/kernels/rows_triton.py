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
    KURTOSIS,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    REQUIRED,
    SKEWNESS,
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
def load_optional(p_field, m, like, FIELDS: tl.constexpr):
    """A field that only longer rows have; 0 in others."""
    field = tl.zeros_like(like)
    if FIELDS > REQUIRED:
        field = tl.load(p_field, mask=m, other=0.0)
    return field


@triton.jit
def unpack(p_slots, m, FIELDS: tl.constexpr):
    """`rows.unpack`: what was measured, from float32 slots."""
    mean = tl.load(p_slots + MEAN, mask=m, other=0.0)
    return (
        _unpack_count(p_slots + COUNT, p_slots + FIELDS, m),
        _unpack_count(p_slots + NONFINITE, p_slots + FIELDS + 1, m),
        _unpack_count(p_slots + ZEROS, p_slots + FIELDS + 2, m),
        mean,
        tl.load(p_slots + STD, mask=m, other=0.0),
        tl.load(p_slots + ABS_MEAN, mask=m, other=0.0),
        tl.load(p_slots + MIN, mask=m, other=0.0),
        tl.load(p_slots + MAX, mask=m, other=0.0),
        load_optional(p_slots + SKEWNESS, m, mean, FIELDS),
        load_optional(p_slots + KURTOSIS, m, mean, FIELDS),
    )


@triton.jit
def pack(p_slots, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis, FIELDS: tl.constexpr):
    """`rows.pack`: what was measured, into float32 slots."""
    _pack_count(p_slots + COUNT, p_slots + FIELDS, count)
    _pack_count(p_slots + NONFINITE, p_slots + FIELDS + 1, nonfinite)
    _pack_count(p_slots + ZEROS, p_slots + FIELDS + 2, zeros)
    tl.store(p_slots + MEAN, mean)
    tl.store(p_slots + STD, std)
    tl.store(p_slots + ABS_MEAN, abs_mean)
    tl.store(p_slots + MIN, low)
    tl.store(p_slots + MAX, high)
    if FIELDS > REQUIRED:
        tl.store(p_slots + SKEWNESS, skewness)
        tl.store(p_slots + KURTOSIS, kurtosis)


@triton.jit
def combine(
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
    FIELDS: tl.constexpr,
):  # fmt: skip
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
    d /= scale
    h /= scale
    variance = tl.sum(w * (h * h + d * d), 0)
    lowest = tl.min(tl.where(filled, low, INFINITY), 0)
    highest = tl.max(tl.where(filled, high, -INFINITY), 0)
    whole_skewness = tl.zeros_like(whole)
    whole_kurtosis = tl.zeros_like(whole)
    if FIELDS > REQUIRED:
        d -= tl.sum(w * d, 0)  # not 0 where the mean was rounded
        third = skewness * h * h * h
        fourth = kurtosis * h * h * h * h
        squares = tl.sum(w * (h * h + d * d), 0)
        cubes = tl.sum(w * (third + 3 * d * h * h + d * d * d), 0)
        fourths = tl.sum(w * (fourth + 4 * d * third + 6 * d * d * h * h + d * d * d * d), 0)
        varies = (lowest < highest) & (squares > 0)
        squares = tl.where(varies, squares, 1.0)
        whole_skewness = tl.where(varies, cubes / (squares * tl.sqrt(squares)), 0.0)
        whole_kurtosis = tl.where(varies, fourths / (squares * squares), 0.0)
    return (
        total,
        tl.sum(nonfinite, 0),
        tl.sum(zeros, 0),
        whole,
        2.0 * scale * tl.sqrt(variance),
        tl.sum(w * abs_mean, 0),
        tl.where(total > 0, lowest, 0.0),
        tl.where(total > 0, highest, 0.0),
        whole_skewness,
        whole_kurtosis,
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
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
    count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, skewness2, kurtosis2,
    FIELDS: tl.constexpr,
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
        _both(skewness, skewness2),
        _both(kurtosis, kurtosis2),
        FIELDS,
    )
