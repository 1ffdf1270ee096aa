"""The norms in plain torch ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...internals import norms_of

#: Rows of what is found.
VALUE, GRADIENT, UPDATE = range(3)
#: Elements of which differences are held at a time, which bounds the scratch memory.
CHUNK = 1 << 24
#: The same on the CPU, where they stay in the cache.
BLOCK = 1 << 15
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def observe_reference(
    now: Sequence[Tensor | None], gradients: Sequence[Tensor | None], before: Sequence[Tensor | None], found: Tensor
) -> None:
    """The norms of tensors of any device, in few launches; see `op.observe`."""
    none = found.new_zeros(())
    norms = [[none] * len(now) for _ in (VALUE, GRADIENT, UPDATE)]
    for values in _chunks(now):
        given = {i: gradient for i in values if (gradient := gradients[i]) is not None}
        old = {i: tensor for i in values if (tensor := before[i]) is not None}
        # The difference of two half-precision numbers needs more digits than they have.
        wide = {i: values[i].float() if values[i].element_size() < 4 else values[i] for i in old}
        updates = {i: wide[i] - old[i] for i in old}
        for row, tensors in zip(norms, (values, given, updates), strict=True):
            for i, norm in zip(tensors, norms_of(list(tensors.values()), found.dtype), strict=True):
                row[i] = norm
        for i, tensor in old.items():
            tensor.copy_(values[i])
    if now:
        found.copy_(torch.stack([torch.stack(row) for row in norms]))


def _chunks(tensors: Sequence[Tensor | None]) -> Iterator[dict[int, Tensor]]:
    """Those that are there by their positions, some of one dtype at a time."""
    chunk: dict[int, Tensor] = {}
    held = 0
    for i, x in enumerate(tensors):
        if x is None:
            continue
        if chunk and (held + x.numel() > CHUNK or x.dtype != next(iter(chunk.values())).dtype):
            yield chunk
            chunk, held = {}, 0
        chunk[i] = x
        held += x.numel()
    if chunk:
        yield chunk


def observe_cpu_reference(x: Tensor, gradient: Tensor | None, old: Tensor | None) -> tuple[float, float, float]:
    """The three norms of one tensor on the CPU, in float64; `.item()` waits for no device here."""
    values = gradients = updates = 0.0
    if gradient is not None:
        gradients = sum(_squares(part.double()) for part in gradient.reshape(-1).split(BLOCK))
    parts = x.reshape(-1).split(BLOCK)
    for part, part_old in zip(parts, parts if old is None else old.reshape(-1).split(BLOCK), strict=True):
        wide = part.double()
        values += _squares(wide)
        if old is not None:
            updates += _squares(wide - part_old.double())
    if old is not None:
        old.copy_(x)
    return math.sqrt(values), math.sqrt(gradients), math.sqrt(updates)


def _squares(x: Tensor) -> float:
    return float(torch.dot(x, x).item())


def same_memory(x: Tensor, gradient: Tensor | None, old: Tensor | None) -> bool:
    """Whether elements lie one after the other, and those that belong together at the same place."""
    dense, form = True, _CHANNELS_LAST.get(x.dim())
    for tensor in (x, gradient, old):
        if tensor is not None:
            if tensor.is_neg():  # a view with a flag for its sign, which the memory does not show
                return False
            dense = dense and tensor.is_contiguous()
    return dense or (
        form is not None
        and all(tensor is None or tensor.is_contiguous(memory_format=form) for tensor in (x, gradient, old))
    )
