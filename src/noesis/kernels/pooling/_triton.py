"""The Triton kernel of `pooling`: one read of the output, wherever its channels lie.

A program takes a few channels of a sample and walks over the positions. Sums are shifted by the channel's first
element, which lies among the others, so that the spread keeps its digits however far the mean is from zero. A second,
tiny launch sets the stamp when all have read it.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Kernel, current_stream
from ..layout_triton import ACTIVE, FORWARDS
from . import reference

FORWARD, SAMPLES, CALLS = (tl.constexpr(i) for i in (reference.FORWARD, reference.SAMPLES, reference.CALLS))
LEAST_SQUARE = tl.constexpr(reference.LEAST_SQUARE)
#: Positions and channels read at a time, where channels follow each other in memory and where positions do.
CHANNELS_LAST, CHANNELS_FIRST = (32, 32), (256, 4)


@triton.jit
def _calls(p_stamp, forward, samples):
    """Which call of the layer within the forward this is, from 1."""
    again = (tl.load(p_stamp + FORWARD) == forward) & (tl.load(p_stamp + SAMPLES) == samples)
    return tl.where(again, tl.load(p_stamp + CALLS), 0) + 1


@triton.jit
def _merge(p, new, calls, mask):
    held = tl.load(p, mask=mask & (calls > 1), other=0.0)
    tl.store(p, tl.where(calls > 1, held + (new - held) / calls.to(tl.float32), new), mask=mask)


@triton.jit(do_not_specialize=["samples", "positions"])
def pool_kernel(
    p_x,
    p_buffer,
    p_stamp,
    p_control,
    samples: tl.int64,
    positions: tl.int64,
    channels: tl.int64,
    width: tl.int64,
    s_sample: tl.int64,
    s_position: tl.int64,
    s_channel: tl.int64,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """`pooling.pool_reference` without a mask and without the stamp."""
    if tl.load(p_control + ACTIVE) == 0:
        return
    sample = tl.program_id(0).to(tl.int64)
    o_channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    o_position = tl.arange(0, POSITIONS).to(tl.int64)
    in_row = o_channel < channels
    p_first = p_x + sample * s_sample + o_channel * s_channel
    pivot = tl.load(p_first, mask=in_row, other=0.0).to(tl.float32)
    sums = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    squares = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for start in range(0, positions, POSITIONS):
        there = (start + o_position < positions)[:, None] & in_row[None, :]
        p = p_first[None, :] + (start + o_position)[:, None] * s_position
        x = tl.where(there, tl.load(p, mask=there, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        sums += x
        if SPREAD:
            squares += x * x
    shift = tl.sum(sums, 0) / positions.to(tl.float32)
    calls = _calls(p_stamp, tl.load(p_control + FORWARDS), samples)
    p_row = p_buffer + sample * width + o_channel
    _merge(p_row, pivot + shift, calls, in_row)
    if SPREAD:
        variance = tl.sum(squares, 0) / positions.to(tl.float32) - shift * shift
        _merge(p_row + channels, tl.sqrt(tl.maximum(variance, LEAST_SQUARE)), calls, in_row)


@triton.jit(do_not_specialize=["samples"])
def stamp_kernel(p_stamp, p_control, samples: tl.int64):
    """Say which forward the vectors are of."""
    if tl.load(p_control + ACTIVE) == 0:
        return
    forward = tl.load(p_control + FORWARDS)
    calls = _calls(p_stamp, forward, samples)
    tl.store(p_stamp + FORWARD, forward)
    tl.store(p_stamp + SAMPLES, samples)
    tl.store(p_stamp + CALLS, calls)


_POOL = Kernel(pool_kernel, warps=4)
_STAMP = Kernel(stamp_kernel, warps=1)


def pool_triton(
    x: Tensor, samples: int, channel: int, spread: bool, buffer: Tensor, stamp: Tensor, control: Tensor
) -> None:
    """Keep the vectors of `x`; see `pooling.pool_reference`.

    Args:
        x: float32, float16 or bfloat16, [samples * n, ...].
        samples: how many samples there are.
        channel: the dimension that is not averaged.
        spread: whether the standard deviation is wanted.
        buffer: float32 [room, width].
        stamp: int64 [STAMP].
        control: int64 [CONTROL].
    """
    device = control.device
    stream = current_stream(device)
    width = reference.width(x, samples, channel, spread)
    rows = reference.by_position(x.resolve_neg(), samples, channel)
    _, positions, channels = rows.shape
    tile = CHANNELS_LAST if rows.stride(2) == 1 else CHANNELS_FIRST
    both = width > channels
    aligned = rows.data_ptr() % 16 == 0
    numbers = (samples, positions, channels, width, *rows.stride())
    # What Triton compiles differently: a 1, and what 16 divides.
    kinds = tuple((number == 1) + 2 * (number % 16 == 0) for number in numbers[2:])
    _POOL.launch(
        device,
        stream,
        (x.dtype, aligned, kinds, tile, both),
        (samples, triton.cdiv(channels, tile[1])),
        (rows, buffer, stamp, control),
        (*numbers, *tile, both),
    )
    _STAMP.launch(device, stream, (), (1, 1), (stamp, control), (samples,))


def suits(x: Tensor) -> bool:
    """Whether the kernel reads this output."""
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0
