"""The gallery: its pictures are there, small, and made by the code beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from helpers.checkout import ROOT

PICTURES = ROOT / "docs" / "pictures"
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
TOOL = runpy.run_path(str(ROOT / "tools" / "draw_gallery.py"))


def test_the_page_shows_all_pictures_and_no_others() -> None:
    shown = TOOL["NAMED"].findall(PAGE)
    assert len(shown) == len(set(shown)) >= 10
    assert {path.name for path in PICTURES.iterdir()} == set(shown)


def test_each_picture_is_small_and_follows_the_code_that_draws_it() -> None:
    for name in TOOL["NAMED"].findall(PAGE):
        data = (PICTURES / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 60_000, name
        assert PAGE.index(f'path="{name}"') < PAGE.index(f"(pictures/{name})")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what the page's libraries say while they load
def test_the_code_of_the_page_draws_them(data: Path, tmp_path: Path) -> None:
    TOOL["run"](PAGE, tmp_path, data)
    assert {path.name for path in tmp_path.glob("*.png")} == set(TOOL["NAMED"].findall(PAGE))
