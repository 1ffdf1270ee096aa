"""JSON and gzip within bounds: a small file from a stranger must not fill the memory."""

from __future__ import annotations

import gzip
import io
import json
import re
import secrets
import sys
from typing import Any

from .errors import BadFile

#: A JSON file may unpack to at most this many bytes, so that a small gzip cannot fill the memory.
LARGEST_JSON = 1 << 30
#: A gzip file may unpack to so many times its size, and always to so many bytes.
LARGEST_RATIO, LEAST_UNPACKED = 64, 1 << 26
#: JSON may take so many times its size in memory (by an estimate that is a fifth too low at worst), and always so many
#: bytes.
LARGEST_IN_MEMORY, LEAST_BOUND = 4, 1 << 28
_NOT_TRUSTED = ("a file of noesis' own", "Save it as .safetensors; if it is not yours, do not trust it")

_KEY_OR_STRING = re.compile(r'"[^"\\]*"(?=\s*:)|(?<=:)\s*"[^"\\]*"')


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


def parsed(text: str, size: int, path: object) -> Any:
    """The value of a JSON text, unless its objects would take far more memory than the file.

    `[[],[],` takes 30 times its text. Strings that come again, such as the fields of records, are kept once.
    """
    keys, told = text.count(":"), text.count(': "') + text.count(':"')
    strings = max(0, text.count('"') // 2 - keys - told)
    # A number or null with its place in a list, an empty list, object, or string.
    needed = sys.getsizeof(text) + 32 * text.count(",") - 24 * text.count("null")
    needed += 64 * text.count("[") + 200 * text.count("{") + 50 * strings
    most = max(LEAST_BOUND, LARGEST_IN_MEMORY * size)
    if needed + 50 * (keys + told) <= most:
        return json.loads(text)
    needed += int(50 * (keys + told) * _share_of_new_strings(text))
    if needed > most:
        raise BadFile(
            f"{path} would take about {needed} bytes of memory for {size} of JSON, and {most} are allowed",
            *_NOT_TRUSTED,
        )
    known: dict[str, str] = {}

    def with_known_strings(value: dict[str, Any]) -> dict[str, Any]:
        for key, inner in value.items():
            if type(inner) is str:
                value[key] = known.setdefault(inner, inner)
        return value

    return json.loads(text, object_hook=with_known_strings)


def _share_of_new_strings(text: str) -> float:
    """Of the keys and the strings behind them, the share that did not come before, in pieces drawn by chance."""
    found: list[str] = []
    for _ in range(64):
        start = secrets.randbelow(len(text))
        found += _KEY_OR_STRING.findall(text, start, start + 4096)
    return len(set(found)) / max(1, len(found))
