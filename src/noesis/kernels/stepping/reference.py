"""Beginning and ending a step: in plain torch ops that never wait for the device, and on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import rows
from ..layout import (
    ACTIVE,
    AVERAGES,
    BRANCH,
    CALLS,
    COUNT,
    ENABLED,
    EVERY,
    FOLDED,
    FORWARDS,
    MEAN,
    NUMBER,
    OBSERVED,
    SEQUENCE,
    SLOT,
    STD,
    STEPS,
    SUM_MEAN,
    SUM_STD,
    TIMESTEP,
)


def merge_totals(parts: Any, xp: Any = np) -> Any:
    """The totals of several disjoint sets of steps, from theirs [K, rows, layers, TOTALS]."""
    merged = xp.zeros_like(parts[0])
    merged[..., :-AVERAGES] = rows.combine(parts[..., :-AVERAGES], xp)
    merged[..., -AVERAGES:] = parts[..., -AVERAGES:].sum(0)
    return merged


def add_steps(totals: Any, steps: Any, xp: Any = np) -> Any:
    """Totals [rows, layers, TOTALS] with more steps [K, rows, layers, fields]; their row 0 becomes the whole."""
    steps = with_whole(steps.swapaxes(0, 1), xp).swapaxes(0, 1)
    alone = xp.zeros_like(totals) + xp.zeros_like(steps[..., :1])
    alone[..., :-AVERAGES] = steps
    alone[..., STEPS] = steps[..., COUNT] > 0
    alone[..., SUM_MEAN] = steps[..., MEAN]
    alone[..., SUM_STD] = rows.sample_std(steps[..., STD], steps[..., COUNT], xp)
    return merge_totals(xp.concatenate([totals[None], alone]), xp)


def with_whole(step: Any, xp: Any = np) -> Any:
    """Rows [rows, ..., layers, fields] with the remainder in row 0 replaced, in place, by the whole of all rows."""
    # One call fills a row per sample, or the remainder: not as many calls as rows.
    calls = step[0, ..., CALLS] + (xp.amax(step[1:, ..., CALLS], 0) if len(step) > 1 else 0)
    step[0] = rows.combine(step, xp)
    step[0, ..., CALLS] = calls
    return step


def begin_reference(
    timestep: Tensor, branch: int, batch: int, slab: Tensor, totals: Tensor, steps: Tensor, control: Tensor
) -> None:
    """Start a step, decided on the device alone."""
    capacity = steps.shape[0]
    enabled = control[ENABLED] > 0
    active = enabled & (control[FORWARDS] % control[EVERY] == 0)
    number = control[FORWARDS].clone()
    full = active & (control[OBSERVED] - control[FOLDED] >= capacity)
    slot = (control[OBSERVED] % capacity).reshape(1)
    outside = (control[SLOT] == capacity) & active
    control[FORWARDS] += enabled
    control[OBSERVED] += active
    control[FOLDED] += full
    control[ACTIVE] = active
    control[SLOT] = torch.where(active, slot[0], torch.where(enabled, capacity, control[SLOT]))
    control[SEQUENCE] *= torch.where(enabled, outside, True)
    # The step starts from what was called since the last one ended.
    current, pending = slab[slot], slab[capacity:]
    oldest = rows.unpack(current, torch.zeros_like(totals[None, ..., :-AVERAGES]))
    totals.copy_(torch.where(full, add_steps(totals, oldest, torch), totals))
    slab[slot] = torch.where(active, pending, current)
    pending.mul_(~enabled)
    described = torch.full_like(steps[slot], batch)
    described[:, NUMBER] = number
    described[:, TIMESTEP] = timestep
    described[:, BRANCH] = branch
    steps[slot] = torch.where(active, described, steps[slot])


def begin_cpu(
    timestep: float,
    branch: int,
    batch: int,
    slab: NDArray[np.float32],
    totals: NDArray[np.float64],
    steps: NDArray[np.float64],
    control: NDArray[np.int64],
) -> None:
    """Start a step on the CPU, whose numbers can be read at once."""
    capacity = len(steps)
    forwards, observed, every, enabled, _, slot, sequence, folded, fold = control.tolist()
    if not enabled:
        control[ACTIVE] = 0
        return
    active = forwards % every == 0
    outside = slot == capacity and sequence > 0
    slot = observed % capacity if active else capacity
    if active and observed - folded >= capacity:
        held = slab[[step % capacity for step in range(folded, folded + fold)]]
        with np.errstate(over="ignore", invalid="ignore"):  # rows of float64 outputs may hold infinities
            totals[...] = add_steps(totals, rows.unpack(held, np.zeros((*held.shape[:-1], rows.width(held)))))
        control[FOLDED] = folded + fold
    control[FORWARDS] = forwards + 1
    control[OBSERVED] = observed + active
    control[ACTIVE] = active
    control[SLOT] = slot
    control[SEQUENCE] = sequence if active and outside else 0
    if active:
        slab[slot] = slab[capacity] if outside else 0
        steps[slot] = (forwards, timestep, branch, batch)
    if outside:
        slab[capacity] = 0


def end(control: Any, capacity: int) -> None:
    """End a step: what is called from now on belongs to the next one."""
    # While paused, or when a step inside this one has ended it, calls made since stay where they are.
    control[SEQUENCE] *= 1 - control[ENABLED] * (control[SLOT] != capacity)
    control[ACTIVE] = control[ENABLED]
    control[SLOT] = capacity
