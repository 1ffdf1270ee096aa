"""Forwards that are nobody's business: run to find out something, beside those that are looked at and edited."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_threads: set[int] = set()


@contextmanager
def aside() -> Iterator[None]:
    """What this thread runs inside is neither kept nor edited."""
    thread = threading.get_ident()
    if thread in _threads:
        yield
        return
    _threads.add(thread)
    try:
        yield
    finally:
        _threads.discard(thread)


def is_aside() -> bool:
    """Whether this thread is."""
    return bool(_threads) and threading.get_ident() in _threads
