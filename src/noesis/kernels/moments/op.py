"""The moments of a tensor, merged into its layer's row of the current step.

Doors with one meaning: a reference in torch ops that never waits for the device, a Triton kernel in
`moments_triton`, two CPU paths in `moments_numba` and `moments_numpy` (all three are imported late),
and `torch.ops.noesis.moments` for compiled code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import BadValue
from .. import rows
from ..dispatch import by_numba, has_triton, register
from ..rows import CALLS, FIELDS, ORDER
from ..stepping import ACTIVE, SEQUENCE, SLOT

#: Elements measured at a time by the reference, which bounds its scratch memory.
CHUNK = 1 << 22
#: What the compiled kernels read; the reference has the others.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------- reference


def reference(x: Tensor, count_zeros: bool) -> Tensor:
    """The rows of the samples of `x` in float64, in plain torch ops without a host sync.

    Args:
        x: floating tensor [rows, n], any strides.
        count_zeros: whether the field `zeros` is wanted; it is 0 otherwise.

    Returns:
        [rows, FIELDS]; NaN and infinite elements are counted and otherwise left out.
    """
    step = max(1, CHUNK // max(1, x.shape[0]))
    parts = [_reference_chunk(part, count_zeros) for part in x.split(step, dim=1)]
    return parts[0] if len(parts) == 1 else rows.combine(torch.stack(parts), torch)


def _reference_chunk(x: Tensor, count_zeros: bool) -> Tensor:
    out = torch.zeros(x.shape[0], len(FIELDS), dtype=_wide(x.device), device=x.device)
    if x.shape[1] == 0:
        return out
    x = x.to(out.dtype)
    finite = x.isfinite()
    count = finite.sum(1)
    divisor = count.clamp(min=1)
    x = torch.where(finite, x, 0.0)
    mean = x.sum(1) / divisor
    centred = torch.where(finite, x - mean[:, None], 0.0)
    out[:, rows.COUNT] = count
    out[:, rows.NONFINITE] = x.shape[1] - count
    out[:, rows.MEAN] = mean
    out[:, rows.STD] = (centred.square().sum(1) / divisor).sqrt()
    out[:, rows.ABS_MEAN] = x.abs().sum(1) / divisor
    out[:, rows.MIN] = torch.where(finite, x, math.inf).amin(1)
    out[:, rows.MAX] = torch.where(finite, x, -math.inf).amax(1)
    for field in (rows.MIN, rows.MAX):
        out[:, field] = torch.where(count > 0, out[:, field], 0.0)
    if count_zeros:
        out[:, rows.ZEROS] = ((x == 0) & finite).sum(1)
    return out


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def observe_reference(x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor) -> None:
    """Merge the moments of `x` into the slab, decided on the device alone."""
    check_room(samples, slab.shape[1] - 1)
    new = reference(by_sample(x, samples), count_zeros)
    first = 0 if samples == 0 else 1
    slot, layer = control[SLOT].reshape(1), layer.reshape(1)
    row = torch.arange(first, first + new.shape[0], device=slab.device)
    packed = slab[slot, row, layer]
    old = rows.unpack(packed, torch.zeros_like(new))
    active = control[ACTIVE] > 0
    control[SEQUENCE] += active
    new[:, CALLS] = 1
    new[:, ORDER] = control[SEQUENCE]
    merged = rows.combine(torch.stack([old, new]), torch)
    slab[slot, row, layer] = rows.pack(torch.where(active, merged, old), packed)


def check_room(samples: int, room: int) -> None:
    """Refuse more samples than there are rows for."""
    if samples > room:
        raise BadValue(
            f"There is a batch of {samples}, and per_sample has room for {room}",
            "room for every batch, since compiled code and CUDA graphs cannot make more",
            f"Pass wrap(..., per_sample={samples})",
        )


# ---------------------------------------------------------------- CPU


def observe_cpu(
    x: Tensor,
    layer: int,
    samples: int,
    count_zeros: bool,
    slab: NDArray[np.float32],
    control: NDArray[np.int64],
) -> None:
    """The same on the CPU, whose numbers can be read at once."""
    if not control[ACTIVE]:
        return
    check_room(samples, slab.shape[1] - 1)
    if x.is_neg():  # a view with a flag for its sign, which the memory does not show
        x = x.resolve_neg()
    numba = by_numba("moments")
    if numba is None or x.dtype not in DTYPES or not x.numel():
        _numpy().observe(x, samples, count_zeros, layer, slab, control)
        return
    if not x.is_contiguous():
        x = _dense(x, samples)
    numba.observe(x.data_ptr(), x.numel(), numba.KINDS[x.dtype], samples, count_zeros, layer, slab, control)


@functools.cache
def _numpy() -> Any:
    from . import _numpy as moments_numpy

    return moments_numpy


def _dense(x: Tensor, samples: int) -> Tensor:
    """The elements without gaps, those of a sample together; in the order of memory if that is possible."""
    dense = storage_order(x)
    if dense.is_contiguous() and (not samples or x.stride(0) * x.shape[0] == x.numel() or x.shape[0] == 1):
        return dense
    return x.contiguous()


def storage_order(x: Tensor) -> Tensor:
    """The elements of `x` as a 1-D view in the order of memory, or `x` itself if it has gaps."""
    if x.is_contiguous():
        return x.view(-1)
    order = sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))
    permuted = x.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else permuted


def by_sample(x: Tensor, samples: int) -> Tensor:
    """[rows, n]: one row for everything (samples=0), or one per sample."""
    if samples:
        return x.reshape(samples, -1)
    if x.is_contiguous() or x.dim() == 0:
        return x.reshape(1, -1)
    return x.permute(sorted(range(x.dim()), key=lambda dim: -x.stride()[dim])).reshape(1, -1)


# ---------------------------------------------------------------- registered op


def observe_anywhere(
    x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor, scratch: Tensor
) -> None:
    """Merge the moments of `x` into the slab: by the Triton kernel where there is one for this device and dtype."""
    if x.dtype in DTYPES and has_triton(x.device):
        check_room(samples, slab.shape[1] - 1)
        _triton()(x, layer, samples, count_zeros, slab, control, scratch)
    else:
        observe_reference(x.detach(), layer, samples, count_zeros, slab, control)


@functools.cache
def _triton() -> Callable[..., None]:
    from ._triton import observe_triton

    return observe_triton


def _op_cpu(
    x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor, _scratch: Tensor
) -> None:
    observe_cpu(x, int(layer), samples, count_zeros, slab.numpy(), control.numpy())


register(
    "moments(Tensor x, Tensor layer, SymInt samples, bool count_zeros, "
    "Tensor(a!) slab, Tensor(b!) control, Tensor(c!) scratch)",
    cpu=_op_cpu,
    anywhere=observe_anywhere,
)
