"""What an observed module knows: where its rows go, and which tensor of its output to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..internals import (
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
    Router,
    batch_of,
    emittable,
    hidden_state,
    is_dtensor,
    is_number,
    part_emitted,
    part_of,
    unmeasurable,
)
from .channels import Channel
from .gradients import NOWHERE, GradientRecorder, Mark
from .recorder import Recorder
from .switch import NEVER


class Site:
    """What an observed module knows: its recorder, its place in it, and which tensor to look at."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.switch = NEVER
        self.root = False
        self.starts = False  # whether its calls may begin steps, as those of the root do
        self.whole = False  # whether it is the model, or all of it but single layers
        self.generates = False
        self.timestep: int | None = None  # position of the timestep among the root's arguments
        self.timestep_name = ""
        self.index = -1  # in the recorder; only the root may have none
        self.places: list[Tensor] = []  # see `Recorder.places`; empty without an index
        self.name = ""
        self.gradients: GradientRecorder | None = None
        self.stream: int | None = None  # which element of the output is the hidden state, where its library says so
        self.pick: Callable[[Any], Any] | None = None  # what `wrap(..., output=)` said
        self.router: Router | None = None
        self.looks = False  # whether the output is of interest
        self.channel: Channel | None = None  # that keeps the layer's vectors for `surprise`
        self.doubt: Channel | None = None  # that keeps what the logits say
        self.head: Channel | None = None  # that keeps what the module of the logits is given
        self.mask: int | None = None  # position of the mask among the root's arguments

    @inlined
    def skips(self) -> bool:
        """Whether this call is none of ours; compiled code asks the device instead.

        Backward passes recompute what was seen; other tracers than Dynamo write programs for where there is no noesis.
        """
        recorder = self.recorder
        off = (recorder.paused or (recorder.skipping and not self.root)) and recorder.off_record is None
        if off and not recorder.capturing():  # a graph asks the device whether to observe, at every replay
            return True
        if not (recomputing() or traced_by_jit() or traced_by_fx() or foreign()):
            return False
        if self.root:
            recorder.evidence.passed_by("recomputed" if recomputing() else "traced by torch.jit, torch.fx or an export")
        return True

    @inlined
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A forward of the root starts, or of a part in its place; whether it is of a step."""
        if not self.root and (self.recorder.off_record is not None or (is_compiling() and not self.whole)):
            return False
        if is_compiling() or not disturbed():
            return self._begin(args, kwargs)
        with undisturbed():
            return self._begin(args, kwargs)

    @untraced
    def passes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the root is none of ours, but compiled code inside is the same, and asks for the batch."""
        if self.recorder.paused and not traced_by_jit():
            with undisturbed():
                self.recorder.size(batch_of(args, kwargs))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Find timestep and batch, and begin."""
        recorder, batch = self.recorder, batch_of(args, kwargs)
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
        if begins and recorder.channels is not None:
            recorder.channels.begin(args, kwargs, self.mask)
        return begins is not None

    @inlined
    def end(self, inside: bool) -> None:
        """The forward that began is over, which may have been inside of another."""
        root = self.root or is_compiling()
        if is_compiling() or not disturbed():
            self.recorder.leave(root=root, inside=inside)
        else:
            with undisturbed():
                self.recorder.leave(root=root, inside=inside)

    def hidden(self, output: Any) -> Any:
        """What is to be measured of an output."""
        return hidden_state(output, self.stream) if self.pick is None else self.pick(output)

    @untraced
    def observe(self, output: Any) -> None:
        """Look at what the module returned."""
        try:
            if disturbed():
                with undisturbed():
                    self.look(output)
            else:
                self.look(output)
        except Exception as error:  # whatever an output may be, the model goes on
            self.recorder.unmeasured[self.name] = f"{type(error).__name__}: {error}"

    def look(self, output: Any) -> None:
        """Find the hidden state, and have it measured."""
        off_record = self.recorder.off_record is not None
        if self.router is not None and not off_record:
            self.route(output, self.router)
        if self.places:
            x = self.hidden(output)
            reason, whole = unmeasurable(x), x
            if reason is not None:
                x, reason = part_of(whole, reason)
            if reason is not None:
                self.recorder.unmeasured[self.name] = f"{reason}, in an output of type {type(output).__name__}"
            else:
                if not off_record:
                    self.recorder.observe(x, self.index, self.places)
                    if self.gradients is not None and whole.requires_grad:
                        self.await_gradient(whole, self.gradients, self.gradients.mark())
                if self.channel is not None and x is not whole and x.shape != whole.shape:
                    self.channel.drop("a DTensor, whose vectors are spread over ranks")
                elif self.channel is not None:
                    self.recorder.keep(self.channel, x)
        if self.doubt is not None:
            self.keep_doubt(output, self.doubt)

    def await_gradient(self, x: Tensor, gradients: GradientRecorder, mark: Mark) -> None:
        """Measure the gradient of an output once a backward pass has it."""
        if x.grad_fn is None:  # a hook would stay on it from step to step
            gradients.unmeasured[self.name] = "a tensor that nothing was computed from: its gradient is its .grad"
            return
        if mark.step == NOWHERE:
            return

        @inlined
        def take(gradient: Tensor | None) -> None:  # which must not keep `x` alive
            # Compiled autograd traces hooks; and a node may pass on no gradient at all.
            if gradient is not None and not is_compiling():
                self.take(gradient, gradients, mark)

        x.register_hook(picklable_hook(take))

    def take(self, gradient: Tensor, gradients: GradientRecorder, mark: Mark) -> None:
        """Have a gradient measured."""
        try:
            reason = unmeasurable(gradient)
            if reason is not None:
                with undisturbed():
                    gradient, reason = part_of(gradient, reason)
            if reason is not None:
                gradients.unmeasured[self.name] = reason
            elif disturbed():
                with undisturbed():
                    gradients.take(gradient, self.index, mark)
            else:
                gradients.take(gradient, self.index, mark)
        except Exception as error:  # whatever a gradient may be, training goes on
            gradients.unmeasured[self.name] = f"{type(error).__name__}: {error}"

    @inlined
    def recompute(self, output: Any) -> None:
        """What is recomputed in a backward pass was observed before, but may get its gradients only now."""
        if self.gradients is None or not recomputing():
            return
        try:
            mark = self.gradients.mark_of_recomputed()
            x = self.hidden(output)
            reason = unmeasurable(x)
            if reason is not None:
                with undisturbed():
                    _, reason = part_of(x, reason)
            if reason is None and x.requires_grad:
                self.await_gradient(x, self.gradients, mark)
        except Exception as error:  # whatever an output may be, training goes on
            self.gradients.unmeasured[self.name] = f"{type(error).__name__}: {error}"

    @inlined
    def read(self, head: Channel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the module of the logits is given."""
        x = hidden_state((*args, *kwargs.values()))
        if is_compiling():
            if emittable(x):
                self.recorder.keep(head, x)
            return
        try:
            reason = "no floating tensor" if x is None else unmeasurable(x)
            if reason is not None or x is None:
                head.drop(f"{reason}, in what the module of the logits is given")
            elif disturbed():
                with undisturbed():
                    self.recorder.keep(head, x)
            else:
                self.recorder.keep(head, x)
        except Exception as error:  # whatever an argument may be, the model goes on
            head.drop(f"{type(error).__name__}: {error}")

    def emit(self, output: Any) -> None:
        """`look` in compiled code, which sees shapes and layouts only: the data comes later.

        What cannot be measured is not noted, since a note on the host would be guarded and cost a recompile.
        """
        if self.router is not None:
            self.route(output, self.router)
        if self.places:
            x = self.hidden(output)
            whole = x
            if is_dtensor(x):
                x = part_emitted(x)
            if emittable(x):
                self.recorder.emit(x, self.places)
                if self.channel is not None and x.shape == whole.shape:
                    self.recorder.keep(self.channel, x)
        if self.doubt is not None:
            self.keep_doubt(output, self.doubt)

    def keep_doubt(self, output: Any, doubt: Channel) -> None:
        """Keep what the logits among an output say."""
        channels = doubt.channels
        try:
            logits = hidden_state(output) if channels.logits is None else channels.logits(output)
        except Exception as error:  # a callable that expects another output
            doubt.drop(f"{type(error).__name__}: {error}")
            return
        if is_compiling():
            if emittable(logits) and logits.dim() > 1:
                self.recorder.keep(doubt, channels.doubt_of(logits))
            return
        reason = unmeasurable(logits)
        if reason is None and logits is not None and logits.dim() < 2:
            reason = f"a tensor of shape {tuple(logits.shape)}, which has no classes"
        if reason is None and logits is not None:
            self.recorder.keep(doubt, channels.doubt_of(logits.detach()))
        else:
            doubt.drop(f"{reason}, where logits were to be")

    def route(self, output: Any, router: Router) -> None:
        """Look at what a router chose."""
        found = router.read(output)
        compiling = is_compiling()
        reason = found if not isinstance(found, tuple) else None if compiling else unmeasurable(found[0])
        if reason is not None:
            self.recorder.unrouted[self.name] = reason
        elif isinstance(found, tuple):
            self.recorder.route(*found, router.index)
