"""How a result writes itself: the same manners for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from .. import files


class Saved:
    """A result with a header, and arrays or a payload of JSON beside it.

    Attributes:
        kind: of its files, see `noesis.files.versions`.
        suffixes: what `save` knows.
    """

    kind: ClassVar[str]
    suffixes: ClassVar[str] = ".safetensors, .json or .json.gz"

    def save(self, path: files.PathLike) -> Path:
        """Write a file of the kind that the suffix says, whole or not at all.

        Args:
            path: `.json`, `.json.gz` or `.safetensors`; token deltas and comparisons are JSON alone.

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

    def _payload(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        raise NotImplementedError

    def _header(self) -> dict[str, Any]:
        """What stands beside the arrays."""
        raise NotImplementedError

    def _arrays(self) -> files.Arrays:
        """What is written as tensors."""
        raise NotImplementedError
