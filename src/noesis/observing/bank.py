"""The slab of one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..internals import stays, undisturbed
from ..kernels import moments, rows, stepping
from ..kernels.layout import (
    ACTIVE,
    AVERAGES,
    BRANCH,
    CONTROL,
    COUNTS,
    ENABLED,
    EVERY,
    FOLD,
    FOLDED,
    FORWARDS,
    NUMBER,
    OBSERVED,
    SEQUENCE,
    SLOT,
    STEP,
    TIMESTEP,
)
from ..kernels.moments import scratch
from ..kernels.runtime import as_array, by_value, from_value
from ..numerics import Floats
from .route_bank import RouteBank

#: Steps that the CPU adds to the totals at a time once the ring is full, and rows, which bound the scratch memory.
LARGEST_FOLD = 64
FOLDED_ROWS = 1 << 14


class Bank:
    """The slab of one device and the control block that says where its rows go."""

    def __init__(self, device: torch.device, layers: int, fields: int, capacity: int, samples: int, every: int) -> None:
        self.device = device
        self.device_type = device.type  # making this string takes longer than what it is asked for
        wide = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64
        # Outside inference mode, whoever calls: inference tensors could not be written to later.
        with undisturbed(), torch.inference_mode(False):
            slots = fields + len(COUNTS)
            self.slab = torch.zeros(capacity + 1, 1 + samples, layers, slots, dtype=torch.float32, device=device)
            self.totals = torch.zeros(1 + samples, layers, fields + AVERAGES, dtype=wide, device=device)
            self.steps = torch.zeros(capacity, STEP, dtype=wide, device=device)
            self.control = torch.zeros(CONTROL, dtype=torch.int64, device=device)
            self.scratch = scratch(device, fields)
            self.no_timestep = torch.full((), torch.nan, dtype=wide, device=device)
            self.control[EVERY] = every
            self.control[FOLD] = self._fold() if device.type == "cpu" else 1  # other kernels add one step at a time
            self.control[SLOT] = capacity  # the row that gathers what is called between forwards
            self.control[ENABLED] = self.control[ACTIVE] = 1
            self.sample_timesteps = torch.full((capacity + 1, samples), torch.nan, dtype=wide, device=device)
            for tensor in (self.slab, self.totals, self.steps, self.control, self.scratch, self.no_timestep):
                stays(tensor)
            self._view()
        self.active_before: Tensor | int = 1
        self.routes: RouteBank | None = None

    @property
    def capacity(self) -> int:
        """Steps the ring holds."""
        return self.steps.shape[0]

    @property
    def samples(self) -> int:
        """Samples there is room for; 0 without per-sample rows."""
        return self.totals.shape[0] - 1

    def _fold(self) -> int:
        """Steps to add to the totals at a time: many where they are small."""
        _, room, layers, _ = self.slab.shape
        return max(1, min(self.capacity, LARGEST_FOLD, FOLDED_ROWS // (room * layers)))

    def _view(self) -> None:
        found = [as_array(tensor) for tensor in (self.slab, self.totals, self.steps, self.control)]
        self.arrays = None if any(array is None for array in found) else tuple(found)

    def __getstate__(self) -> dict[str, Any]:
        return by_value({**self.__dict__, "arrays": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(from_value(state))
        self._view()  # copies of the arrays would no longer share memory with the tensors

    def begin(self, timestep: Tensor | float | None, branch: int, batch: int) -> None:
        """Start a step."""
        timestep, each = of_step(timestep, batch, self.no_timestep.dtype)
        if self.arrays is not None and not torch.compiler.is_compiling():
            stepping.begin_cpu(_number(timestep), branch, batch, *self.arrays)
        else:
            begin = torch.ops.noesis.begin if torch.compiler.is_compiling() else stepping.begin_anywhere
            value = self._on_device(timestep)
            begin(value, branch, batch, self.slab, self.totals, self.steps, self.control, self.scratch)
        if self.samples and not torch.compiler.is_compiling():
            self._keep_each(each)
        if self.routes is not None:
            self.routes.begin(self.control)

    def _keep_each(self, each: Tensor | None) -> None:
        """The timesteps of the step's samples, NaN where they have none of their own."""
        room = self.sample_timesteps.shape[1]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if each is not None and len(each) > room and not capturing:  # a graph writes to where the tensor was
            self._widen(len(each))
            room = len(each)
        row = self.sample_timesteps.new_full((1, room), torch.nan)  # also of none: the ring holds those of an old step
        if each is not None:
            row[0, : len(each)] = each[:room]
        self.sample_timesteps.index_copy_(0, self.control[SLOT : SLOT + 1], row)

    def _widen(self, samples: int) -> None:
        old = self.sample_timesteps
        with torch.inference_mode(False):  # see above
            self.sample_timesteps = old.new_full((len(old), samples), torch.nan)
            self.sample_timesteps[:, : old.shape[1]].copy_(old)

    def describe(self, timestep: Tensor | float | None, branch: int, batch: int) -> None:
        """Say what is known of the latest step, which began before it was known."""
        timestep, _ = of_step(timestep, batch, self.no_timestep.dtype)
        if self.arrays is not None:
            steps, control = self.arrays[2:]
            if control[ACTIVE]:
                steps[(control[OBSERVED] - 1) % self.capacity, TIMESTEP:] = _number(timestep), branch, batch
            return
        slot = ((self.control[OBSERVED] - 1) % self.capacity).reshape(1)
        known = self.steps[slot]
        described = torch.full_like(known, batch)
        described[:, NUMBER], described[:, TIMESTEP] = known[:, NUMBER], self._on_device(timestep)
        described[:, BRANCH] = branch
        # Whether this forward is observed is known on the device, and asking would wait for it.
        self.steps[slot] = torch.where(self.control[ACTIVE] > 0, described, known)

    def _on_device(self, timestep: Tensor | float | None) -> Tensor:
        if isinstance(timestep, Tensor):
            return timestep.to(self.no_timestep.dtype)
        if timestep is None:
            return self.no_timestep
        # Not torch.full, of which compiled code would make one graph per value.
        return torch.zeros((), dtype=self.no_timestep.dtype, device=self.device) + timestep

    def end(self) -> None:
        """End a step: what is called from now on belongs to the next one."""
        if torch.compiler.is_compiling():
            torch.ops.noesis.end(self.control, self.capacity)
        elif self.arrays is not None:
            stepping.end(self.arrays[3], self.capacity)
        else:
            stepping.end_anywhere(self.control, self.capacity)

    def observe(self, x: Tensor, index: int, place: Tensor, samples: int, count_zeros: bool) -> None:
        """Merge a tensor into the row of layer `index`, which `place` holds on the device."""
        if self.arrays is not None:  # by index, past the dispatcher, which would cost more than small tensors do
            moments.observe_cpu(x.detach(), index, samples, count_zeros, self.arrays[0], self.arrays[3])
        else:
            moments.observe_anywhere(x, place, samples, count_zeros, self.slab, self.control, self.scratch)

    def emit(self, x: Tensor, place: Tensor, samples: int, count_zeros: bool) -> None:
        """The same in compiled code."""
        torch.ops.noesis.moments(x.detach(), place, samples, count_zeros, self.slab, self.control, self.scratch)

    def switch(self, enabled: bool) -> None:
        """Set the flags that the kernels look at."""
        if enabled:
            self.control[ENABLED], self.control[ACTIVE] = 1, self.active_before
        else:
            self.active_before = self.control[ACTIVE].clone()  # a forward that `every` leaves out stays left out
            self.control[ENABLED] = self.control[ACTIVE] = 0
        if self.routes is not None:
            self.routes.interrupt()

    def grow(self, samples: int) -> None:
        """Make room for more samples; what is held stays."""
        with torch.inference_mode(False):
            for name, dim in (("slab", 1), ("totals", 0)):
                old = getattr(self, name)
                shape = list(old.shape)
                shape[dim] = 1 + samples
                new = torch.zeros(shape, dtype=old.dtype, device=old.device)
                new.narrow(dim, 0, old.shape[dim]).copy_(old)
                setattr(self, name, stays(new))
        self.control[FOLD] = self.control[FOLD].clamp(max=self._fold())
        self._view()

    def clear(self) -> None:
        """Forget all steps; the tensors stay where compiled code and graphs know them."""
        for tensor in (self.slab, self.totals, self.steps, self.scratch):
            tensor.zero_()
        self.sample_timesteps.fill_(torch.nan)
        for field in (FORWARDS, OBSERVED, SEQUENCE, FOLDED):
            self.control[field] = 0
        self.control[SLOT], self.control[ACTIVE] = self.capacity, self.control[ENABLED]
        if self.routes is not None:
            self.routes.clear()

    def beside(self, device: torch.device) -> Bank:
        """An empty bank on another device, at the same step."""
        layers = self.slab.shape[2]
        bank = Bank(device, layers, rows.width(self.slab), self.capacity, self.samples, 1)
        bank.control.copy_(self.control)
        bank.routes = None if self.routes is None else self.routes.beside(device)
        return bank

    def state(self) -> tuple[Floats, NDArray[np.int64]]:
        """What is known of each step, and the control block, on the host."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # rows may have been written on any stream
        steps, control = (tensor.detach().cpu().numpy() for tensor in (self.steps, self.control))
        return steps.astype(np.float64), control.copy()

    def held(self, slots: list[int] | None = None) -> Floats:
        """Rows [slots, rows, layers, fields] on the host; of all capacity + 1 slots by default."""
        slab = self.slab.detach()
        packed = (slab if slots is None else slab[slots]).cpu().numpy()
        unpacked: Floats = rows.unpack(packed, np.zeros((*packed.shape[:-1], rows.width(packed))))
        return unpacked


def _number(timestep: Tensor | float | None) -> float:
    return np.nan if timestep is None else float(timestep)


def of_step(
    timestep: Tensor | float | None, batch: int, dtype: torch.dtype
) -> tuple[Tensor | float | None, Tensor | None]:
    """The timestep of a step [], NaN where its samples have different ones, and those of its samples [batch].

    A sample whose tokens or frames have timesteps of their own (a conditioned frame has 0) has the largest of them.
    Where all are one number that was repeated, or there is one, samples have none of their own.
    """
    if not isinstance(timestep, Tensor):
        return timestep, None
    timestep = timestep.detach()
    if timestep.numel() == 1 or not any(timestep.stride()):  # pipelines expand it over the batch
        return timestep.reshape(-1)[0], None
    samples = batch if batch and timestep.numel() % batch == 0 else 1
    each = timestep.to(dtype).reshape(samples, -1).amax(1)  # there are integers that torch finds no largest of
    largest = each.amax()
    return torch.where(each.amin() == largest, largest, torch.nan), each


def places_of(device: torch.device, layers: int) -> list[Tensor]:
    """A tensor for each layer that says which it is, on the device."""
    with undisturbed(), torch.inference_mode(False):
        return [stays(index.clone()) for index in torch.arange(layers, device=device)]
