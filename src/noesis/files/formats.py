"""Reading and writing: safetensors and JSON, atomically, with a format version.

A file either is what it says it is, or reading it raises `NoesisError`. Nothing here knows what
a trace or a soulprint is; that knowledge lives with them.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as pack_safetensors

from ..errors import BadFile, BadValue, NoesisError
from . import bounded_json
from .atomic import PathLike, read_bytes, write_bytes
from .versions import check_header, heading

Arrays = dict[str, NDArray[Any]]


def save_tensors(path: PathLike, kind: str, arrays: Arrays, header: dict[str, Any]) -> Path:
    """Write arrays and a JSON header to a `.safetensors` file of the given kind."""
    return write_bytes(path, pack_tensors(kind, arrays, header))


def pack_tensors(kind: str, arrays: Arrays, header: dict[str, Any]) -> bytes:
    """The bytes of such a file."""
    full = {**heading(kind), **header}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # safetensors metadata maps strings to strings, so the header travels as one JSON string.
    packed: bytes = pack_safetensors(contiguous, {"noesis": dump_json(full)})
    return packed


def load_tensors(path: PathLike, kind: str) -> tuple[Arrays, dict[str, Any]]:
    """Read back what `save_tensors` wrote; returns the arrays and the header."""
    return parse_tensors(read_bytes(path), kind, path)


def parse_tensors(data: bytes, kind: str, path: PathLike) -> tuple[Arrays, dict[str, Any]]:
    """The same from bytes; `path` is what errors call them."""
    with reading_tensors(path, kind):
        header = read_header(data, path)
    return parse_arrays(data, kind, path), check_header(header, kind, path)


def parse_arrays(data: bytes, kind: str, path: PathLike) -> Arrays:
    """The arrays alone."""
    with reading_tensors(path, kind):
        arrays: Arrays = parse_safetensors(data)
        # As noesis writes them. Of bytes, float64 would be eight times the file.
        strange = [name for name, array in arrays.items() if array.dtype.kind not in "fiu" or array.dtype.itemsize < 4]
        if strange:
            raise TypeError(f"{strange[0]} is of dtype {arrays[strange[0]].dtype}")
    return arrays


@contextmanager
def reading_tensors(path: PathLike, kind: str) -> Iterator[None]:
    """Have what can be wrong with a safetensors file be an error of noesis."""
    try:
        yield
    except NoesisError:
        raise
    except (
        SafetensorError,
        struct.error,
        ValueError,
        AttributeError,
        TypeError,
        KeyError,
        RuntimeError,
        OverflowError,
        AssertionError,
    ) as error:
        raise BadFile(
            f"{path} is not a readable safetensors file ({type(error).__name__}: {error})",
            f"a noesis {kind}",
            "It may be truncated; write it again",
        ) from None


def read_header(data: bytes, path: PathLike) -> Any:
    """What noesis wrote into the metadata of a safetensors file, from the file's bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].decode()
    inner = bounded_json.parsed(text, len(data), path, held=len(data)).get("__metadata__", {}).get("noesis", "null")
    del text
    return bounded_json.parsed(inner, len(data), path, held=len(data))


def dump_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, anything JSON does not know becomes its `str`."""
    try:
        return json.dumps(value, indent=indent, default=_as_json, allow_nan=False)
    except (ValueError, TypeError):  # NaN, keys that are no strings, or a circle
        return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _as_json(value: Any) -> Any:
    """What JSON does not know: numpy's numbers as numbers, the rest as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _strict(value: Any, depth: int = 100) -> Any:
    if depth == 0:
        raise BadValue("meta is nested more than 100 deep, or holds itself", "values that JSON can hold", "Flatten it")
    if isinstance(value, dict):
        return {str(key): _strict(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner, depth - 1) for inner in value]
    if value is not None and not isinstance(value, (str, bool, int, float)):
        value = _as_json(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_lists(array: NDArray[Any]) -> list[Any]:
    """Numbers as JSON holds them where infinities have to come back: as "Infinity" and "-Infinity", NaN as null.

    `np.asarray(..., dtype=np.float64)` makes numbers of all of them again.

    Examples:
        >>> import numpy as np
        >>> from noesis.files import number_lists
        >>> number_lists(np.array([0.5, np.nan, -np.inf]))
        [0.5, None, '-Infinity']
    """
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return list(array.tolist())
    held = array.astype(object)
    held[np.isnan(array)] = None
    held[array == np.inf], held[array == -np.inf] = "Infinity", "-Infinity"
    return list(held.tolist())


def is_json(path: Path) -> bool:
    """Whether the name says JSON, gzipped or not."""
    return path.name.endswith((".json", ".json.gz"))


def unknown_suffix(path: Path, known: str = ".safetensors, .json or .json.gz") -> BadValue:
    """The error for a path whose name does not say what to write."""
    return BadValue(f"{path} has the suffix {path.suffix!r}", known, "Rename the file")


def save_json(path: PathLike, kind: str, payload: dict[str, Any]) -> Path:
    """Write a JSON object of the given kind; gzip when the name ends in `.gz`."""
    full = {**heading(kind), **payload}
    return write_bytes(path, _packed(path, dump_json(full)))


def json_bytes(path: PathLike, payload: dict[str, Any]) -> bytes:
    """A JSON object as it is, for a file of this name; v0.1 wrote NaN as NaN, and so does this."""
    return _packed(path, json.dumps(payload, default=_as_json))


def _packed(path: PathLike, text: str) -> bytes:
    data = text.encode()
    # mtime=0: the same content gives the same bytes.
    return gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data


def read_json(
    path: PathLike, *, numbers: Collection[str] = (), whole: bool = False, strict: bool = True
) -> dict[str, Any]:
    """The JSON object in a file, gzipped or not (told by its first bytes, not by its name).

    Args:
        path: of the file.
        numbers: names in the object under which lists are read as arrays of float64, at a fifth of the memory.
        whole: as arrays of int64 instead.
        strict: whether something else there is an error; if not, the whole object is then read as it is.
    """
    with _reading_json(path):
        text, size = _decoded(read_bytes(path), path)
        try:
            value = bounded_json.parsed(text, size, path, numbers=numbers, whole=whole)
        except bounded_json.NoArrayError:
            if strict:
                raise
            value = bounded_json.parsed(text, size, path)
    return _object(value, path)


def parse_json(text: str, where: PathLike, *, numbers: Collection[str] = (), whole: bool = False) -> dict[str, Any]:
    """The same from text; errors call it `where`."""
    with _reading_json(where):
        size = len(text.encode("utf-8", "surrogatepass"))
        value = bounded_json.parsed(text, size, where, numbers=numbers, whole=whole)
    return _object(value, where)


def _decoded(data: bytes | bytearray, path: PathLike) -> tuple[str, int]:
    """The text of a file, and how many bytes of JSON it is."""
    if data[:2] == b"\x1f\x8b":
        data = bounded_json.unpacked(data, path)
    bounded_json.check_size(data, path)
    return str(data, json.detect_encoding(data), "surrogatepass"), len(data)


def _object(value: Any, path: PathLike) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadFile(f"{path} holds a JSON {type(value).__name__}", "a JSON object", "Check the path")
    return value


@contextmanager
def _reading_json(path: PathLike) -> Iterator[None]:
    """Have what can be wrong with JSON be an error of noesis."""
    try:
        yield
    except NoesisError:
        raise
    except bounded_json.NoArrayError as error:
        raise BadFile(
            f"{path} holds something else where arrays belong ({error})", "lists of numbers", "Write it again"
        ) from error
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise BadFile(
            f"{path} is not readable JSON ({type(error).__name__}: {error})",
            "a noesis JSON file",
            "It may be truncated; write it again",
        ) from None
