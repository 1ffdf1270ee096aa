"""The recorder: what a wrap keeps on its devices, and how it is read back.

A recorder is a plain object beside the model, not a set of buffers in it: nothing casts it,
broadcasts it or writes it into a checkpoint. It holds one `Bank` per device that observed layers
ran on, all with the same steps.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import NoesisError, WrongState
from ..internals.compiling import LISTENERS, stays
from ..internals.modes import undisturbed
from ..kernels import moments, rows, stepping
from ..kernels.dispatch import CONTROL, as_array, by_value, from_value, scratch
from ..kernels.routing import RouteBank
from ..kernels.rows import FIELDS, SLOTS
from ..kernels.stepping import ACTIVE, ENABLED, EVERY, FOLD, FOLDED, FORWARDS, OBSERVED, SEQUENCE, SLOT, STEP, TOTALS
from ..results.routes import Router, Routes
from ..results.trace import Trace, stats_of
from ..surprise.scorer import Channel, Coder
from .evidence import Evidence
from .switch import Switch

Floats = NDArray[np.float64]
#: Steps that the CPU adds to the totals at a time once the ring is full, and rows, which bound the scratch memory.
LARGEST_FOLD = 64
FOLDED_ROWS = 1 << 14


@dataclass(frozen=True)
class Reading:
    """Everything a recorder knows, on the host."""

    steps: Floats  # [steps, STEP]
    rows: Floats  # [steps, 1 + samples, layers, FIELDS]; entry 0 is the whole, not the remainder
    totals: Floats  # [1 + samples, layers, TOTALS], over all steps of the run
    dropped: int  # steps the ring no longer holds
    forwards: int  # that have begun


class Bank:
    """The slab of one device and the control block that says where its rows go."""

    def __init__(self, device: torch.device, layers: int, capacity: int, samples: int, every: int) -> None:
        self.device = device
        wide = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64
        # Outside inference mode, whoever calls: inference tensors could not be written to later.
        with undisturbed(), torch.inference_mode(False):
            self.slab = torch.zeros(capacity + 1, 1 + samples, layers, SLOTS, dtype=torch.float32, device=device)
            self.totals = torch.zeros(1 + samples, layers, TOTALS, dtype=wide, device=device)
            self.steps = torch.zeros(capacity, STEP, dtype=wide, device=device)
            self.control = torch.zeros(CONTROL, dtype=torch.int64, device=device)
            self.scratch = scratch(device)
            self.no_timestep = torch.full((), torch.nan, dtype=wide, device=device)
            self.control[EVERY] = every
            self.control[FOLD] = self._fold() if device.type == "cpu" else 1
            self.control[SLOT] = capacity
            self.control[ENABLED] = self.control[ACTIVE] = 1
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
        if isinstance(timestep, Tensor):
            timestep = timestep.detach().reshape(-1)[0]  # pipelines repeat it over the batch
        if self.arrays is not None and not torch.compiler.is_compiling():
            stepping.begin_cpu(np.nan if timestep is None else float(timestep), branch, batch, *self.arrays)
            return
        if isinstance(timestep, Tensor):
            value = timestep
        elif timestep is None:
            value = self.no_timestep
        else:
            # Not torch.full, of which compiled code would make one graph per value.
            value = torch.zeros((), dtype=self.no_timestep.dtype, device=self.device) + timestep
        begin = torch.ops.noesis.begin if torch.compiler.is_compiling() else stepping.begin_anywhere
        begin(value, branch, batch, self.slab, self.totals, self.steps, self.control, self.scratch)

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
        if self.arrays is not None:
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
        for field in (FORWARDS, OBSERVED, SEQUENCE, FOLDED):
            self.control[field] = 0
        self.control[SLOT], self.control[ACTIVE] = self.capacity, self.control[ENABLED]
        if self.routes is not None:
            self.routes.clear()

    def beside(self, device: torch.device) -> Bank:
        """An empty bank on another device, at the same step."""
        layers = self.slab.shape[2]
        bank = Bank(device, layers, self.capacity, self.samples, 1)
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
        """Rows [slots, rows, layers, FIELDS] on the host; of all capacity + 1 slots by default."""
        slab = self.slab.detach()
        packed = (slab if slots is None else slab[slots]).cpu().numpy()
        unpacked: Floats = rows.unpack(packed, np.zeros((*packed.shape[:-1], len(FIELDS))))
        return unpacked


class Recorder:
    """The banks of one wrap, and what the host knows of its run."""

    def __init__(
        self,
        names: list[str],
        device: torch.device,
        *,
        capacity: int,
        samples: int,
        every: int,
        stats: tuple[str, ...],
        settings: dict[str, Any],
    ) -> None:
        self.names = names
        self.stats = stats
        self.settings = settings
        self.count_zeros = "zeros" in stats
        self.per_sample = samples > 0
        self.banks = [Bank(device, len(names), capacity, samples, every)]
        # A tensor per layer and bank: a Python int would make compiled code differ from layer to layer.
        self.places: list[list[Tensor]] = [[place] for place in _places(device, len(names))]
        self.on_cuda = device.type == "cuda"
        self.every = every
        self.paused = False
        self.pauses = 0  # that have been entered and not left, in whatever order
        self.forwards = 0  # that the host has begun, to leave out what `every` leaves out without asking the device
        self.skipping = False  # inside a forward that `every` leaves out
        self.switch = Switch()
        self.on_device = False  # whether forwards may run that the host does not see: compiled, or in a CUDA graph
        self.batch: int | None = None  # of the forward that is running; None between forwards
        self.branches: list[str] = []
        self.branch: str | None = None
        self.unmeasured: dict[str, str] = {}
        self.routers: list[Router] = []
        self.unrouted: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self.base_meta: dict[str, Any] = {}
        self.given: dict[str, Any] = {}  # meta of the run that its user gave; it wins over what is found
        self.observed: list[weakref.ref[nn.Module]] = []
        self.named_run = False  # inside `with wrapped.run(...)`
        self.branch_of: Callable[[int], str | None] | None = None  # a pipeline's word on a forward with a batch
        self.coder: Coder | None = None
        self.earlier: Trace | None = None  # the totals of the run before it was resumed
        self.gradients: Recorder | None = None  # of gradients, whose steps begin with these
        self.aside: dict[torch.device, Tensor] | None = None  # a control block per device, where forwards leave no mark
        self.aside_forwards = 0
        self.evidence = Evidence()
        self._listen()

    def _listen(self) -> None:
        self.key = uuid.uuid4().hex  # a string, which compiled code takes for a constant
        LISTENERS[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observed": []}  # the modules of a copy are not these

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._listen()
        # Whoever leaves a pause, a forward or a calibration leaves that of the original.
        self.pauses, self.skipping, self.batch, self.aside = 0, False, None, None
        self.pause(False)
        self._settle()

    # ------------------------------------------------------------ hot path

    def begin(self, timestep: Tensor | float | None, batch: int) -> None:
        """A forward of the root starts."""
        if self.per_sample or self.routers or self.coder is not None:
            self.batch = batch
        if self.aside is not None:
            self.aside_forwards += 1
            return
        if torch.compiler.is_compiling():
            self.on_device = True
        else:
            self.skipping = self._leaves_out()
            self._settle()
        name = self.branch
        if name is None and not torch.compiler.is_compiling() and self.branch_of is not None:
            name = self.branch_of(batch)
            if name is not None and name not in self.branches:
                self.branches.append(name)
        branch = -1 if name is None else self.branches.index(name)
        if isinstance(timestep, Tensor) and not torch.compiler.is_compiling():
            self.bank(timestep.device)  # so that the timestep never has to leave its device
        for bank in self.banks:
            here = not isinstance(timestep, Tensor) or timestep.device == bank.device
            bank.begin(timestep if here else None, branch, batch)
            if bank.routes is not None:
                bank.routes.begin(bank.control)
        if not torch.compiler.is_compiling():
            self.forwards += 1  # now that the devices have counted it
            if self.gradients is not None:
                self.gradients.begin(None, batch)

    def end(self) -> None:
        """A forward of the root is over."""
        if not torch.compiler.is_compiling():
            self.skipping = False
            self._settle()
        if self.per_sample or self.routers or self.coder is not None:
            self.batch = None
        if self.aside is not None:
            return
        for bank in self.banks:
            bank.end()
        if self.gradients is not None and not torch.compiler.is_compiling():
            self.gradients.end()

    def observe(self, x: Tensor, index: int, places: list[Tensor]) -> None:
        """Merge what `x` holds into the row of layer `index` of the current step; `places` is `places[index]`."""
        position = self._position(x.device)
        bank = self.banks[position]
        samples = self._samples(x, bank) if self.per_sample else 0
        bank.observe(x, index, places[position], samples, self.count_zeros)

    def emit(self, x: Tensor, places: list[Tensor]) -> None:
        """The same in compiled code, which must not know the index: it would differ from layer to layer."""
        position = self._position(x.device)
        bank = self.banks[position]
        samples = self._samples(x, bank) if self.per_sample else 0
        bank.emit(x, places[position], samples, self.count_zeros)

    def keep(self, channel: Channel, x: Tensor) -> None:
        """Keep the vectors of `x` for `surprise`; calls between forwards belong to none."""
        if self.batch is None:
            return
        if torch.compiler.is_compiling():
            channel.emit(x, self.batch, self.bank(x.device).control)
            return
        try:
            channel.observe(x, self.batch, self._control(x.device))
        except NoesisError as error:
            channel.drop(str(error))
        except Exception as error:  # whatever an output may be, the model goes on
            channel.drop(f"{type(error).__name__}: {error}")

    def _control(self, device: torch.device) -> Tensor:
        if self.aside is None:
            return self.bank(device).control
        control = self.aside.get(device)
        if control is None:
            control = self.aside[device] = torch.ones(CONTROL, dtype=torch.int64, device=device)
        control[FORWARDS] = self.aside_forwards
        return control

    def route(self, logits: Tensor, indices: Tensor, router: int) -> None:
        """Count where a router sent its tokens."""
        bank = self.bank(logits.device)
        if bank.routes is not None:
            bank.routes.observe(logits, indices, self.batch or 0, router, bank.control)

    def bank(self, device: torch.device) -> Bank:
        """The bank of a device, made when the first layer runs there."""
        return self.banks[self._position(device)]

    def go_to(self, devices: set[torch.device]) -> None:
        """Have banks where the model was moved to: compiled code could not make them."""
        for device in devices:
            if device.type != "meta":
                self.bank(device)
        if self.gradients is not None:
            self.gradients.go_to(devices)

    def _position(self, device: torch.device) -> int:
        for position, bank in enumerate(self.banks):
            if bank.device == device:
                return position
        self.banks.append(self.banks[0].beside(device))
        self.on_cuda = self.on_cuda or device.type == "cuda"
        self._settle()
        for places, place in zip(self.places, _places(device, len(self.names)), strict=True):
            places.append(place)
        for bank in self.banks:
            bank.control[FOLD] = 1  # the totals of all hold the same steps
        return len(self.banks) - 1

    def _leaves_out(self) -> bool:
        """Whether this forward is none of the n-th, as far as the host can know."""
        if self.capturing():
            self.on_device = True  # a graph asks the device at every replay
        return not self.on_device and self.forwards % self.every != 0

    def _samples(self, x: Tensor, bank: Bank) -> int:
        """How many samples `x` can be told apart into; 0 when its first dimension is not of the batch."""
        length = x.shape[0] if x.dim() else 0
        batch = self.batch or length
        if not length or length % batch:
            return 0
        if batch > bank.samples and not torch.compiler.is_compiling() and self._may_grow(bank):
            bank.grow(batch)  # otherwise the kernel says that there is no room
        return batch

    def _may_grow(self, bank: Bank) -> bool:
        """Whether the slab may move: not under a CUDA graph, which writes to where it was."""
        return not (bank.device.type == "cuda" and (self.on_device or self.capturing()))

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, which runs again without the host."""
        return self.on_cuda and torch.cuda.is_current_stream_capturing()

    def traced(self, exporting: bool) -> None:
        """Dynamo traces the model, whose next forward will run compiled."""
        if exporting:
            self.evidence.passed_by("traced by torch.export")
        elif not self.paused and self.aside is None:
            self.evidence.compiled_at = self.forwards

    def returned(self) -> None:
        """The container was called, and the model returned."""
        if not self.paused and self.aside is None:
            self.evidence.calls += 1

    # ------------------------------------------------------------ control and reading

    def pause(self, paused: bool) -> None:
        """Stop observing, or go on."""
        if paused == self.paused:
            return
        self.paused = paused
        self._settle()
        with undisturbed():
            for bank in self.banks:
                bank.switch(not paused)
        if self.gradients is not None:
            self.gradients.pause(paused)

    def _settle(self) -> None:
        """Say whether layers are passed by."""
        off = (self.paused or self.skipping) and self.aside is None
        self.switch.turn(off, cuda=self.on_cuda, gradients=self.gradients is not None)

    @contextmanager
    def no_mark(self) -> Iterator[None]:
        """Forwards inside are no steps; their vectors are kept until the next one, and forgotten at the end."""
        before = self.aside
        try:
            self.aside, self.aside_forwards = {}, 0
            self._settle()
            if self.coder is not None:
                self.coder.forget()  # forwards are counted anew, and are none of those before
            yield
        finally:
            self.aside, self.batch = before, None
            self._settle()
            if self.coder is not None:
                self.coder.forget()

    def set_every(self, every: int) -> None:
        """Observe every n-th forward from now on; compiled code and graphs read it on the device."""
        with undisturbed():
            for bank in self.banks:
                bank.control[EVERY] = every
        self.every = self.settings["every"] = every
        if self.gradients is not None:
            self.gradients.set_every(every)

    def reset(self, meta: dict[str, Any]) -> None:
        """Forget the run and start another one."""
        with undisturbed():
            for bank in self.banks:
                bank.clear()
        self.forwards = 0
        self.evidence = self.evidence.afresh()
        if self.coder is not None:
            self.coder.forget()
        self.unmeasured.clear()
        self.unrouted.clear()
        self.branches.clear()
        self.branch = None
        if self.gradients is not None:
            self.gradients.reset(meta)
        self.earlier = None
        self.given = meta
        self.meta = {"run": uuid.uuid4().hex[:12], **self.base_meta, **meta}

    def follow(self, routers: list[Router]) -> None:
        """Count what these layers choose, from now on."""
        self.routers = routers
        if routers:
            experts = max(router.experts for router in routers)
            with undisturbed():
                for bank in self.banks:
                    bank.routes = RouteBank(bank.device, len(routers), experts, bank.capacity)

    def set_branch(self, branch: str | None) -> None:
        """Name the guidance branch of the forwards to come."""
        if branch is not None and branch not in self.branches:
            self.branches.append(branch)
        self.branch = branch

    def counted(self) -> tuple[int, int]:
        """Forwards that have begun in this run, and how many of them were observed; waits for the device."""
        with undisturbed():
            _, control = self.banks[0].state()
        return int(control[FORWARDS]), int(control[OBSERVED])

    def read(self, since: int | None = None) -> Reading:
        """Everything known, merged over the banks, or of forward `since` and later ones; waits for the device."""
        with undisturbed():
            states = [bank.state() for bank in self.banks]
            (steps, control), capacity = states[0], len(states[0][0])
            for others, _ in states[1:]:  # each forward's timestep is on the bank of its device
                steps = np.where(np.isnan(steps), others, steps)
            observed, folded = int(control[OBSERVED]), int(control[FOLDED])
            dropped = max(0, observed - capacity)
            slots = [number % capacity for number in range(dropped, observed)]
            if since is not None:
                slots = [slot for slot in slots if steps[slot, stepping.NUMBER] >= since]
            samples = max(bank.samples for bank in self.banks)
            fetched = [
                _padded(bank.held(None if since is None else [*slots, capacity]), 1, samples) for bank in self.banks
            ]
            totals = np.stack(
                [_padded(bank.totals.cpu().numpy().astype(np.float64), 0, samples) for bank in self.banks]
            )
        every_row = rows.combine(np.stack(fetched))
        steps = np.concatenate([steps[slots], [[control[FORWARDS], np.nan, -1, 0]]])
        held = every_row[[*slots, capacity]] if since is None else every_row
        late = since is not None and since > control[FORWARDS]
        if late or not held[-1, ..., rows.CALLS].any():  # nothing was called since the last forward ended
            steps, held = steps[:-1], held[:-1]
        if since is not None:
            dropped, folded, totals = observed - len(slots), 0, np.zeros_like(totals)
        fresh = max(0, folded - dropped)
        whole = stepping.add_steps(stepping.merge_totals(totals), held[fresh:])
        stepping.with_whole(held[:fresh].swapaxes(0, 1))
        return Reading(steps, held, whole, dropped, int(control[FORWARDS]))

    def routes(self) -> Routes:
        """What the routers chose."""
        if not self.routers:
            raise WrongState(
                "No router is observed", "a model whose routers were selected", 'Pass wrap(..., layers="routers")'
            )
        steps, control = (tensor.cpu().numpy() for tensor in (self.banks[0].steps, self.banks[0].control))
        counted = [bank.routes for bank in self.banks if bank.routes is not None]
        return Routes.read(self.routers, counted, steps, control, unmeasured=self.unrouted, meta=self.meta)

    @np.errstate(over="ignore", invalid="ignore")  # rows of float64 outputs may hold infinities
    def trace(self, since: int | None = None) -> Trace:
        """What is known, as a trace, or of forward `since` and later ones alone, which reads no more than these."""
        reading, stats = self.read(since), self.stats
        lost = self.evidence.left_no_mark(reading.forwards, self.forwards)
        if lost is not None:
            self.evidence.say(lost)
        named: list[str | None] = [*self.branches, None]  # -1 stands for no branch

        def one(row: int) -> Trace:
            fields, totals = reading.rows[:, row], reading.totals[row]
            return Trace(
                values=stats_of(fields, stats),
                layers=list(self.names),
                stats=stats,
                steps=reading.steps[:, stepping.NUMBER].astype(np.int64),
                order=fields[..., rows.ORDER].astype(np.int64),
                calls=fields[..., rows.CALLS].astype(np.int64),
                totals=stats_of(totals[:, : len(rows.FIELDS)], stats),
                averages=totals[:, len(rows.FIELDS) :],
                timesteps=reading.steps[:, stepping.TIMESTEP],
                batches=reading.steps[:, stepping.BATCH].astype(np.int64),
                branches=[named[int(code)] for code in reading.steps[:, stepping.BRANCH]],
                dropped_steps=reading.dropped,
                unmeasured=dict(self.unmeasured),
                meta=dict(self.meta),
            )

        whole = one(0)
        if lost is not None:
            whole.unmeasured = {**dict.fromkeys(self.names, lost), **whole.unmeasured}
        if self.per_sample:
            used = (reading.totals[1:, :, stepping.STEPS] > 0).any(1).sum()
            whole.samples = [one(1 + sample) for sample in range(int(used))]
        return whole


def _places(device: torch.device, layers: int) -> list[Tensor]:
    with undisturbed(), torch.inference_mode(False):
        return [stays(index.clone()) for index in torch.arange(layers, device=device)]


def _padded(array: Floats, axis: int, samples: int) -> Floats:
    widths = [(0, 1 + samples - size if dim == axis else 0) for dim, size in enumerate(array.shape)]
    return np.pad(array, widths)
