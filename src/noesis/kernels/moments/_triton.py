"""The moments of a tensor on CUDA: one launch reads it once and merges its row into the slab.

Grid: (rows, splits). Each program walks over its share of a row's tiles with per-lane sums in
float32, shifted by the first element each lane meets, so that a mean far from zero costs no digits,
and reduces them once at its end. With several splits, the partial results go to scratch memory and
the last program to arrive merges them, always in the same order: the same tensor gives the same
bits. It also sets the ticket back to zero, so that nothing has to be cleared between launches and a
CUDA graph may replay them.

What float32 sums cannot hold (NaN, infinities, squares that over- or underflow) shows in the sums
themselves; only then a program reads its share again, in float64, leaving out what is not finite.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import LANES, Kernel, current_stream, lane, multiprocessors
from ..layout_triton import (
    ABS_MEAN,
    ACTIVE,
    CALLS,
    COUNT,
    HIGH,
    INFINITY,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    ORDER,
    SEQUENCE,
    SLOT,
    SLOTS,
    STD,
    ZEROS,
)

BASE = tl.constexpr(1 << 24)
TINY = tl.constexpr(1e-30)  # squares below lose digits to underflow

#: Bytes a program reads per tile: 16 for each of its threads.
TILE_BYTES = 4096
#: Of a tile, where it is read in float64.
PIECES = 8
#: Programs per multiprocessor.
PER_SM = 2
#: Up to here one program does it alone, which saves the ticket.
SOLO_BYTES = 4 * TILE_BYTES
#: A partial result: count, nonfinite, zeros as int32; mean, std, abs_mean, min, max as the bits of float32.
PARTIAL = tl.constexpr(8)
#: Dimensions of a view with gaps, after merging those that follow each other in memory.
DIMS = 4


@triton.jit
def _load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, TILE: tl.constexpr, DENSE: tl.constexpr, MASKED: tl.constexpr):
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
def _merge(c, mean, std, abs_mean, lo, hi):
    """The union of disjoint parts, from vectors with an entry per part (Chan et al. 1979).

    Halves, and everything relative to the largest spread: neither differences nor squares leave float32.
    """
    count = tl.sum(c.to(tl.int64), 0)
    filled = c > 0
    w = c.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)
    whole_mean = tl.sum(w * mean, 0)
    d = tl.where(filled, 0.5 * mean - 0.5 * whole_mean, 0.0)
    h = tl.where(filled, 0.5 * std, 0.0)
    scale = tl.max(tl.maximum(tl.abs(d), h), 0)
    scale = tl.where(scale > 0, scale, 1.0)
    whole_std = 2.0 * scale * tl.sqrt(tl.sum(w * ((h / scale) * (h / scale) + (d / scale) * (d / scale)), 0))
    whole_lo = tl.min(tl.where(filled, lo, INFINITY), 0)
    whole_hi = tl.max(tl.where(filled, hi, -INFINITY), 0)
    whole_mean, whole_std = _exact(count, whole_mean, whole_std, whole_lo, whole_hi)
    return count, whole_mean, whole_std, tl.sum(w * abs_mean, 0), whole_lo, whole_hi


@triton.jit
def _exact(count, mean, std, lo, hi):
    """A mean lies between the extremes; a constant tensor has that mean and no spread, to the last bit."""
    mean = tl.where(count > 0, tl.minimum(tl.maximum(mean, lo), hi), 0.0)
    return mean, tl.where(lo < hi, std, 0.0)


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
            x = _load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, PIECE, DENSE, True)
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
            x = _load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, PIECE, DENSE, True)
            good = (start + tl.arange(0, PIECE) < n) & (tl.abs(x) < INFINITY)
            d = tl.where(good, x.to(tl.float64) - mean, 0.0)
            squares += tl.sum(d * d, 0)
    std = tl.sqrt(squares / divisor)
    return count, zero, mean.to(tl.float32), std.to(tl.float32), (absolute / divisor).to(tl.float32), low, high


@triton.jit(
    do_not_specialize=[
        *("p_layer", "lane", "n", "stride_row", "room", "layers"),
        *("s1", "s2", "s3", "t0", "t1", "t2", "t3"),
    ]
)
def moments_kernel(
    p_x,
    p_layer,
    p_slab,
    p_control,
    p_scratch,
    lane: tl.int64,
    n: tl.int64,
    stride_row: tl.int64,
    room: tl.int64,
    layers: tl.int64,
    s1: tl.int64,
    s2: tl.int64,
    s3: tl.int64,
    t0: tl.int64,
    t1: tl.int64,
    t2: tl.int64,
    t3: tl.int64,
    PARTS: tl.constexpr,  # partial results there is room for
    PARTS_P2: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,  # n and stride_row are given in units of 16
    SOLO: tl.constexpr,  # one split
    BY_SAMPLE: tl.constexpr,
    COUNT_ZEROS: tl.constexpr,
):
    """Merge the rows of x [rows, n] into the slab [steps, room, layers, SLOTS]."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if EVEN:
        n *= 16  # so that the compiler sees it, and loads 16 bytes at a time
        stride_row *= 16
    p_x += row * stride_row
    p_scratch += lane * (1 + (1 + PARTIAL) * PARTS)
    tiles = tl.cdiv(n, TILE)
    full = n // TILE
    start = split.to(tl.int64) * TILE
    # The first tile is on its way before anything is asked, since the answer takes as long.
    x = _load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, True)
    active = tl.load(p_control + ACTIVE)
    slot = tl.load(p_control + SLOT)
    order = tl.load(p_control + SEQUENCE) + 1
    layer = tl.load(p_layer)

    if active != 0:
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
        rounds = tl.maximum(full - tile + splits - 1, 0) // splits // 4
        step = splits * TILE
        for _ in range(rounds):
            # Four loads in flight, then the arithmetic.
            start = tile * TILE
            x = _load(p_x, start, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
            y = _load(p_x, start + step, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
            z = _load(p_x, start + 2 * step, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
            v = _load(p_x, start + 3 * step, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, False)
            s, ss, sa, lo, hi = _add(x, pivot, s, ss, sa, lo, hi)
            s, ss, sa, lo, hi = _add(y, pivot, s, ss, sa, lo, hi)
            s, ss, sa, lo, hi = _add(z, pivot, s, ss, sa, lo, hi)
            s, ss, sa, lo, hi = _add(v, pivot, s, ss, sa, lo, hi)
            if COUNT_ZEROS:
                zeros += (x == 0).to(tl.int32) + (y == 0).to(tl.int32) + (z == 0).to(tl.int32) + (v == 0).to(tl.int32)
            tile += 4 * splits
        while tile < tiles:
            x = _load(p_x, tile * TILE, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, True)
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

        # How many elements each lane has met: one per tile, but for the end of the last one.
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
        mean, std = _exact(count, mean, std, low, high)
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

        if SOLO:
            last = True
        else:
            p_part = p_scratch + 1 + PARTS + row * splits + split
            tl.store(p_part, count.to(tl.int32))
            tl.store(p_part + PARTS, nonfinite.to(tl.int32))
            tl.store(p_part + 2 * PARTS, zero.to(tl.int32))
            tl.store(p_part + 3 * PARTS, mean.to(tl.int32, bitcast=True))
            tl.store(p_part + 4 * PARTS, std.to(tl.int32, bitcast=True))
            tl.store(p_part + 5 * PARTS, abs_mean.to(tl.int32, bitcast=True))
            tl.store(p_part + 6 * PARTS, low.to(tl.int32, bitcast=True))
            tl.store(p_part + 7 * PARTS, high.to(tl.int32, bitcast=True))
            tl.debug_barrier()
            last = tl.atomic_add(p_scratch + 1 + row, 1, sem="acq_rel") == splits - 1
        if last:
            if not SOLO:
                o = tl.arange(0, PARTS_P2)
                m_o = o < splits
                # .cg: past L1, which may hold what another program has overwritten since.
                p_parts = p_scratch + 1 + PARTS + row * splits + o
                counts = tl.load(p_parts, mask=m_o, other=0, cache_modifier=".cg")
                nonfinites = tl.load(p_parts + PARTS, mask=m_o, other=0, cache_modifier=".cg")
                zeros_of = tl.load(p_parts + 2 * PARTS, mask=m_o, other=0, cache_modifier=".cg")
                means = tl.load(p_parts + 3 * PARTS, mask=m_o, other=0, cache_modifier=".cg")
                stds = tl.load(p_parts + 4 * PARTS, mask=m_o, other=0, cache_modifier=".cg")
                abs_means = tl.load(p_parts + 5 * PARTS, mask=m_o, other=0, cache_modifier=".cg")
                lows = tl.load(p_parts + 6 * PARTS, mask=m_o, other=0, cache_modifier=".cg")
                highs = tl.load(p_parts + 7 * PARTS, mask=m_o, other=0, cache_modifier=".cg")
                count, mean, std, abs_mean, low, high = _merge(
                    counts.to(tl.int64),
                    means.to(tl.float32, bitcast=True),
                    stds.to(tl.float32, bitcast=True),
                    abs_means.to(tl.float32, bitcast=True),
                    lows.to(tl.float32, bitcast=True),
                    highs.to(tl.float32, bitcast=True),
                )
                nonfinite = tl.sum(nonfinites.to(tl.int64), 0)
                zero = tl.sum(zeros_of.to(tl.int64), 0)
                tl.store(p_scratch + 1 + row, 0)
            target = row
            if BY_SAMPLE:
                target += 1
            _write(
                p_slab + ((slot * room + target) * layers + layer) * SLOTS,
                count, nonfinite, zero, mean, std, abs_mean, low, high, order,
            )  # fmt: skip
            if BY_SAMPLE:
                # Other rows may not have read the sequence yet: the last row of all moves it on.
                if tl.atomic_add(p_scratch, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                    tl.store(p_scratch, 0)
                    tl.store(p_control + SEQUENCE, order)
            else:
                tl.store(p_control + SEQUENCE, order)


@triton.jit
def _write(p_row, count, nonfinite, zero, mean, std, abs_mean, low, high, order):
    """Merge new values into a row of the slab; a module may run several times in one step."""
    calls = tl.load(p_row + CALLS)
    old_count = tl.load(p_row + COUNT).to(tl.int64) + tl.load(p_row + HIGH).to(tl.int64) * BASE
    old_nonfinite = tl.load(p_row + NONFINITE).to(tl.int64) + tl.load(p_row + HIGH + 1).to(tl.int64) * BASE
    old_zero = tl.load(p_row + ZEROS).to(tl.int64) + tl.load(p_row + HIGH + 2).to(tl.int64) * BASE
    whole = old_count + count
    divisor = tl.maximum(whole, 1).to(tl.float32)
    w_old = old_count.to(tl.float32) / divisor
    w = count.to(tl.float32) / divisor
    old_mean = tl.load(p_row + MEAN)
    old_std = tl.load(p_row + STD)
    # As in _merge, for two. An empty part has weight 0 and fields 0.
    whole_mean = w_old * old_mean + w * mean
    d_old = tl.where(old_count > 0, 0.5 * old_mean - 0.5 * whole_mean, 0.0)
    d = tl.where(count > 0, 0.5 * mean - 0.5 * whole_mean, 0.0)
    scale = tl.maximum(tl.maximum(tl.abs(d_old), tl.abs(d)), tl.maximum(0.5 * old_std, 0.5 * std))
    scale = tl.where(scale > 0, scale, 1.0)
    d_old /= scale
    d /= scale
    h_old = 0.5 * old_std / scale
    h = 0.5 * std / scale
    whole_std = 2.0 * scale * tl.sqrt(w_old * (h_old * h_old + d_old * d_old) + w * (h * h + d * d))
    abs_mean = w_old * tl.load(p_row + ABS_MEAN) + w * abs_mean
    low = tl.where(old_count > 0, tl.minimum(low, tl.load(p_row + MIN)), low)
    high = tl.where(old_count > 0, tl.maximum(high, tl.load(p_row + MAX)), high)
    count = whole
    mean, std = _exact(count, whole_mean, whole_std, low, high)
    nonfinite += old_nonfinite
    zero += old_zero
    tl.store(p_row + COUNT, (count % BASE).to(tl.float32))
    tl.store(p_row + NONFINITE, (nonfinite % BASE).to(tl.float32))
    tl.store(p_row + ZEROS, (zero % BASE).to(tl.float32))
    tl.store(p_row + HIGH, (count // BASE).to(tl.float32))
    tl.store(p_row + HIGH + 1, (nonfinite // BASE).to(tl.float32))
    tl.store(p_row + HIGH + 2, (zero // BASE).to(tl.float32))
    tl.store(p_row + MEAN, mean)
    tl.store(p_row + STD, std)
    tl.store(p_row + ABS_MEAN, abs_mean)
    tl.store(p_row + MIN, tl.where(count > 0, low, 0.0))
    tl.store(p_row + MAX, tl.where(count > 0, high, 0.0))
    tl.store(p_row + CALLS, calls + 1)
    tl.store(p_row + ORDER, tl.where(calls > 0, tl.load(p_row + ORDER), order.to(tl.float32)))


_KERNEL = Kernel(moments_kernel, warps=8)


def scratch(device: torch.device) -> Tensor:
    """Room for partial results and tickets, a lane per stream; the tickets start at zero."""
    parts = PER_SM * multiprocessors(device)
    return torch.zeros(LANES, 1 + (1 + PARTIAL.value) * parts, dtype=torch.int32, device=device)


def observe_triton(
    x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor, scratch: Tensor
) -> None:
    """Merge the moments of `x` into the slab in one launch; see `moments.observe_reference`.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        layer: int64 [], its place in the slab.
        samples: rows to tell apart by the first dimension; 0 for one row of all.
        count_zeros: whether the field `zeros` is wanted.
        slab: float32 [capacity + 1, rows, layers, SLOTS].
        control: int64 [CONTROL].
        scratch: int32 [LANES, ...], from `scratch()`.
    """
    if x.is_neg():  # a view with a flag for its sign, which the kernel would not see
        x = x.resolve_neg()
    device = control.device
    stream = current_stream(device)
    _, room, layers, _ = slab.shape
    aligned = x.data_ptr() % 16 == 0
    plan = _plan(x.shape, x.stride(), x.dtype, aligned, samples, count_zeros, room, layers, scratch.shape[1])
    if plan is None:  # more gaps than the kernel has dimensions for
        observe_triton(x.contiguous(), layer, samples, count_zeros, slab, control, scratch)
        return
    variant, grid, numbers = plan
    _KERNEL.launch(device, stream, variant, grid, (x, layer, slab, control, scratch), (lane(device, stream), *numbers))


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    aligned: bool,
    samples: int,
    count_zeros: bool,
    room: int,
    layers: int,
    lane_size: int,
) -> tuple[tuple[Any, ...], tuple[int, int], tuple[Any, ...]] | None:
    """How to launch for outputs of a kind: variant, grid and the numbers after the lane; layers repeat themselves."""
    walk = strided(shape, stride, samples)
    if walk is None:
        return None
    stride_row, dims = walk
    many = samples or 1
    n = math.prod(shape) // many
    parts = lane_size // (1 + PARTIAL.value)
    splits = 1
    if n * dtype.itemsize > SOLO_BYTES and many < parts:
        splits = min(parts // many, -(-n * dtype.itemsize // TILE_BYTES))
    dense = dims is _DENSE
    tile = TILE_BYTES // dtype.itemsize // (1 if dense else 4)  # finding one's way through gaps takes registers
    even = n % 16 == 0 and stride_row % 16 == 0
    flags = (dense, even, splits == 1, samples > 0, count_zeros)
    sizes = (n // 16, stride_row // 16) if even else (n, stride_row)
    constants = (parts, triton.next_power_of_2(parts), tile, tile // PIECES)
    return (dtype, aligned, parts, *flags), (many, splits), (*sizes, room, layers, *dims, *constants, *flags)


#: Sizes (but the outermost) and strides of a tensor without gaps; not looked at.
_DENSE = (1,) * (2 * DIMS - 1)


def strided(shape: Sequence[int], stride: Sequence[int], samples: int) -> tuple[int, tuple[int, ...]] | None:
    """How to walk over a tensor in the order of memory, with few dimensions.

    Args:
        shape: of the tensor.
        stride: of the tensor, in elements.
        samples: rows to tell apart by the first dimension; 0 for one row of all.

    Returns:
        The distance of two rows, and the sizes (but the outermost) and strides of what is in one,
        `DIMS` in number; None when it has more dimensions than that.
    """
    dims = list(zip(shape, stride, strict=True))
    stride_row = 0
    if samples:
        (length, step), *rest = dims
        stride_row, dims = length // samples * step, [(length // samples, step), *rest]
    dims = sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: -dim[1])
    merged: list[tuple[int, int]] = []
    for size, step in dims:
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    if not merged or (len(merged) == 1 and merged[0][1] == 1):
        return stride_row, _DENSE
    if len(merged) > DIMS:
        return None
    padded = [(1, 0)] * (DIMS - len(merged)) + merged
    return stride_row, (*(size for size, _ in padded[1:]), *(step for _, step in padded))
