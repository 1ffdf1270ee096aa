"""Backward passes: whether one is running, and which node it is at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from .lookup import attribute, look_up

F = TypeVar("F", bound=Callable[..., Any])


def _recomputing_by_stack() -> bool:
    """Whether `torch.utils.checkpoint` recomputes, told by who called."""
    frame: Any = sys._getframe()
    while frame is not None:
        named = frame.f_code.co_name in ("backward", "unpack_hook")
        if named and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


_task = look_up(
    "torch._C:_current_graph_task_id",
    fits=lambda ask: bool(ask() == -1),
    instead="recomputation is told by who called, for activation checkpointing of torch alone",
)


def _recomputing_by_task() -> bool:
    return bool(_task() != -1)


#: Whether a backward pass is running: activation checkpointing recomputes there what was seen already.
recomputing: Callable[[], bool] = _recomputing_by_stack if _task is None else _recomputing_by_task


_node = look_up(
    "torch._C:_current_autograd_node",
    fits=lambda ask: ask() is None,
    instead="recomputed layers have no gradients, which their names say",
)
_count = look_up(
    "torch._C:_autograd._get_sequence_nr",
    fits=lambda ask: isinstance(ask(), int) and ask() == ask(),
    instead="recomputed layers have no gradients, which their names say",
)


def node_count() -> int:
    """How many nodes autograd has numbered in this thread; 0 where that cannot be told."""
    return 0 if _count is None else int(_count())


def node_number() -> int | None:
    """The number of the node whose backward is running, None where that cannot be told."""
    node = None if _node is None or _count is None else _node()
    number = attribute(node, "_sequence_nr")
    return int(number()) if callable(number) else None


_unserializable = look_up(
    "torch.utils.hooks:unserializable_hook",
    fits=lambda mark: callable(mark(lambda gradient: None)),
    instead="torch warns when an output with a hook is saved",
)


def picklable_hook(hook: F) -> F:
    """A hook that goes missing, without a warning of torch's, from a tensor that is saved."""
    if _unserializable is not None:
        _unserializable(hook)
    return hook
