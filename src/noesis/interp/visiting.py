"""Visits: what passes a site is handed to whoever reads or changes it, while a `with` block lasts.

Modules take on a generated subclass beneath that of observing, so what is observed is the model as it was changed, and
compiled code, which is guarded by classes, is compiled again once and misses nothing, as it would hooks.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..errors import BadType
from ..internals import (
    SOFTMAX,
    TORCH_SDPA,
    Attend,
    AttentionFunctions,
    Unfused,
    around_attention,
    compiled,
    fusing,
    passed_over,
    register_block,
)
from ..layers import hidden_index, hidden_state
from ..observing import Generated, change_beneath, make_subclass, original_class, subclass_of
from .anatomy import Anatomy, is_compiled, logits_of
from .aside import aside, is_aside
from .attending import Guest, Runs, Visitor, attend, seen_by
from .identifying import Core, results
from .places import AFTER, ATTENTION, BEFORE, Place, with_hidden_input, with_hidden_state
from .recording import hidden_input
from .sites import Site

STOPS = "_noesis_stops"
STATE = 2  # its place in what `__reduce_ex__` gives


class Visited(Generated):
    """A module at which there are stops."""

    slot = "_noesis_visited"

    @passed_over
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, and stop before and after it."""
        if not isinstance(self, Visited):  # left since; torch.compile keeps a bound `__call__`
            return type(self).__call__(self, *args, **kwargs)
        stops = [stop for stop in self.__dict__.get(STOPS, ()) if stop.visiting.here()]
        if not stops:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        begun: list[Stop] = []
        try:
            for stop in stops:
                if stop.instead is not None:
                    return stop.instead()
            for stop in stops:
                begun.append(stop)
                args, kwargs = stop.begin(args, kwargs)
            attending = [stop for stop in stops if stop.by_functions and (stop.attention or stop.gives)]
            if attending:
                around = functools.partial(attend, attending)
                running = functools.partial(_running, self, hidden_input(args, kwargs))
                with AttentionFunctions(around, running):
                    output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            elif [stop for stop in stops if stop.unfused]:
                with Unfused():
                    output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            else:
                output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            for stop in stops:
                output = stop.end(self, args, kwargs, output)
        finally:
            for stop in begun:
                stop.leave()
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies are of the module as it is without visits."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or len(reduced) <= STATE or not isinstance(reduced[STATE], dict):
            return reduced
        function, arguments, state, *rest = reduced
        cls = type(self)
        if arguments and arguments[0] is cls and _is_visited(cls):
            function, arguments = _new, (original_class(cls), *arguments[1:])
        return (function, arguments, {name: value for name, value in state.items() if name != STOPS}, *rest)


def _new(original: type, *args: Any) -> Any:
    made: Any = original
    return made.__new__(original, *args)


def visited_class(original: type) -> type:
    """The subclass of a module class that stops, made once."""
    made = subclass_of(original, Visited.slot)
    if made is None:
        generate = inspect.getattr_static(original, "generate", None)
        body = {"generate": _within_generation(generate)} if inspect.isfunction(generate) else {}
        made = make_subclass(original, Visited, **body)
        register_block(original, made)
    return made


def _within_generation(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def visited_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as leaving:
            for stop in self.__dict__.get(STOPS, ()):
                if stop.generation is not None and stop.visiting.here():
                    leaving.enter_context(stop.generation())
            return generate(self, *args, **kwargs)

    return visited_generate


def _is_visited(cls: type) -> bool:
    """Whether a class is one of ours, and not one that another library has built on ours."""
    return issubclass(cls, Visited) and cls is subclass_of(original_class(cls), Visited.slot)


class Stop:
    """What one visiting does at one module."""

    def __init__(self, visiting: Visiting, module: nn.Module) -> None:
        self.visiting, self.module = visiting, module
        # Of the hidden state in what the module returns: known beforehand where compiled code may ask, or when needed.
        self.index = hidden_index(module) if visiting.thread is None else None
        self.before: list[Guest] = []
        self.after: list[Guest] = []
        self.attention: list[Guest] = []
        self.by_functions = False  # whether the module attends by functions of torch, not by an interface
        self.unfused = False  # whether what is in the module is to run as modules
        self.instead: Callable[[], Any] | None = None  # of running the module
        self.generation: Callable[[], AbstractContextManager[None]] | None = None  # around `generate`
        self.begins: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None  # called with its arguments
        self.ends: Callable[[Any], None] | None = None  # and with what it returns
        self.gives: list[tuple[Runs, str]] = []  # blocks that want to know how the module attended, and by what name
        self.adds: list[Stop] = []  # blocks that want to know what the module adds before their last attention
        self.runs: int | None = None  # of a block, counted
        self.open: dict[int, dict[str, Any]] | None = None  # of a block: thread -> what its call has left so far

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The module is called."""
        if self.begins is not None:
            self.begins(args, kwargs)
        if self.runs is not None:
            self.runs += 1
        given = hidden_input(args, kwargs) if self.before or self.open is not None else None
        if given is not None and self.before:
            new = seen_by(self.before, given)
            if new is not given:
                args, kwargs = with_hidden_input(args, kwargs, new)
                given = new
        if self.open is not None:
            self.open[_thread()] = {"given": given}
        return args, kwargs

    def end(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module returns."""
        if self.ends is not None:
            self.ends(output)
        for guest in self.after:
            if guest.expected():
                output = self._seen(guest.visitor, module, args, kwargs, output)
        for block in self.adds:
            left = block.running()
            if left is not None:
                left["added"] = self._hidden(output)
        return output

    def leave(self) -> None:
        """The call is over, be it by an exception."""
        if self.open is not None:
            self.open.pop(_thread(), None)

    def running(self) -> dict[str, Any] | None:
        """What the call of a block that this thread runs has left so far; None when it runs none."""
        return None if self.open is None else self.open.get(_thread())

    def _seen(self, visitor: Visitor, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        component = visitor.site.component
        old = logits_of(output) if component == "logits" else self._hidden(output)
        if old is None:
            return output
        if component == "result":
            new = self._of_heads(visitor, module, hidden_input(args, kwargs), old)
        elif component == "resid_mid":
            new = self._of_stream(visitor, old)
        else:
            new = visitor.visit(old)
        return output if new is None or new is old else with_hidden_state(output, old, new)

    def _hidden(self, output: Any) -> Tensor | None:
        if self.visiting.thread is not None and isinstance(output, (tuple, list)):
            return hidden_state(output, hidden_index(self.module))
        return hidden_state(output, self.index)

    def _of_heads(self, visitor: Visitor, module: Any, given: Tensor | None, old: Tensor) -> Tensor | None:
        """What each head writes is found by asking the projection once per head."""
        heads = self._left(visitor.site, visitor.site.component)
        if heads is None or given is None:
            return None
        if "results" not in heads:
            with (
                nullcontext() if is_dynamo_compiling() else aside()
            ):  # what is inside the projection runs once more per head
                heads["results"], _ = results(module, heads["call"].z, given.shape)
        each: Tensor = heads["results"]
        new = visitor.visit(each)
        if new is None or new is each:
            return None
        heads["results"] = new
        return old + (new - each).sum(2).reshape(old.shape)

    def _of_stream(self, visitor: Visitor, attn: Tensor) -> Tensor | None:
        """The stream after attention is changed by what attention adds to it."""
        given = self._left(visitor.site, "given")
        if given is None:
            return None
        added = self._left(visitor.site, "added")
        before = given if added is None else given + added.reshape(given.shape)
        mid = before + attn.reshape(given.shape)
        new = visitor.visit(mid)
        return None if new is None or new is mid else attn + (new - mid).reshape(attn.shape)

    def _left(self, site: Site, what: str) -> Any:
        return (self.visiting.blocks[site.layer].running() or {}).get(what)


def _running(module: Any, hidden: Tensor | None) -> tuple[nn.Module, Tensor | None]:
    return module, hidden


def _thread() -> int:
    return 0 if is_dynamo_compiling() else threading.get_ident()


# ---------------------------------------------------------------- all of them


class Visiting:
    """Visitors at the sites of one model, while it lasts.

    Args:
        root: the module whose dotted names count.
        anatomy: of it; None if no site needs it.
        own_thread: whether forwards of other threads are none of its business.
    """

    def __init__(self, root: nn.Module, anatomy: Anatomy | None, *, own_thread: bool) -> None:
        self.root, self.anatomy = root, anatomy
        self.thread = threading.get_ident() if own_thread else None
        self.stops: dict[nn.Module, Stop] = {}
        self.blocks: dict[int | None, Stop] = {}  # by layer
        self.clocked: list[Stop] = []  # of what is called for a step
        self._attached: set[nn.Module] = set()
        self._attends = False
        self._modules: dict[str, nn.Module] = {"": root}  # those that were looked up

    def stop(self, name: str) -> Stop:
        """What happens at a module, by its dotted name; those around it are to run it as a module."""
        module = self._module(name)
        if module not in self.stops:
            for outer in fusing(self._holders(name)):
                self.stop_of(outer).unfused = True
        return self.stop_of(module)

    def _module(self, name: str) -> nn.Module:
        found = self._modules.get(name)
        if found is None:
            parent, _, last = name.rpartition(".")
            found = self._module(parent)._modules[last]
            assert found is not None
            self._modules[name] = found
            if self.thread is not None and compiled(found):  # what it keeps is kept in Python
                raise is_compiled(self.root)
        return found

    def _holders(self, name: str) -> list[nn.Module]:
        """The modules that a module is in."""
        parts = name.split(".")
        return [self._module(".".join(parts[:end])) for end in range(len(parts) if name else 0)]

    def stop_of(self, module: nn.Module) -> Stop:
        """The same, of the module itself."""
        found = self.stops.get(module)
        if found is None:
            found = self.stops[module] = Stop(self, module)
        return found

    def block(self, layer: int) -> Stop:
        """What happens at a block, whose runs are known."""
        assert self.anatomy is not None
        stop = self.blocks.setdefault(layer, self.stop(self.anatomy.blocks[layer].name))
        stop.open = {} if stop.open is None else stop.open
        return stop

    def add(self, visitor: Visitor, place: Place) -> None:
        """Have a visitor see what passes a place, after those that were added before."""
        site, stop = visitor.site, self.stop(place.module)
        block = None
        if site.layer is not None and self.anatomy is not None and place.module in self.anatomy.shared:
            block = self.block(site.layer)
        guests = {BEFORE: stop.before, AFTER: stop.after, ATTENTION: stop.attention}[place.side]
        guests.append(Guest(visitor, block))
        if site.layer is None or self.anatomy is None:
            return
        of = self.anatomy.blocks[site.layer]
        if place.side == ATTENTION:
            self._attention(of.core(site.component))
        elif site.kind == "result":
            gives, asks = self._attention(of.core(site.component)).gives, (self.block(site.layer), site.component)
            gives += [] if asks in gives else [asks]
        elif site.component == "resid_mid" and place.side == AFTER:
            asking = self.block(site.layer)
            for name in of.added[:-1]:
                self.stop(name).adds.append(asking)

    def _attention(self, core: Core) -> Stop:
        """What happens at a module that attends, in the way that it does."""
        stop = self.stop(str(core.attention))
        stop.by_functions = core.implementation in (TORCH_SDPA, SOFTMAX)
        return stop

    def here(self) -> bool:
        """Whether a call that begins now is visited."""
        if is_dynamo_compiling():
            return self.thread is None
        return not is_aside() and (self.thread is None or threading.get_ident() == self.thread)

    def attach(self, leaving: ExitStack) -> None:
        """Stop at all these modules until `leaving` is left; also at those that were added since."""
        for module, stop in self.stops.items():
            if module not in self._attached:
                self._attached.add(module)
                leaving.callback(self._attached.discard, module)
                _arrive(module, stop)
                leaving.callback(_depart, module, stop)
        asked = [stop for stop in self.stops.values() if stop.attention or stop.gives]
        if not self._attends and not all(stop.by_functions for stop in asked):
            self._attends = True
            leaving.callback(setattr, self, "_attends", False)
            leaving.enter_context(around_attention(self._attend))

    def clear(self) -> None:
        """Send all visitors away; the stops stay."""
        for stop in self.stops.values():
            stop.before, stop.after, stop.attention, stop.gives, stop.adds = [], [], [], [], []

    def _attend(self, module: nn.Module, given: dict[str, Any], implementation: str, run: Attend) -> Any:
        here = [stop for stop in module.__dict__.get(STOPS, ()) if stop.visiting.here()]
        stops = [stop for stop in here if stop.attention or stop.gives]
        # Of several visitings, each of which is asked, one does it for all, in their order.
        return attend(stops, module, given, implementation, run) if stops and stops[-1].visiting is self else run(given)


def _arrive(module: nn.Module, stop: Stop) -> None:
    stops = module.__dict__.get(STOPS, ())
    if isinstance(module, torch.jit.ScriptModule):
        raise BadType("a ScriptModule", "a module in Python", "Give the model as it was before scripting")
    if not stops:
        try:
            change_beneath(module, visited_class)
        except TypeError as error:
            raise BadType(
                f"{type(module).__name__} cannot be visited: {error}",
                "a module whose class can be subclassed",
                "Leave its sites out",
            ) from None
    # Those who change before those who look, whoever came first: what is kept is what others go on with.
    module.__dict__[STOPS] = tuple(sorted((*stops, stop), key=lambda each: each.visiting.thread is not None))


def _depart(module: nn.Module, stop: Stop) -> None:
    left = tuple(other for other in module.__dict__.get(STOPS, ()) if other is not stop)
    if left:
        module.__dict__[STOPS] = left
        return
    module.__dict__.pop(STOPS, None)
    change_beneath(module, lambda cls: original_class(cls) if _is_visited(cls) else cls)
