"""Draw the packages of noesis and what each may import, from the table that the tests hold.

    python tools/draw_house.py            # writes docs/house.svg

A package stands one floor above the highest that it may import.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "house.svg"
WIDTH, BOX, ROW, GAP = 960, 78, 102, 12
INK, SOFT, PALE = "#24292f", "#6e7781", "#f3eefc"


def table() -> dict[str, set[str]]:
    """`HOUSE` of `tests/test_package.py`: what each package may import."""
    tree = ast.parse((ROOT / "tests" / "test_package.py").read_text(encoding="utf-8"))
    given = next(
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "HOUSE"
    )
    value: dict[str, set[str]] = eval(ast.unparse(given))  # sets with a star in them are no literals
    return value


def floors(house: dict[str, set[str]]) -> list[list[str]]:
    """The packages of each floor, the lowest first."""

    @functools.cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in house[name]), default=-1)

    found: dict[int, list[str]] = {}
    for name in house:
        if name not in ("", "_version"):
            found.setdefault(floor(name), []).append(name)
    return [found[number] for number in sorted(found)]


def holds(name: str) -> str:
    """What a package says it holds, in its first line."""
    path = ROOT / "src" / "noesis" / name
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def lines(text: str, longest: int) -> list[str]:
    """A text in at most three lines."""
    cut = textwrap.wrap(text.replace("`", ""), longest)
    return cut if len(cut) <= 3 else [*cut[:2], cut[2][: longest - 1] + "…"]


def drawn(house: dict[str, set[str]]) -> str:
    """The picture, as SVG."""
    rows = floors(house)
    height = ROW * len(rows) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, names in enumerate(rows):
        top = height - ROW * (number + 1)
        wide = (WIDTH - GAP) / len(names) - GAP
        for place, name in enumerate(names):
            left = GAP + place * (wide + GAP)
            middle = left + wide / 2
            parts.append(
                f'<rect x="{left:.0f}" y="{top}" width="{wide:.0f}" height="{BOX}" rx="6" '
                f'fill="{PALE}" stroke="{SOFT}"/>'
                f'<text x="{middle:.0f}" y="{top + 20}" text-anchor="middle" font-size="15" fill="{INK}">{name}</text>'
            )
            for line, text in enumerate(lines(holds(name), int(wide / 5.6))):
                parts.append(
                    f'<text x="{middle:.0f}" y="{top + 38 + 14 * line}" text-anchor="middle" font-size="10" '
                    f'fill="{SOFT}">{escape(text)}</text>'
                )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(table()), encoding="utf-8")
