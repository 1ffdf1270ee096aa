"""Looking a name up, and saying so when it is not there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from loguru import logger


def look_up(*paths: str, fits: Callable[[Any], bool], instead: str) -> Any:
    """The first of some names that is there and is what noesis knows.

    Args:
        paths: such as `"torch._C:_is_tracing"`, a module and an attribute below it; the newest name first.
        fits: whether a value is what is meant; raising is a no.
        instead: what is done without it, for the log.

    Returns:
        The value, or None.

    Examples:
        >>> from noesis.internals.lookup import look_up
        >>> look_up("torch:no_such_name", "torch:is_tensor", fits=callable, instead="nothing").__name__
        'is_tensor'
    """
    for path in paths:
        value = resolve(path)
        try:
            if value is not None and fits(value):
                return value
        except Exception as error:
            logger.debug("{} is something else here: {!r}", path, error)
    logger.warning("this version has no {} as noesis knows it; instead, {}", paths[0], instead)
    return None


def resolve(path: str) -> Any:
    """What a path names, or None."""
    module, _, below = path.partition(":")
    try:
        value = import_module(module)
        for name in below.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError):
        return None
    return value


def attribute(holder: Any, name: str) -> Any:
    """An attribute of an object that not every version gives it, or None."""
    return getattr(holder, name, None)
