"""A long run, shortened: the same function as `benchmarks/soak.py`, whose results are those of 200,000 steps."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.checkout import BENCHMARKS

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = sorted((BENCHMARKS / "results").glob("soak-*.json"))


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("soak")


def assert_steady(case: dict[str, Any]) -> None:
    """Counts are exact, the rest has not drifted, the ring holds what it says, and memory is flat."""
    points, capacity = case["points"], case["capacity"]
    assert "error_against_rows" in points[-1] or capacity < case["batches"]
    for point in points:
        assert point["error_counts"] == 0
        assert point.get("error_against_rows", 0) < 1e-12  # float64 sums of 200,000 steps
        assert point.get("error_averages", 0) < 1e-12
        assert point["error_against_outputs"] < 1e-6  # rows are float32
        assert point["ring_as_documented"]
        assert point["held_steps"] == min(point["steps"], capacity)
        assert point["dropped_steps"] == point["steps"] - point["held_steps"]
        assert point.get("scores_equal", True)
    # The part before `half` may still import, compile and fill what stays; a leak of 8 bytes a step would show.
    half = len(points) // 2
    assert points[-1]["rss_bytes"] - points[half]["rss_bytes"] < max(1 << 19, 8 * (points[-1]["steps"] // 2))
    if "cuda_bytes" in points[0]:
        assert len({point["cuda_bytes"] for point in points}) == 1


@pytest.mark.parametrize(
    ("variant", "steps", "capacity"),
    [("plain", 20_000, 256), ("plain", 300, 1), ("per-sample", 3000, 256), ("codebook", 3000, 256)],
)
@pytest.mark.slow
def test_a_long_run_is_steady(soak: ModuleType, variant: str, steps: int, capacity: int) -> None:
    case = soak.soak(steps, variant=variant, capacity=capacity, points=3)
    assert [point["steps"] for point in case["points"]] == [steps * point // 3 for point in range(1, 4)]
    assert_steady(case)


def test_the_truth_of_the_soak_is_that_of_numpy(soak: ModuleType) -> None:
    """The reference itself, and that an error would be seen."""
    import numpy as np

    parts = [np.array([1.0, 2.0, 4.0]), np.array([np.nan, -8.0, 16.0, np.inf])]
    times = [2, 3]
    totals, averages = soak.merged([soak.known(part) for part in parts], times)
    whole = np.concatenate([part for part, n in zip(parts, times, strict=True) for _ in range(n)])
    finite = whole[np.isfinite(whole)]
    expected = [12, finite.mean(), finite.std(ddof=1), abs(finite).mean(), -8, 16, 6]
    np.testing.assert_allclose(totals, expected, rtol=1e-15)
    stds = [np.std(part[np.isfinite(part)], ddof=1) for part in parts]
    np.testing.assert_allclose(averages, [5, 2 * 7 / 3 + 3 * 4, 2 * stds[0] + 3 * stds[1]], rtol=1e-15)
    assert soak.difference([12, 4.0 * (1 + 1e-9), *expected[2:]], [12, 4.0, *expected[2:]]) == pytest.approx(2.5e-10)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_soak_was_steady(path: Path) -> None:
    found = json.loads(path.read_text())
    assert {case["variant"] for case in found["cases"]} == {"plain", "per-sample", "codebook"}
    assert found["cases"][0]["steps"] == 200_000
    for case in found["cases"]:
        assert_steady(case)


def test_there_is_a_result_of_a_cpu() -> None:
    assert "soak-cpu" in [path.stem for path in RESULTS]
