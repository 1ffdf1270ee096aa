"""What a step comes down to for a logger, and where it goes."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from noesis.errors import BadFile, BadType, BadValue, WrongState
from noesis.files import writer
from noesis.results import STATS, scalars

AGGREGATES = {
    "noesis/layers/ran",
    "noesis/layers/nonfinite",
    "noesis/layers/first_nonfinite",
    *(f"noesis/{over}/{stat}" for stat in ("mean", "std", "abs_mean")
      for over in ("mean_of_layers", "min_of_layers", "max_of_layers", "max_at")),
    "noesis/sum_of_layers/nonfinite",
}  # fmt: skip


class Net(nn.Module):
    """Three layers, of which `skipped` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.skipped, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.first(x)
        return self.last(x if skip else self.skipped(x))


@pytest.fixture
def wrapped() -> noesis.Wrapped:
    return noesis.wrap(Net(), layers="linear")


@pytest.fixture
def calibrated() -> noesis.Wrapped:
    wrapped = noesis.wrap(Net(), layers=["first", "skipped"], codebook=noesis.Codebook(size=4), logits="last")
    wrapped.calibrate([torch.randn(300, 4)])
    return wrapped


# ---------------------------------------------------------------- outputs


def test_aggregates_are_the_default(wrapped: noesis.Wrapped) -> None:
    wrapped(torch.randn(5, 4))
    wrapped(torch.randn(5, 4) * 10)
    trace = wrapped.trace()
    found = scalars(trace)
    assert set(found) == AGGREGATES
    assert all(type(value) is float for value in found.values())
    stds = trace["std"][1]
    assert found["noesis/mean_of_layers/std"] == stds.mean()
    assert found["noesis/min_of_layers/std"] == stds.min()
    assert found["noesis/max_of_layers/std"] == stds.max()
    assert trace.layers[int(found["noesis/max_at/std"])] == trace.layers[int(stds.argmax())]
    assert found["noesis/layers/ran"] == 3
    assert (found["noesis/layers/nonfinite"], found["noesis/layers/first_nonfinite"]) == (0, -1)


def test_each_layer(wrapped: noesis.Wrapped) -> None:
    wrapped(torch.randn(5, 4))
    trace = wrapped.trace()
    found = scalars(trace, layers="each", stats=["min", "count"])
    own = {f"noesis/{layer}/{stat}" for layer in trace.layers for stat in ("min", "count")}
    assert own <= set(found)
    assert found["noesis/skipped/min"] == trace["min"][0, 1]
    assert found["noesis/sum_of_layers/count"] == 5 * (8 + 8 + 3)
    chosen = scalars(trace, layers=["last"], stats="min")
    assert {name for name in chosen if "/last/" in name or "/first/" in name} == {"noesis/last/min"}


def test_a_layer_that_did_not_run_is_absent_not_stale(wrapped: noesis.Wrapped) -> None:
    wrapped(torch.randn(5, 4) * 1000)
    wrapped(torch.randn(5, 4), skip=True)
    trace = wrapped.trace()
    found = scalars(trace, layers="each")
    assert not [name for name in found if "/skipped/" in name]
    assert found["noesis/layers/ran"] == 2
    assert found["noesis/max_of_layers/std"] == trace["std"][1, [0, 2]].max()


def test_nan_is_counted_and_located(wrapped: noesis.Wrapped) -> None:
    nn.init.constant_(wrapped.observed_model.skipped.bias, math.nan)
    wrapped(torch.randn(5, 4))
    trace = wrapped.trace()
    found = scalars(trace, layers="each")
    assert trace.layers[int(found["noesis/layers/first_nonfinite"])] == "skipped"
    assert found["noesis/layers/nonfinite"] == 2
    assert found["noesis/sum_of_layers/nonfinite"] == 5 * (8 + 3)
    assert math.isnan(found["noesis/skipped/std"])
    assert found["noesis/max_of_layers/std"] == trace["std"][0, 0]
    nn.init.constant_(wrapped.observed_model.first.bias, math.nan)
    wrapped(torch.randn(5, 4))
    found = scalars(wrapped.trace())
    assert math.isnan(found["noesis/mean_of_layers/std"])
    assert found["noesis/max_at/std"] == -1


def test_bad_arguments(wrapped: noesis.Wrapped) -> None:
    with pytest.raises(WrongState, match=r"no steps\. Expected at least one\. Run the model first"):
        scalars(wrapped.trace())
    wrapped(torch.randn(5, 4))
    with pytest.raises(BadValue, match=r"layers has 'lst'\. Expected \"aggregate\", \"each\", or names among the 3"):
        scalars(wrapped.trace(), layers=["lst"])
    with pytest.raises(BadValue, match="'variance' is not in the trace"):
        scalars(wrapped.trace(), stats=["variance"])


# ---------------------------------------------------------------- surprise


def test_surprise(calibrated: noesis.Wrapped) -> None:
    calibrated(torch.randn(40, 4))
    surprise = calibrated.surprise()
    found = scalars(calibrated.trace(), surprise, calibrated.codebooks, layers="each")
    ordered = np.sort(surprise.score)
    assert found["noesis/surprise/q50"] == ordered[19]
    assert found["noesis/surprise/q95"] == ordered[37]
    assert found["noesis/surprise/max"] == ordered[39]
    assert found["noesis/surprise/p_value/min"] == surprise.p_value.min()
    assert found["noesis/surprise/p_value/share_05"] == (surprise.p_value <= 0.05).mean()
    for name, layer in surprise.layers.items():
        assert found[f"noesis/{name}/code_length"] == layer.code_length.mean()
        assert found[f"noesis/{name}/utilisation"] == calibrated.codebooks[name].utilisation
    lengths = [layer.code_length.mean() for layer in surprise.layers.values()]
    assert found["noesis/max_of_layers/code_length"] == max(lengths)
    assert found["noesis/mean_of_layers/code_length"] == pytest.approx(np.mean(lengths))
    assert 0 < found["noesis/min_of_layers/utilisation"] <= 1
    few = scalars(calibrated.trace(), surprise, calibrated.codebooks)
    assert not [name for name in few if name.split("/")[1] in surprise.layers]


def test_surprise_without_p_values() -> None:
    calibrated = noesis.wrap(Net(), layers=["first", "skipped"], codebook=noesis.Codebook(size=4))
    calibrated.calibrate([torch.randn(300, 4)])
    calibrated(torch.randn(4, 4), skip=True)
    surprise = calibrated.surprise()
    assert surprise.absent == ["skipped"]
    found = scalars(calibrated.trace(), surprise, layers="each")
    assert found["noesis/surprise/max"] == surprise.score.max()
    assert not [name for name in found if "p_value" in name or "/skipped/" in name or "utilisation" in name]
    learning = noesis.wrap(Net(), layers="linear", codebook=noesis.Codebook(size=4, learn="ema"))
    learning(torch.randn(40, 4))
    assert not [name for name in scalars(learning.trace(), None, learning.codebooks) if "utilisation" in name]


def test_a_nan_input_is_the_strangest(calibrated: noesis.Wrapped) -> None:
    x = torch.randn(40, 4)
    x[7] = math.nan
    calibrated(x)
    found = scalars(calibrated.trace(), calibrated.surprise(), layers="each")
    assert found["noesis/surprise/max"] == math.inf
    assert math.isfinite(found["noesis/surprise/q95"])
    assert found["noesis/first/code_length"] == math.inf


# ---------------------------------------------------------------- files


def test_jsonl_grows_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    writer(path)({"noesis/a/std": 0.5}, 0)
    writer(str(path))({"noesis/a/std": math.nan, "noesis/b/std": -math.inf}, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "noesis/a/std": 0.5},
        {"step": 1, "noesis/a/std": None, "noesis/b/std": None},
    ]


def test_csv_has_one_header_and_refuses_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    layer = 'noesis/a,"b\n=1+1/std'
    writer(path)({layer: 0.1 + 0.2, "noesis/b/std": math.inf}, 0)
    writer(path)({"noesis/b/std": math.nan}, 5)
    before = path.read_bytes()
    with pytest.raises(BadValue, match=r"run\.csv has no column 'noesis/c/std', nor 1 others\. .*\.jsonl, whose lines"):
        writer(path)({"noesis/b/std": 1.0, "noesis/c/std": 1.0, "noesis/d/std": 1.0}, 6)
    assert path.read_bytes() == before
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "0", layer: repr(0.1 + 0.2), "noesis/b/std": "inf"},
        {"step": "5", layer: "", "noesis/b/std": "nan"},
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_half_line_does_not_spoil_the_next(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run.{suffix}"
    write = writer(path)
    write({"a": 1.0}, 0)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1][:2])
    write({"a": 2.0}, 1)
    lines = path.read_text().splitlines()
    write({"a": 3.0}, 2)
    assert path.read_text().splitlines()[:-1] == lines
    assert lines[:-2] == whole.splitlines()
    assert len(lines) == len(whole.splitlines()) + 2


@pytest.mark.parametrize("content", [b"time,loss\n1,2\n", b"\xff\xfe\x00", b"\n"])
def test_another_csv_file_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"its first column is not step\. Expected one that log_to began\. Name another"):
        writer(path)({"a": 1.0}, 0)
    assert path.read_bytes() == content


# ---------------------------------------------------------------- objects


class Run:
    """As W&B's, Trackio's, Accelerate's."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.taken.append((data, step))


class Metrics(Run):
    """As Lightning's loggers and MLflow's; a `log` of another kind is not taken for one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.taken.append((dict(metrics), step))

    def log(self, message: str) -> None:  # type: ignore[override]
        raise AssertionError(message)


class Board(Run):
    """As TensorBoard's SummaryWriter."""

    log = None  # type: ignore[assignment]

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.taken.append(({tag: scalar_value}, global_step))


@pytest.mark.parametrize("kind", [Run, Metrics, Board])
def test_objects(kind: type[Run]) -> None:
    target = kind()
    writer(target)({"noesis/a/std": 0.5, "noesis/b/std": 2.0}, 7)
    assert {name: value for data, _ in target.taken for name, value in data.items()} == {
        "noesis/a/std": 0.5,
        "noesis/b/std": 2.0,
    }
    assert {step for _, step in target.taken} == {7}


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(str(tmp_path)) as board:
        writer(board)({"noesis/a/std": 0.5}, 7)
    found = events.EventAccumulator(str(tmp_path)).Reload().Scalars("noesis/a/std")
    assert [(event.step, event.value) for event in found] == [(7, 0.5)]


@pytest.mark.parametrize("target", [None, 3, object(), logging.getLogger("a"), math])
def test_what_is_no_logger(target: Any) -> None:
    given = "None" if target is None else f"an object of type {type(target).__name__}"
    with pytest.raises(BadType, match=rf"log_to\({given}\)\. Expected a path that ends in \.csv or \.jsonl, or an obj"):
        writer(target)


@pytest.mark.parametrize("name", ["run", "run.json", "run.csv.gz"])
def test_other_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=re.escape(name) + r".*Expected a path that ends in .*Name the file run\.jsonl"):
        writer(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_step_of_a_model_in_a_file(calibrated: noesis.Wrapped, tmp_path: Path) -> None:
    for step in range(3):
        calibrated(torch.randn(8, 4))
        found = scalars(calibrated.trace(), calibrated.surprise(), calibrated.codebooks, layers="each", stats=STATS)
        writer(tmp_path / "run.csv")(found, step)
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["noesis/first/std"]) == calibrated.trace()["std"][2, 0]
