"""JSON and gzip within bounds: a small file from a stranger must not fill the memory."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from array import array
from collections.abc import Collection
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]  # C, as in JSONDecoder.parse_string
from json.scanner import make_scanner
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadFile

#: A JSON file may unpack to at most this many bytes, so that a small gzip cannot fill the memory.
LARGEST_JSON = 1 << 30
#: A gzip file may unpack to so many times its size, and always to so many bytes.
LARGEST_RATIO, LEAST_UNPACKED = 64, 1 << 26
#: JSON may take so many times its size in memory, and always so many bytes.
LARGEST_IN_MEMORY, LEAST_BOUND = 4, 1 << 25
_NOT_TRUSTED = ("a file of noesis' own", "Save it as .safetensors; if it is not yours, do not trust it")

#: Characters that are parsed at once where a list or object ends within them; of numbers on their way into an array.
_WINDOW, _PIECE = 1 << 13, 1 << 16
#: What objects take at most: a number, a place in a growing list or dict, what surrounds any object.
_NUMBER, _PLACE, _ENTRY, _HEAD = 32, 10, 160, 16
#: Strings that are kept once each, and their longest.
_KNOWN, _SHORT = 4096, 64
_WIDE = re.compile(r"(?<!\\)(?:\\\\)*\\u(?!00)")
_WIDEST = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89abAB]")
_ITEM = r'(?:"[^"\\]*"|[-+.0-9eE]+|null|true|false|NaN|-?Infinity)'
_ITEMS = re.compile(rf"{_ITEM}(?:\s*,\s*{_ITEM})*(?=\s*[,\]])")
_SPACE = re.compile(r"[ \t\n\r]*")
_FLAT = re.compile(r'\[[^\[\]{}"]*\]')
_ROWS = re.compile(r'\[[^\[\]{}"]*\](?:\s*,\s*\[[^\[\]{}"]*\])*')
_STRETCH = re.compile(r'[^\[\]{}"]+')


class NoArrayError(ValueError):
    """There is JSON, and no array of numbers where one belongs."""


def unpacked(data: bytes | bytearray, path: object) -> bytearray:
    """What a gzip file holds, within bounds: it could be a thousand times its size."""
    most = min(LARGEST_JSON, max(LEAST_UNPACKED, LARGEST_RATIO * len(data)))
    found = bytearray()
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        while piece := file.read(1 << 20):
            found += piece
            if len(found) > most:
                raise _too_large(path, most)
    return found


def check_size(data: bytes | bytearray, path: object) -> None:
    """Refuse what is too long, or becomes too large as text."""
    if len(data) > LARGEST_JSON:
        raise _too_large(path, LARGEST_JSON)
    if 2 * _width(data) * len(data) > max(LEAST_BOUND, LARGEST_IN_MEMORY * len(data)):
        raise BadFile(f"{path} has characters that make it eight times as large in memory", *_NOT_TRUSTED)


def _width(data: bytes | bytearray) -> int:
    """Bytes per character of the text in memory: the widest character decides for all."""
    return 4 if re.search(rb"[\xf0-\xff]", data) else 2 if re.search(rb"[\xc4-\xff]", data) else 1


def _too_large(path: object, most: int) -> BadFile:
    return BadFile(f"{path} unpacks to more than {most} bytes", "a noesis JSON file", "Do not trust it")


def parsed(
    text: str, size: int, path: object, *, held: int = 0, numbers: Collection[str] = (), whole: bool = False
) -> Any:
    """The value of a JSON text, unless it and its objects would take far more memory than the file.

    `[[],[],` takes 30 times its text, which is learned before it has taken four times.

    Args:
        text: JSON.
        size: bytes of the file that it is of.
        path: what errors call it.
        held: bytes of that file that stay in memory beside the text.
        numbers: names in the outermost object under which lists are read as float64 arrays.
        whole: as int64 arrays instead; other numbers are refused.

    Raises:
        NoesisError: when it would take too much.
        ValueError: when it is no JSON, or (a NoArrayError) there is no array where one belongs.
    """
    budget = _Budget(size, path, held + sys.getsizeof(text))
    parser = _Parser(text, budget, numbers, "q" if whole else "d")
    value, end = parser.value(parser.skip(0))
    if (end := parser.skip(end)) != len(text):
        raise JSONDecodeError("Extra data", text, end)
    return value


class _Budget:
    """The memory that the objects of a text may take."""

    def __init__(self, size: int, path: object, taken: int) -> None:
        self.size, self.path = size, path
        self.most = max(LEAST_BOUND, LARGEST_IN_MEMORY * size)
        self.left = self.most - taken

    def pay(self, needed: int) -> None:
        """Count bytes."""
        self.left -= needed
        if self.left < 0:
            raise BadFile(
                f"{self.path} would take more than {self.most} bytes of memory for {self.size} of JSON", *_NOT_TRUSTED
            )


class _Text:
    """A JSON text, and the way from value to value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def skip(self, at: int) -> int:
        """Past white space."""
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]  # it matches nothing too

    def next(self, at: int, close: str) -> tuple[int, bool]:
        """Past the comma that follows here, or past the end, and whether it was that."""
        at = self.skip(at)
        if self.text[at : at + 1] == close:
            return at + 1, True
        if self.text[at : at + 1] != ",":
            raise JSONDecodeError("Expecting ',' delimiter", self.text, at)
        return self.skip(at + 1), False


class _Parser(_Text):
    """Reads values, and pays for each object before it makes the next."""

    def __init__(self, text: str, budget: _Budget, numbers: Collection[str], code: str) -> None:
        super().__init__(text)
        self.budget, self.pay = budget, budget.pay
        self.strings = _Strings(text, budget)
        self.string, self.kept = self.strings.read, self.strings.kept
        self.arrays = _Arrays(text, budget, code)
        self.numbers = frozenset(numbers)
        self.scan = make_scanner(json.JSONDecoder(object_pairs_hook=self._object_of))  # type: ignore[arg-type]
        self.long_at = 0  # what begins before did not end within a window, or would not

    def value(self, at: int, numeric: bool = False, outermost: bool = True) -> tuple[Any, int]:
        """The value that begins here, and where it ends."""
        first = self.text[at : at + 1]
        if numeric and first != "{":
            return self.arrays.read(at)
        if first == '"':
            return self.string(at)
        if first not in ("[", "{"):
            return self._scanned(at)
        if not outermost and not numeric and at >= self.long_at:
            value, end = self.short(at)
            if end:
                return value, end
        return self.entries(at, numeric, outermost) if first == "{" else self.elements(at)

    def short(self, at: int) -> tuple[Any, int]:
        """The list or object that begins here, if it ends within a window; else it ends at 0."""
        before = self.budget.left
        try:
            value, end = self.scan(self.text[at : at + _WINDOW], 0)
        except (JSONDecodeError, StopIteration):  # cut off, or no JSON, which will be found again
            self.budget.left, self.long_at = before, at + _WINDOW // 2
            return None, 0
        if type(value) is list:
            self.pay(_weight(value))
        return value, at + end

    def entries(self, at: int, numeric: bool, outermost: bool) -> tuple[dict[str, Any], int]:
        """The object that begins here, entry by entry."""
        found: dict[str, Any] = {}
        at = self.skip(at + 1)
        while self.text[at : at + 1] != "}" or found:
            if self.text[at : at + 1] != '"':
                raise JSONDecodeError("Expecting property name enclosed in double quotes", self.text, at)
            self.pay(_ENTRY)
            key, at = self.string(at)
            at = self.skip(at)
            if self.text[at : at + 1] != ":":
                raise JSONDecodeError("Expecting ':' delimiter", self.text, at)
            found[key], at = self.value(self.skip(at + 1), numeric or (outermost and key in self.numbers), False)
            at, ended = self.next(at, "}")
            if ended:
                return found, at
        return found, at + 1

    def elements(self, at: int) -> tuple[list[Any], int]:
        """The list that begins here, element by element."""
        found: list[Any] = []
        at = self.skip(at + 1)
        while self.text[at : at + 1] != "]" or found:
            if items := _ITEMS.match(self.text, at, at + _WINDOW):
                values = json.loads(f"[{items[0]}]")
                self.pay(_PLACE * len(values) + sum(map(_weight, values)))
                found += values
                at = items.end()
            else:
                self.pay(_PLACE)
                value, at = self.value(at, outermost=False)
                found.append(value)
            at, ended = self.next(at, "]")
            if ended:
                return found, at
        return found, at + 1

    def _scanned(self, at: int) -> tuple[Any, int]:
        """The number, or the name of a constant, that stands here."""
        try:
            value, end = self.scan(self.text, at)
        except StopIteration:
            raise JSONDecodeError("Expecting value", self.text, at) from None
        self.pay(_weight(value))
        return value, end

    def _object_of(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """The object of a window with these entries; the objects in it are made, and paid for, before."""
        found, kept = {}, self.kept
        for key, value in pairs:
            if type(value) is str:
                found[kept(key)] = kept(value)
            else:
                self.pay(_weight(value))
                found[kept(key)] = value
        self.pay(sys.getsizeof(found) + _HEAD)
        return found


class _Strings:
    """Reads strings, and keeps each short one once."""

    def __init__(self, text: str, budget: _Budget) -> None:
        self.text, self.budget = text, budget
        self.known: dict[str, str] = {}
        self.width = max(1, sys.getsizeof(text) // max(1, len(text)))  # bytes per character

    def read(self, at: int) -> tuple[str, int]:
        """The string that begins here, and where it ends."""
        close = self._close_of(at)
        needed = self._needed_for(at, close) if close - at > _WINDOW else 0
        self.budget.pay(needed)
        found, end = scanstring(self.text, at + 1)
        self.budget.left += needed
        return self.kept(found), end

    def kept(self, found: str) -> str:
        """A string, or the equal one that came before."""
        before = self.known.get(found)
        if before is not None:
            return before
        self.budget.pay(sys.getsizeof(found) + _HEAD)
        if len(found) <= _SHORT and len(self.known) < _KNOWN:
            self.known[found] = found
        return found

    def _close_of(self, at: int) -> int:
        """Where the string that begins here ends."""
        close = at
        while (close := self.text.find('"', close + 1)) > 0:
            back = close
            while self.text[back - 1] == "\\":
                back -= 1
            if (close - back) % 2 == 0:
                return close
        raise JSONDecodeError("Unterminated string starting at", self.text, at)

    def _needed_for(self, at: int, close: int) -> int:
        """Bytes of the string between these quotes at most, and of what it is put together from."""
        wide, escapes = _WIDE.search(self.text, at, close), self.text.count("\\u", at, close)
        characters = close - at - 5 * (escapes - self.text.count("\\\\u", at, close))
        width = max(self.width, 1 if wide is None else 4 if _WIDEST.search(self.text, at, close) else 2)
        return characters * (width if width == self.width else width + self.width)


class _Arrays(_Text):
    """Reads lists of numbers as arrays."""

    def __init__(self, text: str, budget: _Budget, code: str) -> None:
        super().__init__(text)
        self.budget, self.code = budget, code

    def read(self, at: int) -> tuple[NDArray[Any], int]:
        """The lists of numbers that begin here, and where they end."""
        if self.text[at : at + 1] != "[":
            raise NoArrayError(f"no list of numbers at character {at}")
        found = array(self.code)
        shape, end = self._fill(found, at)
        return np.frombuffer(found, found.typecode).reshape(shape) if found else np.zeros(shape), end

    def _fill(self, found: array[Any], at: int) -> tuple[tuple[int, ...], int]:
        """Add the numbers of the list that begins here; its shape, and where it ends."""
        if flat := _FLAT.match(self.text, at, at + _PIECE):
            return self._add(found, flat[0]), flat.end()
        inner: set[tuple[int, ...]] = set()
        count, at = 0, self.skip(at + 1)
        while self.text[at : at + 1] != "]" or count:
            if rows := _ROWS.match(self.text, at, at + _PIECE):
                length, *shape = self._add(found, f"[{rows[0]}]")
                inner.add(tuple(shape))
                count += length
                at = rows.end()
            elif self.text[at : at + 1] == "[":
                of_one, at = self._fill(found, at)
                inner.add(of_one)
                count += 1
            else:
                length, at = self._stretch(found, at)
                inner.add(())
                count += length
            if len(inner) > 1:
                raise NoArrayError(f"lists of different lengths before character {at}")
            at, ended = self.next(at, "]")
            if ended:
                return (count, *inner.pop()), at
        return (0,), at + 1

    def _stretch(self, found: array[Any], at: int) -> tuple[int, int]:
        """Add the numbers from here up to a bracket, or as many as fit a window; how many, and where they end."""
        match = _STRETCH.match(self.text, at, at + _PIECE)
        numbers = "" if match is None else match[0]
        if self.text[at + len(numbers) : at + len(numbers) + 1] != "]":  # up to the last comma: one may be cut off
            numbers = numbers[: max(0, numbers.rfind(","))]
        if not numbers:
            raise JSONDecodeError("Expecting a number", self.text, at)
        [length] = self._add(found, f"[{numbers}]")
        return length, at + len(numbers)

    def _add(self, found: array[Any], flat: str) -> tuple[int, ...]:
        """Add a list of numbers, or of rows of them; its shape."""
        values = json.loads(flat)
        try:
            numbers = np.asarray(values, dtype=np.float64 if self.code == "d" else None)
        except (ValueError, TypeError, OverflowError) as error:
            raise NoArrayError(str(error)) from None
        if self.code == "q" and numbers.size and numbers.dtype.kind not in "iu":
            raise NoArrayError(f"numbers of type {numbers.dtype}, expected whole ones")
        # `found` grows by a sixteenth more; nothing is for nothing.
        self.budget.pay(9 * numbers.size or _HEAD + len(flat))
        found.frombytes(numbers.astype(self.code).tobytes())
        return numbers.shape


def _weight(value: Any) -> int:
    """Bytes of a value that is no object."""
    if type(value) is list:
        return sys.getsizeof(value) + _HEAD + sum(map(_weight, value))
    if type(value) is str:
        return sys.getsizeof(value) + _HEAD
    return _NUMBER if type(value) is float or type(value) is int else 0
