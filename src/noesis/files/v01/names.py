"""Names of rows: v0.1 wrote bare module names, one row per call; here calls are told apart as `name#1`, `name#2`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray


def qualified(names: Iterable[str], most_calls: Mapping[str, int]) -> list[str]:
    """The names with `#k` for the k-th call, where a module is called several times."""
    calls: Counter[str] = Counter()
    qualified = []
    for name in names:
        calls[name] += 1
        qualified.append(f"{name}#{calls[name]}" if most_calls[name] > 1 else name)
    return qualified


def execution_order(sequences: Iterable[Sequence[str]]) -> list[str]:
    """All names in one order: each new one goes behind the one it followed when it first ran."""
    following: dict[str | None, str | None] = {None: None}  # a linked list that starts at None
    for sequence in sequences:
        before: str | None = None
        for name in sequence:
            if name not in following:
                following[before], following[name] = name, following[before]
            before = name
    order = []
    at = following[None]
    while at is not None:
        order.append(at)
        at = following[at]
    return order


def bare_names(layers: Sequence[str], ran: NDArray[np.bool_]) -> list[str]:
    """The names as v0.1 wrote them, without `#k`; `ran` is `[steps, layers]`.

    A suffix is taken off only where reading puts the same one on again: calls 1 to n, n > 1, are there in order, each
    step ran the first few of them, some step all. So a module whose own name ends in `#1` keeps it.
    """
    bare = list(layers)
    families: dict[str, list[int]] = {}
    for row, name in enumerate(layers):
        base, mark, _ = name.rpartition("#")
        if mark:
            families.setdefault(base, []).append(row)
    for base in families.keys() - set(layers):
        rows = families[base]
        in_order = all(layers[row] == f"{base}#{call}" for call, row in enumerate(rows, start=1))
        first_few = (ran[:, rows[:-1]] >= ran[:, rows[1:]]).all() and ran[:, rows[-1]].any()
        if len(rows) > 1 and in_order and first_few:
            for row in rows:
                bare[row] = base
    return bare
