"""What an observed module knows: where its rows go, and which tensors of its output to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..internals import (
    call_undisturbed,
    disturbed,
    foreign,
    inlined,
    picklable_hook,
    recomputing,
    traced_by_fx,
    traced_by_jit,
    undisturbed,
    untraced,
)
from ..layers import (
    Layer,
    MaskArgument,
    Router,
    batch_of,
    emittable,
    hidden_index,
    hidden_state,
    is_number,
    measurable,
    part_emitted,
    stream,
    unmeasurable,
)
from .channels import Channel
from .gradients import NOWHERE, GradientRecorder, Mark
from .padding import Padding
from .recorder import Recorder
from .switch import NEVER


class Row:
    """One tensor of what a module returns, and the row that it goes to."""

    def __init__(self, layer: Layer, index: int, places: list[Tensor], output: Callable[[Any], Any] | None) -> None:
        self.name = layer.name
        self.index = index  # in the recorder
        self.places = places  # see `Recorder.places`
        self.place = layer.place  # of a stream in the output
        self.hidden = hidden_index(layer.module)  # of the hidden state in it
        self.output = output if layer.place is None else None  # what `wrap(..., output=)` said
        self.channel: Channel | None = None  # that keeps the layer's vectors for `surprise`

    def pick(self, output: Any) -> Any:
        """The tensor of an output, or what is in its place."""
        if self.output is not None:
            return self.output(output)
        return hidden_state(output, self.hidden) if self.place is None else stream(output, self.place)

    def await_gradient(self, x: Tensor, gradients: GradientRecorder, mark: Mark) -> None:
        """Measure the gradient of an output once a backward pass has it."""
        if x.grad_fn is None:  # a hook would stay on it from step to step
            gradients.unmeasured[self.name] = "a tensor that nothing was computed from: its gradient is its .grad"
            return
        if mark.step == NOWHERE:  # of a forward that `every` leaves out
            return

        @inlined
        def take(gradient: Tensor | None) -> None:  # which must not keep `x` alive
            # Compiled autograd traces hooks; and a node may pass on no gradient at all.
            if gradient is not None and not is_compiling():
                call_undisturbed(self.take, gradient, gradients, mark)

        x.register_hook(picklable_hook(take))

    def await_recomputed(self, output: Any, gradients: GradientRecorder) -> None:
        """The same of an output that was recomputed, for the forward it is of."""
        try:
            mark = gradients.mark_of_recomputed()
            x = self.pick(output)
            _, reason = measurable(x)
            if reason is None and x.requires_grad:
                self.await_gradient(x, gradients, mark)
        except Exception as error:  # whatever an output may be, training goes on
            gradients.unmeasured[self.name] = f"{type(error).__name__}: {error}"

    def take(self, gradient: Tensor, gradients: GradientRecorder, mark: Mark) -> None:
        """Have a gradient measured."""
        try:
            gradient, reason = measurable(gradient)
            if reason is None:
                gradients.take(gradient, self.index, mark)
            else:
                gradients.unmeasured[self.name] = reason
        except Exception as error:  # whatever a gradient may be, training goes on
            gradients.unmeasured[self.name] = f"{type(error).__name__}: {error}"


class Site:
    """What an observed module knows: its recorder, its rows, and what else its calls mean."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.switch = NEVER
        self.root = False
        self.starts = False  # whether its calls may begin steps, as those of the root do
        self.whole = False  # whether it is the model, or all of it but single layers
        self.generates = False
        self.timestep: int | None = None  # position of the timestep among the root's arguments
        self.timestep_name = ""
        self.name = ""  # of the module; only a root may have none
        self.rows: list[Row] = []
        self.gradients: GradientRecorder | None = None
        self.router: Router | None = None
        self.looks = False  # whether the output is of interest
        self.doubt: Channel | None = None  # that keeps what the logits say
        self.head: Channel | None = None  # that keeps what the module of the logits is given
        self.parameters: tuple[str, ...] = ()  # of the root's forward
        self.padding: Padding | None = None  # that follows which mask is around the module
        self.masks: tuple[MaskArgument, ...] = ()  # that its forward takes

    @inlined
    def skips(self) -> bool:
        """Whether this call is none of ours; compiled code asks the device instead.

        Backward passes recompute what was seen; other tracers than Dynamo write programs for where there is no noesis.
        """
        recorder = self.recorder
        off = recorder.paused or (recorder.skipping and not self.root)
        # A graph asks the device whether to observe, at every replay.
        if off and recorder.off_record() is None and not recorder.capturing():
            return True
        if not (recomputing() or traced_by_jit() or traced_by_fx() or foreign()):
            return False
        if self.root:
            recorder.evidence.passed_by("recomputed" if recomputing() else "traced by torch.jit, torch.fx or an export")
        return True

    @inlined
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A forward of the root starts, or of a part in its place; whether it is of a step."""
        # Which parts were called before is known on the host alone: compiled, only what is the whole model begins.
        if not self.root and is_compiling() and not self.whole:
            return False
        if is_compiling() or not disturbed():  # what `call_undisturbed` does, a call sooner
            return self._begin(args, kwargs)
        with undisturbed():
            return self._begin(args, kwargs)

    @inlined
    def follows(self) -> Padding | None:
        """What follows which mask is around the module: off the record, the thread's own."""
        off_record = None if self.padding is None or is_compiling() else self.recorder.off_record()
        return self.padding if off_record is None else off_record.channels.padding

    @untraced
    def passes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the root is none of ours, but compiled code inside is the same, and asks for the batch."""
        if self.recorder.paused and not traced_by_jit():
            with undisturbed():
                self.recorder.size(batch_of(args, kwargs, self.parameters))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Find timestep and batch, and begin."""
        recorder, batch = self.recorder, batch_of(args, kwargs, self.parameters)
        off_record = None if is_compiling() else recorder.off_record()
        if off_record is not None:
            if self.root:
                off_record.begin(args, kwargs, self.masks, batch)
            return self.root
        begins: bool | None
        if self.whole:
            timestep = None
            if self.timestep is not None:
                timestep = kwargs.get(self.timestep_name)
                if timestep is None and len(args) > self.timestep:
                    timestep = args[self.timestep]
                if not is_number(timestep):
                    timestep = None
            begins = recorder.begin(timestep, batch)
        else:
            begins = recorder.begin_part(self.name, self.generates, batch)
        if begins is not None and recorder.channels is not None:
            recorder.channels.begin(args, kwargs, self.masks, begins)
        return begins is not None  # a part that belongs to the model's next step has nothing to end

    @inlined
    def end(self, inside: bool) -> None:
        """The forward that began is over, which may have been inside of another."""
        root = self.root or is_compiling()
        off_record = None if is_compiling() else self.recorder.off_record()
        if off_record is not None:
            off_record.end()
        elif is_compiling() or not disturbed():  # see `begin`
            self.recorder.leave(root=root, inside=inside)
        else:
            with undisturbed():
                self.recorder.leave(root=root, inside=inside)

    @untraced
    def observe(self, output: Any, alone: bool = False) -> None:
        """Look at what the module returned: find its tensors, and have them measured.

        Args:
            output: whatever that may be.
            alone: whether modes that would see what happens here were left; see `call_undisturbed`.
        """
        if not alone and disturbed():  # calls itself, since a function in between would cost every layer a call
            with undisturbed():
                self.observe(output, alone=True)
            return
        recorder = self.recorder
        on_record = not recorder.switch.off_record or recorder.off_record() is None  # mostly nobody is off it
        try:
            if self.router is not None and on_record:
                self.route(output, self.router)
            if self.doubt is not None:
                self.keep_doubt(output, self.doubt)
        except Exception as error:  # whatever an output may be, the model goes on
            self.leave_out(self.name, None, f"{type(error).__name__}: {error}")
        for row in self.rows:
            try:
                whole = row.pick(output)
                x, reason = measurable(whole)
                if reason is not None:
                    self.leave_out(row.name, row.channel, f"{reason}, in an output of type {type(output).__name__}")
                    continue
                if on_record:
                    recorder.observe(x, row.index, row.places)
                    if self.gradients is not None and whole.requires_grad:  # which the part of a DTensor does not
                        row.await_gradient(whole, self.gradients, self.gradients.mark())
                # A part as large as the whole is a copy of it, which holds all of each vector.
                if row.channel is not None and (x is whole or x.shape == whole.shape):
                    recorder.keep(row.channel, x)
                elif row.channel is not None:
                    recorder.drop(row.channel, "a DTensor, whose vectors are spread over ranks")
            except Exception as error:  # one row's is not the others'
                self.leave_out(row.name, row.channel, f"{type(error).__name__}: {error}")

    def leave_out(self, name: str, channel: Channel | None, reason: str) -> None:
        """Say why a row is not measured; what others do off the record is no news of the trace."""
        if self.recorder.off_record() is None:
            self.recorder.unmeasured[name] = reason
        elif channel is not None:
            self.recorder.drop(channel, reason)

    def emit(self, output: Any) -> None:
        """The same in compiled code, which sees shapes and layouts only: the data comes later.

        What cannot be measured is not noted, since a note on the host would be guarded and cost a recompile.
        """
        if self.router is not None:
            self.route(output, self.router)
        if self.doubt is not None:
            self.keep_doubt(output, self.doubt)
        for row in self.rows:
            whole = row.pick(output)
            x = part_emitted(whole)
            if emittable(x):
                self.recorder.emit(x, row.places)
                if row.channel is not None and x.shape == whole.shape:
                    self.recorder.keep(row.channel, x)

    @inlined
    def recompute(self, output: Any) -> None:
        """What is recomputed in a backward pass was observed before, but may get its gradients only now."""
        if self.gradients is not None and recomputing():
            for row in self.rows:
                call_undisturbed(row.await_recomputed, output, self.gradients)

    @inlined
    def read(self, head: Channel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the module of the logits is given."""
        x: Any = hidden_state((*args, *kwargs.values()))
        if is_compiling():
            if emittable(x):
                self.recorder.keep(head, x)
            return
        try:
            reason = unmeasurable(x)
            if reason is None:
                call_undisturbed(self.recorder.keep, head, x)
            else:
                self.recorder.drop(head, f"{reason}, in what the module of the logits is given")
        except Exception as error:  # whatever an argument may be, the model goes on
            self.recorder.drop(head, f"{type(error).__name__}: {error}")

    def keep_doubt(self, output: Any, doubt: Channel) -> None:
        """Keep what the logits among an output say."""
        channels = doubt.channels
        try:
            logits: Any = hidden_state(output) if channels.logits is None else channels.logits(output)
        except Exception as error:  # a callable that expects another output
            self.recorder.drop(doubt, f"{type(error).__name__}: {error}")
            return
        if is_compiling():
            if emittable(logits) and logits.dim() > 1:
                self.recorder.keep(doubt, channels.doubt_of(logits))
            return
        reason = unmeasurable(logits)
        if reason is None and logits.dim() < 2:
            reason = f"a tensor of shape {tuple(logits.shape)}, which has no classes"
        if reason is None:
            self.recorder.keep(doubt, channels.doubt_of(logits.detach()))
        else:
            self.recorder.drop(doubt, f"{reason}, where logits were to be")

    def route(self, output: Any, router: Router) -> None:
        """Look at what a router chose."""
        found = router.read(output)
        reason = found if not isinstance(found, tuple) else None if is_compiling() else unmeasurable(found[0])
        if reason is not None:
            self.recorder.unrouted[self.name] = reason
        elif isinstance(found, tuple):
            self.recorder.route(*found, router.index)
