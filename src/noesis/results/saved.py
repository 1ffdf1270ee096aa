"""How a result writes and reads itself: the same manners for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .. import files
from ..errors import BadFile

S = TypeVar("S", bound="Saved")
T = TypeVar("T", str, int)
#: What JSON or tensors that do not fit together make of themselves while a result is made of them.
MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)


class Saved:
    """A result with a header, and arrays or a payload of JSON beside it.

    Attributes:
        kind: of its files, see `noesis.files.versions`.
        suffixes: what `save` knows.
        numbers: names in its JSON under which lists are read as arrays of float64.
        whole_numbers: whether these are whole numbers instead.
    """

    kind: ClassVar[str]
    suffixes: ClassVar[str] = ".safetensors, .json or .json.gz"
    numbers: ClassVar[tuple[str, ...]] = ()
    whole_numbers: ClassVar[bool] = False

    # ------------------------------------------------------------ writing

    def save(self, path: files.PathLike) -> Path:
        """Write a file of the kind that the suffix says, whole or not at all; one that is there is replaced.

        Args:
            path: `.json`, `.json.gz` or `.safetensors`; token deltas, comparisons and diffs are JSON alone.

        Raises:
            NoesisError: (a ValueError) for another suffix; (an OSError) where the file cannot be written.
        """
        path = Path(path)
        if files.is_json(path):
            return files.save_json(path, self.kind, self._payload())
        if path.suffix == ".safetensors" and ".safetensors" in self.suffixes:
            return files.save_tensors(path, self.kind, self._arrays(), self._header())
        raise files.unknown_suffix(path, self.suffixes)

    def to_json(self) -> str:
        """All of it as one JSON object, header included; NaN becomes null."""
        return files.dump_json({**files.heading(self.kind), **self._payload()})

    # ------------------------------------------------------------ reading

    @classmethod
    def load(cls: type[S], path: files.PathLike) -> S:
        """Read back what `save` wrote.

        Raises:
            NoesisError: (a ValueError) for a broken file, another kind or version; (a FileNotFoundError) for none.
        """
        return cls._read(files.read_contents(path, cls.kind, numbers=cls.numbers, whole=cls.whole_numbers))

    @classmethod
    def from_json(cls: type[S], value: str | Mapping[str, Any], path: Path | str = "the JSON") -> S:
        """Read back what `to_json` gave, as text or parsed; `path` is what errors call it.

        Raises:
            NoesisError: (a ValueError) when it is broken, or of another kind or version.
        """
        if isinstance(value, str):
            value = files.parse_json(value, path, numbers=cls.numbers, whole=cls.whole_numbers)
        return cls._of(files.Contents(path, value))

    @classmethod
    def _read(cls: type[S], contents: files.Contents) -> S:
        """From what a file holds, which may be older than noesis' own formats."""
        return cls._of(contents)

    @classmethod
    def _of(cls: type[S], contents: files.Contents) -> S:
        header, arrays = contents.of(cls.kind)
        try:
            return cls._from_payload(header) if arrays is None else cls._from_arrays(arrays, header)
        except MISFITS as error:
            what = ("valid " if cls.kind.endswith("s") else "a valid ") + cls.kind.replace("_", " ")
            why = str(error).rstrip(".")
            raise BadFile(
                f"{contents.path} is not {what} ({type(error).__name__}: {why})",
                f"a file written by {cls.__name__}.save",
                "It may be truncated or edited; write it again",
            ) from None

    # ------------------------------------------------------------ what each kind has of its own

    def _payload(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        raise NotImplementedError

    def _header(self) -> dict[str, Any]:
        """What stands beside the arrays."""
        raise NotImplementedError

    def _arrays(self) -> files.Arrays:
        """What is written as tensors."""
        raise NotImplementedError

    @classmethod
    def _from_payload(cls: type[S], payload: dict[str, Any]) -> S:
        """From the JSON object; whatever is wrong with it is one of `MISFITS`."""
        raise NotImplementedError

    @classmethod
    def _from_arrays(cls: type[S], arrays: files.Arrays, header: dict[str, Any]) -> S:
        """From tensors and what stands beside them; likewise."""
        raise NotImplementedError


def list_of(kind: type[T], values: Any) -> list[T]:
    """Values from JSON, once they are a list of strings, or of whole numbers.

    Raises:
        TypeError: when they are not.
    """
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise TypeError(f"expected a list of {kind.__name__}")
    return values
