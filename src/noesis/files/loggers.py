"""Where named numbers go: a file, or the object of a library that logs training runs.

No such library is imported: what an object is, is told by its methods.
"""

from __future__ import annotations

import csv
import inspect
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BadFile, BadType, BadValue
from ..text import csv_quoting
from .atomic import accessing
from .formats import dump_json

#: Takes the numbers of one step, and its number.
Writer = Callable[[Mapping[str, float], int], None]

ACCEPTED = (
    "a path that ends in .csv or .jsonl, or an object with log(numbers, step=...) as a W&B run, "
    "log_metrics(numbers, step=...) as MLflow's or Lightning's, or add_scalar(name, number, step) as TensorBoard's"
)


def writer(target: Any) -> Writer:
    """What writes named numbers to a target, one step at a time.

    Files grow by a line per step, their folder is made. JSONL has `null` for NaN and infinity, which JSON lacks. The
    first step decides the columns of a CSV file, `step` being the first; later steps may have fewer.

    Args:
        target: a path that ends in `.csv` or `.jsonl`, or an object with `log(numbers, step=...)` (a W&B or Trackio
            run, an Accelerator), `log_metrics(numbers, step)` (MLflow, Lightning's loggers) or
            `add_scalar(name, number, step)` (TensorBoard's SummaryWriter).

    Raises:
        NoesisError: when it is none of these; and from what is returned, for a column that a CSV file does not have.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from noesis.files import writer
        >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> writer(path)({"noesis/fc/std": 0.5}, 3)
        >>> path.read_text().splitlines()
        ['{"step": 3, "noesis/fc/std": 0.5}']
    """
    if isinstance(target, (str, os.PathLike)):
        path = Path(target)
        if path.suffix.lower() == ".csv":
            return lambda numbers, step: _append(path, _csv_lines(path, numbers, step))
        if path.suffix.lower() == ".jsonl":
            return lambda numbers, step: _append(path, dump_json({"step": step, **numbers}) + "\n")
        raise BadValue(f"log_to({str(target)!r})", ACCEPTED, "Name the file run.jsonl, say")
    for method, bound in _METHODS.items():
        if _takes(getattr(target, method, None), *bound[0], **bound[1]):
            return lambda numbers, step: _hand_over(target, method, numbers, step)
    raise BadType(
        f"log_to({'None' if target is None else f'an object of type {type(target).__name__}'})",
        ACCEPTED,
        "Pass one of these, or a path",
    )


#: By method, arguments as it is called with.
_METHODS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "log_metrics": (({},), {"step": 0}),
    "add_scalar": (("", 0.0, 0), {}),
    "log": (({},), {"step": 0}),
}


def _takes(method: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a method can be called like this; `logging.Logger.log`, say, cannot."""
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(*args, **kwargs)
    except (TypeError, ValueError):  # other arguments; or a function in C that does not tell, such as math.log
        return False
    return True


def _hand_over(target: Any, method: str, numbers: Mapping[str, float], step: int) -> None:
    if method == "add_scalar":
        for name, number in numbers.items():
            target.add_scalar(name, number, step)
    else:
        getattr(target, method)(dict(numbers), step=step)


# ---------------------------------------------------------------- files


def _append(path: Path, text: str) -> None:
    """Add whole lines at the end, or nothing."""
    with accessing(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            if before:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a writer was killed, or an editor left it like this
                    text = "\n" + text
            left = memoryview(text.encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except BaseException:
                # No half line, unless somebody has written behind it since.
                written = len(text.encode()) - len(left)
                if os.fstat(file.fileno()).st_size == before + written:
                    file.truncate(before)
                raise


def _csv_lines(path: Path, numbers: Mapping[str, float], step: int) -> str:
    """The line of a step, and the header if the file is new."""
    row: dict[str, Any] = {"step": step, **numbers}
    lines = io.StringIO()
    columns = _columns(path)
    if columns is None:
        columns = list(row)
        csv.writer(lines, lineterminator="\n", quoting=csv_quoting(columns)).writerow(columns)
    new = [name for name in row if name not in columns]
    if new:
        raise BadValue(
            f"{path} has no column {new[0]!r}" + (f", nor {len(new) - 1} others" if len(new) > 1 else ""),
            "the columns of its first step, or fewer",
            "Log to another file, or to .jsonl, whose lines may differ",
        )
    csv.DictWriter(lines, columns, restval="", lineterminator="\n").writerow(row)
    return lines.getvalue()


def _columns(path: Path) -> list[str] | None:
    """The header of a CSV file; None if there is nothing in it yet."""
    with accessing(path, "read"):
        if not path.exists() or not path.stat().st_size:
            return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error):
        columns = []
    if columns[:1] != ["step"]:
        raise BadFile(f"{path} is another file: its first column is not step", "one that log_to began", "Name another")
    return columns
