"""The moments of a tensor on CUDA: one launch reads it once and merges its row into the slab, see `program_triton`.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..launching import LANES, Kernel, current_stream, lane, multiprocessors
from ..layout import COUNTS, REQUIRED
from .program_triton import UNMEASURED, moments_kernel

#: Bytes a program reads per tile: 16 for each of its threads.
TILE_BYTES = 4096
#: Of a tile, where it is read in float64.
PIECES = 8
#: Programs per multiprocessor.
PER_SM = 2
#: Up to here one program does it alone, which saves the ticket.
SOLO_BYTES = 4 * TILE_BYTES
#: Dimensions of a view with gaps, after merging those that follow each other in memory.
DIMS = 4

_KERNEL = Kernel(moments_kernel, warps=8)


def scratch(device: torch.device, fields: int = REQUIRED) -> Tensor:
    """Room for partial results and tickets, a lane per stream; the tickets start at zero."""
    parts = PER_SM * multiprocessors(device)
    return torch.zeros(LANES, 1 + (1 + partial(fields)) * parts, dtype=torch.int32, device=device)


def partial(fields: int) -> int:
    """How many numbers a partial result has, for rows of so many fields."""
    return fields - int(UNMEASURED.value)


def observe_triton(
    x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor, scratch: Tensor
) -> None:
    """Merge the moments of `x` into the slab in one launch; see `moments.observe_reference`.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        layer: int64 [], its place in the slab.
        samples: rows to tell apart by the first dimension; 0 for one row of all.
        count_zeros: whether the field `zeros` is wanted.
        slab: float32 [capacity + 1, rows, layers, fields + COUNTS].
        control: int64 [CONTROL].
        scratch: int32 [LANES, ...], from `scratch()`.
    """
    if x.is_neg():  # a view with a flag for its sign, which the kernel would not see
        x = x.resolve_neg()
    device = control.device
    stream = current_stream(device)
    _, room, layers, slots = slab.shape
    aligned = x.data_ptr() % 16 == 0
    plan = _plan(x.shape, x.stride(), x.dtype, aligned, samples, count_zeros, room, layers, slots, scratch.shape[1])
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
    slots: int,
    lane_size: int,
) -> tuple[tuple[Any, ...], tuple[int, int], tuple[Any, ...]] | None:
    """How to launch for outputs of a kind: variant, grid and the numbers after the lane; layers repeat themselves."""
    walk = strided(shape, stride, samples)
    if walk is None:
        return None
    stride_row, dims = walk
    many = samples or 1
    n = math.prod(shape) // many
    fields = slots - len(COUNTS)
    parts = lane_size // (1 + partial(fields))
    splits = 1
    if n * dtype.itemsize > SOLO_BYTES and many < parts:
        splits = min(parts // many, -(-n * dtype.itemsize // TILE_BYTES))
    dense = dims is _DENSE
    tile = TILE_BYTES // dtype.itemsize // (1 if dense else 4)  # finding one's way through gaps takes registers
    even = n % 16 == 0 and stride_row % 16 == 0
    flags = (dense, even, splits == 1, samples > 0, count_zeros)
    sizes = (n // 16, stride_row // 16) if even else (n, stride_row)
    constants = (parts, triton.next_power_of_2(parts), tile, tile // PIECES, fields)
    return (dtype, aligned, parts, fields, *flags), (many, splits), (*sizes, room, layers, *dims, *constants, *flags)


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
