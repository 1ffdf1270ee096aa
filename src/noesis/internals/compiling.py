"""torch.compile and torch.export: what they made of a model, and what they are told while they trace."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Module

from .frames import dynamo_at_work
from .lookup import attribute

# ---------------------------------------------------------------- what torch.compile returns


def _is_shell(module: Any) -> bool:
    """Whether this is what `torch.compile` returned for a module."""
    cls = type(module)
    return cls.__name__ == "OptimizedModule" and cls.__module__.startswith("torch._dynamo")


def inside(module: Any) -> Any:
    """The module that `torch.compile` was given; any other module itself."""
    found = attribute(module, "_orig_mod")
    if isinstance(found, Module):
        return found
    children = list(module.children()) if _is_shell(module) else []
    return children[0] if len(children) == 1 else module


def compiled(module: Module) -> bool:
    """Whether a module was compiled where it stands, or is what `torch.compile` returned."""
    return attribute(module, "_compiled_call_impl") is not None or inside(module) is not module


def rebind(shell: Any) -> bool:
    """Have what torch.compile returned call its module by the class it has now; whether that could be done.

    It keeps the `__call__` of the class at the time of compiling, which ours would stay unseen behind.
    """
    if not isinstance(shell, Module) or inside(shell) is shell:
        return True
    again, before = attribute(shell, "_initialize"), shell.forward
    if callable(again):
        again()
    return shell.forward is not before


# ---------------------------------------------------------------- while Dynamo traces


class Listener(Protocol):
    """Whoever wants to know that Dynamo traces its model."""

    def traced(self, exporting: bool) -> None:
        """Dynamo traces the root, to export it or to run it compiled."""


#: By the key that the traced code has.
LISTENERS: weakref.WeakValueDictionary[str, Listener] = weakref.WeakValueDictionary()


_traced = 0


def times_traced() -> int:
    """How often Dynamo came by an observed module, to run it compiled."""
    return _traced


def traced_for_export(key: str) -> bool:
    """Whether it is `torch.export` that traces: what it writes runs where there is no noesis, and is not observed.

    Dynamo calls this while it traces, and takes the answer for a constant (`torch.compiler.assume_constant_result`
    sets the mark below, but imports Dynamo). So it is ordinary Python, and may ask what traced code may not: before
    2.12 Dynamo itself answers `torch.compiler.is_exporting` with yes whenever it compiles.
    """
    if is_dynamo_compiling():  # traced after all
        return False
    global _traced  # noqa: PLW0603  one of the process
    exporting = _exporting()
    _traced += not exporting
    dynamo_at_work()
    _mark_early()
    listener = LISTENERS.get(key)
    if listener is not None:
        listener.traced(exporting)
    return exporting


traced_for_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _exporting() -> bool:
    ask = attribute(torch.compiler, "is_exporting")  # torch 2.7, which does not say so of strict exports
    if callable(ask) and ask() is True:
        return True
    frame: Any = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(("torch.export.", "torch._export.")):
            return True
        frame = frame.f_back
    return False


def foreign() -> bool:
    """Whether another than Dynamo compiles, which may trace this very function."""
    return is_compiling() and not is_dynamo_compiling()


# ---------------------------------------------------------------- tensors that stay where they are

_EARLY: list[weakref.ref[Tensor]] = []


def stays(tensor: Tensor) -> Tensor:
    """Tell compiled code that a tensor stays where it is, and as large.

    So CUDA graphs write to it and do not copy it, and `dynamic=True` takes none of its sizes for that of a batch which
    happens to be the same, to compile once more for the next batch.
    """
    tensor._dynamo_static_indices = set(range(tensor.dim()))  # type: ignore[attr-defined]  # see Dynamo's mark_static
    mark = _mark()
    if mark is None:
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        _EARLY.append(weakref.ref(tensor))
    else:
        mark(tensor, guard=False)
    return tensor


def _mark() -> Callable[..., None] | None:
    """Dynamo's own mark, once it is imported, which costs seconds."""
    mark = attribute(sys.modules.get("torch._dynamo"), "mark_static_address")
    return mark if callable(mark) else None


def _mark_early() -> None:
    """Mark tensors that came before Dynamo as it does, should that be otherwise than we did."""
    mark = _mark() if _EARLY else None
    if mark is not None:
        for ref in _EARLY:
            tensor = ref()
            if tensor is not None:
                mark(tensor, guard=False)
        _EARLY.clear()


# ---------------------------------------------------------------- tensors whose sizes change from call to call


class _Kept:
    """Tensors by keys.

    Compiled code takes a number that an object holds for a constant, and the size of a tensor for a variable, unless it
    comes upon it by way of a module of torch.nn: so they are kept here.
    """


_KEPT = _Kept()


def keep(key: str, value: Tensor | tuple[Tensor, ...] | None) -> None:
    """Keep tensors for compiled code to read, or none."""
    setattr(_KEPT, key, value)


def drop_kept(key: str) -> None:
    """Keep nothing by this key any more."""
    _KEPT.__dict__.pop(key, None)


def kept(key: str) -> Any:
    """What was kept; compiled code depends on the sizes of the tensors that it has looked at."""
    return getattr(_KEPT, key, None)


def set_sizes(key: str, sizes: Iterable[tuple[int, ...]] | None, device: torch.device) -> None:
    """Keep some groups of sizes for compiled code to read, or none."""
    if sizes is None:
        drop_kept(key)
    else:
        keep(key, tuple([torch.empty(0, *group, device=device) for group in sizes]))


def sizes_of(key: str) -> tuple[Tensor, ...] | None:
    """The groups that were kept, each as a tensor of shape [0, *sizes]; in compiled code sizes are variables."""
    groups: tuple[Tensor, ...] | None = kept(key)
    return groups
