"""In what two runs were asked for different things: by their meta, and by the timesteps that they had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import files
from ..numerics import Floats
from ..text import plain

#: What is different for every run, and tells nothing of it.
IDENTITY = ("run", "resumed")
#: How many are shown as text, and how much of each.
MOST, LONGEST = 8, 40

#: By name, the value in a and that in b; None where there is none.
Differences = dict[str, tuple[Any, Any]]


def meta_differences(a: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Differences:
    """What the meta of run `a` and of others say differently.

    Mappings are compared entry by entry, named `scheduler_config.beta_start`. Of several others that do not
    agree, the value is the list of theirs. What a file cannot tell apart (tuples and lists) is no difference.

    Examples:
        >>> from noesis.results.meta_differences import meta_differences
        >>> meta_differences({"seed": 1, "run": "a", "cfg": {"n": 4}}, [{"seed": 2, "run": "b", "cfg": {"n": 4.0}}])
        {'seed': (1, 2)}
    """
    one, rest = dict(_flat(a)), [dict(_flat(other)) for other in others]
    found: Differences = {}
    for name in dict.fromkeys([*one, *(name for other in rest for name in other)]):
        values = [other.get(name) for other in rest]
        if not all(_same(one.get(name), value) for value in values):
            agree = all(_same(values[0], value) for value in values)
            found[name] = (one.get(name), values[0] if agree else values)
    return found


def timestep_differences(a: Floats, b: Floats) -> Differences:
    """The timesteps of two runs, float64 [steps], where they are known and not the same."""
    if np.array_equal(a, b, equal_nan=True) or (np.isnan(a).all() and np.isnan(b).all()):
        return {}
    one, other = ([None if np.isnan(value) else float(value) for value in each] for each in (a, b))
    return {"timesteps": (one, other)}


def as_text(found: Differences) -> str:
    """The differences on one line, entries of mappings last."""
    names = sorted(found, key=lambda name: "." in name)
    shown = [f"{plain(name)} {_short(found[name][0])} -> {_short(found[name][1])}" for name in names[:MOST]]
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"different meta: {', '.join(shown)}{more}"


def from_json(value: Any) -> Differences:
    """What was written as lists of two."""
    found = {}
    for name, pair in dict(value).items():
        one, other = pair
        found[str(name)] = (one, other)
    return found


def _flat(meta: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in meta.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif prefix or name not in IDENTITY:
            yield f"{prefix}{name}", value


def _same(x: Any, y: Any) -> bool:
    try:
        if bool(x == y):  # 7 and 7.0
            return True
    except (TypeError, ValueError, RuntimeError):  # arrays
        pass
    return files.dump_json(x) == files.dump_json(y)


def _short(value: Any) -> str:
    text = repr(value)
    return plain(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
