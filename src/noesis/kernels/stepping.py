"""The ring of steps: where the current step's rows go, and what becomes of the oldest.

State of a bank, all on one device and only ever changed in place:

| tensor | shape | what |
|---|---|---|
| `slab` | float32 [capacity + 1, rows, layers, SLOTS] | packed rows; the last entry gathers calls made between steps |
| `totals` | float64 [rows, layers, TOTALS] | the steps the ring no longer holds, merged |
| `steps` | float64 [capacity, STEP] | what is known of each step |
| `control` | int64 [CONTROL] | cursor and flags |

`rows` is 1, or 1 + samples: row 0 holds what cannot be told apart by sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import register, rows
from .rows import CALLS, COUNT, FIELDS, MEAN, STD

#: Forwards counted, steps kept, and the flags that tell a layer where its row goes, if anywhere.
CONTROL = 7
FORWARDS, OBSERVED, EVERY, ENABLED, ACTIVE, SLOT, SEQUENCE = range(CONTROL)
STEP = 4
NUMBER, TIMESTEP, BRANCH, BATCH = range(STEP)
#: Beside the merged row, totals hold what a soulprint averages: steps, sum of means, sum of stds.
TOTALS = len(FIELDS) + 3
STEPS, SUM_MEAN, SUM_STD = range(len(FIELDS), TOTALS)


def merge_totals(parts: Any, xp: Any = np) -> Any:
    """The totals of several disjoint sets of steps, from theirs [K, rows, layers, TOTALS]."""
    merged = xp.zeros_like(parts[0])
    merged[..., : len(FIELDS)] = rows.combine(parts[..., : len(FIELDS)], xp)
    merged[..., len(FIELDS) :] = parts[..., len(FIELDS) :].sum(0)
    return merged


def add_step(totals: Any, step: Any, xp: Any = np) -> Any:
    """Totals [rows, layers, TOTALS] with one more step [rows, layers, FIELDS], whose row 0 is the whole."""
    alone = xp.zeros_like(totals)
    alone[..., : len(FIELDS)] = step
    alone[..., STEPS] = step[..., COUNT] > 0
    alone[..., SUM_MEAN] = step[..., MEAN]
    alone[..., SUM_STD] = rows.sample_std(step[..., STD], step[..., COUNT], xp)
    return merge_totals(xp.stack([totals, alone]), xp)


def with_whole(step: Any, xp: Any = np) -> Any:
    """A step's rows [rows, layers, FIELDS] with the remainder in row 0 replaced by the whole of all rows."""
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
    full = active & (control[OBSERVED] >= capacity)
    slot = (control[OBSERVED] % capacity).reshape(1)
    control[FORWARDS] += enabled
    control[OBSERVED] += active
    control[ACTIVE] = active
    control[SLOT] = torch.where(active, slot[0], capacity)
    # The step starts from what was called since the last one ended.
    current, pending = slab[slot], slab[capacity:]
    oldest = rows.unpack(current[0], torch.zeros_like(totals[..., : len(FIELDS)]))
    totals.copy_(torch.where(full, add_step(totals, with_whole(oldest, torch), torch), totals))
    slab[slot] = torch.where(active, pending, current)
    pending.mul_(~enabled)
    control[SEQUENCE] = torch.where(active, slab[slot][..., rows.ORDER].amax().to(control.dtype), control[SEQUENCE])
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
    """The same on the CPU."""
    capacity = len(steps)
    forwards, observed, every, enabled, *_ = control.tolist()
    if not enabled:
        control[ACTIVE] = 0
        return
    active = forwards % every == 0
    control[FORWARDS] = forwards + 1
    control[ACTIVE] = active
    pending = slab[capacity]
    outside = bool(pending[..., rows.CALLS].any())
    if active:
        slot = observed % capacity
        if observed >= capacity:
            oldest = rows.unpack(slab[slot], np.zeros_like(totals[..., : len(FIELDS)]))
            totals[...] = add_step(totals, with_whole(oldest))
        control[OBSERVED] = observed + 1
        control[SLOT] = slot
        control[SEQUENCE] = int(pending[..., rows.ORDER].max()) if outside else 0
        slab[slot] = pending
        steps[slot] = (forwards, timestep, branch, batch)
    if outside:
        pending[...] = 0


def end(control: Any, capacity: int) -> None:
    """End a step: what is called from now on belongs to the next one."""
    control[ACTIVE] = control[ENABLED]
    control[SLOT] = capacity
    control[SEQUENCE] = 0


def _begin_op_cpu(
    timestep: Tensor, branch: int, batch: int, slab: Tensor, totals: Tensor, steps: Tensor, control: Tensor
) -> None:
    begin_cpu(float(timestep), branch, batch, slab.numpy(), totals.numpy(), steps.numpy(), control.numpy())


register(
    "begin(Tensor timestep, int branch, SymInt batch, "
    "Tensor(a!) slab, Tensor(b!) totals, Tensor(c!) steps, Tensor(d!) control)",
    cpu=_begin_op_cpu,
    anywhere=begin_reference,
)
register("end(Tensor(a!) control, int capacity)", cpu=end, anywhere=end)
