"""The ring of steps on CUDA: beginning a step is one launch, ending it another.

A program takes a block of layers; the last one to arrive moves the cursor on, when all have read it.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import rows
from ..launching import Kernel, current_stream, lane
from ..layout_triton import (
    ABS_MEAN,
    ACTIVE,
    AVERAGES,
    CALLS,
    COUNT,
    ENABLED,
    EVERY,
    FOLDED,
    FORWARDS,
    HIGHS,
    INFINITY,
    KURTOSIS,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    OBSERVED,
    ORDER,
    REQUIRED,
    SEQUENCE,
    SKEWNESS,
    SLOT,
    STD,
    STEP,
    STEPS,
    SUM_MEAN,
    SUM_STD,
    ZEROS,
)
from ..rows_triton import load_optional, union, unpack

#: Layers a program takes.
BLOCK = 128


@triton.jit
def _row(p_slots, m, FIELDS: tl.constexpr):
    """What was measured of a packed row, in float64."""
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = unpack(p_slots, m, FIELDS)
    return (
        count,
        nonfinite,
        zeros,
        mean.to(tl.float64),
        std.to(tl.float64),
        abs_mean.to(tl.float64),
        low.to(tl.float64),
        high.to(tl.float64),
        skewness.to(tl.float64),
        kurtosis.to(tl.float64),
    )


@triton.jit
def _calls(p_row, m):
    """Calls, and the place of the first in the order of execution."""
    calls = tl.load(p_row + CALLS, mask=m, other=0.0).to(tl.float64)
    return calls, tl.load(p_row + ORDER, mask=m, other=0.0).to(tl.float64)


@triton.jit
def _first(calls, order, calls2, order2):
    """The earlier place in the order of execution, of those that ran; 0 if none did."""
    first = tl.minimum(tl.where(calls > 0, order, INFINITY), tl.where(calls2 > 0, order2, INFINITY))
    return tl.where(calls + calls2 > 0, first, 0.0)


@triton.jit
def _fold(
    p_total, m, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis, calls, order,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Add a step's row to the totals; `stepping.add_steps`."""
    p_averages = p_total + FIELDS + AVERAGES
    old_calls = tl.load(p_total + CALLS, mask=m, other=0.0)
    first = _first(old_calls, tl.load(p_total + ORDER, mask=m, other=0.0), calls, order)
    steps = tl.load(p_averages + STEPS, mask=m, other=0.0) + tl.where(count > 0, 1.0, 0.0)
    sum_mean = tl.load(p_averages + SUM_MEAN, mask=m, other=0.0) + mean
    size = count.to(tl.float64)
    sample_std = std * tl.sqrt(size / tl.where(count > 1, size - 1, 1.0))
    sum_std = tl.load(p_averages + SUM_STD, mask=m, other=0.0) + sample_std
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = union(
        tl.load(p_total + COUNT, mask=m, other=0.0).to(tl.int64),
        tl.load(p_total + NONFINITE, mask=m, other=0.0).to(tl.int64),
        tl.load(p_total + ZEROS, mask=m, other=0.0).to(tl.int64),
        tl.load(p_total + MEAN, mask=m, other=0.0),
        tl.load(p_total + STD, mask=m, other=0.0),
        tl.load(p_total + ABS_MEAN, mask=m, other=0.0),
        tl.load(p_total + MIN, mask=m, other=0.0),
        tl.load(p_total + MAX, mask=m, other=0.0),
        load_optional(p_total + SKEWNESS, m, mean, FIELDS),
        load_optional(p_total + KURTOSIS, m, mean, FIELDS),
        count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
        FIELDS,
    )  # fmt: skip
    tl.store(p_total + COUNT, count.to(tl.float64), mask=m)
    tl.store(p_total + NONFINITE, nonfinite.to(tl.float64), mask=m)
    tl.store(p_total + ZEROS, zeros.to(tl.float64), mask=m)
    tl.store(p_total + MEAN, mean, mask=m)
    tl.store(p_total + STD, std, mask=m)
    tl.store(p_total + ABS_MEAN, abs_mean, mask=m)
    tl.store(p_total + MIN, low, mask=m)
    tl.store(p_total + MAX, high, mask=m)
    if FIELDS > REQUIRED:
        tl.store(p_total + SKEWNESS, skewness, mask=m)
        tl.store(p_total + KURTOSIS, kurtosis, mask=m)
    tl.store(p_total + CALLS, old_calls + calls, mask=m)
    tl.store(p_total + ORDER, first, mask=m)
    tl.store(p_averages + STEPS, steps, mask=m)
    tl.store(p_averages + SUM_MEAN, sum_mean, mask=m)
    tl.store(p_averages + SUM_STD, sum_std, mask=m)


@triton.jit
def _fold_step(p_step, p_totals, o_layer, m, room, layers, FIELDS: tl.constexpr):
    """Add the rows of a step to the totals: row 0, the remainder, becomes the whole of all rows."""
    p_row = p_step + o_layer * (FIELDS + HIGHS)
    count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = _row(p_row, m, FIELDS)
    calls, order = _calls(p_row, m)
    most = tl.zeros_like(calls)
    for r in range(1, room):
        p_row = p_step + (r * layers + o_layer) * (FIELDS + HIGHS)
        count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, skewness2, kurtosis2 = _row(p_row, m, FIELDS)
        calls2, order2 = _calls(p_row, m)
        p_total = p_totals + (r * layers + o_layer) * (FIELDS + AVERAGES)
        _fold(
            p_total, m, count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, skewness2, kurtosis2,
            calls2, order2, FIELDS,
        )  # fmt: skip
        # One call fills a row per sample, or the remainder: not as many calls as rows.
        order = _first(calls + most, order, calls2, order2)
        most = tl.maximum(most, calls2)
        count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis = union(
            count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
            count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, skewness2, kurtosis2,
            FIELDS,
        )  # fmt: skip
    p_total = p_totals + o_layer * (FIELDS + AVERAGES)
    _fold(
        p_total, m, count, nonfinite, zeros, mean, std, abs_mean, low, high, skewness, kurtosis,
        calls + most, order, FIELDS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["p_timestep", "branch", "batch", "lane", "stride_lane", "capacity", "room", "layers"])
def begin_kernel(
    p_timestep,
    p_slab,
    p_totals,
    p_steps,
    p_control,
    p_scratch,
    branch: tl.int64,
    batch: tl.int64,
    lane: tl.int64,
    stride_lane: tl.int64,
    capacity: tl.int64,
    room: tl.int64,
    layers: tl.int64,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,  # of a row
):
    """Start a step; `stepping.begin_reference`."""
    forwards = tl.load(p_control + FORWARDS)
    observed = tl.load(p_control + OBSERVED)
    sequence = tl.load(p_control + SEQUENCE)
    folded = tl.load(p_control + FOLDED)
    enabled = tl.load(p_control + ENABLED) != 0
    active = enabled & (forwards % tl.load(p_control + EVERY) == 0)
    outside = (tl.load(p_control + SLOT) == capacity) & (sequence > 0)
    slot = observed % capacity
    full = active & (observed - folded >= capacity)

    o_layer = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o_layer < layers
    p_slot = p_slab + slot * room * layers * (FIELDS + HIGHS)
    p_pending = p_slab + capacity * room * layers * (FIELDS + HIGHS)
    if full:
        _fold_step(p_slot, p_totals, o_layer, m, room, layers, FIELDS)
    if active | (enabled & outside):
        for r in range(room):
            o_row = (r * layers + o_layer) * (FIELDS + HIGHS)
            for k in tl.static_range(FIELDS + HIGHS):
                value = tl.load(p_pending + o_row + k, mask=m & outside, other=0.0)
                tl.store(p_slot + o_row + k, value, mask=m & active)
                tl.store(p_pending + o_row + k, 0.0, mask=m & outside)

    tl.debug_barrier()
    if tl.atomic_add(p_scratch + lane * stride_lane, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(p_scratch + lane * stride_lane, 0)
        if active:
            p_step = p_steps + slot * STEP
            tl.store(p_step, forwards.to(tl.float64))
            tl.store(p_step + 1, tl.load(p_timestep).to(tl.float64))
            tl.store(p_step + 2, branch.to(tl.float64))
            tl.store(p_step + 3, batch.to(tl.float64))
        if enabled:
            tl.store(p_control + FORWARDS, forwards + 1)
            tl.store(p_control + SLOT, tl.where(active, slot, capacity))
            tl.store(p_control + SEQUENCE, tl.where(active & outside, sequence, 0))
        tl.store(p_control + OBSERVED, observed + active.to(tl.int64))
        tl.store(p_control + FOLDED, folded + full.to(tl.int64))
        tl.store(p_control + ACTIVE, active.to(tl.int64))


@triton.jit(do_not_specialize=["capacity"])
def end_kernel(p_control, capacity: tl.int64):
    """End a step; `stepping.end`."""
    enabled = tl.load(p_control + ENABLED)
    ends = (enabled != 0) & (tl.load(p_control + SLOT) != capacity)
    tl.store(p_control + SEQUENCE, tl.where(ends, 0, tl.load(p_control + SEQUENCE)))
    tl.store(p_control + ACTIVE, enabled)
    tl.store(p_control + SLOT, capacity)


_BEGIN = Kernel(begin_kernel, warps=4)
_END = Kernel(end_kernel, warps=1)


def begin_triton(
    timestep: Tensor,
    branch: int,
    batch: int,
    slab: Tensor,
    totals: Tensor,
    steps: Tensor,
    control: Tensor,
    scratch: Tensor,
) -> None:
    """Start a step in one launch; see `stepping.begin_reference`."""
    device = control.device
    stream = current_stream(device)
    _, room, layers, _ = slab.shape
    fields = rows.width(slab)
    blocks = -(-layers // BLOCK)
    _BEGIN.launch(
        device,
        stream,
        (timestep.dtype, fields),
        (blocks, 1),
        (timestep, slab, totals, steps, control, scratch),
        (branch, batch, lane(device, stream), scratch.stride(0), steps.shape[0], room, layers, BLOCK, fields),
    )


def end_triton(control: Tensor, capacity: int) -> None:
    """End a step in one launch; see `stepping.end`."""
    device = control.device
    _END.launch(device, current_stream(device), (), (1, 1), (control,), (capacity,))
