"""The attention interface of transformers: by which its models call attention, whichever implementation they use."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger
from torch import nn

from .lookup import attribute

#: Runs attention with arguments by name.
Attend = Callable[[dict[str, Any]], Any]
#: Called in its place: with the attention module, arguments by name, the implementation's name, and what runs it.
Around = Callable[[nn.Module, dict[str, Any], str, Attend], Any]

#: What models call an implementation with, by place.
FIRST = ("module", "query", "key", "value", "attention_mask")

_lock = threading.Lock()
_around: tuple[Around, ...] = ()  # the last one entered is the outermost


@contextmanager
def around_attention(around: Around) -> Iterator[bool]:
    """Have each call of attention through transformers' interface go by way of a function while the block lasts.

    Models ask `ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)` at each call; what they get is the same
    function, wrapped. Implementation, config and masks stay what they are. The interface is one of the process: what
    other threads run comes by, too.

    Yields:
        Whether there is such an interface: no, without transformers.
    """
    global _around  # noqa: PLW0603  one of the process, as the interface is
    library = sys.modules.get("transformers.modeling_utils")
    registry = attribute(library, "ALL_ATTENTION_FUNCTIONS")
    if not callable(attribute(registry, "get_interface")):
        if library is not None:
            name = "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface"
            logger.warning("this version has no {} as noesis knows it; instead, attention is not seen by heads", name)
        yield False
        return
    with _lock:
        if not _around:  # an attribute of the object goes before the method of its class
            registry.get_interface = functools.partial(_wrapped, registry)
        _around = (*_around, around)
    try:
        yield True
    finally:
        with _lock:
            last = len(_around) - 1 - _around[::-1].index(around)
            _around = _around[:last] + _around[last + 1 :]
            if not _around:
                del registry.get_interface


def _wrapped(registry: Any, implementation: str, default: Any = None) -> Any:
    original = type(registry).get_interface(registry, implementation, default)
    if original is None:
        return None

    def attend(*args: Any, **kwargs: Any) -> Any:
        names = FIRST if len(args) <= len(FIRST) else _names(original)  # which Dynamo could not trace
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        module = given.pop("module", None)

        def innermost(given: dict[str, Any]) -> Any:
            return original(module, **given)

        run = innermost
        for around in _around:
            run = functools.partial(_through, around, module, implementation, run)
        return run(given)

    return attend


def _through(around: Around, module: Any, implementation: str, run: Attend, given: dict[str, Any]) -> Any:
    return around(module, given, implementation, run)


@functools.lru_cache(maxsize=64)
def _names(function: Any) -> tuple[str, ...]:
    """Names of arguments by place; those of the first are the same everywhere, the order of the others differs."""
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return (*FIRST, *names[len(FIRST) :])
