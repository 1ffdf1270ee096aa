"""Layers that fail on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class OnPurpose(Exception):
    pass


@contextmanager
def failing(module: nn.Module, when: str, error: type[BaseException] = OnPurpose) -> Iterator[None]:
    """The module's forward raises, before it has done anything or after all is done."""
    forward = module.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            forward(*args, **kwargs)
        raise error

    module.forward = fails  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
