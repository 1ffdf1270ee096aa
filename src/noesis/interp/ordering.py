"""In which order edits are applied, and what they are called."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from ..errors import BadType, BadValue
from .edits import Edit


def in_order(edits: Sequence[Edit]) -> dict[str, Edit]:
    """Edits by name, in the order in which they are given, but each after those that it names in `after`.

    Raises:
        NoesisError: (a ValueError) for a name that is there twice or not at all, and edits that wait for each other;
            (a TypeError) for what is no edit.
    """
    named: dict[str, Edit] = {}
    for edit in edits:
        if not isinstance(edit, Edit):
            raise BadType(
                f"there is a {type(edit).__name__} among edits", "edits", "Pass interp.Zero('z.3'), for example"
            )
        name = edit.name or f"{edit.kind} {edit.site}"
        if name in named and edit.name:
            raise BadValue(f"two edits are called {name!r}", "a name for each", "Call one of them otherwise")
        number = 2
        while name in named:
            name, number = f"{edit.kind} {edit.site} ({number})", number + 1
        named[name] = edit
    for name, edit in named.items():
        for other in edit.after:
            if other not in named:
                near = difflib.get_close_matches(other, named, n=2) or list(named)[:4]
                raise BadValue(
                    f"{name} has to come after {other!r}, which is not there",
                    "a name of an edit",
                    f"There is {', '.join(near)}",
                )
    try:
        TopologicalSorter({name: edit.after for name, edit in named.items()}).prepare()
    except CycleError as error:
        raise BadValue(
            f"edits wait for each other: {' after '.join(error.args[1])}",
            "edits without a cycle",
            "Take out an `after`",
        ) from None
    ordered: dict[str, Edit] = {}
    while len(ordered) < len(named):
        ready = next(name for name, edit in named.items() if name not in ordered and ordered.keys() >= set(edit.after))
        ordered[ready] = named[ready]
    return ordered


def ordered_by(edits: Mapping[str, Edit], names: Sequence[str]) -> dict[str, Edit]:
    """The same edits in the order of `names`.

    Raises:
        NoesisError: (a ValueError) when `names` are not all of theirs, each once, or break an `after`.
    """
    if sorted(names) != sorted(edits):
        raise BadValue(f"the order {', '.join(names)}", f"each of {', '.join(edits)} once", "Name all of them")
    for place, name in enumerate(names):
        late = set(edits[name].after) - set(names[:place])
        if late:
            raise BadValue(f"{name} before {', '.join(late)}", "the order that `after` asks for", "Put it behind")
    return {name: edits[name] for name in names}
