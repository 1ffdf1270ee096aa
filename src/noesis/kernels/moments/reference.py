"""The moments of a tensor in plain torch ops, and the order in which elements lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import BadValue
from .. import layout, rows
from ..layout import ACTIVE, CALLS, ORDER, REQUIRED, SEQUENCE, SLOT

#: Elements measured at a time by the reference, which bounds its scratch memory.
CHUNK = 1 << 22
#: What the compiled kernels read; the reference has the others.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def measure_reference(x: Tensor, count_zeros: bool, fields: int = REQUIRED) -> Tensor:
    """The rows of the samples of `x` in float64, in plain torch ops without a host sync.

    Args:
        x: floating tensor [rows, n], any strides.
        count_zeros: whether the field `zeros` is wanted; it is 0 otherwise.
        fields: how many of the fields are wanted.

    Returns:
        [rows, fields]; NaN and infinite elements are counted and otherwise left out.
    """
    step = max(1, CHUNK // max(1, x.shape[0]))
    parts = [_reference_chunk(part, count_zeros, fields) for part in x.split(step, dim=1)]
    return parts[0] if len(parts) == 1 else rows.combine(torch.stack(parts), torch)


def _reference_chunk(x: Tensor, count_zeros: bool, fields: int) -> Tensor:
    out = torch.zeros(x.shape[0], fields, dtype=_wide(x.device), device=x.device)
    if x.shape[1] == 0:
        return out
    x = x.to(out.dtype)
    finite = x.isfinite()
    count = finite.sum(1)
    divisor = count.clamp(min=1)
    x = torch.where(finite, x, 0.0)
    mean = x.sum(1) / divisor
    centred = torch.where(finite, x - mean[:, None], 0.0)
    out[:, layout.COUNT] = count
    out[:, layout.NONFINITE] = x.shape[1] - count
    out[:, layout.MEAN] = mean
    out[:, layout.STD] = (centred.square().sum(1) / divisor).sqrt()
    out[:, layout.ABS_MEAN] = x.abs().sum(1) / divisor
    out[:, layout.MIN] = torch.where(finite, x, math.inf).amin(1)
    out[:, layout.MAX] = torch.where(finite, x, -math.inf).amax(1)
    for field in (layout.MIN, layout.MAX):
        out[:, field] = torch.where(count > 0, out[:, field], 0.0)
    if count_zeros:
        out[:, layout.ZEROS] = ((x == 0) & finite).sum(1)
    if fields > REQUIRED:
        varies = (out[:, layout.MAX] > out[:, layout.MIN]) & (out[:, layout.STD] > 0)
        z = centred / torch.where(varies, out[:, layout.STD], torch.inf)[:, None]
        out[:, layout.SKEWNESS] = z.pow(3).sum(1) / divisor
        out[:, layout.KURTOSIS] = z.pow(4).sum(1) / divisor
    return out


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def observe_reference(x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor) -> None:
    """Merge the moments of `x` into the slab, decided on the device alone."""
    check_room(samples, slab.shape[1] - 1)
    new = measure_reference(by_sample(x, samples), count_zeros, rows.width(slab))
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


def dense_copy(x: Tensor, samples: int) -> Tensor:
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
