"""Functions that Dynamo is not to compile by themselves.

Where a graph breaks, Dynamo runs the rest in Python, and compiles each function that is called there. Of one that
measures tensors on the host it would make graphs that keep the numbers of the forward they were made in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from .lookup import look_up

F = TypeVar("F", bound=Callable[..., Any])

_SLOWER = "Dynamo is kept off by torch.compiler.disable, which costs a microsecond a call once models are compiled"
_action = look_up(
    "torch._C:_dynamo.eval_frame._FrameAction",
    fits=lambda action: (action.SKIP.name, action.DEFAULT.name) == ("SKIP", "DEFAULT"),
    instead=_SLOWER,
)
_strategy = look_up(
    "torch._C:_dynamo.eval_frame._FrameExecStrategy",
    fits=lambda strategy: strategy(_action.SKIP, _action.DEFAULT).cur_action == _action.SKIP,
    instead=_SLOWER,
)
#: What Dynamo does with a frame, and with those that it calls; torch 2.6 can only skip the frame itself.
_ALONE = () if _strategy is None else (_strategy(_action.SKIP, _action.DEFAULT),)
_WITH_ALL_BELOW = () if _strategy is None else (_strategy(_action.SKIP, _action.SKIP),)
_leave = look_up(
    "torch._C:_dynamo.eval_frame.set_code_exec_strategy",
    "torch._C:_dynamo.eval_frame.skip_code",
    fits=lambda leave: leave((lambda: None).__code__, *_ALONE) is None,
    instead=_SLOWER,
)
#: Functions are left as they are: otherwise Dynamo of 2.6 refuses strict exports. Where graphs break, it loses rows.
_TOO_OLD = torch.__version__.startswith("2.6.")
_at_work = False


def dynamo_at_work() -> None:
    """Dynamo has begun to compile what noesis observes."""
    global _at_work  # noqa: PLW0603  one of the process
    _at_work = True


def passed_over(function: F) -> F:
    """Have Dynamo call a function as torch's `Module.__call__`: inlined, or in Python, compiling what it calls."""
    if _leave is not None and not _TOO_OLD:
        _leave(function.__code__, *_ALONE)
    return function


def inlined(function: F) -> F:
    """Have Dynamo compile a function only within what calls it, and what it calls likewise."""
    return _left_alone(function)


def untraced(function: F) -> F:
    """Have Dynamo compile neither a function nor what it calls: compiled code breaks there, and calls it in Python."""
    if not _TOO_OLD:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return _left_alone(function)


def _left_alone(function: F) -> F:
    if _TOO_OLD:
        return function
    if _leave is not None and _WITH_ALL_BELOW:
        _leave(function.__code__, *_WITH_ALL_BELOW)
        return function

    @functools.cache
    @passed_over
    def disabled() -> Any:  # late, since it imports Dynamo, which would compile this too
        return torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():  # within what calls it
            return function(*args, **kwargs)
        return disabled()(*args, **kwargs) if _at_work else function(*args, **kwargs)

    return passed_over(call)  # type: ignore[return-value]
