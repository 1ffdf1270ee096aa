"""One vector per sample: mean and spread of an output over its positions, kept until the next forward.

What is kept of a layer, on its device and changed in place only:

| tensor | shape | what |
|---|---|---|
| `buffer` | float32 [room, width] | a row per sample of the latest forward |
| `stamp` | int64 [STAMP] | which forward that was, its samples, and how many calls it averages |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import by_numba, has_triton, register
from ..layout import ACTIVE, FORWARDS
from .reference import by_position, check_room, pool_reference, pooled


def pool_anywhere(
    x: Tensor,
    samples: int,
    channel: int,
    spread: bool,
    mask: Tensor | None,
    buffer: Tensor,
    stamp: Tensor,
    control: Tensor,
) -> None:
    """Keep the vectors of an output: by the Triton kernel, where there is one for this device, dtype and mask."""
    if mask is None and has_triton(x.device):
        from ._triton import pool_triton, suits

        if suits(x):
            check_room(samples, buffer)
            pool_triton(x, samples, channel, spread, buffer, stamp, control)
            return
    pool_reference(x, samples, channel, spread, mask, buffer, stamp, control)


def pool_cpu(
    x: Tensor,
    samples: int,
    channel: int,
    spread: bool,
    mask: Tensor | None,
    buffer: Tensor,
    stamp: Tensor,
    control: Tensor,
) -> None:
    """Keep the vectors of an output on the CPU, which can look at the flags; in one read of it, if Numba is there."""
    flags = control.tolist()
    seen, before, _ = stamp.tolist()
    if not flags[ACTIVE]:
        return
    if seen == flags[FORWARDS] and before == samples:
        pool_reference(x, samples, channel, spread, mask, buffer, stamp, control)
        return
    check_room(samples, buffer)
    numba = by_numba("pooling")
    if numba is None or mask is not None or x.dtype != torch.float32 or x.dim() < 3 or not x.numel():
        buffer[:samples] = pooled(x.detach(), samples, channel, spread, mask)
    else:
        rows = by_position(x.detach().resolve_neg(), samples, channel)
        numba.pool(rows.data_ptr(), *rows.shape, *rows.stride(), spread, buffer.numpy())
    stamp.copy_(torch.tensor([flags[FORWARDS], samples, 1]))


register(
    "pool(Tensor x, SymInt samples, int channel, bool spread, Tensor? mask, "
    "Tensor(a!) buffer, Tensor(b!) stamp, Tensor control)",
    cpu=pool_cpu,
    anywhere=pool_anywhere,
)
