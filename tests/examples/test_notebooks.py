"""The notebooks: their cells run in order, and find what their text says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.checkout import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def run(path: Path) -> dict[str, Any]:
    """Run the code of a notebook in one namespace, without its magics (`%matplotlib inline`); the namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            lines = ["\n" if line.startswith("%") else line for line in cell["source"]]
            exec(compile("".join(lines), f"{path.name}, cell {number}", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["nbformat"] == 4
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in told["cells"])


def test_a_first_look() -> None:
    found = run(ROOT / "examples" / "first_look.ipynb")
    assert found["trace"].first_nonfinite() is None
    assert found["exploded"].first_nonfinite() is not None
    assert found["same"].first_divergence.layer == "2"
    assert "2" in found["fresh"].changed
    assert found["surprise"].is_ood(0.05).tolist() == [False, False, True, True]


def test_two_models() -> None:
    found = run(ROOT / "examples" / "two_models.ipynb")
    assert found["changed"].first_divergence.layer == "model.layers.3.mlp"
    assert found["rounded"].first_divergence is None
    assert found["beside"].first_divergence.layer == "model.layers.3.mlp"
    assert found["fidelity"].sqnr.min() > 30
