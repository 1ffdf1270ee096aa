"""The arrays of a trace are declared once; what a declaration asks for elsewhere is named here where it is missing."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.checkout import ROOT
from noesis.distributed import merge
from noesis.results import COLUMNS
from noesis.results.columns import Column

DOCS = ROOT / "docs" / "files.md"
#: Follow from the rows of the steps, and from those that the ring has dropped.
MEASURED = {"values", "totals", "averages"}
#: What a trace holds beside its columns.
OTHERS = {"layers", "stats", "dropped_steps", "unmeasured", "samples", "meta", "surprise"}


class Denoiser(nn.Module):
    """Its layers run in another order than they are named, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        x = self.last(self.last(x))
        return x if timestep is None else self.first(x)


def recorded(steps: int = 6) -> noesis.Trace:
    """A run in which every column is something else than what it is where nobody said."""
    torch.manual_seed(0)
    wrapped = noesis.wrap(Denoiser(), layers="linear", per_sample=True, capacity=4)
    for step in range(steps):
        wrapped._recorder.set_branch(["cond", "uncond"][step % 2])
        wrapped(torch.randn(2 + step % 2, 4), timestep=None if step == 3 else torch.tensor(900.0 - step))
    return wrapped.trace()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return bool(one == other)
    return bool(one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def undeclared(column: Column) -> list[str]:
    """What the declaration of a column, and what is written about it, lack, in words."""
    name, missing = column.name, []
    if name not in {field.name for field in dataclasses.fields(noesis.Trace)}:
        missing.append("a field of Trace")
    if f"\n        {name}: " not in str(noesis.Trace.__doc__):
        missing.append("a line in the docstring of Trace")
    place = rf"header also holds .*`{name}`" if column.dtype is str else rf"^\| `{name}` \|"
    if not re.search(place, DOCS.read_text(encoding="utf-8"), re.MULTILINE):
        missing.append("a word in docs/files.md")
    if name not in MEASURED and (column.field is None) == (column.known is None):
        missing.append("either a field of a row or something that is known of a step")
    if column.known is not None and column.merged is None:
        missing.append("how ranks merge")
    if column.optional and column.absent is None:
        missing.append("what it is in files without it")
    return missing


def unhandled(column: Column, folder: Path) -> list[str]:
    """What does not come of a column that is a field of traces, in words."""
    name, trace, missing = column.name, recorded(), []
    value = getattr(trace, name)
    if column.absent is not None and same(value, column.absent(trace["count"] > 0)):
        missing.append("the recorder's word on it")
    late = trace.steps > 3
    if "steps" in column.axes and not same(getattr(trace.at(late), name), column.at(value, late)):
        missing.append("slicing")
    if name not in MEASURED and not same(getattr(merge([trace]), name), value):
        missing.append("merging")
    for suffix in ("safetensors", "json"):
        again = noesis.Trace.load(trace.save(folder / f"{name}.{suffix}"))
        if not all(same(getattr(one, name), getattr(two, name)) for one, two in pairs(trace, again)):
            missing.append(f"loading from .{suffix}")
    return missing


def pairs(one: noesis.Trace, other: noesis.Trace) -> list[tuple[noesis.Trace, noesis.Trace]]:
    """Two traces and their samples."""
    return [(one, other), *zip(one.samples, other.samples, strict=True)]


@pytest.mark.parametrize("column", COLUMNS, ids=[column.name for column in COLUMNS])
def test_a_column_is_handled_everywhere(column: Column, tmp_path: Path) -> None:
    """A new column fails here until nothing is missing; the message says what is."""
    assert undeclared(column) == []
    assert unhandled(column, tmp_path) == []


def test_what_a_new_column_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = ["a field of Trace", "a line in the docstring of Trace", "a word in docs/files.md"]
    nowhere = "either a field of a row or something that is known of a step"
    assert undeclared(Column("weather", ("steps",), float)) == [*everywhere, nowhere]
    half = Column("weather", ("steps",), str, known=2, optional=True)
    assert undeclared(half) == [*everywhere, "how ranks merge", "what it is in files without it"]
    # A field that nobody fills, slices, merges or loads.
    monkeypatch.setattr(noesis.Trace, "weather", property(lambda trace: np.full(4, float(id(trace)))), raising=False)
    idle = Column("weather", ("steps",), float, known=1, merged=lambda parts: parts[0])
    assert unhandled(idle, tmp_path) == ["slicing", "merging", "loading from .safetensors", "loading from .json"]
    monkeypatch.setattr(noesis.Trace, "weather", property(lambda _: np.zeros(4)))
    idle = dataclasses.replace(idle, absent=lambda _: np.zeros(4))
    assert unhandled(idle, tmp_path) == ["the recorder's word on it", "slicing"]


def test_every_array_of_a_trace_is_declared() -> None:
    declared = [column.name for column in COLUMNS]
    assert sorted([*declared, *OTHERS]) == sorted(field.name for field in dataclasses.fields(noesis.Trace))


@pytest.mark.parametrize("column", [column for column in COLUMNS if column.optional], ids=lambda column: column.name)
def test_files_from_before_a_column_was_there(column: Column, tmp_path: Path) -> None:
    trace = recorded()
    payload = json.loads(trace.to_json())
    payload["arrays"] = {key: value for key, value in payload["arrays"].items() if not key.endswith(column.name)}
    payload.pop(column.name, None)
    (tmp_path / "trace.json").write_text(json.dumps(payload))
    assert column.absent is not None
    for now, before in pairs(trace, noesis.Trace.load(tmp_path)):
        assert same(getattr(before, column.name), column.absent(now["count"] > 0))


@pytest.mark.parametrize("column", COLUMNS, ids=[column.name for column in COLUMNS])
def test_a_file_with_a_column_of_another_shape_is_broken(column: Column) -> None:
    payload = json.loads(recorded().to_json())
    holder = payload if column.dtype is str else payload["arrays"]
    holder[column.name] = [*holder[column.name], holder[column.name][0]]
    with pytest.raises(noesis.NoesisError, match="is not a valid trace"):
        noesis.Trace.from_json(payload, "this")


def test_traces_that_are_made_have_every_column() -> None:
    values = np.ones((2, 1, 7))
    trace = noesis.Trace.of(values, ["a"], noesis.results.ALWAYS, steps=np.arange(2), batches=np.array([3, 4]))
    assert trace.batches.tolist() == [3, 4]
    assert all(
        same(getattr(trace, each.name), each.absent(np.ones((2, 1), dtype=bool)))
        for each in COLUMNS
        if each.absent is not None and each.name != "batches"
    )
    with pytest.raises(TypeError, match="weather"):
        noesis.Trace.of(values, ["a"], noesis.results.ALWAYS, steps=np.arange(2), weather=np.zeros(2))
