"""The ring of steps: where the current step's rows go, and what becomes of the oldest.

State of a bank, all on one device and only ever changed in place:

| tensor | shape | what |
|---|---|---|
| `slab` | float32 [capacity + 1, rows, layers, SLOTS] | packed rows; the last entry gathers calls made between steps |
| `totals` | float64 [rows, layers, TOTALS] | the oldest steps, merged: those that left the ring, and maybe some more |
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

from .. import rows
from ..dispatch import CONTROL, has_triton, register
from ..rows import CALLS, COUNT, FIELDS, MEAN, STD

#: Forwards counted, steps observed, the flags that tell a layer where its row goes, if anywhere, calls
#: since the step began, or since the last one ended, steps that are in the totals, and how many to add
#: to them at a time once the ring is full (on the CPU, where one call for many costs as much as for one).
FORWARDS, OBSERVED, EVERY, ENABLED, ACTIVE, SLOT, SEQUENCE, FOLDED, FOLD = range(CONTROL)
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


def add_steps(totals: Any, steps: Any, xp: Any = np) -> Any:
    """Totals [rows, layers, TOTALS] with more steps [K, rows, layers, FIELDS]; their row 0 becomes the whole."""
    steps = with_whole(steps.swapaxes(0, 1), xp).swapaxes(0, 1)
    alone = xp.zeros_like(totals) + xp.zeros_like(steps[..., :1])
    alone[..., : len(FIELDS)] = steps
    alone[..., STEPS] = steps[..., COUNT] > 0
    alone[..., SUM_MEAN] = steps[..., MEAN]
    alone[..., SUM_STD] = rows.sample_std(steps[..., STD], steps[..., COUNT], xp)
    return merge_totals(xp.concatenate([totals[None], alone]), xp)


def with_whole(step: Any, xp: Any = np) -> Any:
    """Rows [rows, ..., layers, FIELDS] with the remainder in row 0 replaced, in place, by the whole of all rows."""
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
    oldest = rows.unpack(current, torch.zeros_like(totals[None, ..., : len(FIELDS)]))
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
    """The same on the CPU."""
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
            totals[...] = add_steps(totals, rows.unpack(held, np.zeros((*held.shape[:-1], len(FIELDS)))))
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


def begin_anywhere(
    timestep: Tensor,
    branch: int,
    batch: int,
    slab: Tensor,
    totals: Tensor,
    steps: Tensor,
    control: Tensor,
    scratch: Tensor,
) -> None:
    """Start a step: by the Triton kernel where there is one for this device."""
    if has_triton(control.device):
        from ._triton import begin_triton

        begin_triton(timestep, branch, batch, slab, totals, steps, control, scratch)
    else:
        begin_reference(timestep, branch, batch, slab, totals, steps, control)


def end_anywhere(control: Tensor, capacity: int) -> None:
    """End a step: by the Triton kernel where there is one for this device."""
    if has_triton(control.device):
        from ._triton import end_triton

        end_triton(control, capacity)
    else:
        end(control, capacity)


def _begin_op_cpu(
    timestep: Tensor,
    branch: int,
    batch: int,
    slab: Tensor,
    totals: Tensor,
    steps: Tensor,
    control: Tensor,
    _scratch: Tensor,
) -> None:
    begin_cpu(float(timestep), branch, batch, slab.numpy(), totals.numpy(), steps.numpy(), control.numpy())


register(
    "begin(Tensor timestep, int branch, SymInt batch, "
    "Tensor(a!) slab, Tensor(b!) totals, Tensor(c!) steps, Tensor(d!) control, Tensor(e!) scratch)",
    cpu=_begin_op_cpu,
    anywhere=begin_anywhere,
)


def _end_op_cpu(control: Tensor, capacity: int) -> None:
    end(control.numpy(), capacity)


register("end(Tensor(a!) control, int capacity)", cpu=_end_op_cpu, anywhere=end_anywhere)
