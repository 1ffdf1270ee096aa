"""Becoming observed: modules take on a subclass that looks at what they return.

`wrap` turns the selected modules, where they stand, into instances of a generated subclass of
their own class (as FSDP2 and torch's parametrize do). The object stays the same, so parents, tied
modules, optimisers and `pipe.unet` keep what they hold, and `unwrap` gives the class back.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from loguru import logger
from torch import nn
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.fx import GraphModule
from torch.nn import Module
from torch.nn.modules import module

from ..errors import BadType, WrongState
from ..internals import CALL, CALL_IMPL, passed_over, recomputing, register_block, traced_by_jit, traced_for_export
from .site import Site
from .subclassing import Generated, by_original, make_subclass, original_class, subclass_of
from .switch import NEVER


class Observed(Generated):
    """Marks modules that noesis observes: `isinstance(module, noesis.Observed)`.

    Examples:
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

    @passed_over
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: PLR0912  whatever it called would cost a call
        """Call the module, and look at what it returns."""
        this: Any = self
        compiling = is_dynamo_compiling()
        if not compiling:
            try:
                switch = this._noesis.switch
            except AttributeError:  # no site, or no longer observed: see below
                switch = NEVER
            # Without hooks a call comes to forward. To find that out here costs less than torch's call does.
            if switch.off and not (
                switch.off_record
                or this._backward_hooks
                or this._backward_pre_hooks
                or this._forward_hooks
                or this._forward_pre_hooks
                or module._global_backward_pre_hooks
                or module._global_backward_hooks
                or module._global_forward_hooks
                or module._global_forward_pre_hooks
                or this._compiled_call_impl
                or profiler._is_profiler_enabled  # it finds modules by the frames of their calls
                or traced_by_jit()
                or (switch.cuda and torch.cuda.is_current_stream_capturing())  # a graph asks the device later
                or (switch.gradients and recomputing())  # of what was observed before: see below
                or Module.__call__ is not CALL  # torch.fx puts its own in its place
                or Module._call_impl is not CALL_IMPL
                or "_call_impl" in this.__dict__
            ):
                return this.forward(*args, **kwargs)
        if not isinstance(self, Observed):  # unwrapped since; torch.compile keeps a bound `__call__`
            return type(self).__call__(self, *args, **kwargs)
        site = self._noesis
        # Dynamo may ask whether it exports, and asks once; whether a call counts, its code asks the device at each.
        if site is None or (traced_for_export(site.recorder.key if site.root else "") if compiling else site.skips()):
            if site is not None and site.root and not compiling:
                site.passes(args, kwargs)
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            if site is not None and site.gradients is not None and not compiling:
                site.recompute(output)
            return output
        padding, around, begun, inside = site.padding, None, False, False
        if padding is not None:
            padding = site.follows()
        try:
            # Parts of the model begin steps only where nobody has; a root inside of a root has a step of its own.
            if site.starts and (site.root or not site.recorder.inside):
                inside = site.recorder.inside
                begun = site.begin(args, kwargs)
            if padding is not None:
                around = padding.enter(args, kwargs, site.masks, begun)
            if site.head is not None:
                site.read(site.head, args, kwargs)
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            if site.looks:
                if compiling:
                    site.emit(output)
                # A graph that is captured in a forward which `every` leaves out is replayed in others.
                elif not site.recorder.skipping or site.recorder.capturing() or site.recorder.off_record():
                    site.observe(output)
        finally:
            if padding is not None:
                padding.mask = around
            if begun:  # also where the model raised: whoever catches that may call layers by themselves
                site.end(inside)
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
        return by_original(super().__reduce_ex__(protocol), type(self), observed_class)


#: What LTX calls the batch that it has just put together, of one branch or of both: the pipeline tells which.
BOTH = "cond_uncond"


class ObservedDenoiser(Observed):
    """An observed denoiser whose pipeline names the guidance branch of each call."""

    @contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The denoiser's own, which also tells the recorder the branch."""
        site = self._noesis
        before = None if site is None else site.recorder.branch
        with super().cache_context(name, *args, **kwargs) as context:  # type: ignore[misc]
            if site is not None:
                site.recorder.set_branch(None if name == BOTH else name)
            try:
                yield context
            finally:
                if site is not None:
                    site.recorder.set_branch(before)


class ObservedGraph(Observed):
    """An observed `GraphModule`, which writes its code into its class, and makes copies from it."""

    def recompile(self) -> Any:
        """The module's own."""
        with _bare(self) as module:
            return module.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _bare(self) as module:
            made = copy.deepcopy(module, memo)
        return _regain(made, copy.deepcopy(self._noesis, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _bare(self) as module:
            function, arguments = module.__reduce_ex__(protocol)
        return _remake, (function, arguments, self._noesis)


@contextmanager
def _bare(module: Any) -> Iterator[Any]:
    """A module with the class that it had."""
    observed, module.__class__ = type(module), original_class(type(module))
    try:
        yield module
    finally:
        module.__class__ = observed


def _regain(module: Any, site: Site | None) -> Any:
    """A copy that was made by the module's own recipe, observed as the module was."""
    module.__class__ = observed_class(type(module))
    module.__dict__["_noesis"] = site
    return module


def _remake(function: Callable[..., Any], arguments: tuple[Any, ...], site: Site | None) -> Any:
    return _regain(function(*arguments), site)


def _observed_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A method that tells when the model generates: what it runs between two of its own forwards begins no step."""

    @functools.wraps(generate)
    def observed_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        site = self._noesis
        if site is None or not site.root:
            return generate(self, *args, **kwargs)
        with site.recorder.stand_ins.generating():
            return generate(self, *args, **kwargs)

    return observed_generate


def observed_class(original: type) -> type:
    """The observe-only subclass of a module class, made once."""
    made = subclass_of(original)
    if made is None:
        mixin = Observed
        if hasattr(original, "cache_context"):
            mixin = ObservedDenoiser
        elif issubclass(original, GraphModule):
            mixin = ObservedGraph
        generate = inspect.getattr_static(original, "generate", None)
        body = {"generate": _observed_generate(generate)} if inspect.isfunction(generate) else {}
        made = make_subclass(original, mixin, **body)
        register_block(original, made)
    return made


def site_of(module: nn.Module) -> Site | None:
    """What an observed module knows; None for one that is not observed."""
    return module._noesis if isinstance(module, Observed) else None


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
    _settle(module, site)


def _settle(module: nn.Module, site: Site) -> None:
    """Have a layer ask the switch whether it may be passed by, if calls of its class are those of any module."""
    passed_by = not site.root and site.recorder.switch.add(original_class(type(module)))
    site.switch = site.recorder.switch if passed_by else NEVER


def restore(module: nn.Module) -> bool:
    """Give a module its class back; False if another library has built a class on ours since."""
    cls = type(module)
    original = original_class(cls)
    if cls is subclass_of(original):
        module.__class__ = original
        del module.__dict__["_noesis"]
        return True
    module.__dict__["_noesis"] = None  # ours stays in between, and does nothing
    return False


def change_beneath(module: nn.Module, change: Callable[[type], type]) -> None:
    """Give a module the class that `change` makes of its own, with observing on top as before.

    Where another library has built a class on ours, the change comes on top of that.
    """
    cls = type(module)
    if isinstance(module, Observed) and cls is subclass_of(original_class(cls)):
        made = observed_class(change(original_class(cls)))
    else:
        made = change(cls)
    object.__setattr__(module, "__class__", made)  # past the module's own, which looks for parameters
    site = module.__dict__.get("_noesis")
    if site is not None:
        _settle(module, site)


@contextmanager
def plain(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules with the classes that they had, for the length of a block; nothing is observed inside."""
    kept: list[tuple[nn.Module, type[nn.Module], Site | None]] = []
    try:
        for module in modules:
            cls = type(module)
            if isinstance(module, Observed):
                kept.append((module, cls, module._noesis))
                restore(module)
        yield
    finally:
        for module, cls, site in kept:
            if type(module) in (cls, original_class(cls)):
                module.__class__ = cls
                module.__dict__["_noesis"] = site
            else:
                logger.warning("A {} was given another class while it was unwrapped; it keeps it", cls.__name__)
