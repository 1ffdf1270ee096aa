"""The ring of steps on CUDA: beginning a step is one launch, ending it another.

A program takes a block of layers; the last one to arrive moves the cursor on, when all have read it.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import layout
from ..launching import Kernel, current_stream, lane
from ..layout_triton import (
    ABS_MEAN,
    ACTIVE,
    CALLS,
    COUNT,
    ENABLED,
    EVERY,
    FOLDED,
    FORWARDS,
    HIGH,
    INFINITY,
    MAX,
    MEAN,
    MIN,
    NONFINITE,
    OBSERVED,
    ORDER,
    SEQUENCE,
    SLOT,
    SLOTS,
    STD,
    STEP,
    STEPS,
    SUM_MEAN,
    SUM_STD,
    TOTALS,
    ZEROS,
)

BASE = tl.constexpr(layout.BASE)

#: Layers a program takes.
BLOCK = 128


@triton.jit
def _row(p_row, m):
    """A packed row in float64, unpacked."""
    count = tl.load(p_row + COUNT, mask=m, other=0.0).to(tl.float64)
    nonfinite = tl.load(p_row + NONFINITE, mask=m, other=0.0).to(tl.float64)
    zeros = tl.load(p_row + ZEROS, mask=m, other=0.0).to(tl.float64)
    count += tl.load(p_row + HIGH, mask=m, other=0.0).to(tl.float64) * BASE
    nonfinite += tl.load(p_row + HIGH + 1, mask=m, other=0.0).to(tl.float64) * BASE
    zeros += tl.load(p_row + HIGH + 2, mask=m, other=0.0).to(tl.float64) * BASE
    mean = tl.load(p_row + MEAN, mask=m, other=0.0).to(tl.float64)
    std = tl.load(p_row + STD, mask=m, other=0.0).to(tl.float64)
    abs_mean = tl.load(p_row + ABS_MEAN, mask=m, other=0.0).to(tl.float64)
    low = tl.load(p_row + MIN, mask=m, other=0.0).to(tl.float64)
    high = tl.load(p_row + MAX, mask=m, other=0.0).to(tl.float64)
    calls = tl.load(p_row + CALLS, mask=m, other=0.0).to(tl.float64)
    order = tl.load(p_row + ORDER, mask=m, other=0.0).to(tl.float64)
    return count, nonfinite, zeros, mean, std, abs_mean, low, high, calls, order


@triton.jit
def _union(n, mean, std, abs_mean, low, high, n2, mean2, std2, abs_mean2, low2, high2):
    """`rows.combine` for two parts (Chan et al. 1979)."""
    total = n + n2
    divisor = tl.where(total > 0, total, 1.0)
    w = n / divisor
    w2 = n2 / divisor
    whole = w * mean + w2 * mean2
    spread = w * (std * std + (mean - whole) * (mean - whole)) + w2 * (std2 * std2 + (mean2 - whole) * (mean2 - whole))
    lowest = tl.minimum(tl.where(n > 0, low, INFINITY), tl.where(n2 > 0, low2, INFINITY))
    highest = tl.maximum(tl.where(n > 0, high, -INFINITY), tl.where(n2 > 0, high2, -INFINITY))
    lowest = tl.where(total > 0, lowest, 0.0)
    highest = tl.where(total > 0, highest, 0.0)
    return total, whole, tl.sqrt(spread), w * abs_mean + w2 * abs_mean2, lowest, highest


@triton.jit
def _first(calls, order, calls2, order2):
    """The earlier place in the order of execution, of those that ran; 0 if none did."""
    first = tl.minimum(tl.where(calls > 0, order, INFINITY), tl.where(calls2 > 0, order2, INFINITY))
    return tl.where(calls + calls2 > 0, first, 0.0)


@triton.jit
def _fold(p_total, m, count, nonfinite, zeros, mean, std, abs_mean, low, high, calls, order):
    """Add a step's row to the totals; `stepping.add_steps`."""
    old_calls = tl.load(p_total + CALLS, mask=m, other=0.0)
    total, whole, spread, whole_abs, lowest, highest = _union(
        tl.load(p_total + COUNT, mask=m, other=0.0),
        tl.load(p_total + MEAN, mask=m, other=0.0),
        tl.load(p_total + STD, mask=m, other=0.0),
        tl.load(p_total + ABS_MEAN, mask=m, other=0.0),
        tl.load(p_total + MIN, mask=m, other=0.0),
        tl.load(p_total + MAX, mask=m, other=0.0),
        count, mean, std, abs_mean, low, high,
    )  # fmt: skip
    first = _first(old_calls, tl.load(p_total + ORDER, mask=m, other=0.0), calls, order)
    tl.store(p_total + COUNT, total, mask=m)
    tl.store(p_total + NONFINITE, tl.load(p_total + NONFINITE, mask=m, other=0.0) + nonfinite, mask=m)
    tl.store(p_total + ZEROS, tl.load(p_total + ZEROS, mask=m, other=0.0) + zeros, mask=m)
    tl.store(p_total + MEAN, whole, mask=m)
    tl.store(p_total + STD, spread, mask=m)
    tl.store(p_total + ABS_MEAN, whole_abs, mask=m)
    tl.store(p_total + MIN, lowest, mask=m)
    tl.store(p_total + MAX, highest, mask=m)
    tl.store(p_total + CALLS, old_calls + calls, mask=m)
    tl.store(p_total + ORDER, first, mask=m)
    sample = std * tl.sqrt(count / tl.where(count > 1, count - 1, 1.0))
    steps = tl.load(p_total + STEPS, mask=m, other=0.0) + tl.where(count > 0, 1.0, 0.0)
    tl.store(p_total + STEPS, steps, mask=m)
    tl.store(p_total + SUM_MEAN, tl.load(p_total + SUM_MEAN, mask=m, other=0.0) + mean, mask=m)
    tl.store(p_total + SUM_STD, tl.load(p_total + SUM_STD, mask=m, other=0.0) + sample, mask=m)


@triton.jit
def _fold_step(p_step, p_totals, o_layer, m, room, layers):
    """Add the rows of a step to the totals: row 0, the remainder, becomes the whole of all rows."""
    p_row = p_step + o_layer * SLOTS
    count, nonfinite, zeros, mean, std, abs_mean, low, high, calls, order = _row(p_row, m)
    most = tl.zeros_like(calls)
    for r in range(1, room):
        p_row = p_step + (r * layers + o_layer) * SLOTS
        count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, calls2, order2 = _row(p_row, m)
        p_total = p_totals + (r * layers + o_layer) * TOTALS
        _fold(p_total, m, count2, nonfinite2, zeros2, mean2, std2, abs_mean2, low2, high2, calls2, order2)
        # One call fills a row per sample, or the remainder: not as many calls as rows.
        order = _first(calls + most, order, calls2, order2)
        most = tl.maximum(most, calls2)
        nonfinite += nonfinite2
        zeros += zeros2
        count, mean, std, abs_mean, low, high = _union(
            count, mean, std, abs_mean, low, high, count2, mean2, std2, abs_mean2, low2, high2
        )
    p_total = p_totals + o_layer * TOTALS
    _fold(p_total, m, count, nonfinite, zeros, mean, std, abs_mean, low, high, calls + most, order)


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
    p_slot = p_slab + slot * room * layers * SLOTS
    p_pending = p_slab + capacity * room * layers * SLOTS
    if full:
        _fold_step(p_slot, p_totals, o_layer, m, room, layers)
    if active | (enabled & outside):
        for r in range(room):
            o_row = (r * layers + o_layer) * SLOTS
            for k in tl.static_range(SLOTS):
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
    blocks = -(-layers // BLOCK)
    _BEGIN.launch(
        device,
        stream,
        (timestep.dtype,),
        (blocks, 1),
        (timestep, slab, totals, steps, control, scratch),
        (branch, batch, lane(device, stream), scratch.stride(0), steps.shape[0], room, layers, BLOCK),
    )


def end_triton(control: Tensor, capacity: int) -> None:
    """End a step in one launch; see `stepping.end`."""
    device = control.device
    _END.launch(device, current_stream(device), (), (1, 1), (control,), (capacity,))
