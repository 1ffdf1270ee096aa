"""Files of v0.1: real ones, made-up ones, and hostile ones."""

from __future__ import annotations

import copy
import gzip
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import noesis
from noesis.errors import BadFile, BadValue, MissingFile, NoesisError
from noesis.files import bounded_json, v01
from noesis.files.v01 import Print, Run
from noesis.results import load_run, load_runs

REAL = [("run_a", "1795207852"), ("run_b", "1795207854")]
STATS = ("mean", "std", "abs_mean", "min", "max")


def raw(path: Path) -> dict[str, Any]:
    """The JSON of a file, read without noesis."""
    data = path.read_bytes()
    value = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    assert isinstance(value, dict)
    return value


def put(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def record(name: str, step: int = 0, value: float = 1.0, shape: tuple[int, ...] = (2, 4)) -> dict[str, Any]:
    stats = {"mean": value, "std": value, "abs_mean": value, "max": value, "min": value}
    return {"name": name, "shape": list(shape), "dtype": "float32", "device": "cpu", **stats, "step": step}


def trace(records: list[Any], run_id: str = "r", **more: Any) -> dict[str, Any]:
    return {"type": "sdxl_unet", "run_id": run_id, "meta": {}, "records": records, **more}


def put_step(folder: Path, step: int, names: list[str], run_id: str = "r", suffix: str = "", **more: Any) -> Path:
    records = [record(name, step, value=float(at)) for at, name in enumerate(names)]
    path = folder / f"unet_trace_{run_id}_step{step:03d}{suffix}.json"
    return put(path, {**trace(records, run_id, step=step), **more})


def soulprint(index: dict[str, int], rows: int, **more: Any) -> dict[str, Any]:
    return {
        "type": "sdxl_unet_soulprint",
        "run_id": "r",
        "meta": {},
        "steps_aggregated": 2,
        "layer_index": index,
        "vector_layout": "concat(means[0:L], stds[0:L])",
        "soulprint": [float(at) for at in range(2 * rows)],
        **more,
    }


def assert_same_run(one: Run, two: Run) -> None:
    assert (one.run_id, one.meta, one.layers, one.steps) == (two.run_id, two.meta, two.layers, two.steps)
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.counts, two.counts)


def assert_sound(run: Run) -> None:
    """What every run that reading returns must satisfy."""
    shape = (len(run.steps), len(run.layers))
    assert run.values.shape == (*shape, 5)
    assert run.counts.shape == shape
    assert run.values.dtype == run.counts.dtype == np.float64
    assert len(set(run.layers)) == len(run.layers) > 0
    assert run.steps == sorted(set(run.steps))
    assert run.steps[0] >= 0
    assert np.isnan(run.values[run.counts == 0]).all()
    assert (run.counts == np.floor(run.counts)).all()


# Real files.


@pytest.mark.data
@pytest.mark.parametrize(("name", "run_id"), REAL)
def test_every_statistic_is_the_one_of_that_call(data: Path, name: str, run_id: str) -> None:
    folder = data / "noesis_v01" / name
    run = v01.read_run(folder)
    assert (run.run_id, run.steps, len(run.layers), run.values.shape) == (run_id, [0, 1, 2, 3], 403, (4, 403, 5))
    assert len(set(run.layers)) == 403
    assert_sound(run)
    for step in range(4):
        value = raw(folder / f"unet_trace_{run_id}_step{step:03d}.json.gz")
        assert value["meta"] == run.meta
        called = Counter(one["name"] for one in value["records"])
        calls: Counter[str] = Counter()
        for row, one in enumerate(value["records"]):
            calls[one["name"]] += 1
            many = called[one["name"]] > 1
            assert run.layers[row] == (f"{one['name']}#{calls[one['name']]}" if many else one["name"])
            assert run.values[step, row].tolist() == [one[key] for key in STATS]
            assert run.counts[step, row] == math.prod(one["shape"])


@pytest.mark.data
@pytest.mark.parametrize(("name", "run_id"), REAL)
def test_the_soulprint_is_the_average_of_the_traces(data: Path, name: str, run_id: str) -> None:
    folder = data / "noesis_v01" / name
    run, soul = v01.read_run(folder), v01.read_soulprint(folder / "soulprint.json")
    assert (soul.run_id, soul.steps, len(soul.layers)) == (run_id, 4, 403)
    assert soul.layers == run.layers
    np.testing.assert_allclose(soul.means, run.values[..., 0].mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(soul.stds, run.values[..., 1].mean(0), rtol=0, atol=1e-12)


@pytest.mark.data
@pytest.mark.parametrize(("name", "run_id"), REAL)
def test_names_inferred_from_the_soulprint_alone_are_those_of_the_traces(
    data: Path, tmp_path: Path, name: str, run_id: str
) -> None:
    folder = data / "noesis_v01" / name
    alone = shutil.copy(folder / "soulprint.json", tmp_path / "soulprint.json")
    soul = v01.read_soulprint(alone)
    assert soul.layers == v01.read_run(folder).layers
    assert len(set(soul.layers) - set(raw(folder / "soulprint.json")["layer_index"])) == 36  # 12 resnets, 3 calls each
    assert not [layer for layer in soul.layers if layer.startswith("unnamed#")]


@pytest.mark.data
@pytest.mark.parametrize(("name", "run_id"), REAL)
def test_a_soulprint_rewritten_is_the_same_object(data: Path, tmp_path: Path, name: str, run_id: str) -> None:
    source = data / "noesis_v01" / name / "soulprint.json"
    back = raw(v01.write_soulprint(v01.read_soulprint(source), tmp_path / "soulprint.json.gz"))
    assert back == raw(source)
    assert list(back["layer_index"]) == list(raw(source)["layer_index"])


@pytest.mark.data
@pytest.mark.parametrize("single_file", [False, True])
@pytest.mark.parametrize("compress", [False, True])
def test_a_run_rewritten_is_the_same(data: Path, tmp_path: Path, single_file: bool, compress: bool) -> None:
    source = data / "noesis_v01" / "run_a"
    run = v01.read_run(source)
    originals = [raw(path) for path in v01.runs_in(source)["1795207852"]]
    shapes = {layer: one["shape"] for layer, one in zip(run.layers, originals[0]["records"], strict=True)}
    paths = v01.write_run(run, tmp_path / "new", single_file=single_file, compress=compress, shapes=shapes)
    stem, suffix = "unet_trace_1795207852", ".json.gz" if compress else ".json"
    names = [f"{stem}{suffix}"] if single_file else [f"{stem}_step{step:03d}{suffix}" for step in range(4)]
    assert [path.name for path in paths] == names == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert_same_run(v01.read_run(tmp_path / "new"), run)

    for original in originals:
        for one in original["records"]:
            one["dtype"] = "unknown"  # a Run does not keep it
    written = [raw(path) for path in paths]
    if single_file:
        assert written[0]["records"] == [one for original in originals for one in original["records"]]
        assert list(written[0]) == ["type", "run_id", "meta", "records"]
    else:
        assert written == originals


class Reading:
    """Counts how often files below a folder are opened, and how often their JSON is parsed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.opened: Counter[str] = Counter()
        self.parsed: Counter[str] = Counter()
        sys.addaudithook(self._heard)  # which cannot be taken back, so it is there once for all tests

    def clear(self) -> None:
        self.opened, self.parsed = Counter(), Counter()

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and self.folder is not None and isinstance(given[0], (str, Path)):
            path = Path(given[0])
            if path.parent == self.folder:
                self.opened[path.name] += 1


_READING = Reading()


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    parse = bounded_json.parsed

    def counted(text: str, size: int, path: Any, **options: Any) -> Any:
        _READING.parsed[Path(path).name] += 1
        return parse(text, size, path, **options)

    monkeypatch.setattr(bounded_json, "parsed", counted)
    _READING.folder = tmp_path
    _READING.clear()
    yield _READING
    _READING.folder = None


def test_many_runs_of_one_folder_are_read_file_by_file(tmp_path: Path, reading: Reading) -> None:
    """Not every file for every run."""
    for number in range(4):
        run = Run(f"r{number}", {}, ["a", "b"], [0, 1, 2], np.full((3, 2, 5), float(number)), np.full((3, 2), 8.0))
        v01.write_run(run, tmp_path)
    reading.clear()
    found = load_runs(tmp_path)
    assert [trace.meta["run"] for trace in found] == ["r0", "r1", "r2", "r3"]
    assert [trace.layer("b")[0, 1] for trace in found] == [0, 1, 2, 3]
    assert len(reading.opened) == 12
    assert set(reading.opened.values()) == set(reading.parsed.values()) == {1}


def single_trace(folder: Path) -> Path:
    return put(folder / "unet_trace_r.json", trace([record("a"), record("act"), record("act")]))


@pytest.mark.parametrize(
    ("made", "load"),
    [
        (single_trace, load_run),
        (single_trace, noesis.Trace.load),
        (lambda folder: put(folder / "s.json", soulprint({"a": 0}, 1)), load_run),
        (lambda folder: put(folder / "s.json", soulprint({"a": 0}, 1)), noesis.Soulprint.load),
        (
            lambda folder: noesis.Trace._from_v01(v01.read_run(single_trace(folder))).save(folder / "t.json.gz"),
            load_run,
        ),
        (lambda folder: noesis.Soulprint([1.0], [2.0], ["a"]).save(folder / "p.json"), load_run),
        (lambda folder: noesis.Soulprint([1.0], [2.0], ["a"]).save(folder / "p.safetensors"), load_run),
    ],
)
def test_a_file_is_opened_once_and_parsed_once(tmp_path: Path, reading: Reading, made: Any, load: Any) -> None:
    path = made(tmp_path)
    reading.clear()
    load(path)
    assert reading.opened == {path.name: 1}
    # Of safetensors two JSON texts are parsed: the format's header, and noesis' within it.
    assert reading.parsed == {path.name: 2 if path.suffix == ".safetensors" else 1}


def test_all_files_of_a_folder_are_opened_once(tmp_path: Path, reading: Reading) -> None:
    """Also traces that a soulprint beside them takes the names of its rows from, and files of other kinds."""
    single_trace(tmp_path)
    put(tmp_path / "soulprint.json", soulprint({"a": 0, "act": 2}, 3))
    put(tmp_path / "other.json", soulprint({"a": 0, "act": 2}, 3, run_id="r"))
    put(tmp_path / "config.json", {"values": ["x"], "means": {"a": "b"}})  # where a run would have numbers
    noesis.Trace.load(tmp_path).save(tmp_path / "trace.safetensors")
    reading.clear()
    assert [type(run).__name__ for run in load_runs(tmp_path)] == ["Trace"]
    assert reading.opened == dict.fromkeys((path.name for path in tmp_path.iterdir()), 1)


@pytest.mark.data
def test_two_runs_in_one_folder_are_told_apart(data: Path, tmp_path: Path) -> None:
    for name, _ in REAL:
        for path in (data / "noesis_v01" / name).glob("unet_trace_*"):
            shutil.copy(path, tmp_path)
    found = v01.runs_in(tmp_path)
    assert list(found) == ["1795207852", "1795207854"]
    for run_id, paths in found.items():
        assert [path.name for path in paths] == [f"unet_trace_{run_id}_step{step:03d}.json.gz" for step in range(4)]
    with pytest.raises(BadValue, match=r"holds 2 runs: '1795207852' .*, '1795207854' .*run=") as caught:
        v01.read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(BadValue, match=r"holds no run '7'; it holds '1795207852' .*, '1795207854'"):
        v01.read_run(tmp_path, run="7")
    for name, run_id in REAL:
        assert_same_run(v01.read_run(tmp_path, run=run_id), v01.read_run(data / "noesis_v01" / name))


@pytest.mark.data
def test_the_file_of_one_step_gives_that_step(data: Path) -> None:
    folder = data / "noesis_v01" / "run_b"
    whole, one = v01.read_run(folder), v01.read_run(folder / "unet_trace_1795207854_step002.json.gz")
    assert (one.steps, one.layers) == ([2], whole.layers)
    np.testing.assert_array_equal(one.values, whole.values[2:3])


# Traces.


def test_layouts_of_a_trace_file_mean_the_same(tmp_path: Path) -> None:
    records = [record("a"), record("b"), record("a"), record("a", 3), record("b", 3)]
    flat = v01.read_run(put(tmp_path / "flat.json", trace(records)))
    assert flat.layers == ["a#1", "b", "a#2"]
    assert flat.steps == [0, 3]
    assert flat.counts.tolist() == [[8, 8, 8], [8, 8, 0]]
    bare = [{key: value for key, value in one.items() if key != "step"} for one in records]
    nested = trace([], steps=[{"step": 3, "records": bare[3:]}, {"step": 0, "records": records[:3]}])
    del nested["records"]
    assert_same_run(v01.read_run(put(tmp_path / "nested.json", nested)), flat)
    folder = tmp_path / "folder"
    folder.mkdir()
    put(folder / "unet_trace_r_step000.json", trace(records[:3], step=0))
    put(folder / "unet_trace_r_step003.json", trace(records[3:], step=3))
    put(folder / "something_else.json", {})
    assert_same_run(v01.read_run(folder), flat)


def test_steps_sort_by_number_and_may_have_gaps(tmp_path: Path) -> None:
    for step in (1000, 20, 3):
        put_step(tmp_path, step, ["a"])
    nested = {**trace([]), "steps": [{"step": step, "records": [record("a", step)]} for step in (30, 10)]}
    del nested["records"]
    put(tmp_path / "unet_trace_r.json", nested)
    assert v01.read_run(tmp_path).steps == [3, 10, 20, 30, 1000]
    assert [path.name[12:-5] for path in v01.runs_in(tmp_path)["r"]] == ["_step003", "", "_step020", "_step1000"]


def test_the_same_step_twice_names_both_files(tmp_path: Path) -> None:
    first = put_step(tmp_path, 2, ["a"])
    second = Path(f"{first}.gz")
    second.write_bytes(gzip.compress(first.read_bytes()))
    with pytest.raises(BadFile, match="step 2 of run 'r' comes twice") as caught:
        v01.read_run(tmp_path)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    assert v01.read_run(first).steps == [2]


def test_a_step_that_comes_back_in_a_single_file_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.json", trace([record("a", 0), record("a", 1), record("a", 0)]))
    with pytest.raises(BadFile, match=r"t\.json: step 0 of run 'r' comes twice"):
        v01.read_run(path)


def test_a_record_of_another_step_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.json", trace([record("a", 1), record("b", 2)], step=1))
    with pytest.raises(BadFile, match=r"t\.json, step 1, record 1: the record is of step 2"):
        v01.read_run(path)


def test_the_run_id_inside_counts_not_the_one_in_the_name(tmp_path: Path) -> None:
    put_step(tmp_path, 0, ["a"])
    put_step(tmp_path, 1, ["a"], run_id="r").rename(tmp_path / "unet_trace_other_step001.json")
    assert v01.read_run(tmp_path).steps == [0, 1]
    assert list(v01.runs_in(tmp_path)) == ["r"]
    put(tmp_path / "unet_trace_r_step002.json", trace([record("a", 2)], "hidden", step=2))
    with pytest.raises(BadValue, match=r"2 runs: 'hidden' \(as in unet_trace_r_step002.json\), 'r'"):
        v01.read_run(tmp_path)
    assert v01.read_run(tmp_path, run="r").steps == [0, 1]


def test_two_runs_of_one_id_are_not_pooled(tmp_path: Path) -> None:
    put_step(tmp_path, 0, ["a"], meta={"seed": 1, "scale": math.nan, "of": {"a": 1, "b": 2}})
    put_step(tmp_path, 1, ["a"], meta={"of": {"b": 2, "a": 1}, "scale": math.nan, "seed": 1})
    assert v01.read_run(tmp_path).steps == [0, 1]
    put_step(tmp_path, 2, ["a"], meta={"seed": 2, "scale": math.nan, "of": {"a": 1, "b": 2}})
    with pytest.raises(BadFile, match=r"step001.json and .*step002.json: both say run 'r', but .* \['seed'\]"):
        v01.read_run(tmp_path)


def test_layers_that_ran_in_some_steps_are_aligned_in_order_of_execution(tmp_path: Path) -> None:
    put_step(tmp_path, 0, ["in", "act", "mid", "out"])
    put_step(tmp_path, 1, ["first", "in", "act", "extra", "act", "out", "last"])
    put_step(tmp_path, 2, [])
    run = v01.read_run(tmp_path)
    assert run.layers == ["first", "in", "act#1", "extra", "act#2", "mid", "out", "last"]
    assert (run.counts > 0).tolist() == [
        [False, True, True, False, False, True, True, False],
        [True, True, True, True, True, False, True, True],
        [False] * 8,
    ]
    assert run.values[1, :, 0].tolist()[:5] == [0, 1, 2, 3, 4]
    assert_sound(run)
    v01.write_run(run, tmp_path / "again")
    assert_same_run(v01.read_run(tmp_path / "again"), run)
    with pytest.raises(BadValue, match=r"nothing ran in steps \[2\].*single_file=False"):
        v01.write_run(run, tmp_path, single_file=True)


def test_a_name_with_a_number_sign_is_not_taken_for_a_call(tmp_path: Path) -> None:
    put_step(tmp_path, 0, ["a#2", "b#1"])
    run = v01.read_run(tmp_path)
    assert run.layers == ["a#2", "b#1"]
    paths = v01.write_run(run, tmp_path / "again")
    assert [one["name"] for one in raw(paths[0])["records"]] == ["a#2", "b#1"]
    put_step(tmp_path, 1, ["a#1", "a#2"])  # a#2 once without a#1, so these are no calls of one module
    run = v01.read_run(tmp_path)
    assert run.layers == ["a#1", "a#2", "b#1"]
    v01.write_run(run, tmp_path / "both")
    assert_same_run(v01.read_run(tmp_path / "both"), run)
    put_step(tmp_path, 2, ["a", "a"])
    with pytest.raises(BadFile, match="called like calls of others"):
        v01.read_run(tmp_path)


def test_nan_and_infinity_are_numbers(tmp_path: Path) -> None:
    path = put(tmp_path / "t.json", trace([{**record("a"), "mean": math.nan, "std": math.inf, "min": -math.inf}]))
    assert "NaN" in path.read_text()
    run = v01.read_run(path)
    np.testing.assert_array_equal(run.values[0, 0], [math.nan, math.inf, 1, -math.inf, 1])
    assert run.counts[0, 0] == 8
    v01.write_run(run, tmp_path / "again")
    assert_same_run(v01.read_run(tmp_path / "again"), run)


def test_a_run_without_any_record_is_refused(tmp_path: Path) -> None:
    path = put_step(tmp_path, 0, [])
    put_step(tmp_path, 1, [])
    for source in (path, tmp_path):
        with pytest.raises(BadFile, match="there are no records of run 'r'") as caught:
            v01.read_run(source)
        assert str(source) in str(caught.value)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"holds no v0\.1 trace"):
        v01.read_run(tmp_path)
    assert v01.runs_in(tmp_path) == {}
    for call in (v01.read_run, v01.runs_in, v01.read_soulprint):
        with pytest.raises(MissingFile, match="nowhere"):
            call(tmp_path / "nowhere")


def test_a_file_of_the_other_kind_says_which_reader_to_use(tmp_path: Path) -> None:
    soul = put(tmp_path / "s.json", soulprint({"a": 0}, 1))
    with pytest.raises(BadFile, match=r"s\.json: 'type' is 'sdxl_unet_soulprint'.*use read_soulprint"):
        v01.read_run(soul)
    with pytest.raises(BadFile, match=r"'type' is 'sdxl_unet'.*use read_run"):
        v01.read_soulprint(put_step(tmp_path, 0, ["a"]))
    with pytest.raises(BadFile, match=r"'type' is None.*Check the path"):
        v01.read_run(put(tmp_path / "n.json", {}))
    assert v01.looks_like(raw(soul))
    assert not any(v01.looks_like(value) for value in ({}, {"type": []}, {"type": "noesis"}, [], None))


def test_more_rows_than_fit_into_memory_are_refused(tmp_path: Path) -> None:
    # 6000 small records that would become a table of 36 million rows
    path = put(tmp_path / "t.json", trace([record(f"layer{step}", step) for step in range(6000)]))
    with pytest.raises(BadFile, match=r"t\.json: run 'r' has 6000 layers over 6000 steps"):
        v01.read_run(path)


def change(value: dict[str, Any], at: tuple[Any, ...], new: Any) -> dict[str, Any]:
    """A copy with the value at a place replaced, or removed where new is `...`."""
    value = copy.deepcopy(value)
    holder: Any = value
    for key in at[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = new
    return value


TRACE = trace([record("a", 1), record("b", 1), record("a", 1)], step=1)
LOOP: dict[str, Any] = {}
LOOP["again"] = LOOP

BAD_TRACES = [
    *[((key,), ..., f"{key!r}") for key in ("type", "run_id", "meta", "records")],
    *[(("records", 1, key), ..., f"record 1: {key!r} is missing") for key in record("a")],
    (("type",), ["sdxl_unet"], "'type'"),
    (("run_id",), 7, "'run_id' is 7"),
    (("run_id",), "", "'run_id' is empty"),
    (("meta",), None, "'meta' is None"),
    (("records",), {}, "'records' is {}"),
    (("records", 1), [1], r"record 1: it is \[1\]"),
    (("step",), -1, "'step' is -1"),
    (("step",), True, "'step' is True"),
    (("step",), 1.0, "'step' is 1.0"),
    (("step",), 10**4000, "'step' is 1000"),
    (("records", 1, "step"), 2, "record 1: the record is of step 2"),
    (("records", 1, "step"), math.nan, "record 1: 'step' is nan"),
    (("records", 1, "name"), None, "record 1: 'name' is None"),
    (("records", 1, "dtype"), 32, "record 1: 'dtype' is 32"),
    (("records", 1, "shape"), "2, 4", "record 1: 'shape' is '2, 4'"),
    (("records", 1, "shape"), [2, -4], r"record 1: 'shape' is \[2, -4\]"),
    (("records", 1, "shape"), [0], r"record 1: 'shape' is \[0\]"),
    (("records", 1, "shape"), [True], r"record 1: 'shape' is \[True\]"),
    (("records", 1, "shape"), [2.0], r"record 1: 'shape' is \[2.0\]"),
    (("records", 1, "shape"), [2**40, 2**40], "record 1: 'shape' is"),
    (("records", 1, "shape"), [10**4000] * 9, "record 1: 'shape' is"),
    (("records", 1, "shape"), [1] * 1000, "record 1: 'shape' is"),
    (("records", 1, "mean"), "0", "record 1: value 0 is '0'"),
    (("records", 1, "std"), None, "record 1: value 1 is None"),
    (("records", 1, "max"), False, "record 1: value 4 is False"),
    (("records", 1, "min"), 10**400, "record 1: a number is too large"),
]


@pytest.mark.parametrize(("at", "new", "what"), BAD_TRACES)
def test_a_broken_trace_says_where(tmp_path: Path, at: tuple[Any, ...], new: Any, what: str) -> None:
    path = put(tmp_path / "unet_trace_r_step001.json", change(TRACE, at, new))
    for call in (lambda: v01.read_run(path), lambda: v01.read_run(tmp_path), lambda: v01.runs_in(tmp_path)):
        with pytest.raises(BadFile, match=what) as caught:
            call()
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        (4, "'steps' is 4"),
        ([], "there are no records"),
        ([7], r"steps\[0\]: it is 7"),
        ([{"records": []}], r"steps\[0\]: 'step' is missing"),
        ([{"step": 0, "records": [3]}], "step 0, record 0: it is 3"),
        ([{"step": 0, "records": [record("a", 5)]}], "record 0: the record is of step 5"),
        ([{"step": 0, "records": [record("a")]}] * 2, "step 0 of run 'r' comes twice"),
        ([{"step": 0, "records": []}], "there are no records of run 'r'"),
    ],
)
def test_a_broken_list_of_steps_says_where(tmp_path: Path, steps: Any, what: str) -> None:
    value = {key: item for key, item in trace([], steps=steps).items() if key != "records"}
    with pytest.raises(BadFile, match=what):
        v01.read_run(put(tmp_path / "t.json", value))


def test_meta_nested_to_the_limit_of_the_parser_is_no_crash(tmp_path: Path) -> None:
    refused = 0
    for depth in (500, *range(800, 1000), 100_000):  # where parsing just succeeds, comparing must too
        for step in (1, 2):
            text = json.dumps(trace([record("a", step)], step=step))
            deep = text.replace('"meta": {}', f'"meta": {{"a": {"[" * depth}{"]" * depth}}}')
            (tmp_path / f"unet_trace_r_step{step}.json").write_text(deep)
        try:
            assert_sound(v01.read_run(tmp_path))
        except BadFile as error:
            assert "not readable JSON" in str(error)  # noqa: PT017
            refused += 1
    assert 1 <= refused <= 201


@pytest.mark.parametrize("keep", [0, 1, 2, 9, 10, 11, 40, -9, -8, -4, -1])
def test_a_truncated_gzip_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "unet_trace_r_step001.json.gz"
    path.write_bytes(gzip.compress(json.dumps(TRACE).encode())[:keep])
    with pytest.raises(BadFile, match=r"unet_trace_r_step001\.json\.gz is not readable JSON"):
        v01.read_run(tmp_path)


# Soulprints.

RESNET = {"r.norm1": 0, "r.nonlinearity": 6, "r.conv1": 2, "r.time_emb_proj": 4, "r.norm2": 5, "r.conv2": 7, "r": 8}


def test_earlier_calls_are_inferred_from_the_neighbours(tmp_path: Path) -> None:
    soul = v01.read_soulprint(put(tmp_path / "s.json", soulprint(RESNET, 9)))
    assert soul.layers == [
        *("r.norm1", "r.nonlinearity#1", "r.conv1", "r.nonlinearity#2", "r.time_emb_proj", "r.norm2"),
        *("r.nonlinearity#3", "r.conv2", "r"),
    ]
    assert soul.means.tolist() == list(range(9))
    assert soul.stds.tolist() == list(range(9, 18))
    assert soul.steps == 2


def test_a_resnet_with_an_upsampler_inside_is_inferred_too(tmp_path: Path) -> None:
    index = {"b.r.norm1.inner": 0, "b.r.upsample.op": 2, "b.r.upsample": 3, "b.r.conv1": 4, "b.r.nonlinearity": 5}
    soul = v01.read_soulprint(put(tmp_path / "s.json", soulprint(index, 6)))
    assert soul.layers[1] == "b.r.nonlinearity#1"


@pytest.mark.parametrize(
    ("index", "rows", "unnamed"),
    [
        ({}, 2, [0, 1]),
        ({"a": 1}, 3, [0, 2]),  # nothing on one side
        ({"r.a": 0, "r.b": 2}, 3, [1]),  # no nonlinearity there
        ({"r.a": 0, "s.b": 2, "r.nonlinearity": 3}, 4, [1]),  # another parent behind it
        ({"r.a": 0, "rr.b": 2, "r.nonlinearity": 3}, 4, [1]),  # a prefix, but another parent
        ({"r.nonlinearity": 0, "r.a": 1, "r.b": 3}, 4, [2]),  # the last call came before
        ({"r.a": 0, "r.b": 4, "r.nonlinearity": 5}, 6, [1, 2, 3]),  # more calls than a resnet makes
        ({"a": 0, "b": 2, "nonlinearity": 3}, 4, [1]),  # no parent
    ],
)
def test_a_gap_that_nothing_explains_stays_unnamed(
    tmp_path: Path, index: dict[str, int], rows: int, unnamed: list[int]
) -> None:
    soul = v01.read_soulprint(put(tmp_path / "s.json", soulprint(index, rows)))
    assert [row for row, name in enumerate(soul.layers) if name == f"unnamed#{row}"] == unnamed
    assert {name: row for row, name in enumerate(soul.layers) if row not in unnamed} == index
    back = v01.write_soulprint(soul, tmp_path / "again.json")
    assert raw(back) == soulprint(index, rows)


def test_traces_beside_the_soulprint_name_what_inference_cannot(tmp_path: Path) -> None:
    names = ["a", "act", "b", "act"]
    path = put(tmp_path / "s.json", soulprint({"a": 0, "act": 3, "b": 2}, 4))
    assert v01.read_soulprint(path).layers == ["a", "unnamed#1", "b", "act"]

    put_step(tmp_path, 0, names, run_id="other")  # another run
    put_step(tmp_path, 0, names[:3])  # other rows
    put_step(tmp_path, 1, ["act", "a", "b", "act"])  # other places
    (tmp_path / "unet_trace_r_step002.json").write_text("{")  # broken
    put(tmp_path / "unet_trace_r_step003.json", trace([record(name, 3) for name in names], "x", step=3))  # mislabelled
    assert v01.read_soulprint(path).layers == ["a", "unnamed#1", "b", "act"]
    put_step(tmp_path, 4, names).rename(tmp_path / "unet_trace_far_step004.json")  # only files of this name are opened
    assert v01.read_soulprint(path).layers == ["a", "unnamed#1", "b", "act"]
    put_step(tmp_path, 5, names)
    soul = v01.read_soulprint(path)
    assert soul.layers == ["a", "act#1", "b", "act#2"]

    away = v01.write_soulprint(soul, tmp_path / "away" / "s.json")
    assert raw(away)["layer_index"] == {"a": 0, "act": 3, "b": 2}
    assert v01.read_soulprint(away).layers == soul.layers


def test_a_trace_with_fewer_rows_does_not_name_the_soulprint(tmp_path: Path) -> None:
    put_step(tmp_path, 0, ["a", "b"])
    soul = v01.read_soulprint(put(tmp_path / "s.json", soulprint({"a": 0, "b": 1}, 3)))
    assert soul.layers == ["a", "b", "unnamed#2"]


GOOD_PRINT = soulprint(RESNET, 9, layer_names=[f"r{row}" for row in range(9)])
GOOD_PRINT["layer_index"] = {name: row for row, name in enumerate(GOOD_PRINT["layer_names"])}

BAD_PRINTS = [
    *[((key,), ..., f"{key!r}") for key in GOOD_PRINT if key != "layer_names"],
    (("run_id",), None, "'run_id' is None"),
    (("meta",), [], r"'meta' is \[\]"),
    (("steps_aggregated",), 0, "'steps_aggregated' is 0"),
    (("steps_aggregated",), True, "'steps_aggregated' is True"),
    (("steps_aggregated",), 2.5, "'steps_aggregated' is 2.5"),
    (("vector_layout",), "stds, means", "'vector_layout' is 'stds, means'"),
    (("soulprint",), "x", "'soulprint' is 'x'"),
    (("soulprint",), [], "the soulprint has 0 numbers"),
    (("soulprint",), [1.0] * 17, "the soulprint has 17 numbers"),
    (("soulprint",), [1.0] * 16, "'r8' is 8"),
    (("soulprint", 3), None, "'soulprint': value 3 is None"),
    (("soulprint", 3), True, "'soulprint': value 3 is True"),
    (("soulprint", 3), [1], r"'soulprint': value 3 is \[1\]"),
    (("soulprint", 3), -(10**400), "a number is too large"),
    (("layer_index",), [], r"'layer_index' is \[\]"),
    (("layer_index", "r3"), 9, "'layer_index': 'r3' is 9"),
    (("layer_index", "r3"), -1, "'layer_index': 'r3' is -1"),
    (("layer_index", "r3"), 2, "'layer_index': row 2 belongs to two layers"),
    (("layer_index", "r3"), True, "'layer_index': 'r3' is True"),
    (("layer_index", "r3"), math.inf, "'layer_index': 'r3' is inf"),
    (("layer_names",), None, "'layer_names' is None"),
    (("layer_names", 3), 3, "'layer_names' is"),
    (("layer_names",), ["r0"], "'layer_names' is"),
    (("layer_names", 3), "other", "'layer_names' and 'layer_index' disagree"),
    (("layer_names", 3), "r2", "'layer_names' and 'layer_index' disagree"),
]


@pytest.mark.parametrize(("at", "new", "what"), BAD_PRINTS)
def test_a_broken_soulprint_says_where(tmp_path: Path, at: tuple[Any, ...], new: Any, what: str) -> None:
    v01.read_soulprint(put(tmp_path / "good.json", GOOD_PRINT))
    path = put(tmp_path / "s.json", change(GOOD_PRINT, at, new))
    with pytest.raises(BadFile, match=what) as caught:
        v01.read_soulprint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_rows_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="two rows would be called 'unnamed#1'"):
        v01.read_soulprint(put(tmp_path / "s.json", soulprint({"unnamed#1": 0}, 2)))


def test_a_name_of_a_million_dots_takes_no_time(tmp_path: Path) -> None:
    dots = "." * 1_000_000
    path = put(tmp_path / "s.json", soulprint({f"{dots}a": 0, f"{dots}b": 2}, 3))
    assert v01.read_soulprint(path).layers[1] == "unnamed#1"


# Writing.

RUN = Run("r", {}, ["a", "b"], [0, 4], np.ones((2, 2, 5)), np.full((2, 2), 8.0))
PRINT = Print("r", {}, ["a", "b"], np.zeros(2), np.ones(2), 3)


@pytest.mark.parametrize("run_id", ["../r", "a/b", ".r", "", "a b", "a\n", "a\0", "ü", "x" * 201])
def test_a_run_id_that_is_no_part_of_a_file_name_is_not_written(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(BadValue, match="the run id"):
        v01.write_run(Run(run_id, {}, RUN.layers, RUN.steps, RUN.values, RUN.counts), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"meta": {(1, 2): 3}}, "meta does not fit into JSON"),
        ({"meta": LOOP}, "meta does not fit into JSON"),
        ({"layers": ["a", "a"]}, "two layers are called 'a'"),
        ({"layers": ["a"]}, "2 steps, 1 layers"),
        ({"steps": [4, 4]}, "2 steps, 2 layers"),
        ({"steps": [-1, 4]}, "rising steps"),
        ({"steps": [1, 2**31]}, "rising steps"),
        ({"values": np.ones((2, 2, 4))}, r"values \(2, 2, 4\)"),
        ({"counts": np.ones((2, 1))}, r"counts \(2, 1\)"),
        ({"counts": np.full((2, 2), 0.5)}, "counts are not all numbers of elements"),
        ({"counts": np.full((2, 2), math.nan)}, "counts are not all numbers of elements"),
        ({"counts": np.zeros((2, 2))}, "no layer of run 'r' ran"),
        ({"counts": np.array([[8.0, 0.0], [8.0, 8.0]])}, "values where the count is 0"),
        ({"shapes": {"c": [8]}}, "shapes says .* for 'c'"),
        ({"shapes": {"a": [-2, -4]}}, "shapes says .* for 'a'"),
    ],
)
def test_a_run_that_does_not_fit_together_is_not_written(tmp_path: Path, changed: dict[str, Any], what: str) -> None:
    shapes = changed.get("shapes")
    run = Run(**{**vars(RUN), **{key: value for key, value in changed.items() if key != "shapes"}})
    with pytest.raises(BadValue, match=what):
        v01.write_run(run, tmp_path, shapes=shapes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"run_id": ""}, "the run id is empty"),
        ({"layers": ["a", "a"]}, "two layers are called 'a'"),
        ({"layers": ["", ""]}, "two layers are called ''"),
        ({"layers": ["a"]}, r"1 layers, means \(2,\)"),
        ({"layers": [], "means": np.zeros(0), "stds": np.zeros(0)}, "0 layers"),
        ({"stds": np.ones((2, 1))}, r"stds \(2, 1\)"),
        ({"steps": 0}, "0 steps"),
    ],
)
def test_a_soulprint_that_does_not_fit_together_is_not_written(
    tmp_path: Path, changed: dict[str, Any], what: str
) -> None:
    with pytest.raises(BadValue, match=what):
        v01.write_soulprint(Print(**{**vars(PRINT), **changed}), tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_shapes_are_used_where_they_fit_and_silent_layers_leave_no_record(tmp_path: Path) -> None:
    counts = np.array([[8.0, 8.0, 0.0], [8.0, 6.0, 0.0]])
    values = np.where(counts[..., None] > 0, np.ones((2, 3, 5)), np.nan)
    run = Run("r", {"device": "cuda"}, ["a", "b", "never"], [0, 1], values, counts)
    path = v01.write_run(run, tmp_path, single_file=True, shapes={"b": (2, 4)})[0]
    records = raw(path)["records"]
    assert [(one["name"], one["step"], one["shape"]) for one in records] == [
        *[("a", 0, [8]), ("b", 0, [2, 4])],
        *[("a", 1, [8]), ("b", 1, [6])],
    ]
    assert {(one["device"], one["dtype"]) for one in records} == {("cuda", "unknown")}
    assert v01.read_run(path).layers == ["a", "b"]


# Properties.

NAMES = st.sampled_from(["a", "b", "c", "a#1", "a#2", "b#1", "#1", "", "r.nonlinearity", "r.x", "unnamed", "unnamed#1"])


@settings(deadline=None, max_examples=150)
@given(steps=st.lists(st.lists(NAMES, max_size=8), min_size=1, max_size=4))
def test_reading_what_was_written_gives_what_was_read(steps: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step, names in enumerate(steps):
            put_step(folder, step, names)
        try:
            run = v01.read_run(folder)
        except BadFile as error:
            assert not any(steps) or "called like calls" in str(error)  # noqa: PT017
            return
        assert_sound(run)
        for step, names in enumerate(steps):
            row = [run.layers.index(layer) for layer in run.layers if run.counts[step, run.layers.index(layer)]]
            assert sorted(run.values[step, row, 0]) == list(range(len(names)))
        v01.write_run(run, folder / "again", compress=False)
        assert_same_run(v01.read_run(folder / "again"), run)
        if all(steps):
            v01.write_run(run, folder / "single", single_file=True)
            assert_same_run(v01.read_run(folder / "single"), run)


@settings(deadline=None, max_examples=150)
@given(
    layers=st.lists(
        st.one_of(NAMES, st.sampled_from(["r.nonlinearity#1", "r.nonlinearity#2", "r.y", "unnamed#2"])),
        min_size=1,
        max_size=9,
        unique=True,
    )
)
def test_a_soulprint_keeps_all_its_names(layers: list[str]) -> None:
    count = len(layers)
    soul = Print("r", {"seed": 1}, layers, np.arange(count) / 7, -np.arange(count) / 3, 30)
    with tempfile.TemporaryDirectory() as folder:
        back = v01.read_soulprint(v01.write_soulprint(soul, f"{folder}/s.json"))
    assert (back.run_id, back.meta, back.layers, back.steps) == ("r", {"seed": 1}, layers, 30)
    np.testing.assert_array_equal(back.means, soul.means)
    np.testing.assert_array_equal(back.stds, soul.stds)


SAMPLES = [
    TRACE,
    trace([record("a"), record("r.nonlinearity"), record("a"), record("a", 3)]),
    {**{key: item for key, item in TRACE.items() if key not in ("records", "step")}}
    | {"steps": [{"step": 0, "records": [record("a")]}, {"step": 2, "records": [record("a", 2)]}]},
    soulprint(RESNET, 9),
    GOOD_PRINT,
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 12),
    st.sampled_from([2**31, 2**53, 2**63, 10**400, -(10**400), 1e308, math.nan, math.inf, -math.inf, 0.5]),
    st.text(max_size=4),
    st.sampled_from([[], {}, [1], {"a": 1}, [[]], "a", "a#1", "unnamed#1", "sdxl_unet", "\ud800"]),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*at, key), *places(item, (*at, key)))]


def read_or_refuse(data: bytes) -> None:
    """Every reader gives a sound object or an error of noesis that names the file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "unet_trace_r_step001.json.gz"
        path.write_bytes(data)
        for call, source in ((v01.read_run, path), (v01.read_run, path.parent), (v01.read_soulprint, path)):
            try:
                result = call(source)
            except NoesisError as error:
                assert isinstance(error, BadFile)  # noqa: PT017
                assert str(path) in str(error) or str(path.parent) in str(error)  # noqa: PT017
                continue
            if isinstance(result, Run):
                assert_sound(result)
            else:
                assert len(result.layers) == len(set(result.layers)) == len(result.means) == len(result.stds) > 0


@settings(deadline=None, max_examples=250)
@given(choice=st.data())
def test_changed_values_are_read_or_refused(choice: st.DataObject) -> None:
    value = choice.draw(st.sampled_from(SAMPLES))
    for _ in range(choice.draw(st.integers(1, 3))):
        found = places(value)
        if found:
            value = change(value, choice.draw(st.sampled_from(found)), choice.draw(st.one_of(st.just(...), ODD)))
    read_or_refuse(json.dumps(value).encode())


@settings(deadline=None, max_examples=250)
@given(choice=st.data())
def test_changed_bytes_are_read_or_refused(choice: st.DataObject) -> None:
    data = json.dumps(choice.draw(st.sampled_from(SAMPLES))).encode()
    changed = bytearray(gzip.compress(data, mtime=0) if choice.draw(st.booleans()) else data)
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(0, len(changed) - 1))
        changed[at : at + choice.draw(st.integers(0, 3))] = choice.draw(st.binary(max_size=3))
    read_or_refuse(bytes(changed))


@pytest.mark.data
@settings(deadline=None, max_examples=60)
@given(choice=st.data())
def test_changed_bytes_of_real_files_are_read_or_refused(data: Path, choice: st.DataObject) -> None:
    name = choice.draw(st.sampled_from(["soulprint.json", "unet_trace_1795207852_step001.json.gz"]))
    content = (data / "noesis_v01" / "run_a" / name).read_bytes()
    if name.endswith(".gz") and choice.draw(st.booleans()):
        content = gzip.decompress(content)
    changed = bytearray(content)
    at = choice.draw(st.integers(0, len(changed) - 1))
    changed[at : at + choice.draw(st.integers(0, 3))] = choice.draw(st.binary(max_size=3))
    read_or_refuse(bytes(changed))
