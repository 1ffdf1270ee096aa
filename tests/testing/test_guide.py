"""The guide to tests of models, followed as it stands: its test, its snapshot, its failure, and its line for CI."""

from __future__ import annotations

import re

import pytest
import torch

import noesis
from helpers.checkout import ROOT
from helpers.models import small

pytest_plugins = ["pytester"]

GUIDE = (ROOT / "docs" / "guides" / "testing.md").read_text(encoding="utf-8")


def block(language: str, holds: str) -> str:
    """The block of code that holds a text."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    found = [text for text in blocks if holds in text]
    assert len(found) == 1, f"the guide has {len(found)} blocks with {holds!r}"
    return found[0]


def without_numbers(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "N", text)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What registers operations is imported before pytester forgets what its sessions imported."""
    noesis.wrap(small(), layers="all")(torch.ones(1, 4))


def run(pytester: pytest.Pytester, *arguments: str) -> tuple[int, str]:
    done = pytester.runpytest_inprocess("-p", "noesis.testing.pytest_plugin", "-p", "no:cacheprovider", *arguments)
    return done.ret, done.stdout.str()


@pytest.mark.slow
def test_the_guide_is_true(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # else it would come twice where noesis is installed
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    test = pytester.mkdir("tests") / "test_encoder.py"
    test.write_text(block("python", "def test_encoder("), encoding="utf-8")
    snapshot = test.parent / "__snapshots__" / "test_encoder" / "test_encoder.json"
    code, said = run(pytester)
    assert (code, block("text", "there is no snapshot") in said) == (1, True)

    code, said = run(pytester, "--soulprint-update")
    assert code == 0
    assert block("text", "1 written").splitlines()[1:] == [
        line for line in said.splitlines() if re.match(r"\d+ written|written:", line)
    ]
    shown = block("json", "noesis.snapshot")
    assert without_numbers(snapshot.read_text(encoding="utf-8")) == without_numbers(shown)

    snapshot.write_text(shown, encoding="utf-8")
    in_ci = block("yaml", "jobs:").split("- run: pytest ")[1].split()
    assert run(pytester, "-p", "xdist.plugin", *in_ci)[0] == 0  # another machine's, which holds here

    change = block("diff", "+").splitlines()
    (at,) = (number for number, line in enumerate(change) if line.startswith("+"))
    before = f"{change[at - 1][1:]}\n"
    assert before in test.read_text(encoding="utf-8")
    test.write_text(test.read_text(encoding="utf-8").replace(before, f"{before}{change[at][1:]}\n"), encoding="utf-8")
    code, said = run(pytester)
    failure = [line for line in said.splitlines() if line.startswith((">", "E  "))]
    assert code == 1
    assert without_numbers("\n".join(failure)) == without_numbers(block("text", "the furthest").strip())
