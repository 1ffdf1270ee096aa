"""Which cases of a test run by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(count: int, values: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`, of which the first run by default and the others with the slow tests.

    Args:
        count: how many run by default.
        values: all of them; a tuple stands for several arguments.
    """
    slow = pytest.mark.slow
    return [
        value if place < count else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for place, value in enumerate(values)
    ]
