"""Bytes in files: whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Inaccessible, MissingFile, NoesisError

PathLike = str | os.PathLike[str]


def write_bytes(path: PathLike, data: bytes) -> Path:
    """Write a whole file or none."""
    return write_all([(path, data)])[0]


def write_all(contents: Iterable[tuple[PathLike, bytes]]) -> list[Path]:
    """Write whole files, all or none: temporary files in the same folders, fsync, then rename.

    Raises:
        NoesisError: (an OSError) naming the path that cannot be written.
    """
    ready: list[tuple[Path, Path]] = []
    try:
        for name, data in contents:
            path = Path(name)
            temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"
            ready.append((temporary, path))
            with accessing(path, "written"):
                if path.exists() and not path.is_file():  # a device, say, which renaming would put a file in place of
                    raise IsADirectoryError("a folder or a device is in its place")
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        for temporary, path in ready:
            with accessing(path, "written"):
                temporary.replace(path)
    except BaseException:
        for temporary, _ in ready:
            with suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)
        raise
    return [path for _, path in ready]


@contextmanager
def accessing(path: PathLike, how: str) -> Iterator[None]:
    """Have what the system refuses inside be an error of noesis that names the path."""
    try:
        yield
    except NoesisError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL, or half of a surrogate pair
        why = getattr(error, "strerror", None) or error
        refused = Inaccessible(
            f"{path} cannot be {how} ({why})",
            "a path that can be",
            "Check the path, its permissions, and the room left",
        )
        refused.errno = getattr(error, "errno", None)
        raise refused from error


def read_bytes(path: PathLike) -> bytes:
    """The bytes of a file, or an error that names it."""
    path = Path(path)
    with accessing(path, "read"):
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not there"
            raise MissingFile(f"{path} is {what}", "a file", "Check the path")
        return path.read_bytes()
