"""The site, as mkdocs renders it: the start page is the README, and the reference shows examples as code."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers.checkout import ROOT

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
pytestmark = pytest.mark.slow
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a page shows: the text of each block of code, all other text, identifiers, pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.code: list[str] = []
        self.prose = ""
        self.ids: list[str] = []
        self.pictures: list[str] = []
        self._within: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.ids += [told["id"]] if told.get("id") else []
        self.pictures += [told["src"]] if tag == "img" and told.get("src") else []
        if tag == "pre" and "pre" not in self._within:
            self.code.append("")
        if tag not in VOID:
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self._within:
            self.code[-1] += data
        elif not {"script", "style"} & set(self._within):
            self.prose += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return folder


def first_lines() -> list[tuple[str, str]]:
    """Of each public thing of the reference with an example, and of its public methods: the first line of it."""
    names = re.findall(r"^::: (noesis\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = []
    for name in names:
        thing: Any = pkgutil.resolve_name(name)
        own = vars(thing).items() if isinstance(thing, type) else []
        for owner, one in [(name, thing), *((f"{name}.{key}", value) for key, value in own if not key.startswith("_"))]:
            if example := re.search(r"^ {4}>>> .*", inspect.getdoc(one) or "", re.MULTILINE):
                found.append((owner, example[0]))
    assert len(found) > 20
    return found


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_reference_shows_examples_as_code(site: Path) -> None:
    page = Page(site / "reference" / "index.html")
    assert ">>>" not in page.prose
    code = [words(block) for block in page.code]
    missing = {owner for owner, line in first_lines() if not any(words(line) in block for block in code)}
    assert not missing


def test_the_reference_lists_no_dunder_methods(site: Path) -> None:
    page = Page(site / "reference" / "index.html")
    assert "noesis.Trace.soulprint" in page.ids
    asked_for = "noesis.testing.SoulprintSnapshot.__call__"  # all that a fixture is for
    assert [name for name in page.ids if name.startswith("noesis") and "__" in name] == [asked_for]


def test_the_start_page_is_the_readme(site: Path) -> None:
    page, readme = Page(site / "index.html"), (ROOT / "README.md").read_text(encoding="utf-8")
    for line in readme.splitlines()[2], "## Four questions"[3:], "## Install"[3:]:
        assert words(line) in words(page.prose)
    assert any("first_nonfinite()" in block for block in page.code)
    pictures = [path for path in page.pictures if path.startswith("pictures/")]
    assert pictures
    assert all((site / path).is_file() for path in pictures)


@pytest.mark.parametrize("page", ["changelog", "contributing", "gallery", "guides/diffusion"])
def test_pages_and_their_pictures_are_there(site: Path, page: str) -> None:
    for path in Page(site / page / "index.html").pictures:
        assert path.startswith("data:") or (site / page / path).resolve().is_file(), path
