"""The recorder: what a wrap keeps on its devices; `answers` says how it is read back.

A recorder is a plain object beside the model, not a set of buffers in it: nothing casts it,
broadcasts it or writes it into a checkpoint. It holds one `Bank` per device that observed layers
ran on, all with the same steps.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NoesisError
from ..internals import LISTENERS, set_sizes, sizes_of, times_traced, undisturbed, untraced
from ..kernels.layout import EVERY, FOLD
from ..kernels.stepping import Clock
from ..layers import Batch, Router
from ..results import Trace, fields_for
from ..surprise import Scorer
from .answers import Answers
from .bank import Bank, places_of
from .channels import Channel, Channels
from .evidence import Evidence
from .off_record import OffRecord, off_the_record
from .route_bank import RouteBank
from .stand_ins import StandIns
from .switch import Switch


class Recorder(Answers):
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
        self.banks = [Bank(device, len(names), fields_for(stats), capacity, samples, every)]
        # A tensor per layer and bank: a Python int would make compiled code differ from layer to layer.
        self.places: list[list[Tensor]] = [[place] for place in places_of(device, len(names))]
        self.on_cuda = device.type == "cuda"
        self.every = every
        self.paused = False
        self.pauses = 0  # that have been entered and not left, in whatever order
        self.clock = Clock(capacity, every)
        self.forwards = 0  # that the host has begun, to leave out what `every` leaves out without asking the device
        self.skipping = False  # inside a forward that `every` leaves out
        self.left_out = False  # whether `every` leaves out the latest step
        self.inside = False  # a forward that began a step, or goes on with one
        self.stand_ins = StandIns()
        self.switch = Switch()
        self.on_device = False  # whether forwards may run that the host does not see: compiled, or in a CUDA graph
        self.batch: Batch | None = None  # of the forward that is running; None between forwards
        self.times_traced = 0  # when the forward began
        self.branches: list[str] = []
        self.branch: str | None = None
        self.unmeasured: dict[str, str] = {}
        self.routers: list[Router] = []
        self.unrouted: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self.base_meta: dict[str, Any] = {}
        self.call_metas: list[dict[str, Any]] = []  # of each call of a pipeline in this run
        self.given: dict[str, Any] = {}  # meta of the run that its user gave; it wins over what is found
        self.observed: list[weakref.ref[nn.Module]] = []
        self.named_run = False  # inside `with wrapped.run(...)`
        self.branch_of: Callable[[int], str | None] | None = None  # a pipeline's word on a forward with a batch
        self.channels: Channels | None = None  # what is kept for surprise
        self.scorer: Scorer | None = None  # what makes scores of it
        self.earlier: Trace | None = None  # the totals of the run before it was resumed
        self.gradients: Recorder | None = None  # of gradients, whose steps begin with these
        self.weights: Any = None  # a Weights: what is measured of parameters
        self.spare: list[OffRecord] = []  # what off-the-record forwards left their vectors in, to be used again
        self.attached = True  # until its modules have their classes back
        self.family = uuid.uuid4().hex  # that copies share, to be unwrapped together
        self.evidence = Evidence()
        self._listen()

    def _listen(self) -> None:
        self.key = uuid.uuid4().hex  # a string, which compiled code takes for a constant
        LISTENERS[self.key] = self
        self.clock.follow(self.banks[0].control)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observed": [], "spare": []}  # the modules of a copy are not these

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._listen()
        # Whoever leaves a pause, a forward or a calibration leaves that of the original.
        self.pauses, self.skipping, self.inside, self.batch = 0, False, False, None
        self.pause(False)
        self._settle()

    # ------------------------------------------------------------ hot path

    def begin(self, timestep: Tensor | float | None, batch: Batch) -> bool:
        """A forward of the root starts, or of a part that is all of it; whether this is a step of its own."""
        self.size(batch)
        self.inside = True
        joins, compiling = False, torch.compiler.is_compiling()
        if compiling:
            self.on_device = True  # later forwards run without the host, and without this line
        else:
            now, capturing = perf_counter(), self.capturing()
            self._note_autocast()
            joins = self.stand_ins.joins()
            self._leave_out(self.left_out if joins else self._leaves_out(capturing))
            self.times_traced = times_traced()
        name = self.branch
        if name is None and not compiling and self.branch_of is not None:
            name = self.branch_of(batch.size)
            if name is not None and name not in self.branches:
                self.branches.append(name)
        branch = -1 if name is None else self.branches.index(name)
        if isinstance(timestep, Tensor) and not compiling:
            self.bank(timestep.device)  # so that the timestep never has to leave its device
        for bank in self.banks:  # of which those elsewhere know no timestep, which is no copy and no wait
            here = not isinstance(timestep, Tensor) or timestep.device == bank.device
            if joins:
                bank.describe(timestep if here else None, branch, batch.size)
            else:
                bank.begin(timestep if here else None, branch, batch.size)
        if not (compiling or joins):
            self._begun(batch, now, capturing)
        return not joins

    def begin_part(self, part: str, generates: bool, batch: Batch) -> bool | None:
        """A forward of a part starts by itself: whether it begins a step; None if it belongs to the model's next."""
        begins = self.stand_ins.begins(part, generates)
        if begins is None:
            return None
        self.size(batch)
        self.inside = True
        now, capturing = perf_counter(), self.capturing()
        self._note_autocast()
        self._leave_out(self._leaves_out(capturing) if begins else self.left_out)
        self.times_traced = times_traced()
        if begins:
            for bank in self.banks:
                bank.begin(None, -1, batch.size)
            self._begun(batch, now, capturing)
        return begins

    def _note_autocast(self) -> None:
        """Whoever compares runs wants to know in which dtype they computed."""
        for bank in self.banks if "autocast" not in self.meta else ():
            if torch.is_autocast_enabled(bank.device_type):
                self.meta["autocast"] = str(torch.get_autocast_dtype(bank.device_type)).removeprefix("torch.")

    def _leave_out(self, left_out: bool) -> None:
        self.skipping = self.left_out = left_out
        self._settle()
        if self.gradients is not None:
            self.gradients.skipping = left_out

    def _begun(self, batch: Batch, now: float, capturing: bool) -> None:
        self.forwards += 1  # now that the devices have counted it
        self.clock.tick(now, capturing)
        if self.gradients is not None:
            self.gradients.begin(None, batch)

    def size(self, batch: Batch | None) -> None:
        """Say what batch the forward has that is running; None when there is none."""
        if self.per_sample or self.routers or self.channels is not None:
            self.batch = batch
            if not torch.compiler.is_compiling():
                set_sizes(self.key, None if batch is None else batch.shapes(), self.banks[0].device)

    def _batch(self) -> Batch | None:
        """The batch of the forward that is running, which eager code may have begun and compiled code be part of."""
        begun = sizes_of(self.key) if torch.compiler.is_compiling() else None
        return self.batch if begun is None else Batch.of_shapes(*begun)

    def leave(self, *, root: bool, inside: bool) -> None:
        """A forward is over, which may have been inside of another; only one of the root ends its step."""
        if not torch.compiler.is_compiling():
            self.skipping = False
            self._settle()
            self.evidence.inside |= self.times_traced != times_traced()
        self.size(None)
        self.inside = inside
        if root:  # the step of a part stays open: other parts, or the model itself, may go on with it
            self.end()
        if self.gradients is not None and not torch.compiler.is_compiling():
            self.gradients.end()

    def end(self) -> None:
        """A step ends: what is called from now on belongs to the next one."""
        for bank in self.banks:
            bank.end()

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
        if torch.compiler.is_compiling():
            batch = self._batch()
            if batch is not None:
                channel.emit(x, batch, self.bank(x.device).control)
            return
        off_record, batch = self.off_record(), self.batch
        if off_record is not None:
            channel, batch = off_record.own(channel), off_record.batch
        if batch is None:
            return
        try:
            control = self.bank(x.device).control if off_record is None else off_record.control(x.device)
            channel.observe(x, batch, control)
        except NoesisError as error:
            channel.drop(str(error))
        except Exception as error:  # whatever an output may be, the model goes on
            channel.drop(f"{type(error).__name__}: {error}")

    def drop(self, channel: Channel, reason: str) -> None:
        """Leave nothing of this forward in a channel, and say why."""
        off_record = self.off_record()
        (off_record.own(channel) if off_record else channel).drop(reason)

    def route(self, logits: Tensor, indices: Tensor, router: int) -> None:
        """Count where a router sent its tokens."""
        bank = self.bank(logits.device)
        if bank.routes is not None:
            bank.routes.observe(logits, indices, (self._batch() or Batch(0)).size, router, bank.control)

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
        for position, bank in enumerate(self.banks):  # one or two, found sooner than by hashing a device
            if bank.device == device:
                return position
        self.banks.append(self.banks[0].beside(device))
        self.on_cuda = self.on_cuda or device.type == "cuda"
        self._settle()
        for places, place in zip(self.places, places_of(device, len(self.names)), strict=True):
            places.append(place)
        for bank in self.banks:
            bank.control[FOLD] = 1  # the totals of all hold the same steps
        return len(self.banks) - 1

    def _leaves_out(self, capturing: bool) -> bool:
        """Whether this forward is none of the n-th, as far as the host can know."""
        if capturing and not self.on_device:
            self.clock.settle(self.clock.begun)  # the host began all forwards until here, but a graph will begin others
            self.on_device = True  # it asks the device at every replay
        return not self.on_device and self.forwards % self.every != 0

    def _samples(self, x: Tensor, bank: Bank) -> int:
        """How many samples `x` can be told apart into; 0 when its first dimension is not of the batch."""
        batch = self._batch()
        if batch is None:  # between forwards nothing says how many there are, so it may not make room
            return x.shape[0] if x.dim() and x.shape[0] <= bank.samples else 0
        samples = batch.samples(x)
        if samples > bank.samples and not torch.compiler.is_compiling() and self._may_grow(bank):
            bank.grow(samples)  # otherwise the kernel says that there is no room
        return samples

    def _may_grow(self, bank: Bank) -> bool:
        """Whether the slab may move: not under a CUDA graph, which writes to where it was."""
        return not (bank.device.type == "cuda" and (self.runs_compiled() or self.capturing()))

    def runs_compiled(self) -> bool:
        """Whether compiled code measures layers, as far as is known."""
        return self.on_device or self.evidence.inside

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, which runs again without the host."""
        return self.on_cuda and torch.cuda.is_current_stream_capturing()

    def traced(self, exporting: bool) -> None:
        """Dynamo traces the model, whose next forward will run compiled."""
        if exporting:
            self.evidence.passed_by("traced by torch.export")
        elif not self.paused and self.off_record() is None:
            self.evidence.compiled_at = self.forwards

    def returned(self) -> None:
        """The container was called, and the model returned."""
        if not self.paused and self.off_record() is None:
            self.evidence.calls += 1

    # ------------------------------------------------------------ control

    @untraced
    def pause(self, paused: bool) -> None:
        """Stop observing, or go on."""
        if paused == self.paused:
            return
        self.paused = self.clock.paused = paused
        self.size(None)
        self._settle()
        with undisturbed():
            for bank in self.banks:
                bank.switch(not paused)
        if self.gradients is not None:
            self.gradients.pause(paused)

    def _settle(self) -> None:
        """Say whether layers are passed by."""
        self.switch.turn(self.paused or self.skipping, cuda=self.on_cuda, gradients=self.gradients is not None)

    def off_the_record(self) -> AbstractContextManager[OffRecord]:
        """Forwards of this thread inside are no steps; their vectors are kept until the next one, or the end."""
        assert self.channels is not None  # whoever asks has codebooks
        return off_the_record(self.switch.off_record, self.spare, self.channels)

    def off_record(self) -> OffRecord | None:
        """What keeps the vectors of this thread's forwards, where they are off the record."""
        found = self.switch.off_record
        return found.get(get_ident()) if found else None

    @untraced
    def set_every(self, every: int) -> None:
        """Observe every n-th forward from now on; compiled code and graphs read it on the device."""
        with undisturbed():
            for bank in self.banks:
                bank.control[EVERY] = every
        self.every = self.clock.every = self.settings["every"] = every
        if self.gradients is not None:
            self.gradients.set_every(every)

    @untraced
    def reset(self, meta: dict[str, Any]) -> None:
        """Forget the run and start another one."""
        with undisturbed():
            for bank in self.banks:
                bank.clear()
        self.clock.restart()
        self.forwards = 0
        self.left_out = False
        self.stand_ins.reset()
        self.evidence = self.evidence.afresh()
        if self.channels is not None:
            self.channels.forget()
        self.unmeasured.clear()
        self.unrouted.clear()
        self.branches.clear()
        self.branch = None
        if self.gradients is not None:
            self.gradients.reset(meta)
        if self.weights is not None:
            self.weights.reset()
        self.earlier = None
        self.given, self.call_metas = meta, []
        self.meta = {"run": uuid.uuid4().hex[:12], **self.base_meta, **meta}

    def count_routes(self, routers: list[Router]) -> None:
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
