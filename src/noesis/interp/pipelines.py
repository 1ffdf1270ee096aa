"""Calls of a diffusers pipeline, each of which begins at step 0."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..observing import Generated, make_subclass, subclass_of
from .clock import Clock

CLOCKS = "_noesis_clocks"


class Restarting(Generated):
    """A pipeline whose calls begin generations."""

    slot = "_noesis_restarting"


@contextmanager
def restarting(pipe: Any, clock: Clock) -> Iterator[None]:
    """Have each call of a pipeline begin at step 0 while the block lasts."""
    before = type(pipe)
    clocks = pipe.__dict__.get(CLOCKS, ())
    pipe.__dict__[CLOCKS] = (*clocks, clock)
    if not clocks:
        object.__setattr__(pipe, "__class__", _class_of(before))
    try:
        yield
    finally:
        left = tuple(other for other in pipe.__dict__.get(CLOCKS, ()) if other is not clock)
        pipe.__dict__[CLOCKS] = left
        if not left:
            del pipe.__dict__[CLOCKS]
            if type(pipe) is subclass_of(before, Restarting.slot):  # else another library's stays, and does nothing
                object.__setattr__(pipe, "__class__", before)


def _class_of(original: type) -> type:
    made = subclass_of(original, Restarting.slot)
    if made is not None:
        return made
    call: Callable[..., Any] = original.__call__

    @functools.wraps(call)  # callers read the signature
    def restarted(self: Any, *args: Any, **kwargs: Any) -> Any:
        for clock in self.__dict__.get(CLOCKS, ()):
            clock.restart()
        return call(self, *args, **kwargs)

    return make_subclass(original, Restarting, __call__=restarted)
