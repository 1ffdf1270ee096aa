"""Plain-text tables for `repr`: aligned columns, the middle left out when there are many rows."""

from __future__ import annotations

from collections.abc import Sequence

MOST_ROWS = 24


def table(header: Sequence[str], lines: Sequence[Sequence[str]], most: int = MOST_ROWS) -> str:
    """Align the first column left and the others right.

    Example:
        >>> from noesis.tables import table
        >>> print(table(["layer", "std"], [["fc1", "0.5"], ["head", "1.25"]]))
        layer   std
        fc1     0.5
        head   1.25
    """
    cut = len(lines) - most
    shown = [list(line) for line in lines]
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

    Example:
        >>> from noesis.tables import counted
        >>> counted(1, "step"), counted(3, "step")
        ('1 step', '3 steps')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")
