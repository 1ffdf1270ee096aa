"""The benchmark of merging ranks, at a tiny size."""

from __future__ import annotations

import importlib
import json

import pytest

from helpers.checkout import BENCHMARKS


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def test_merging_ranks_is_measured(scaling, tmp_path, capsys) -> None:
    path = tmp_path / "ranks.json"
    scaling.main(["--ranks", "2", "9", "--depth", "3", "--json", str(path)])
    found = json.loads(path.read_text())
    assert [case["ranks"] for case in found["by_ranks"]] == [2, 9]
    for case in found["by_ranks"]:
        assert case["sent_bytes_per_rank"] == 256 * 3 * 12 * 8
        assert case["held_bytes"] == case["ranks"] * case["sent_bytes_per_rank"]  # one piece, so few are they
        assert case["file_bytes_per_rank"] > 256 * 3 * 7 * 8
        assert case["merge_seconds"] > 0
        assert case["combine_seconds"] > 0
    assert "    9 ranks x 3 layers x 256 steps" in capsys.readouterr().out


def test_lost_elements_are_noticed(scaling, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "merge", lambda traces: traces[0])
    with pytest.raises(RuntimeError, match="elements were lost"):
        scaling.merging(3, 2, 4)
