"""A call of attention at which there are visitors: each sees its part, and may put something in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import WrongState
from ..internals import Attend
from .attention import Attention, attention_of, pattern_of, unverified_pattern, with_pattern
from .places import with_hidden_state
from .sites import Site


class Visitor(Protocol):
    """Whoever looks at what passes a site."""

    @property
    def site(self) -> Site:
        """Where."""

    def visit(self, whole: Tensor) -> Tensor | None:
        """See the component's tensor, of all heads and tokens; return what is to stand in its place, if anything."""


class Look:
    """A visitor that hands on what passes."""

    def __init__(self, site: Site, function: Callable[[Tensor], Tensor | None]) -> None:
        self.site, self.function, self.times = site, function, 0

    def visit(self, whole: Tensor) -> Tensor | None:
        """Hand it on."""
        self.times += 1
        return self.function(whole)


class Runs(Protocol):
    """A block."""

    def running(self) -> dict[str, Any] | None:
        """What its call has left so far; None when it is not called."""


class Guest(NamedTuple):
    """A visitor, and the block within which it is to see a module that several blocks share."""

    visitor: Visitor
    block: Runs | None

    def expected(self) -> bool:
        """Whether it is its turn."""
        return self.block is None or self.block.running() is not None


class Attended(Protocol):
    """What happens at a module that attends."""

    attention: list[Guest]
    gives: list[tuple[Runs, str]]  # blocks that want to know how it attended, and by what name


def attend(stops: Sequence[Attended], module: Any, given: dict[str, Any], implementation: str, run: Attend) -> Any:
    """A module attends, at which there are stops."""
    guests = [guest for stop in stops for guest in stop.attention if guest.expected()]

    def of(component: str) -> list[Guest]:
        return [guest for guest in guests if guest.visitor.site.kind == component]

    for component, argument in (("q", "query"), ("k", "key"), ("v", "value")):
        visitors = of(component)
        if visitors and isinstance(given.get(argument), Tensor):
            heads = given[argument].transpose(1, 2)
            new = seen_by(visitors, heads)
            if new is not heads:
                given = {**given, argument: new.transpose(1, 2)}
    result = run(given)
    patterns, zs, gives = of("pattern"), of("z"), [each for stop in stops for each in stop.gives]
    if not patterns and not zs and not gives:
        return result
    call = attention_of(module, given, implementation, result)
    if isinstance(call, str):
        site = guests[0].visitor.site if guests else "result"
        raise WrongState(f"{site} cannot be read: {call}", "attention by heads", "Leave it out")
    z = seen_by(zs, _through_pattern(patterns, call) if patterns else call.z)
    if z is not call.z:
        result = with_hidden_state(result, call.z, z)
        call = call._replace(z=z)
    heads = {"call": call}  # one for all, so that those who keep see what others changed
    for block, name in gives:
        left = block.running()
        if left is not None:
            left[name] = heads
    return result


def _through_pattern(guests: Sequence[Guest], call: Attention) -> Tensor:
    found = unverified_pattern(call) if is_dynamo_compiling() else pattern_of(call)
    if isinstance(found, str):
        raise WrongState(f"{guests[0].visitor.site} cannot be given: {found}", "a checked pattern", "Leave it out")
    pattern = found if isinstance(found, Tensor) else found.tensor
    new = seen_by(guests, pattern)
    return call.z if new is pattern else with_pattern(call, pattern, new)


def seen_by(guests: Iterable[Guest], whole: Tensor) -> Tensor:
    """What is left of a tensor when each of the visitors has seen what the one before made of it."""
    for guest in guests:
        new = guest.visitor.visit(whole) if guest.expected() else None
        whole = whole if new is None else new
    return whole
