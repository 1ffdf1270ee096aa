"""Results as tables: CSV, and data frames of pandas, both from the same columns."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import require
from ..text import csv_quoting

if TYPE_CHECKING:
    import pandas

#: Of one column: numbers as an array, texts as a list; None where there is no value.
Cells = NDArray[Any] | list[Any]

#: What a spreadsheet would run as a formula; and what looks like one that was made harmless.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


class Tabular:
    """A result that is a table; what a row is, its class says."""

    @overload
    def to_csv(self, path: None = None) -> str: ...

    @overload
    def to_csv(self, path: files.PathLike) -> Path: ...

    def to_csv(self, path: files.PathLike | None = None) -> str | Path:
        """The rows as CSV with a header line: text, or a file, whole or not at all; one that is there is replaced.

        Numbers read back as the very same, NaN is `nan`, and a field without a value is empty. A name that a
        spreadsheet would take for a formula, as it begins with `=`, `+`, `-` or `@`, has an apostrophe in front.

        Args:
            path: where to write it, in UTF-8; without, it is returned.

        Returns:
            The text; or the path, if one was given.

        Raises:
            NoesisError: (an OSError) where the file cannot be written.

        Examples:
            >>> import noesis
            >>> print(noesis.Soulprint([0.5, float("nan")], [1.0, 2.0], ["conv", "head,1"]).to_csv())
            layer,mean,std
            conv,0.5,1.0
            "head,1",nan,2.0
            <BLANKLINE>
        """
        columns = self._columns()
        header = [_harmless(name) for name in columns]
        rows = zip(*(map(_harmless, _as_list(column)) for column in columns.values()), strict=True)
        texts = {value for column in columns.values() if isinstance(column, list) for value in column}
        text = io.StringIO()
        quoting = csv_quoting([*header, *(value for value in texts if isinstance(value, str))])
        writer = csv.writer(text, lineterminator="\n", quoting=quoting)
        writer.writerow(header)
        writer.writerows(rows)
        if path is None:
            return text.getvalue()
        # Half of a surrogate pair, which a name from JSON may have, is none of UTF-8's characters.
        return files.write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a data frame of pandas; needs the extra `pandas`.

        The columns are those of `to_csv`. Names are as they are, and a number that is missing is NaN.

        Raises:
            NoesisError: (an ImportError) when pandas is not installed.
        """
        frames = require("pandas", extra="pandas", purpose="to_dataframe()")
        made: pandas.DataFrame = frames.DataFrame({name: _of_one_kind(each) for name, each in self._columns().items()})
        return made

    def _columns(self) -> dict[str, Cells]:
        """The table, column by column, all of one length."""
        raise NotImplementedError


def _as_list(cells: Cells) -> list[Any]:
    return cells.tolist() if isinstance(cells, np.ndarray) else cells


def _harmless(value: Any) -> Any:
    """A text that no spreadsheet runs."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _of_one_kind(cells: Cells) -> Cells:
    """Numbers of which some are missing as numbers."""
    if isinstance(cells, np.ndarray) or None not in cells or any(isinstance(value, str) for value in cells):
        return cells
    return np.array([np.nan if value is None else value for value in cells], dtype=np.float64)
