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

#: Called with the attention module, what the implementation was given by name, its name, and what it returned.
Seen = Callable[[nn.Module, dict[str, Any], str, Any], None]

#: What models call an implementation with, by place.
FIRST = ("module", "query", "key", "value", "attention_mask")

_lock = threading.Lock()
_watching: list[tuple[int, Seen]] = []


@contextmanager
def watching_attention(seen: Seen) -> Iterator[bool]:
    """Hand on each call of attention that this thread makes through transformers' interface while the block lasts.

    Models ask `ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)` at each call; what they get is the same
    function, wrapped. Implementation, config and masks stay what they are, and so do all bits.

    Yields:
        Whether there is such an interface: no, without transformers.
    """
    library = sys.modules.get("transformers.modeling_utils")
    registry = attribute(library, "ALL_ATTENTION_FUNCTIONS")
    if not callable(attribute(registry, "get_interface")):
        if library is not None:
            name = "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface"
            logger.warning("this version has no {} as noesis knows it; instead, attention is not seen by heads", name)
        yield False
        return
    watcher = (threading.get_ident(), seen)
    with _lock:
        if not _watching:  # an attribute of the object goes before the method of its class
            registry.get_interface = functools.partial(_wrapped, registry)
        _watching.append(watcher)
    try:
        yield True
    finally:
        with _lock:
            _watching.remove(watcher)
            if not _watching:
                del registry.get_interface


def _wrapped(registry: Any, implementation: str, default: Any = None) -> Any:
    original = type(registry).get_interface(registry, implementation, default)
    thread = threading.get_ident()
    with _lock:
        watchers = [seen for ident, seen in _watching if ident == thread]
    if not watchers or original is None:
        return original

    @functools.wraps(original)
    def attend(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = _by_name(original, args, kwargs)
        module = given.pop("module", None)
        if isinstance(module, nn.Module):
            for seen in watchers:
                seen(module, given, implementation, result)
        return result

    return attend


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; the order of those after the first differs between implementations."""
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    names = [*FIRST, *names[len(FIRST) :]]
    return {**dict(zip(names, args, strict=False)), **kwargs}
