"""Trace and Soulprint: reading back, files, errors, v0.1."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from torch import nn

import noesis


@pytest.fixture(scope="module")
def trace() -> noesis.Trace:
    torch.manual_seed(0)
    wrapped = noesis.wrap(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        layers="all",
        stats=("zeros", "rms"),
        per_sample=True,
        capacity=3,
    )
    with wrapped.run(prompt="a $moth$ <b>", seed=7):
        for _ in range(5):
            wrapped(torch.randn(2, 4))
    return wrapped.trace()


def same(one: noesis.Trace, other: noesis.Trace) -> None:
    for name in ("values", "steps", "order", "calls", "totals", "averages", "timesteps", "batches"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    for name in ("layers", "stats", "branches", "dropped_steps", "unmeasured", "meta"):
        assert getattr(one, name) == getattr(other, name), name
    for left, right in zip(one.samples, other.samples, strict=True):
        same(left, right)


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".json.gz"])
def test_traces_and_soulprints_come_back(trace, tmp_path, suffix):
    same(noesis.Trace.load(trace.save(tmp_path / f"trace{suffix}")), trace)
    same(noesis.Trace.load(tmp_path), trace)
    print_ = trace.soulprint()
    for path in (print_.save(tmp_path / f"soulprint{suffix}"), tmp_path):
        again = noesis.Soulprint.load(path)
        np.testing.assert_array_equal(again.vector, print_.vector)
        assert (again.layers, again.steps, again.meta) == (print_.layers, print_.steps, print_.meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"soulprint{suffix}", f"trace{suffix}"]  # no leftovers


def test_access(trace):
    assert trace["std"].shape == (3, 3)
    assert trace.layer("2").shape == (3, 9)
    assert trace.steps.tolist() == [2, 3, 4]
    step = trace.soulprint(step=3)
    np.testing.assert_array_equal(step.means, trace["mean"][1])
    assert json.loads(trace.to_json())["layers"] == ["0", "1", "2"]
    assert json.loads(trace.soulprint().to_json())["vector_layout"] == "concat(means[0:L], stds[0:L])"
    np.testing.assert_allclose(trace["rms"], np.sqrt(trace["mean"] ** 2 + trace["std"] ** 2 * (1 - 1 / trace["count"])))
    assert (trace["zeros"][:, 1] > 0).all()


def test_text(trace):
    lines = repr(trace).splitlines()
    head, _, rest = lines[0].partition(" per step ")
    assert head.startswith("Trace of 3 steps x 3 layers x 9 stats, ")
    assert rest == "(2 earlier steps are in the totals only), 2 samples"
    assert lines[1].split() == ["layer", "mean", "std", "abs_mean", "min", "max", "nonfinite", "zeros", "rms"]
    assert repr(trace.soulprint()).startswith(
        "Soulprint of 3 layers over 5 steps (model=Sequential, prompt=a $moth$ <b>"
    )


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t: t["median"], "'median' is not in the trace. Expected one of count, mean"),
        (lambda t: t.layer("9"), "layer '9' is not in the trace"),
        (lambda t: t.soulprint(step=0), "step=0 is not in the trace. Expected one of steps 2 to 4"),
        (lambda t: t.save("x.txt"), r"suffix '.txt'. Expected .safetensors, .json or .json.gz"),
    ],
)
def test_wrong_questions(trace, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(trace)


def test_a_stat_that_was_not_asked_for_says_how():
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2)))
    wrapped(torch.ones(1, 2))
    with pytest.raises(noesis.NoesisError, match=r"Pass wrap\(..., stats=\['rms'\]\) before the run"):
        wrapped.trace()["rms"]


# ---------------------------------------------------------------- files that are not what they should be


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(data: bytes, **changes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = header_of(data)
    inner = json.loads(header["__metadata__"]["noesis"]) | changes
    header["__metadata__"]["noesis"] = json.dumps(inner)
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :]


BROKEN = {
    "empty": (lambda data: b"", "not a readable safetensors file"),
    "truncated": (lambda data: data[: len(data) // 2], "not a readable safetensors file"),
    "cut header": (lambda data: data[:40], "not a readable safetensors file"),
    "huge header": (lambda data: struct.pack("<Q", 2**60) + data[8:], "not a readable safetensors file"),
    "newer": (
        lambda data: with_header(data, format_version=99),
        "has format_version 99. Expected version 1. Upgrade noesis",
    ),
    "other format": (lambda data: with_header(data, format="noesis.else"), "its format is 'noesis.else'"),
    "missing layers": (lambda data: with_header(data, layers=["0"]), "is not a valid"),
    "no header": (lambda data: with_header(data, layers=None), "is not a valid"),
}


@pytest.mark.parametrize("kind", ["trace", "soulprint"])
@pytest.mark.parametrize("breakage", BROKEN)
def test_broken_files(trace, tmp_path, kind, breakage):
    result = trace if kind == "trace" else trace.soulprint()
    change, message = BROKEN[breakage]
    path = tmp_path / "file.safetensors"
    path.write_bytes(change(result.save(path).read_bytes()))
    with pytest.raises(noesis.NoesisError, match=message) as caught:
        type(result).load(path)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", [None, 1, 2]),
        ("steps", [0.5, 1, 2]),
        ("order", [[1e300] * 3] * 3),
        ("calls", [[-4] * 3] * 3),
        ("values", "x"),
        ("layers", ["0", "0", "1"]),
        ("stats", ["mean"]),
        ("samples", 99),
        ("branches", []),
    ],
)
def test_fields_that_are_not_what_they_should_be(trace, tmp_path, field, value):
    payload = json.loads(trace.to_json())
    (payload["arrays"] if field in payload["arrays"] else payload)[field] = value
    (tmp_path / "trace.json").write_text(json.dumps(payload))
    with pytest.raises(noesis.NoesisError, match="is not a valid trace|where arrays belong"):
        noesis.Trace.load(tmp_path / "trace.json")


@pytest.mark.parametrize(
    ("field", "value"), [("layers", "012"), ("steps", "3"), ("means", [1]), ("format_version", True)]
)
def test_soulprints_that_are_not(trace, tmp_path, field, value):
    payload = json.loads(trace.soulprint().to_json()) | {field: value}
    (tmp_path / "s.json").write_text(json.dumps(payload))
    with pytest.raises(noesis.NoesisError, match="is not a valid soulprint|has format_version True"):
        noesis.Soulprint.load(tmp_path / "s.json")


def test_files_of_another_kind(trace, tmp_path):
    path = trace.save(tmp_path / "trace.safetensors")
    with pytest.raises(ValueError, match=r"is no noesis soulprint: its format is 'noesis.trace'"):
        noesis.Soulprint.load(path)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a JSON list. Expected a JSON object"):
        noesis.Trace.load(tmp_path / "list.json")
    (tmp_path / "x.json").write_text('{"type": "cat"}')
    with pytest.raises(ValueError, match="is no noesis soulprint: its format is None"):
        noesis.Soulprint.load(tmp_path / "x.json")
    for nothing in ("nothing.json", "nothing.safetensors"):
        with pytest.raises(FileNotFoundError, match="is not there. Expected a file"):
            noesis.Trace.load(tmp_path / nothing)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        noesis.Trace.load(empty)


def test_a_failed_write_leaves_the_old_file(trace, tmp_path, monkeypatch):
    path = trace.save(tmp_path / "trace.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trace.soulprint().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_soulprints_have_one_mean_and_std_per_layer():
    with pytest.raises(ValueError, match=r"means \(2,\), stds \(1,\) and 2 layers"):
        noesis.Soulprint([1, 2], [1], ["a", "b"])
    with pytest.raises(ValueError, match="each layer named once"):
        noesis.Soulprint([1, 2], [1, 2], ["a", "a"])


# ---------------------------------------------------------------- v0.1


@pytest.mark.data
def test_v01_runs_load_and_compare(data):
    folder = data / "noesis_v01"
    a, b = (noesis.Soulprint.load(folder / run / "soulprint.json") for run in ("run_a", "run_b"))
    result = noesis.compare(a, b)
    assert len(result.rows) == 403
    assert result.cosine == pytest.approx(0.9999111, abs=1e-7)
    raw = json.loads((folder / "run_b" / "soulprint.json").read_text())["soulprint"]
    for index, name in enumerate(b.layers):  # every mean and std with its own layer and call
        row = result.row(name)
        assert (row.mean_b, row.std_b) == (raw[index], raw[403 + index])
    assert a.layers[1] == "down_blocks.0.resnets.0.nonlinearity#1"
    traces = [noesis.Trace.load(folder / run) for run in ("run_a", "run_b")]
    assert traces[0].layers == a.layers
    assert traces[0].values.shape == (4, 403, 7)
    np.testing.assert_allclose(traces[0].soulprint().vector, a.vector, rtol=0, atol=1e-12)
    where = noesis.compare(*traces).first_divergence
    assert (where.step, where.layer) == (0, "down_blocks.0.resnets.0.norm1")


@pytest.mark.data
def test_v01_runs_in_one_folder_are_told_apart(data, tmp_path):
    for run in ("run_a", "run_b"):
        for path in (data / "noesis_v01" / run).glob("*.gz"):
            shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match="1795207852.*1795207854"):
        noesis.Trace.load(tmp_path)
    assert noesis.Trace.load(tmp_path, run="1795207854").meta["seed"] == 43


@pytest.mark.data
@pytest.mark.parametrize("single_file", [True, False])
@pytest.mark.parametrize("compress", [True, False])
def test_v01_is_written(data, tmp_path, single_file, compress):
    trace = noesis.Trace.load(data / "noesis_v01" / "run_a")
    paths = trace.save_v01(tmp_path, single_file=single_file, compress=compress)
    assert len(paths) == (1 if single_file else 4)
    again = noesis.Trace.load(tmp_path)
    np.testing.assert_array_equal(again.values, trace.values)
    assert again.layers == trace.layers
    trace.soulprint().save_v01(tmp_path / "soulprint.json")
    np.testing.assert_array_equal(noesis.Soulprint.load(tmp_path / "soulprint.json").means, trace.soulprint().means)


def test_our_runs_are_written_as_v01(trace, tmp_path):
    trace.save_v01(tmp_path)
    again = noesis.Trace.load(tmp_path)
    np.testing.assert_array_equal(again["std"], trace["std"])
    assert again.layers == trace.layers
