"""Norms of many tensors of one device, asked for between forwards, and so not registered for compiled code.

Doors with one meaning: a reference in torch ops that never waits for the device, and for the CPU one read of each
tensor in `_numba`, which is imported late.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..dispatch import by_numba
from .reference import GRADIENT, UPDATE, VALUE, observe_cpu_reference, observe_reference, same_memory

__all__ = ["GRADIENT", "UPDATE", "VALUE", "observe"]


def observe(
    now: Sequence[Tensor | None], gradients: Sequence[Tensor | None], before: Sequence[Tensor | None], found: Tensor
) -> None:
    """Write the norms of some tensors, and leave in `before` what they are now.

    Args:
        now: floating tensors of one device, or None where there is none to measure.
        gradients: of each, or None.
        before: what each was, with its shape, dtype and device, or None.
        found: float64 [3, tensors] (float32 where a device has no other) on that device, for `VALUE`, `GRADIENT` and
            `UPDATE`; 0 where there is none. NaN or infinite where an element is.
    """
    if found.device.type != "cpu":
        observe_reference(now, gradients, before, found)
        return
    numba, rows = by_numba("norms"), found.numpy()
    kinds = {} if numba is None else numba.KINDS
    jobs: list[tuple[int, ...]] = []  # for one call of the kernel
    for index, (x, gradient, old) in enumerate(zip(now, gradients, before, strict=True)):
        if x is None:
            rows[:, index] = 0
            continue
        kind = kinds.get(x.dtype, -1)
        gradient_kind = kind if gradient is None else kinds.get(gradient.dtype, -1)
        if min(kind, gradient_kind) < 0 or not same_memory(x, gradient, old):
            rows[:, index] = observe_cpu_reference(x, gradient, old)
            continue
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (x, gradient, old))
        jobs.append((*addresses, x.numel(), kind, gradient_kind, index))
    if jobs:
        numba.observe(np.array(jobs), rows)
