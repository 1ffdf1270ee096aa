"""The ring of steps: where the current step's rows go, and what becomes of the oldest.

State of a bank, all on one device and only ever changed in place:

| tensor | shape | what |
|---|---|---|
| `slab` | float32 [capacity + 1, rows, layers, SLOTS] | packed rows; the last entry gathers calls made between steps |
| `totals` | float64 [rows, layers, TOTALS] | the oldest steps, merged: those that left the ring, and maybe some more |
| `steps` | float64 [capacity, STEP] | what is known of each step |
| `control` | int64 [CONTROL] | cursor and flags |

`rows` is 1, or 1 + samples: row 0 holds what cannot be told apart by sample. SLOTS and TOTALS follow from the number of
fields of a row, see `layout`.
"""

from __future__ import annotations

from time import perf_counter

from torch import Tensor

from ..dispatch import has_triton, register
from .clock import begun_compiled
from .reference import begin_cpu, begin_reference, end


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
    now = perf_counter()
    begin_cpu(float(timestep), branch, batch, slab.numpy(), totals.numpy(), steps.numpy(), control.numpy())
    begun_compiled(control, now)


def _begin_op_anywhere(
    timestep: Tensor,
    branch: int,
    batch: int,
    slab: Tensor,
    totals: Tensor,
    steps: Tensor,
    control: Tensor,
    scratch: Tensor,
) -> None:
    now = perf_counter()
    begin_anywhere(timestep, branch, batch, slab, totals, steps, control, scratch)
    begun_compiled(control, now)


register(
    "begin(Tensor timestep, int branch, SymInt batch, "
    "Tensor(a!) slab, Tensor(b!) totals, Tensor(c!) steps, Tensor(d!) control, Tensor(e!) scratch)",
    cpu=_begin_op_cpu,
    anywhere=_begin_op_anywhere,
)


def _end_op_cpu(control: Tensor, capacity: int) -> None:
    end(control.numpy(), capacity)


register("end(Tensor(a!) control, int capacity)", cpu=_end_op_cpu, anywhere=end_anywhere)
