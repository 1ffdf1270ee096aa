"""The row of a program's share of a tensor, in Triton: what `program_triton` measures before it merges.

Per-lane sums in float32 are shifted by the first element that each lane meets, so that a mean far from zero costs no
digits, and reduced once at the end. What they cannot hold (NaN, infinities, squares that over- or underflow) shows in
the sums themselves; only then a program reads its share again, in float64, leaving out what is not finite.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout_triton import INFINITY, REQUIRED

TINY = tl.constexpr(1e-30)  # squares below lose digits to underflow


@triton.jit
def load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, TILE: tl.constexpr, DENSE: tl.constexpr, MASKED: tl.constexpr):
    """A tile in float32, 0 past the end."""
    o_lane = tl.arange(0, TILE)
    if DENSE:
        p = p_x + start + o_lane
    else:
        i = start + o_lane
        i3 = i % s3
        i = i // s3
        i2 = i % s2
        i = i // s2
        p = p_x + (i // s1) * t0 + (i % s1) * t1 + i2 * t2 + i3 * t3
    if MASKED:
        return tl.load(p, mask=start + o_lane < n, other=0.0).to(tl.float32)
    return tl.load(p).to(tl.float32)


@triton.jit
def _add(x, pivot, s, ss, sa, lo, hi):
    """Per-lane sums, with one more element in each lane."""
    d = x - pivot
    return s + d, ss + d * d, sa + tl.abs(x), tl.minimum(lo, x), tl.maximum(hi, x)


@triton.jit
def exact(count, mean, std, lo, hi):
    """A mean lies between the extremes; a constant tensor has that mean and no spread, to the last bit."""
    mean = tl.where(count > 0, tl.minimum(tl.maximum(mean, lo), hi), 0.0)
    return mean, tl.where(lo < hi, std, 0.0)


@triton.jit
def _sums(
    p_x, x, n, s1, s2, s3, t0, t1, t2, t3, split, splits,
    TILE: tl.constexpr, DENSE: tl.constexpr, COUNT_ZEROS: tl.constexpr,
):  # fmt: skip
    """Per-lane sums of a program's share about the lane's first element, extremes and zeros; `x` is its first tile."""
    start = split.to(tl.int64) * TILE
    inside = start + tl.arange(0, TILE) < n
    pivot = x
    s = tl.zeros([TILE], tl.float32)
    ss = tl.zeros([TILE], tl.float32)
    sa = tl.abs(x)
    lo = tl.where(inside, x, INFINITY)
    hi = tl.where(inside, x, -INFINITY)
    zeros = tl.zeros([TILE], tl.int32)
    if COUNT_ZEROS:
        zeros += (inside & (x == 0)).to(tl.int32)
    tile = split.to(tl.int64) + splits
    rounds = tl.maximum(n // TILE - tile + splits - 1, 0) // splits // 4
    step = splits * TILE
    for _ in range(rounds):
        # Four loads in flight, then the arithmetic.
        start = tile * TILE
        x = load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
        y = load(p_x, start + step, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
        z = load(p_x, start + 2 * step, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
        v = load(p_x, start + 3 * step, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
        s, ss, sa, lo, hi = _add(x, pivot, s, ss, sa, lo, hi)
        s, ss, sa, lo, hi = _add(y, pivot, s, ss, sa, lo, hi)
        s, ss, sa, lo, hi = _add(z, pivot, s, ss, sa, lo, hi)
        s, ss, sa, lo, hi = _add(v, pivot, s, ss, sa, lo, hi)
        if COUNT_ZEROS:
            zeros += (x == 0).to(tl.int32) + (y == 0).to(tl.int32) + (z == 0).to(tl.int32) + (v == 0).to(tl.int32)
        tile += 4 * splits
    while tile < tl.cdiv(n, TILE):
        x = load(p_x, tile * TILE, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, True)
        inside = tile * TILE + tl.arange(0, TILE) < n
        d = tl.where(inside, x - pivot, 0.0)
        s += d
        ss += d * d
        sa += tl.abs(x)
        lo = tl.minimum(lo, tl.where(inside, x, INFINITY))
        hi = tl.maximum(hi, tl.where(inside, x, -INFINITY))
        if COUNT_ZEROS:
            zeros += (inside & (x == 0)).to(tl.int32)
        tile += splits
    return s, ss, sa, lo, hi, zeros


@triton.jit
def share(
    p_x, pivot, n, s1, s2, s3, t0, t1, t2, t3, split, splits,
    TILE: tl.constexpr, PIECE: tl.constexpr, FIELDS: tl.constexpr, DENSE: tl.constexpr, COUNT_ZEROS: tl.constexpr,
):  # fmt: skip
    """The row of a program's share."""
    s, ss, sa, lo, hi, zeros = _sums(p_x, pivot, n, s1, s2, s3, t0, t1, t2, t3, split, splits, TILE, DENSE, COUNT_ZEROS)
    # How many elements each lane has met: one per tile, but for the end of the last one.
    tiles = tl.cdiv(n, TILE)
    mine = tl.maximum(tiles - split + splits - 1, 0) // splits
    short = (tiles > 0) & ((tiles - 1) % splits == split)
    missing = tl.where(short, tiles * TILE - n, 0)
    count = mine * TILE - missing
    c = mine.to(tl.float32) - (tl.arange(0, TILE) >= TILE - missing.to(tl.int32)).to(tl.float32)
    size = tl.maximum(count, 1).to(tl.float32)
    shift = s / tl.maximum(c, 1.0)
    mean = tl.sum(c * (pivot + shift), 0) / size
    total = tl.sum(sa, 0)
    low = tl.min(lo, 0)
    high = tl.max(hi, 0)
    squares = tl.sum(ss, 0)
    d = pivot + shift - mean
    std = tl.sqrt(tl.sum(tl.maximum(ss - s * shift, 0.0) + c * d * d, 0) / size)
    mean, std = exact(count, mean, std, low, high)
    abs_mean = total / size
    nonfinite = tl.zeros_like(count)
    zero = tl.zeros_like(count)
    if COUNT_ZEROS:
        zero += tl.sum(zeros, 0)
    if not ((total < INFINITY) & (squares < INFINITY) & ((squares > TINY) | (low >= high))):
        met = count
        count, zero, mean, std, abs_mean, low, high = _reread(
            p_x, n, s1, s2, s3, t0, t1, t2, t3, split, splits, mine, TILE, PIECE, DENSE, COUNT_ZEROS
        )
        nonfinite = met - count
    skewness = tl.zeros_like(mean)
    kurtosis = tl.zeros_like(mean)
    if FIELDS > REQUIRED:
        skewness, kurtosis = _shape(
            p_x, n, s1, s2, s3, t0, t1, t2, t3, split, splits, mine, count, mean, std, TILE, DENSE
        )
    return count, nonfinite, zero, mean, std, abs_mean, low, high, skewness, kurtosis


@triton.jit
def _shape(
    p_x, n, s1, s2, s3, t0, t1, t2, t3, split, splits, mine, count, mean, std,
    TILE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Skewness and kurtosis of a program's share, which is read once more: relative to its std nothing overflows."""
    first = tl.zeros([TILE], tl.float32)
    second = tl.zeros([TILE], tl.float32)
    third = tl.zeros([TILE], tl.float32)
    fourth = tl.zeros([TILE], tl.float32)
    for k in range(mine):
        start = (split + k * splits).to(tl.int64) * TILE
        x = load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, True)
        good = (start + tl.arange(0, TILE) < n) & (tl.abs(x) < INFINITY)
        z = tl.where(good, (0.5 * x - 0.5 * mean) / (0.5 * std), 0.0)
        first += z
        second += z * z
        third += z * z * z
        fourth += z * z * (z * z)
    # The mean is rounded to float32: powers about it from those about 0.
    size = count.to(tl.float32)
    shift = tl.sum(first, 0) / size
    squares = tl.sum(second, 0) / size
    cubes = tl.sum(third, 0) / size
    fourths = tl.sum(fourth, 0) / size
    variance = squares - shift * shift
    fourths += shift * (shift * (6 * squares - 3 * shift * shift) - 4 * cubes)
    cubes += shift * (2 * shift * shift - 3 * squares)
    varies = (variance > 0) & (variance < INFINITY)  # false for NaN, which no element or no spread gives
    skewness = tl.where(varies, cubes / (variance * tl.sqrt(variance)), 0.0)
    return skewness, tl.where(varies, fourths / (variance * variance), 0.0)


@triton.jit
def _reread(
    p_x, n, s1, s2, s3, t0, t1, t2, t3, split, splits, mine,
    TILE: tl.constexpr, PIECE: tl.constexpr, DENSE: tl.constexpr, COUNT_ZEROS: tl.constexpr,
):  # fmt: skip
    """The moments of a program's share over finite elements, in float64 and two passes.

    In small pieces: what is rare must not take registers from what is not.
    """
    count = tl.zeros([], tl.int64)
    zero = tl.zeros([], tl.int64)
    low = tl.full([], INFINITY, tl.float32)
    high = tl.full([], -INFINITY, tl.float32)
    total = tl.zeros([], tl.float64)
    absolute = tl.zeros([], tl.float64)
    for k in range(mine):
        for j in range(TILE // PIECE):
            start = (split + k * splits).to(tl.int64) * TILE + j * PIECE
            x = load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, PIECE, DENSE, True)
            good = (start + tl.arange(0, PIECE) < n) & (tl.abs(x) < INFINITY)
            count += tl.sum(good.to(tl.int32), 0)
            if COUNT_ZEROS:
                zero += tl.sum((good & (x == 0)).to(tl.int32), 0)
            wide = tl.where(good, x, 0.0).to(tl.float64)
            total += tl.sum(wide, 0)
            absolute += tl.sum(tl.abs(wide), 0)
            low = tl.minimum(low, tl.min(tl.where(good, x, INFINITY), 0))
            high = tl.maximum(high, tl.max(tl.where(good, x, -INFINITY), 0))
    divisor = tl.maximum(count, 1).to(tl.float64)
    mean = total / divisor
    squares = tl.zeros([], tl.float64)
    for k in range(mine):
        for j in range(TILE // PIECE):
            start = (split + k * splits).to(tl.int64) * TILE + j * PIECE
            x = load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, PIECE, DENSE, True)
            good = (start + tl.arange(0, PIECE) < n) & (tl.abs(x) < INFINITY)
            d = tl.where(good, x.to(tl.float64) - mean, 0.0)
            squares += tl.sum(d * d, 0)
    std = tl.sqrt(squares / divisor)
    return count, zero, mean.to(tl.float32), std.to(tl.float32), (absolute / divisor).to(tl.float32), low, high
