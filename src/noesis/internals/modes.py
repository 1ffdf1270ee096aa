"""The modes that watch or change torch's operations (selective checkpointing, fake tensors, default devices)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

from torch.compiler import is_compiling

from .lookup import look_up

P = ParamSpec("P")
T = TypeVar("T")

_SEEN = "such modes see the operations of noesis too"


def _counts(ask: Any) -> bool:
    return type(ask()) is int


def _leaves(leave: Any) -> bool:
    with leave():
        return True


_functions = look_up("torch._C:DisableTorchFunction", fits=_leaves, instead=_SEEN)
_dispatch = look_up("torch.utils._python_dispatch:_disable_current_modes", fits=_leaves, instead=_SEEN)
_ALWAYS = "they are left always, which costs some microseconds"
_dispatch_modes = look_up("torch._C:_len_torch_dispatch_stack", fits=_counts, instead=_ALWAYS)
_function_modes = look_up("torch._C:_len_torch_function_stack", fits=_counts, instead=_ALWAYS)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Outside of such modes."""
    if _functions is not None and _dispatch is not None:
        with _functions(), _dispatch():
            yield
        return
    with ExitStack() as left:
        for leave in (_functions, _dispatch):
            if leave is not None:
                left.enter_context(leave())
        yield


def disturbed() -> bool:
    """Whether there are such modes; asking costs less than leaving them."""
    if _dispatch_modes is None or _function_modes is None:
        return True
    return bool(_dispatch_modes() or _function_modes())


def call_undisturbed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function outside of such modes, where there are any."""
    if is_compiling() or not disturbed():
        return function(*args, **kwargs)
    with undisturbed():
        return function(*args, **kwargs)
