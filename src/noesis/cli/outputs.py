"""What commands write: nothing in the place of what is there, unless they are told to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..errors import BadValue, Inaccessible


def check_outputs(outputs: Iterable[tuple[str, files.PathLike | None]], force: bool) -> None:
    """Refuse to write, before any work is done, in the place of a file that is there, or two things into one file.

    Args:
        outputs: what is to be written, and the option that says so; None for what is not.
        force: whether files that are there are replaced.

    Raises:
        NoesisError: naming the file.

    Examples:
        >>> import tempfile
        >>> from noesis.cli.outputs import check_outputs
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     check_outputs([("--out", file.name)], force=True)
    """
    taken: dict[Path, str] = {}
    for option, name in outputs:
        if name is None:
            continue
        path = Path(name)
        if path.is_file() and not force:
            raise Inaccessible(
                f"{path} is there already", "a name that is free", f"Change {option}, or replace it with --force"
            )
        before = taken.setdefault(path.absolute(), option)
        if before != option:
            raise BadValue(f"{before} and {option} both name {path}", "a file for each", f"Change {option}")
