"""The code shown to readers runs: the README, the pages of docs/ and the examples of docstrings."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from helpers.checkout import DATA, ROOT, SOURCE

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

FENCE = re.compile(r"(?P<indent>\s*)(?P<ticks>`{3,}|~{3,})(?P<info>.*)")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?")
PIECE = re.compile(rf"{NUMBER.pattern}|\w+|[^\w\s]")
NO_RUN = re.compile(r"<!-- no-run: (?P<reason>\S.*) -->")
NEEDS = re.compile(r"<!-- data: (?P<name>\w+) -->")
VARIES = re.compile(r"<!-- varies: (?P<reason>\S.*) -->")


@dataclass(frozen=True)
class Fence:
    """One fenced ```python block, padded so that its line numbers are those of the page.

    `shown` is what it prints: the ```text block that follows, if not `<!-- varies: reason -->`.
    """

    source: str
    line: int
    runs: bool
    data: str | None = None
    shown: str | None = None


@dataclass(frozen=True)
class Example:
    """One docstring that holds examples."""

    module: str
    owner: str
    text: str
    path: Path
    line: int


def blocks(page: str) -> list[Fence]:
    """The ```python blocks of a page; one that follows `<!-- no-run: reason -->` does not run.

    One that follows `<!-- data: name -->` runs where a folder of this name lies, as one of real weights.
    """
    found: list[Fence] = []
    opening: re.Match[str] | None = None
    body: list[str] = []
    start, before, latest = 0, "", ""
    for number, line in enumerate(page.splitlines(), start=1):
        fence = FENCE.fullmatch(line)
        if opening is None:
            if fence:
                opening, body, start = fence, [], number
            elif line.strip():
                before = line.strip()
            continue
        if fence and fence["ticks"].startswith(opening["ticks"]) and not fence["info"].strip():
            language = opening["info"].strip().split(" ")[0]
            if language == "python":
                source = "\n" * start + textwrap.dedent("\n".join(body)) + "\n"
                needs = NEEDS.fullmatch(before)
                found.append(Fence(source, start, NO_RUN.fullmatch(before) is None, needs and needs["name"]))
            elif language == "text" and latest == "python" and not VARIES.fullmatch(before):
                found[-1] = replace(found[-1], shown=textwrap.dedent("\n".join(body)))
            latest = language
            opening, before = None, ""
        else:
            body.append(line)
    if opening is not None:
        raise ValueError(f"line {start}: a fence is never closed")
    return found


def run_page(path: Path) -> None:
    """Compile every block of a page and run those that run, in one namespace; they print what the page shows."""
    namespace = {"__name__": "__main__"}
    for block in blocks(path.read_text(encoding="utf-8")):
        code = compile(block.source, str(path), "exec", dont_inherit=True)
        if block.runs and (block.data is None or Path(block.data).exists()):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            if block.shown is not None and not alike(printed.getvalue(), block.shown):
                pytest.fail(f"{path.name}, line {block.line}: prints\n{printed.getvalue()}")


def alike(printed: str, shown: str) -> bool:
    """Whether the words are the same, and numbers to about a hundredth; how long a step took is left out."""
    pieces = [PIECE.findall(re.sub(r", [\d.e+]+ m?s per step", "", text)) for text in (printed, shown)]
    return len(pieces[0]) == len(pieces[1]) and all(
        one == other
        or (
            NUMBER.fullmatch(one)
            and NUMBER.fullmatch(other)
            and math.isclose(float(one), float(other), rel_tol=0.02, abs_tol=1e-5)
        )
        for one, other in zip(*pieces, strict=True)
    )


def examples(source: Path) -> Iterator[Example]:
    """Every docstring with `>>>` under a folder of packages.

    Read from the syntax tree: `doctest.DocTestFinder` silently passes over whatever a decorator
    of another module has wrapped (`contextmanager`, `cached_property`).
    """
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield from _examples_below(ast.parse(path.read_text(encoding="utf-8"), str(path)), module, module, path)


def _examples_below(node: ast.AST, owner: str, module: str, path: Path) -> Iterator[Example]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if not isinstance(node, ast.Module):
            owner = f"{owner}.{node.name}"
        text = ast.get_docstring(node, clean=False)
        if text and ">>>" in text:
            yield Example(module, owner, text, path, node.body[0].lineno - 1)
    for child in ast.iter_child_nodes(node):
        yield from _examples_below(child, owner, module, path)


def run_example(example: Example, names: dict[str, object]) -> str:
    """Run one docstring; the text of its failures, empty when there is none."""
    test = doctest.DocTestParser().get_doctest(
        example.text, {"__name__": "__main__", **names}, example.owner, str(example.path), example.line
    )
    assert test.examples, f"{example.owner}: '>>>' without an example"
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=failures.append)
    return "".join(failures)


@pytest.fixture(autouse=True)
def _in_a_folder_with_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if DATA.is_dir():
        for model in DATA.iterdir():
            Path(model.name).symlink_to(model)
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.slow
def test_code_of_a_page_runs(path: Path) -> None:
    run_page(path)


@pytest.mark.parametrize("example", list(examples(SOURCE)), ids=lambda example: example.owner)
def test_example_of_a_docstring_runs(example: Example) -> None:
    failures = run_example(example, vars(importlib.import_module(example.module)))
    assert not failures, failures


def test_readme_has_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("demo", "test"):
        assert len(re.findall(rf"^<!-- {name} -->\n```bash\n", readme, re.MULTILINE)) == 1, name


def test_the_readme_shows_what_each_of_its_blocks_prints() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = blocks(readme)
    assert len(found) >= 5
    assert all(block.runs and block.data is None and block.shown for block in found)
    assert len(found[0].source.strip().splitlines()) <= 9, "a NaN in six lines, after what it imports"


# That the checks above can fail.


def test_blocks_share_a_namespace_and_fail_at_their_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno + 1 == 10
    assert str(caught.traceback[-1].path) == str(page)


def test_no_run_needs_a_reason_and_still_compiles(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: downloads weights -->\n\n```python\nraise RuntimeError\n```\n")
    run_page(page)
    page.write_text("<!-- no-run -->\n```python\nraise RuntimeError\n```\n")
    with pytest.raises(RuntimeError):
        run_page(page)
    page.write_text("<!-- no-run: downloads weights -->\n```python\nx =\n```\n")
    with pytest.raises(SyntaxError):
        run_page(page)


def test_a_page_prints_what_it_shows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    told = "```python\nprint('share', 0.123456)\n```\n\n{}```text\n{}\n```\n"
    page.write_text(told.format("", "share 0.1235"))
    run_page(page)
    page.write_text(told.format("<!-- varies: by machine -->\n", "share 0.2"))
    run_page(page)
    for wrong in ("share 0.2", "part 0.1235", "share 0.1235 0.1235"):
        page.write_text(told.format("", wrong))
        with pytest.raises(pytest.fail.Exception, match=r"page.md, line 1: prints\nshare 0.123456"):
            run_page(page)


def test_what_needs_weights_runs_where_they_are(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- data: no_such_model -->\n```python\nraise RuntimeError\n```\n")
    run_page(page)
    Path("no_such_model").mkdir()
    with pytest.raises(RuntimeError):
        run_page(page)


def test_no_run_holds_for_one_block_only() -> None:
    page = "<!-- no-run: slow -->\n```python\n1\n```\n```python\n2\n```\n"
    assert [block.runs for block in blocks(page)] == [False, True]


def test_only_python_fences_count_also_indented_ones() -> None:
    page = "```bash\npip\n```\n\n=== tab\n\n    ```python title=a.py\n    if True:\n        x = 1\n    ```\n"
    [block] = blocks(page)
    assert block.source.strip() == "if True:\n    x = 1"
    with pytest.raises(ValueError, match="line 1: a fence is never closed"):
        blocks("```python\nx = 1\n")


def test_a_wrong_docstring_is_found_under_any_decorator(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "import contextlib\n\n\n@contextlib.contextmanager\ndef f():\n"
        '    """Do.\n\n    >>> 1 + 1\n    3\n    """\n    yield\n'
    )
    [example] = examples(tmp_path)
    assert example.owner == "wrong.f"
    failures = run_example(example, {})
    assert "line 8" in failures
    assert "Expected:\n    3\nGot:\n    2" in failures
