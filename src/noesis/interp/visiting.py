"""Visits: what passes a site is handed to whoever reads or changes it, while a `with` block lasts.

Modules take on a generated subclass beneath that of observing, so what is observed is the model as it was changed, and
compiled code, which is guarded by classes, is compiled again once and misses nothing, as it would hooks.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..errors import BadType, WrongState
from ..internals import Attend, around_attention, compiled, passed_over, register_block
from ..layers import hidden_index, hidden_state
from ..observing import Generated, change_beneath, make_subclass, original_class, subclass_of
from .anatomy import Anatomy, is_compiled, logits_of
from .aside import aside, is_aside
from .attention import Attention, attention_of, pattern_of, unverified_pattern, with_pattern
from .identifying import results
from .places import AFTER, ATTENTION, BEFORE, Place, with_hidden_input, with_hidden_state
from .recording import hidden_input
from .sites import Site

STOPS = "_noesis_stops"
STATE = 2  # its place in what `__reduce_ex__` gives


class Visitor(Protocol):
    """Whoever looks at what passes a site."""

    @property
    def site(self) -> Site:
        """Where."""

    def visit(self, whole: Tensor) -> Tensor | None:
        """See the component's tensor, of all heads and tokens; return what is to stand in its place, if anything."""


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


class Guest(NamedTuple):
    """A visitor, and the block within which it is to see a module that several blocks share."""

    visitor: Visitor
    block: Stop | None

    def expected(self) -> bool:
        """Whether it is its turn."""
        return self.block is None or self.block.running() is not None


class Stop:
    """What one visiting does at one module."""

    def __init__(self, visiting: Visiting, module: nn.Module) -> None:
        self.visiting, self.module = visiting, module
        self.before: list[Guest] = []
        self.after: list[Guest] = []
        self.attention: list[Guest] = []
        self.instead: Callable[[], Any] | None = None  # of running the module
        self.generation: Callable[[], AbstractContextManager[None]] | None = None  # around `generate`
        self.begins: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None  # called with its arguments
        self.ends: Callable[[Any], None] | None = None  # and with what it returns
        self.gives: list[Stop] = []  # blocks that want to know how the module attended
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
            new = _seen_by(self.before, given)
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
        index = hidden_index(self.module) if isinstance(output, (tuple, list)) else None
        old = logits_of(output) if component == "logits" else hidden_state(output, index)
        if old is None:
            return output
        if component == "result":
            new = self._of_heads(visitor, module, hidden_input(args, kwargs), old)
        elif component == "resid_mid":
            new = self._of_stream(visitor, old)
        else:
            new = visitor.visit(old)
        return output if new is None or new is old else with_hidden_state(output, old, new)

    def _of_heads(self, visitor: Visitor, module: Any, given: Tensor | None, old: Tensor) -> Tensor | None:
        """What each head writes is found by asking the projection once per head."""
        heads = self._left(visitor.site, "heads")
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
        mid = given + attn.reshape(given.shape)
        new = visitor.visit(mid)
        return None if new is None or new is mid else attn + (new - mid).reshape(attn.shape)

    def _left(self, site: Site, what: str) -> Any:
        return (self.visiting.blocks[site.layer].running() or {}).get(what)


# ---------------------------------------------------------------- attention


def attend(stops: Sequence[Stop], module: Any, given: dict[str, Any], implementation: str, run: Attend) -> Any:
    """A module attends, at which there are stops."""
    guests = [guest for stop in stops for guest in stop.attention if guest.expected()]

    def of(component: str) -> list[Guest]:
        return [guest for guest in guests if guest.visitor.site.component == component]

    for component, argument in (("q", "query"), ("k", "key"), ("v", "value")):
        visitors = of(component)
        if visitors and isinstance(given.get(argument), Tensor):
            heads = given[argument].transpose(1, 2)
            new = _seen_by(visitors, heads)
            if new is not heads:
                given = {**given, argument: new.transpose(1, 2)}
    result = run(given)
    patterns, zs, gives = of("pattern"), of("z"), [block for stop in stops for block in stop.gives]
    if not patterns and not zs and not gives:
        return result
    call = attention_of(module, given, implementation, result)
    if isinstance(call, str):
        site = guests[0].visitor.site if guests else "result"
        raise WrongState(f"{site} cannot be read: {call}", "attention by heads", "Leave it out")
    z = _seen_by(zs, _through_pattern(patterns, call) if patterns else call.z)
    if z is not call.z:
        result = with_hidden_state(result, call.z, z)
        call = call._replace(z=z)
    heads = {"call": call}  # one for all, so that those who keep see what others changed
    for block in gives:
        left = block.running()
        if left is not None:
            left["heads"] = heads
    return result


def _through_pattern(guests: Sequence[Guest], call: Attention) -> Tensor:
    found = unverified_pattern(call) if is_dynamo_compiling() else pattern_of(call)
    if isinstance(found, str):
        raise WrongState(f"{guests[0].visitor.site} cannot be given: {found}", "a checked pattern", "Leave it out")
    pattern = found if isinstance(found, Tensor) else found.tensor
    new = _seen_by(guests, pattern)
    return call.z if new is pattern else with_pattern(call, pattern, new)


def _seen_by(guests: Iterable[Guest], whole: Tensor) -> Tensor:
    """What is left of a tensor when each of the visitors has seen what the one before made of it."""
    for guest in guests:
        new = guest.visitor.visit(whole) if guest.expected() else None
        whole = whole if new is None else new
    return whole


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
        """What happens at a module, by its dotted name."""
        return self.stop_of(self._module(name))

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
        if site.component == "result" or (site.component == "resid_mid" and place.side == AFTER):
            assert site.layer is not None
            assert self.anatomy is not None
            block = self.block(site.layer)
            if site.component == "result":
                attention = self.stop(str(self.anatomy.blocks[site.layer].attention))
                attention.gives += [] if block in attention.gives else [block]

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
        if not self._attends and any(stop.attention or stop.gives for stop in self.stops.values()):
            self._attends = True
            leaving.enter_context(around_attention(self._attend))

    def clear(self) -> None:
        """Send all visitors away; the stops stay."""
        for stop in self.stops.values():
            stop.before, stop.after, stop.attention, stop.gives = [], [], [], []

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
