"""What all results have alike: files and JSON that come back, and tables as CSV and data frames."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import noesis
from noesis import interp
from noesis.errors import BadFile, Inaccessible, MissingExtra
from noesis.kernels.routing import FIELDS
from noesis.results import Flip, WeightChange
from noesis.results.tabular import Tabular
from noesis.surprise import LayerSurprise

#: Commas, quotes, line breaks of three kinds, scripts, what spreadsheets would run, and what looks as if disarmed.
NAMES = [
    "conv",
    "a,b",
    'say "x"',
    "two\nlines",
    "re\rturn",
    "ä.漢字.☃",
    "=1+2",
    "+x",
    "-x",
    "@x",
    "'=1",
    "'plain",
    "\t=",
]


def traced(names: list[str]) -> noesis.Trace:
    stats = ("count", "mean", "std", "abs_mean", "min", "max", "nonfinite")
    values = np.random.default_rng(0).normal(size=(2, len(names), len(stats)))
    values[..., 0], values[..., 6] = 2**40 + 1, 0
    values[0, 1] = [0, *[np.nan] * 5, 3]
    steps = np.array([4, 7])
    return noesis.Trace.of(values, names, stats, steps=steps, branches=[None, "=cond"], batches=np.array([1, 2]))


def printed(names: list[str]) -> noesis.Soulprint:
    rng = np.random.default_rng(1)
    return noesis.Soulprint(np.append(rng.normal(size=len(names) - 1), np.nan), rng.random(len(names)), names)


def compared(names: list[str]) -> noesis.Comparison:
    return noesis.compare(printed(names), noesis.Soulprint(np.arange(float(len(names))), np.ones(len(names)), names))


def judged(names: list[str]) -> noesis.Comparison:
    runs = [noesis.Soulprint(np.arange(len(names)) + 0.01 * n, np.ones(len(names)) + n, names) for n in range(4)]
    return noesis.compare(runs[0], runs[1], baseline=runs)


def surprised(names: list[str]) -> noesis.Surprise:
    rng, score = np.random.default_rng(2), np.array([1.5, np.inf, 3.0])
    layers = {
        name: LayerSurprise(*rng.normal(size=(4, 3)), np.arange(3), rng.random(3), rng.random(3)) for name in names
    }
    return noesis.Surprise(score, layers, doubt=np.array([np.nan, 0.5, 1.0]), calibrated=np.array([0.5, 0.01, 0.25]))


def routed(names: list[str]) -> noesis.Routes:
    sums = np.random.default_rng(3).integers(1, 9, size=(2, len(names), FIELDS + 3))
    experts = np.array([2, *[3] * (len(names) - 1)])
    sums[:, 0, 2] = 0
    none = np.zeros((len(names), 3, 3), dtype=np.int64)
    return noesis.Routes(sums, experts, names, np.array([0, 2]), sums.sum(0), none, none[None][:0])


def apart(names: list[str]) -> noesis.TokenDeltas:
    acts = [
        noesis.Activations({name: [torch.randn(1, len(NAMES), 4, generator=generator)] for name in names})
        for generator in (torch.Generator().manual_seed(seed) for seed in (0, 1))
    ]
    acts[0][names[1]][0][0, 2, 0] = torch.nan
    return noesis.token_deltas(*acts, NAMES, NAMES)


def captured(names: list[str]) -> noesis.Activations:
    calls = {name: [torch.ones(1, 3, 2), torch.ones((), dtype=torch.bfloat16)] for name in names}
    return noesis.Activations({**calls, "never ran": []})


def weighed(names: list[str]) -> noesis.ParameterNorms:
    values, gradients, updates = np.random.default_rng(4).random((3, 2, len(names)))
    gradients[0], updates[:, 1], values[1, 0] = np.nan, np.nan, np.inf
    return noesis.ParameterNorms(names, np.array([0, 1]), values, gradients, updates, {names[1]: "a reason"})


def faithful(names: list[str]) -> noesis.Fidelity:
    x, y = (
        {
            name: [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed + at))]
            for at, name in enumerate(names)
        }
        for seed in (0, 100)
    )
    x[names[1]][0][0, 2] = torch.nan
    return noesis.compare(noesis.Activations(x), noesis.Activations({**y, "more": []}))


def differing(names: list[str]) -> noesis.ModelDiff:
    def captures(seed: int) -> list[noesis.Activations]:
        generator = torch.Generator().manual_seed(seed)
        calls = [{name: [torch.randn(1, 3, 4, generator=generator)] for name in names} for _ in range(3)]
        calls[seed][names[1]][0][0, 2, 0] = torch.nan
        return [noesis.Activations(each, meta={"seed": seed}) for each in calls]

    found = noesis.diff(captures(0), captures(1))
    found.flips = [Flip(0, 2, names[3], names[4], 0.5, float("nan"))]
    found.weights = [WeightChange(names[5], 0.25, float("inf"), estimated=True)]
    return found


def patched(names: list[str]) -> interp.Effects:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(len(names), 3))
    values[1, 0] = np.nan
    sites = [interp.Site("module", position=at or None, module=name) for at, name in enumerate(names)]
    return interp.Effects(sites, np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.5, 3.0]), values, "noise", "=metric")


RESULTS = [patched, differing, faithful, weighed, traced, printed, compared, judged, surprised, routed, apart, captured]


# Files and JSON.

#: What is there for other readers, and what older files lack.
OPTIONAL = {
    "reasons",
    "totals",
    "vector_layout",
    "lengths",
    "meta_differences",
    "sample_meta",
    "substituted",
    "tolerance",
}


def test_why_layers_could_not_be_judged_is_saved(tmp_path: Path) -> None:
    surprise = surprised(NAMES)
    surprise.absent, surprise.reasons = ["gone", "padded"], {"padded": "padding changes its figures"}
    for again in (
        noesis.Surprise.from_json(surprise.to_json()),
        noesis.Surprise.load(surprise.save(tmp_path / "s.json")),
    ):
        assert again.reasons == surprise.reasons
        with pytest.raises(noesis.NoesisError, match="cannot be judged .padded: padding changes its figures"):
            _ = again.p_value
    header = json.loads(surprise.to_json())
    del header["reasons"]
    assert noesis.Surprise.from_json(header).reasons == {}
    with pytest.raises(noesis.NoesisError, match="reasons"):
        noesis.Surprise.from_json(header | {"reasons": ["padded"]})


@pytest.mark.parametrize("make", [make for make in RESULTS if make is not captured])
def test_results_come_back_from_json_and_from_every_file_they_are_saved_to(make: Any, tmp_path: Path) -> None:
    result = make(NAMES)
    kind = type(result)
    text = result.to_json()
    again = [kind.from_json(text), kind.from_json(json.loads(text))]
    again += [kind.load(result.save(tmp_path / f"result{suffix}")) for suffix in result.suffixes.split(", ")[:1]]
    again += [kind.load(result.save(tmp_path / f"result{suffix}")) for suffix in (".json", ".json.gz")]
    for each in again:
        assert type(each) is kind
        assert each.to_json() == text
        assert each.to_csv() == result.to_csv()
        assert repr(each) == repr(result)


@pytest.mark.parametrize("make", [make for make in RESULTS if make is not captured])
def test_json_that_is_no_result(make: Any) -> None:
    kind, text = type(make(NAMES)), make(NAMES).to_json()
    payload = json.loads(text)
    for wrong in (text[:-9], "[]", "", json.dumps({**payload, "format": "noesis.else"})):
        with pytest.raises(BadFile, match="^the JSON "):
            kind.from_json(wrong)
    for name in payload.keys() - OPTIONAL:
        with pytest.raises(BadFile, match="^answer "):
            kind.from_json({key: value for key, value in payload.items() if key != name}, "answer")


# Tables.


def read(text: str) -> dict[str, list[str]]:
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert len(set(header)) == len(header)
    assert all(len(row) == len(header) for row in rows)
    return {armed(name): [row[at] for row in rows] for at, name in enumerate(header)}


def armed(text: str) -> str:
    """What the result called it: the apostrophe that was put in front is taken away."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r")) else text


def value_of(text: str, like: Any) -> Any:
    """A field of CSV as the kind of value that it was."""
    if isinstance(like, str):
        return armed(text)
    return (
        {"": None, "True": True, "False": False}.get(text) if like is None or type(like) is bool else type(like)(text)
    )


@pytest.mark.parametrize("make", RESULTS)
def test_csv_reads_back_as_the_columns(make: Any) -> None:
    result: Tabular = make(NAMES)
    found = read(result.to_csv())
    columns = {name: np.asarray(column, dtype=object).tolist() for name, column in result._columns().items()}
    assert list(found) == list(columns)
    for name, values in columns.items():
        back = [value_of(text, value) for text, value in zip(found[name], values, strict=True)]
        np.testing.assert_equal(back, values, err_msg=name)  # NaN equals NaN


@pytest.mark.parametrize("make", RESULTS)
def test_only_numbers_begin_as_a_formula_would(make: Any) -> None:
    rows = list(csv.reader(io.StringIO(make(NAMES).to_csv(), newline="")))
    for field in (field for row in rows for field in row if field.startswith(("=", "+", "-", "@", "\t", "\r"))):
        float(field)
    assert any("=1+2" in field for row in rows for field in row)


@pytest.mark.parametrize("make", RESULTS)
def test_files_hold_the_same(make: Any, tmp_path: Path) -> None:
    result = make(NAMES)
    path = result.to_csv(tmp_path / "new" / "table.csv")
    assert path == tmp_path / "new" / "table.csv"
    assert path.read_bytes().decode() == result.to_csv()
    assert result.to_csv(str(path)) == path  # replaced, as by save
    assert [each.name for each in path.parent.iterdir()] == ["table.csv"]
    with pytest.raises(Inaccessible, match="cannot be written"):
        result.to_csv(tmp_path)


def test_half_a_surrogate_pair_is_told(tmp_path: Path) -> None:
    path = noesis.Soulprint([0.0], [1.0], ["a\ud800"]).to_csv(tmp_path / "table.csv")
    assert path.read_text(encoding="utf-8") == "layer,mean,std\na\\ud800,0.0,1.0\n"


# What a row is.


def test_a_trace_has_a_row_per_step_and_layer() -> None:
    trace = traced(["fc", "=head"])
    header, *lines = trace.to_csv().splitlines()
    assert header.startswith("step,timestep,batch_size,branch,seconds,layer,order,calls,count,mean,std,")
    assert lines[1] == "4,nan,1,,nan,'=head,0,0,0,nan,nan,nan,nan,nan,3"
    assert lines[2].startswith(f"7,nan,2,'=cond,nan,fc,1,1,{2**40 + 1},{trace['mean'][1, 0]},{trace['std'][1, 0]},")
    assert len(lines) == 4


def test_the_others_have_a_row_per_layer_sample_router_token_and_call() -> None:
    assert noesis.Soulprint([0.5, np.nan], [1.0, 2.0], ["a", "b"]).to_csv() == "layer,mean,std\na,0.5,1.0\nb,nan,2.0\n"
    comparison = compared(["a", "b"])
    rows = read(comparison.to_csv())
    assert rows["layer"] == [row.layer for row in comparison.rows]
    assert rows["q_value"] == ["", ""]
    assert read(judged(["a", "b"]).to_csv())["changed"] == ["False", "False"]
    surprise = surprised(["a", "a/p_value"])
    rows = read(surprise.to_csv())
    assert rows["score"] == ["1.5", "inf", "3.0"]
    assert rows["a/p_value/surprisal"] == [str(value) for value in surprise.layers["a/p_value"].surprisal.tolist()]
    routes = routed(["a", "b"])
    rows = read(routes.to_csv())
    assert (rows["step"], rows["layer"]) == (["0", "0", "2", "2"], ["a", "b", "a", "b"])
    assert rows["expert_1"] == [str(number) for number in routes.counts[:, :, 1].ravel()]
    assert rows["expert_2"][::2] == ["", ""]
    assert "" not in rows["expert_2"][1::2]
    deltas = apart(["a", "b"])
    rows = read(deltas.to_csv())
    assert [rows[name][5] for name in ("token", "position_a", "layer", "delta")] == ['say "x"', "2", "b", "nan"]
    assert len(rows["token"]) == 2 * len(NAMES)
    assert captured(["a"]).to_csv().splitlines()[1:] == ["a,0,1x3x2,float32,6,24", "a,1,scalar,bfloat16,1,2"]


def test_scores_without_calibration_or_with_absent_layers_have_no_p_values() -> None:
    columns = read(noesis.Surprise(np.ones(3), surprised(["a"]).layers).to_csv())
    assert "p_value" not in columns
    assert "doubt" not in columns
    absent = surprised(["a"])
    absent.absent = ["b"]
    assert "p_value" not in read(absent.to_csv())


def test_tables_without_rows_have_a_header() -> None:
    trace = traced(["a", "b"])
    assert trace.at([False, False]).to_csv() == trace.to_csv().splitlines(keepends=True)[0]
    assert noesis.Soulprint([], [], []).to_csv() == "layer,mean,std\n"
    assert noesis.Activations({}).to_csv() == "layer,call,shape,dtype,elements,bytes\n"


# Data frames.


@pytest.mark.parametrize("make", RESULTS)
def test_data_frames_hold_the_same_columns(make: Any) -> None:
    pandas = pytest.importorskip("pandas")
    result = make(NAMES)
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    columns = result._columns()
    assert list(frame.columns) == list(columns)
    for name, column in columns.items():
        values = np.asarray(column, dtype=object).tolist()
        if frame[name].dtype.kind in "fiub":  # where None stands for a number, it is NaN
            values = [np.nan if value is None else value for value in values]
        else:
            assert all(value is None or isinstance(value, str) for value in values), name
        back = [None if isinstance(value, float) and np.isnan(value) else value for value in frame[name].tolist()]
        values = [None if isinstance(value, float) and np.isnan(value) else value for value in values]
        assert back == values, name


def test_numbers_of_data_frames_are_numbers() -> None:
    pytest.importorskip("pandas")
    kinds = {name: kind.kind for name, kind in compared(NAMES).to_dataframe().dtypes.items()}
    assert all(kinds[name] == "f" for name in kinds if name != "layer")
    frame = traced(NAMES).to_dataframe()
    assert [frame[name].dtype.kind for name in ("step", "count", "std")] == ["i", "i", "f"]
    assert frame["count"].max() == 2**40 + 1


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"to_dataframe\(\) needs .*'pandas'.*pip install 'noesis\[pandas\]'"):
        printed(NAMES).to_dataframe()
    assert printed(["a"]).to_csv().startswith("layer,mean,std\n")
