"""Banks on the host: steps in order, rows merged over devices, totals of the whole run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..internals import undisturbed
from ..kernels import layout, rows
from ..kernels.layout import FOLDED, FORWARDS, OBSERVED
from ..kernels.stepping import Clock, add_steps, merge_totals, with_whole
from ..numerics import Floats
from .bank import Bank


@dataclass(frozen=True)
class Reading:
    """Everything a recorder knows, on the host."""

    steps: Floats  # [steps, KNOWN]
    rows: Floats  # [steps, 1 + samples, layers, fields]; entry 0 is the whole, not the remainder
    totals: Floats  # [1 + samples, layers, fields + AVERAGES], over all steps of the run
    dropped: int  # steps the ring no longer holds
    forwards: int  # that have begun
    timesteps: Floats  # [steps, samples], NaN where a sample has none of its own

    def without_samples(self, names: list[str]) -> list[str]:
        """Those of the layers that have rows of the whole, and of no sample."""
        called = self.totals[..., layout.CALLS] > 0
        without = called[0] & ~called[1:].any(0)
        return [name for name, lacking in zip(names, without, strict=True) if lacking]


def read_banks(banks: list[Bank], clock: Clock, since: int | None = None) -> Reading:
    """Everything known, merged over the banks, or of forward `since` and later ones; waits for the device."""
    with undisturbed():
        states = [bank.state() for bank in banks]
        (steps, control), capacity = states[0], len(states[0][0])
        for others, _ in states[1:]:  # each forward's timestep is on the bank of its device
            steps = np.where(np.isnan(steps), others, steps)
        observed, folded = int(control[OBSERVED]), int(control[FOLDED])
        dropped = max(0, observed - capacity)
        slots = [number % capacity for number in range(dropped, observed)]
        if since is not None:
            slots = [slot for slot in slots if steps[slot, layout.NUMBER] >= since]
        samples = max(bank.samples for bank in banks)
        fetched = [_padded(bank.held(None if since is None else [*slots, capacity]), 1, samples) for bank in banks]
        totals = np.stack([_padded(bank.totals.cpu().numpy().astype(np.float64), 0, samples) for bank in banks])
        timesteps = np.full((capacity + 1, samples), np.nan)
        for bank in banks:
            own = bank.sample_timesteps[:, :samples].cpu().numpy()
            there = timesteps[:, : own.shape[1]]
            there[...] = np.where(np.isnan(own), there, own)
    every_row = rows.combine(np.stack(fetched))
    clock.settle(int(control[FORWARDS]))
    steps = np.concatenate([steps[slots], [[control[FORWARDS], np.nan, -1, 0]]])
    steps = np.column_stack([steps, clock.seconds(steps[:, layout.NUMBER])])
    held = every_row[[*slots, capacity]] if since is None else every_row
    late = since is not None and since > control[FORWARDS]
    if late or not held[-1, ..., layout.CALLS].any():  # nothing was called since the last forward ended
        steps, held = steps[:-1], held[:-1]
    if since is not None:
        dropped, folded, totals = observed - len(slots), 0, np.zeros_like(totals)
    fresh = max(0, folded - dropped)
    whole = add_steps(merge_totals(totals), held[fresh:])
    with_whole(held[:fresh].swapaxes(0, 1))
    timesteps = np.concatenate([timesteps[slots], timesteps[:1] * np.nan])[: len(steps)]
    return Reading(steps, held, whole, dropped, int(control[FORWARDS]), timesteps)


def _padded(array: Floats, axis: int, samples: int) -> Floats:
    widths = [(0, 1 + samples - size if dim == axis else 0) for dim, size in enumerate(array.shape)]
    return np.pad(array, widths)
