"""Plain-text tables for `repr`: aligned columns, the middle left out when there are many rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import Literal

MOST_ROWS = 24
#: Characters of a cell, or of a name in a sentence.
LONGEST = 200


def table(header: Sequence[str], lines: Sequence[Sequence[str]], most: int = MOST_ROWS) -> str:
    """Align the first column left and the others right.

    Examples:
        >>> from noesis.text import table
        >>> print(table(["layer", "std"], [["fc1", "0.5"], ["head", "1.25"]]))
        layer   std
        fc1     0.5
        head   1.25
    """
    cut = len(lines) - most
    shown = [[plain(cell) for cell in line] for line in lines]
    if cut > 0:
        half = most // 2
        gap = [f"... {cut} more ...", *[""] * (len(header) - 1)]
        shown = [*shown[:half], gap, *shown[len(shown) - (most - half) :]]
    widths = [max(len(row[column]) for row in [list(header), *shown]) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [list(header), *shown]
    )


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless there is one.

    Examples:
        >>> from noesis.text import counted
        >>> counted(1, "step"), counted(3, "step")
        ('1 step', '3 steps')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def first_few(names: Sequence[str]) -> str:
    """Names on one line: of many the first six, and how many there are.

    Examples:
        >>> from noesis.text import first_few
        >>> first_few(["fc1", "fc2"]), first_few("abcdefgh")
        ('fc1, fc2', 'a, b, c, d, e, f, ... (8)')
    """
    return (", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")) or "none"


def csv_quoting(texts: Iterable[str]) -> Literal[0, 1]:
    """How to quote CSV whose lines end in a newline alone: csv itself would leave carriage returns in a name bare."""
    return csv.QUOTE_ALL if any("\r" in text for text in texts) else csv.QUOTE_MINIMAL


def plain(text: str) -> str:
    """Text as `escaped`, and of a long one the beginning and the end."""
    return escaped(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}")


def escaped(text: str) -> str:
    r"""Text on one line, without what a terminal would obey: names come from models, and files from anybody.

    Examples:
        >>> from noesis.text import escaped
        >>> print(escaped("fc" + chr(27) + "[2J"))
        fc\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
