"""`soulprint_snapshot` in a test: where its files lie, and comparing or writing them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile, BadValue
from .tally import Tally

if TYPE_CHECKING:
    from .snapshot import Snapshot

FOLDER = "__snapshots__"
#: Characters of a file's name, without its suffix.
LONGEST = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


class SoulprintSnapshot:
    """Compares a run with the file beside the test; what the fixture `soulprint_snapshot` gives.

    Examples:
        >>> import torch, noesis
        >>> def test_model(soulprint_snapshot):
        ...     wrapped = noesis.wrap(torch.nn.Linear(4, 2), layers="all")
        ...     wrapped(torch.ones(1, 4))
        ...     soulprint_snapshot(wrapped)
    """

    def __init__(self, test_file: Path, test: str, again: str, tally: Tally, *, update: bool) -> None:
        self._folder = test_file.parent / FOLDER / test_file.stem
        self._test, self._again, self._tally, self._update = test, again, tally, update

    def __call__(self, run: Any, name: str | None = None, *, tolerance: float | None = None) -> None:
        """Fail the test where the run differs from its snapshot, or has none; with `--soulprint-update`, write it.

        Args:
            run: what `noesis.wrap` returned, a `Trace`, or a `Soulprint`.
            name: of the file, of letters, digits and `._-`; by default that of the test, with its class and
                parameters. Those in one test file who give the same name have to agree.
            tolerance: by how much it may differ, as a share of the root mean square of a layer's elements; by default
                1e-5 in float32, 0.4 % in float16, 3.1 % in bfloat16. 0 for bitwise equal.

        Raises:
            NoesisError: for something that is no run, a run in which no layer ran, or a name that is no file's.
        """
        __tracebackhide__ = True
        from .snapshot import Snapshot

        path = self._folder / f"{file_name(self._test) if name is None else _checked(name)}.json"
        new = Snapshot.of(run, tolerance)
        written_now = self._tally.used(path)
        if self._update and not written_now:
            self._tally.add(path, self._written(path, new))
            return
        self._tally.add(path, "compared")
        problems = _problems(path, new)
        if problems:
            import pytest

            said, command = (
                f"{path.stem}: the run differs from {shown(path)}",
                f"pytest {self._again} --soulprint-update",
            )
            if self._update:
                do = "Another snapshot of that name was taken in this session: give each its own name=..."
            elif not path.exists():
                said, problems = f"{path.stem}: there is no snapshot {shown(path)}", []
                do = f"Write it, look at it, and commit it: {command}"
            else:
                do = f"If this is meant to be so: {command}"
            pytest.fail("\n".join([said, *problems, do]))

    def _written(self, path: Path, new: Snapshot) -> str:
        """Write it, unless what is there still holds; which of both."""
        if not _problems(path, new):
            return "unchanged"
        twins = (
            []
            if path.exists()
            else [other for other in path.parent.glob("*.json") if other.name.casefold() == path.name.casefold()]
        )
        if twins:
            raise BadValue(
                f"{path.name} differs from {shown(twins[0])} in case alone",
                "names that differ on every file system",
                "Give a name=...",
            )
        new.save(path)
        return "written"


def file_name(test: str) -> str:
    """The name of a test as that of a file: `TestA::test_b[1-x]` is `TestA.test_b-1-x`.

    What is no letter, digit or one of `._-` becomes `_`, and then a short hash tells it from others; likewise of a long
    name.

    Examples:
        >>> from noesis.testing.fixture import file_name
        >>> file_name("TestA::test_b[1-x]"), file_name("test_b[a/b]")
        ('TestA.test_b-1-x', 'test_b-a_b.f3ab8f')
    """
    plainly = test.replace("::", ".").removesuffix("]").replace("[", "-", 1)
    safe = _UNSAFE.sub("_", plainly)
    if safe == plainly and len(safe) <= LONGEST:
        return safe
    return f"{safe[:LONGEST]}.{hashlib.sha256(test.encode('utf-8', 'backslashreplace')).hexdigest()[:6]}"


def _checked(name: str) -> str:
    if not isinstance(name, str) or not name or _UNSAFE.search(name) or name[0] == "." or len(name) > LONGEST:
        raise BadValue(
            f"name={name!r}", f"up to {LONGEST} letters, digits and ._-, no dot in front", "Leave it out for the test's"
        )
    return name


def _problems(path: Path, new: Snapshot) -> list[str]:
    """Why a snapshot does not hold for a run, in words; none if it does."""
    if not path.exists():
        return ["there is no such file"]
    try:
        old = type(new).load(path)
    except BadFile as error:
        return [str(error)]
    if old.is_coarser(new.tolerance):
        return ["its numbers were rounded for a larger tolerance than this test asks for"]
    return old.differences(new)


def shown(path: Path) -> str:
    """A path as people say it, from the working folder."""
    return os.path.relpath(path)
