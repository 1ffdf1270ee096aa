"""Becoming observed: modules take on a subclass that looks at what they return.

`wrap` turns the selected modules, where they stand, into instances of a generated subclass of
their own class (as FSDP2 and torch's parametrize do). The object stays the same, so parents, tied
modules, optimisers and `pipe.unet` keep what they hold, and `unwrap` gives the class back.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from .coder import Channel
from .errors import BadType, WrongState
from .gradients import NOWHERE, GradientRecorder, Mark
from .kernels import disturbed, recomputing, undisturbed
from .outputs import batch_of, hidden_state, is_dtensor, part_emitted, part_here, register_block
from .recorder import Recorder
from .routes import Router

#: What a timestep has to stay below to be recorded exactly.
LARGEST_TIMESTEP = 2.0**53
_GENERATED = "_noesis_generated"


class Site:
    """What an observed module knows: its recorder, its place in it, and which tensor to look at."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.root = False
        self.timestep: int | None = None  # position of the timestep among the root's arguments
        self.timestep_name = ""
        self.index = -1  # in the recorder; only the root may have none
        self.places: list[Tensor] = []  # see `Recorder.places`; empty without an index
        self.name = ""
        self.gradients: GradientRecorder | None = None
        self.stream: int | None = None
        self.pick: Callable[[Any], Any] | None = None
        self.router: Router | None = None
        self.looks = False  # whether the output is of interest
        self.channel: Channel | None = None  # that keeps the layer's vectors for `surprise`
        self.doubt: Channel | None = None  # that keeps what the logits say
        self.head: Channel | None = None  # that keeps what the module of the logits is given
        self.mask: int | None = None  # position of the mask among the root's arguments

    def skips(self) -> bool:
        """Whether this call is none of ours; compiled code asks the device instead."""
        recorder = self.recorder
        off = (recorder.paused or (recorder.skipping and not self.root)) and recorder.aside is None
        if off and not recorder.capturing():  # a graph asks the device whether to observe, at every replay
            return True
        return recomputing() or torch._C._get_tracing_state() is not None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the root starts: find its timestep and its batch."""
        timestep = None
        if self.timestep is not None:
            timestep = kwargs.get(self.timestep_name)
            if timestep is None and len(args) > self.timestep:
                timestep = args[self.timestep]
            if not is_number(timestep):
                timestep = None
        if self.recorder.coder is not None:
            self.recorder.coder.begin(args, kwargs, self.mask)
        if torch.compiler.is_compiling() or not disturbed():
            self.recorder.begin(timestep, batch_of(args, kwargs))
        else:
            with undisturbed():
                self.recorder.begin(timestep, batch_of(args, kwargs))

    def end(self) -> None:
        """The forward of the root is over."""
        if torch.compiler.is_compiling() or not disturbed():
            self.recorder.end()
        else:
            with undisturbed():
                self.recorder.end()

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
        aside = self.recorder.aside is not None
        if self.router is not None and not aside:
            self.route(output, self.router)
        if self.places:
            x: Any = hidden_state(output, self.stream) if self.pick is None else self.pick(output)
            reason, whole = unmeasurable(x), x
            if reason is not None:
                x, reason = part_of(whole, reason)
            if reason is not None:
                self.recorder.unmeasured[self.name] = f"{reason}, in an output of type {type(output).__name__}"
            else:
                if not aside:
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

        def take(gradient: Tensor | None) -> None:  # which must not keep `x` alive
            # Compiled autograd traces hooks; and a node may pass on no gradient at all.
            if gradient is not None and not torch.compiler.is_compiling():
                self.take(gradient, gradients, mark)

        x.register_hook(unserializable_hook(take))  # or torch would warn when the output is saved

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

    def recompute(self, output: Any) -> None:
        """What is recomputed in a backward pass was observed before, but may get its gradients only now."""
        if self.gradients is None or not recomputing():
            return
        try:
            mark = self.gradients.mark_of_recomputed()
            x: Any = hidden_state(output, self.stream) if self.pick is None else self.pick(output)
            reason = unmeasurable(x)
            if reason is not None:
                with undisturbed():
                    _, reason = part_of(x, reason)
            if reason is None and x.requires_grad:
                self.await_gradient(x, self.gradients, mark)
        except Exception as error:  # whatever an output may be, training goes on
            self.gradients.unmeasured[self.name] = f"{type(error).__name__}: {error}"

    def read(self, head: Channel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the module of the logits is given."""
        x = hidden_state((*args, *kwargs.values()))
        if torch.compiler.is_compiling():
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
            x: Any = hidden_state(output, self.stream) if self.pick is None else self.pick(output)
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
        coder = doubt.coder
        try:
            logits = hidden_state(output) if coder.logits is None else coder.logits(output)
        except Exception as error:  # a callable that expects another output
            doubt.drop(f"{type(error).__name__}: {error}")
            return
        if torch.compiler.is_compiling():
            if emittable(logits) and logits.dim() > 1:
                self.recorder.keep(doubt, coder.doubt_of(logits))
            return
        reason = unmeasurable(logits)
        if reason is None and logits is not None and logits.dim() < 2:
            reason = f"a tensor of shape {tuple(logits.shape)}, which has no classes"
        if reason is None and logits is not None:
            self.recorder.keep(doubt, coder.doubt_of(logits.detach()))
        else:
            doubt.drop(f"{reason}, where logits were to be")

    def route(self, output: Any, router: Router) -> None:
        """Look at what a router chose."""
        found = router.read(output)
        compiling = torch.compiler.is_compiling()
        reason = found if not isinstance(found, tuple) else None if compiling else unmeasurable(found[0])
        if reason is not None:
            self.recorder.unrouted[self.name] = reason
        elif isinstance(found, tuple):
            self.recorder.route(*found, router.index)


def exporting() -> bool:
    """Whether `torch.export` looks: what it writes runs where there is no noesis, and is not observed."""
    asked: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
    return asked is not None and asked()


def is_number(timestep: Any) -> bool:
    """Whether there is a value to record: a fake or batched tensor has none that could be read."""
    if isinstance(timestep, (float, int)):
        return abs(timestep) < LARGEST_TIMESTEP
    if type(timestep) is not Tensor or timestep.is_complex():
        return False
    if torch.compiler.is_compiling():
        return True
    return not (
        timestep.is_nested
        or timestep.layout != torch.strided
        or timestep.numel() == 0
        or timestep.device.type == "meta"
        or torch._C._functorch.is_functorch_wrapped_tensor(timestep)
    )


def unmeasurable(x: Any) -> str | None:
    """Why a hidden state cannot be measured, or None if it can."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return "no floating tensor"
    if x.is_nested or x.layout != torch.strided:
        return "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
    if x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a tensor without data of its own (meta device or torch.func)"
    if type(x) not in (Tensor, nn.Parameter) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(x).__name__}"
    return None


def part_of(whole: Any, reason: str) -> tuple[Any, str | None]:
    """This process' part of what as a whole cannot be measured for a reason; why the part cannot be, or None."""
    part = part_here(whole)
    if part is whole:
        return whole, reason
    return part, part if isinstance(part, str) else unmeasurable(part)


def emittable(x: Any) -> TypeGuard[Tensor]:
    """Whether compiled code can measure a hidden state: what `unmeasurable` asks, as far as shapes and layouts tell."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or x.layout != torch.strided:
        return False
    return not is_dtensor(x)  # an operation takes no DTensor among tensors


class Observed:
    """Marks modules that noesis observes: `isinstance(module, noesis.Observed)`.

    Example:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> wrapped = noesis.wrap(model)
        >>> isinstance(model[0], noesis.Observed), type(model[0]).__name__
        (True, 'Linear')
        >>> model[0]
        ObservedLinear(in_features=2, out_features=2, bias=True)
        >>> wrapped.unwrap()[0]
        Linear(in_features=2, out_features=2, bias=True)
    """

    _noesis = cast("Site | None", None)  # without an annotation, which torch.jit.script could not read

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A registry of subclasses would take the generated class for a new one.
        if _GENERATED not in cls.__dict__:
            super().__init_subclass__(**kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, and look at what it returns."""
        if not isinstance(self, Observed):  # unwrapped since; torch.compile keeps a bound `__call__`
            return type(self).__call__(self, *args, **kwargs)
        site = self._noesis
        compiling = torch.compiler.is_compiling()
        if site is None or (exporting() if compiling else site.skips()):
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            if site is not None and site.gradients is not None and not compiling:
                site.recompute(output)
            return output
        try:
            if site.root:
                site.begin(args, kwargs)
            if site.head is not None:
                site.read(site.head, args, kwargs)
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            if site.looks:
                if compiling:
                    site.emit(output)
                elif not site.recorder.skipping or site.recorder.capturing():
                    site.observe(output)
        finally:
            if site.root:
                site.end()
        return output

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the module, as its class does; the recorder follows to the device."""
        result = super()._apply(*args, **kwargs)  # type: ignore[misc]
        site = self._noesis
        if site is not None and site.root:
            site.recorder.go_to({parameter.device for parameter in self.parameters()})  # type: ignore[attr-defined]
        return result

    def __repr__(self) -> str:
        return f"Observed{super().__repr__()}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by way of the original class, since generated classes cannot be imported."""
        reduced = super().__reduce_ex__(protocol)
        newobj = copyreg.__newobj__  # type: ignore[attr-defined]
        if isinstance(reduced, tuple) and reduced[0] is newobj and reduced[1][0] is type(self):
            return (_new, (original_class(type(self)), *reduced[1][1:]), *reduced[2:])
        if isinstance(reduced, tuple) and reduced[0] is type(self):
            return (original_class(type(self)), *reduced[1:])  # made anew by its own recipe, and not observed
        return reduced


class ObservedDenoiser(Observed):
    """An observed denoiser whose pipeline names the guidance branch of each call."""

    @contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The denoiser's own, which also tells the recorder the branch."""
        site = self._noesis
        before = None if site is None else site.recorder.branch
        with super().cache_context(name, *args, **kwargs) as context:  # type: ignore[misc]
            if site is not None:
                site.recorder.set_branch(name)
            try:
                yield context
            finally:
                if site is not None:
                    site.recorder.set_branch(before)


_MADE: dict[type, type[nn.Module]] = {}


def observed_class(original: type[nn.Module]) -> type[nn.Module]:
    """The observe-only subclass of a module class, made once."""
    if original in _MADE:
        return _MADE[original]
    mixin = ObservedDenoiser if hasattr(original, "cache_context") else Observed
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__slots__": (),
        _GENERATED: True,
    }
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(original.__name__, (mixin, original), body)
    _MADE[original] = made
    register_block(original, made)
    return made


def original_class(observed: type) -> type:
    """The class an observed class was made from."""
    return observed.__mro__[observed.__mro__.index(Observed) + 1]


def site_of(module: nn.Module) -> Site | None:
    """What an observed module knows; None for one that is not observed."""
    return module._noesis if isinstance(module, Observed) else None


def rebind(shell: Any) -> None:
    """Have what torch.compile returned call its module by the class it has now.

    It keeps the `__call__` of the class at the time of compiling, which ours would stay unseen behind.
    """
    if hasattr(shell, "_orig_mod"):
        shell._initialize()


def _new(original: type[nn.Module], *args: Any) -> Any:
    made: Any = observed_class(original)
    return made.__new__(made, *args)


def become_observed(module: nn.Module, site: Site) -> None:
    """Give a module, where it stands, its observed class."""
    if isinstance(module, Observed):  # unwrapped, with a class on top of ours that another library gave it
        module.__dict__["_noesis"] = site
        return
    name = f"{site.name or 'the model'} ({type(module).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise BadType(f"{name} is a ScriptModule", "a module in Python", "Wrap the model before scripting it")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise WrongState(
            f"{name} has no parameters yet, and changes its class at its first forward",
            "initialised layers",
            "Run the model once before wrapping it",
        )
    try:
        module.__class__ = observed_class(type(module))
    except TypeError as error:
        raise BadType(
            f"{name} cannot be observed: {error}",
            "a module whose class can be subclassed",
            "Leave it out with a predicate, layers=lambda name, module: ...",
        ) from None
    module.__dict__["_noesis"] = site


def restore(module: nn.Module) -> bool:
    """Give a module its class back; False if another library has built a class on ours since."""
    cls = type(module)
    original = original_class(cls)
    if cls is observed_class(original):
        module.__class__ = original
        del module.__dict__["_noesis"]
        return True
    module.__dict__["_noesis"] = None  # ours stays in between, and does nothing
    return False
