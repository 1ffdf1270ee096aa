"""What a file of either format holds, read once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import PathLike, read_bytes
from .formats import Arrays, parse_arrays, read_header, read_json, reading_tensors
from .versions import check_header


@dataclass
class Contents:
    """What a file holds; of safetensors, the tensors are parsed when they are asked for, once.

    Attributes:
        path: what errors call it.
        header: of safetensors the header that noesis wrote, of JSON the whole object.
        data: of safetensors the bytes, until they are parsed.
    """

    path: PathLike
    header: Any
    data: bytes | None = None

    @property
    def format(self) -> str | None:
        """What the header says it is, for example "noesis.trace"."""
        named = self.header.get("format") if isinstance(self.header, dict) else None
        return named if isinstance(named, str) else None

    def of(self, kind: str) -> tuple[dict[str, Any], Arrays | None]:
        """The header and the arrays; of JSON, which has them in the header, None.

        Raises:
            NoesisError: when it is of another kind or version, or tensors are broken.
        """
        header = check_header(self.header, kind, self.path)
        if self.data is None:
            return header, None
        arrays = parse_arrays(self.data, kind, self.path)
        self.data = None  # a result is made next, which may be as large as the file again
        return header, arrays


def read_contents(
    path: PathLike, what: str, *, numbers: Collection[str] = (), whole: bool = False, strict: bool = True
) -> Contents:
    """What a file holds, by its suffix; `what` errors say was expected, and see `read_json` for the rest."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return Contents(path, read_json(path, numbers=numbers, whole=whole, strict=strict))
    data = read_bytes(path)
    with reading_tensors(path, what):
        return Contents(path, read_header(data, path), data)
