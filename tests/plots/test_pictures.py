"""The pictures of the docs: they are there, small, and made by the code beside them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from helpers.checkout import ROOT

PICTURES = ROOT / "docs" / "pictures"
TOOL = runpy.run_path(str(ROOT / "tools" / "draw_pictures.py"))
SHOWN = {page: TOOL["NAMED"].findall(page.read_text(encoding="utf-8")) for page in TOOL["PAGES"]}


def test_the_pages_show_all_pictures_and_no_others() -> None:
    shown = [name for names in SHOWN.values() for name in names]
    assert all(SHOWN.values())
    assert len(shown) == len(set(shown)) >= 15
    assert {path.name for path in PICTURES.iterdir()} == set(shown)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(docs/pictures/([\w.]+)\)", readme)) < set(shown)


def test_each_picture_is_small_and_follows_the_code_that_draws_it() -> None:
    for page, names in SHOWN.items():
        text = page.read_text(encoding="utf-8")
        for name in names:
            data = (PICTURES / name).read_bytes()
            assert data.startswith(b"\x89PNG")
            assert len(data) < 60_000, name
            assert text.index(f'"{name}")') < text.index(f"pictures/{name})")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what the pages' libraries say while they load
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_the_code_of_the_page_draws_them(page: Path, data: Path, tmp_path: Path) -> None:
    TOOL["run"](page, tmp_path, data)
    assert {path.name for path in tmp_path.glob("*.png")} >= set(SHOWN[page])


def test_code_that_is_not_to_run_does_not() -> None:
    told = "<!-- no-run: why -->\n```python\na\n```\n<!-- data: model -->\n```python\nb\n```\n\n```python\nc\n```\n"
    assert TOOL["BLOCK"].findall(told) == ["b\n", "c\n"]
