"""What every file of v0.1 has: a type, a run, and fields that may be anything until they are checked."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import BadFile, BadValue, MissingFile
from ..atomic import accessing

if TYPE_CHECKING:
    from collections.abc import Iterable


TRACE = "sdxl_unet"

SOULPRINT = "sdxl_unet_soulprint"

_KINDS: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    object: "a number",
}

ASK_PATH = "Check the path"

FIT = "Build it from rows that belong together"

LARGEST_STEP = (1 << 31) - 1

#: Dimensions of a tensor, as in NumPy.
MOST_SIZES = 64

#: float64 holds whole numbers exactly up to here.
LARGEST_COUNT = 1 << 53

_T = TypeVar("_T")


def looks_like(value: object) -> bool:
    """Whether parsed JSON is a trace or soulprint of v0.1, by its `type`.

    Examples:
        >>> from noesis.files import v01
        >>> v01.looks_like({"type": "sdxl_unet_soulprint"}), v01.looks_like({"format": "noesis.trace"})
        (True, False)
    """
    return isinstance(value, dict) and value.get("type") in (TRACE, SOULPRINT)


def trace_files(folder: Path) -> list[Path]:
    """Files in a folder that are named like traces of v0.1."""
    if not folder.is_dir():
        raise MissingFile(f"{folder} is no folder", "a folder of v0.1 traces", ASK_PATH)
    with accessing(folder, "read"):
        found = list(folder.iterdir())
    return sorted(path for path in found if re.match(r"unet_trace_.+\.json(\.gz)?\Z", path.name))


def check_type(value: dict[str, Any], kind: str, path: Path) -> None:
    """Refuse the JSON object of a file that is not of the given kind."""
    if value.get("type") != kind:
        reader = "read_soulprint" if kind == TRACE else "read_run"
        do = f"It is the other kind of v0.1 file: use {reader}" if looks_like(value) else ASK_PATH
        raise bad(path, f"'type' is {reprlib.repr(value.get('type'))}", f"a v0.1 file of type {kind!r}", do)


def head(value: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Run id and meta of a file."""
    run_id, meta = get(value, "run_id", str, path), get(value, "meta", dict, path)
    if not run_id:
        raise bad(path, "'run_id' is empty", "a name for the run")
    return run_id, meta


def get(holder: Any, key: str, kind: type[_T], where: object) -> _T:
    """`holder[key]` if holder is an object, has the key, and its value is of the kind."""
    if not isinstance(holder, dict):
        raise bad(where, f"it is {reprlib.repr(holder)}", "an object")
    if key not in holder:
        raise bad(where, f"{key!r} is missing", _KINDS[kind])
    given = holder[key]
    if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
        raise bad(where, f"{key!r} is {reprlib.repr(given)}", _KINDS[kind])
    return given


def whole(holder: Any, key: str, where: object, *, least: int = 0, most: int = LARGEST_STEP) -> int:
    """A field that has to be a whole number within bounds."""
    given = get(holder, key, int, where)
    if not least <= given <= most:
        raise bad(where, f"{key!r} is {reprlib.repr(given)}", f"a whole number from {least} to {most}")
    return given


def numbers(given: list[Any], where: str) -> list[float]:
    """The numbers as floats; NaN and infinity are numbers, as Python's JSON writes them."""
    for at, one in enumerate(given):
        if isinstance(one, bool) or not isinstance(one, (int, float)):
            raise bad(where, f"value {at} is {reprlib.repr(one)}", "a number")
    try:
        return [float(one) for one in given]
    except OverflowError:
        raise bad(where, "a number is too large for float64", "numbers below 1.8e308") from None


def repeated(values: Iterable[_T]) -> _T | None:
    """The first value that comes a second time; None if all differ."""
    seen: set[_T] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def bad(where: object, what: str, expected: str, do: str = "The file may be damaged; write it again") -> BadFile:
    """The error for a file that is not as v0.1 wrote it."""
    return BadFile(f"{where}: {what}", expected, do)


def check_identity(run_id: str, meta: dict[str, Any], layers: list[str]) -> None:
    """Refuse to write what could not be told apart when read."""
    if not run_id:
        raise BadValue("the run id is empty", "a name for the run", "Name the run")
    try:
        json.dumps(meta, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        given = f"meta does not fit into JSON ({error})"
        raise BadValue(given, "a dict with string keys", "Leave out what JSON cannot hold") from None
    if (twice := repeated(layers)) is not None:
        raise BadValue(f"two layers are called {twice!r}", "a name for each row", "Name calls 'name#1', 'name#2'")
