"""What a program of the moments kernel does, and where its result goes; launched by `_triton`.

Grid: (rows, splits). Each program measures its share of a row's tiles (`share_triton`). With several splits, the
partial results go to scratch memory and the last program to arrive merges them, always in the same order: the same
tensor gives the same bits. It also sets the ticket back to zero, so that nothing has to be cleared between launches and
a CUDA graph may replay them.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout_triton import (
    ABS_MEAN,
    ACTIVE,
    CALLS,
    COUNT,
    HIGHS,
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
from ..rows_triton import combine, pack, union, unpack
from .share_triton import exact, load, share

#: A partial result has what is measured, counts as int32, the others as the bits of float32, but not these.
UNMEASURED = tl.constexpr(2)  # calls, order


@triton.jit
def _leave(
    p_part, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
    PARTS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """A partial result into scratch memory."""
    tl.store(p_part + COUNT * PARTS, count.to(tl.int32))
    tl.store(p_part + NONFINITE * PARTS, nonfinite.to(tl.int32))
    tl.store(p_part + ZEROS * PARTS, zeros.to(tl.int32))
    tl.store(p_part + MEAN * PARTS, mean.to(tl.int32, bitcast=True))
    tl.store(p_part + STD * PARTS, std.to(tl.int32, bitcast=True))
    tl.store(p_part + ABS_MEAN * PARTS, abs_mean.to(tl.int32, bitcast=True))
    tl.store(p_part + MIN * PARTS, low.to(tl.int32, bitcast=True))
    tl.store(p_part + MAX * PARTS, high.to(tl.int32, bitcast=True))
    if FIELDS > REQUIRED:
        tl.store(p_part + (SKEWNESS - UNMEASURED) * PARTS, skewness.to(tl.int32, bitcast=True))
        tl.store(p_part + (KURTOSIS - UNMEASURED) * PARTS, kurtosis.to(tl.int32, bitcast=True))


@triton.jit
def _left(p_parts, field, m):
    """A field of all partial results, past L1, which may hold what another program has overwritten since."""
    return tl.load(p_parts + field, mask=m, other=0, cache_modifier=".cg")


@triton.jit
def _gather(p_parts, splits, PARTS: tl.constexpr, PARTS_P2: tl.constexpr, FIELDS: tl.constexpr):
    """The row of all partial results."""
    o = tl.arange(0, PARTS_P2)
    m = o < splits
    p_parts += o
    skewness = tl.zeros([PARTS_P2], tl.int32)
    kurtosis = tl.zeros([PARTS_P2], tl.int32)
    if FIELDS > REQUIRED:
        skewness = _left(p_parts, (SKEWNESS - UNMEASURED) * PARTS, m)
        kurtosis = _left(p_parts, (KURTOSIS - UNMEASURED) * PARTS, m)
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = combine(
        _left(p_parts, COUNT * PARTS, m).to(tl.int64),
        _left(p_parts, NONFINITE * PARTS, m).to(tl.int64),
        _left(p_parts, ZEROS * PARTS, m).to(tl.int64),
        _left(p_parts, MEAN * PARTS, m).to(tl.float32, bitcast=True),
        _left(p_parts, STD * PARTS, m).to(tl.float32, bitcast=True),
        _left(p_parts, ABS_MEAN * PARTS, m).to(tl.float32, bitcast=True),
        _left(p_parts, MIN * PARTS, m).to(tl.float32, bitcast=True),
        _left(p_parts, MAX * PARTS, m).to(tl.float32, bitcast=True),
        skewness.to(tl.float32, bitcast=True),
        kurtosis.to(tl.float32, bitcast=True),
        FIELDS,
    )
    mean, std = exact(count, mean, std, low, high)
    return count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis


@triton.jit
def _write(
    p_slots, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis, order,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Merge new values into a row of the slab; a module may run several times in one step."""
    count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, skewness2, kurtosis2 = unpack(
        p_slots, True, FIELDS
    )
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = union(
        count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, skewness2, kurtosis2,
        count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
        FIELDS,
    )  # fmt: skip
    mean, std = exact(count, mean, std, low, high)
    calls = tl.load(p_slots + CALLS)
    first = tl.where(calls > 0, tl.load(p_slots + ORDER), order.to(tl.float32))
    pack(p_slots, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis, FIELDS)
    tl.store(p_slots + CALLS, calls + 1)
    tl.store(p_slots + ORDER, first)


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
    FIELDS: tl.constexpr,  # of a row
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,  # n and stride_row are given in units of 16
    SOLO: tl.constexpr,  # one split
    BY_SAMPLE: tl.constexpr,
    COUNT_ZEROS: tl.constexpr,
):
    """Merge the rows of x [rows, n] into the slab [steps, room, layers, FIELDS + HIGHS]."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if EVEN:
        n *= 16  # so that the compiler sees it, and loads 16 bytes at a time
        stride_row *= 16
    p_x += row * stride_row
    p_scratch += lane * (1 + (1 + FIELDS - UNMEASURED) * PARTS)
    # The first tile is on its way before anything is asked, since the answer takes as long.
    x = load(p_x, split.to(tl.int64) * TILE, n, s1, s2, s3, t0, t1, t2, t3, TILE, DENSE, True)
    active = tl.load(p_control + ACTIVE)
    slot = tl.load(p_control + SLOT)
    order = tl.load(p_control + SEQUENCE) + 1
    layer = tl.load(p_layer)

    if active != 0:
        count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = share(
            p_x, x, n, s1, s2, s3, t0, t1, t2, t3, split, splits, TILE, PIECE, FIELDS, DENSE, COUNT_ZEROS
        )
        p_parts = p_scratch + 1 + PARTS + row * splits
        if SOLO:
            last = True
        else:
            _leave(
                p_parts + split, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
                PARTS, FIELDS,
            )  # fmt: skip
            tl.debug_barrier()
            last = tl.atomic_add(p_scratch + 1 + row, 1, sem="acq_rel") == splits - 1
        if last:
            if not SOLO:
                count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = _gather(
                    p_parts, splits, PARTS, PARTS_P2, FIELDS
                )
                tl.store(p_scratch + 1 + row, 0)
            target = row
            if BY_SAMPLE:
                target += 1
            p_slots = p_slab + ((slot * room + target) * layers + layer) * (FIELDS + HIGHS)
            _write(p_slots, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis, order, FIELDS)
            if BY_SAMPLE:
                # Other rows may not have read the sequence yet: the last row of all moves it on.
                if tl.atomic_add(p_scratch, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                    tl.store(p_scratch, 0)
                    tl.store(p_control + SEQUENCE, order)
            else:
                tl.store(p_control + SEQUENCE, order)
