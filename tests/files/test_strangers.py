"""Files from strangers: whatever is in them, a reader gives a sound object or an error of noesis, and nothing else.

More cases than by default: NOESIS_FUZZ_CASES=100000 pytest tests/files/test_strangers.py
"""

from __future__ import annotations

import copy
import csv
import gzip
import json
import math
import os
import random
import resource
import struct
import sys
import textwrap
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

import noesis
from helpers.models import small
from helpers.processes import python
from noesis.files import bounded_json, writer
from noesis.files.bounded_json import LEAST_BOUND
from noesis.kernels.routing import FIELDS
from noesis.results import ALWAYS

#: Cases over all formats.
CASES = int(os.environ.get("NOESIS_FUZZ_CASES", "6000"))
#: What is put in the place of a JSON value.
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf, 2**31, 2**53, 2**63,
    2**64, 10**400, -(10**400), "", "a", "0", "1", "../../etc/passwd", "<script>alert(1)</script>", "\ud800", "\x00",
    "a" * 300, [], {}, [[]], [None], [1, 2], {"a": 1}, {"": None}, [[[[[[]]]]]], ["0", "0"], "F16", "I64", "F8_E4M3",
    "BOOL", "C64",
]  # fmt: skip
#: What is put in the place of bytes.
PIECES = [
    b"", b"\x00", b"\xff", b"\x7f", b"\x80", b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"null", b"NaN",
    b"Infinity", b"-Infinity", b"1e999", b"9" * 400, b"[" * 2000, b'{"a":' * 2000, b"\\ud800", b"\xed\xa0\x80",
    b"\x00" * 8, b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<f", math.nan), struct.pack("<d", math.inf),
    struct.pack("<d", -1e308),
]  # fmt: skip


# ---------------------------------------------------------------- files to begin with


def model(codebook: bool = False) -> noesis.Wrapped:
    if codebook:
        return noesis.wrap(small(), layers=["0", "1"], codebook=noesis.Codebook(size=4, dim=4), logits="2")
    return noesis.wrap(small(), layers="all", stats=("zeros",), per_sample=True, capacity=3)


@pytest.fixture(scope="module")
def trace() -> noesis.Trace:
    wrapped = model()
    with wrapped.run(prompt="a moth", seed=7):
        for _ in range(4):
            wrapped(torch.randn(2, 4))
    return wrapped.trace()


@pytest.fixture(scope="module")
def calibrated() -> noesis.Wrapped:
    wrapped = model(codebook=True)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(60, 4, generator=generator), torch.randint(2, (60,), generator=generator)) for _ in range(5)
    ]
    wrapped.calibrate(batches, progress=False, by_class=True)
    return wrapped


def v01_soulprint(trace: noesis.Trace, path: Path) -> Path:
    return trace.soulprint().save_v01(path)


def v01_steps(trace: noesis.Trace, path: Path) -> Path:
    """The first of a folder's files is the one that is broken."""
    return trace.save_v01(path.parent, compress=path.name.endswith(".gz"))[0]


def v01_single(trace: noesis.Trace, path: Path) -> Path:
    return trace.save_v01(path.parent, single_file=True, compress=path.name.endswith(".gz"))[0]


def routes(_: noesis.Trace, path: Path) -> Path:
    """Two steps of a router with two experts."""
    ones = np.ones((2, 1, 2, 2), np.int64)
    sums = np.arange(2 * (2 + FIELDS)).reshape(2, 1, 2 + FIELDS)
    return noesis.Routes(
        sums=sums,
        experts=np.array([2]),
        layers=["gate"],
        steps=np.arange(2),
        whole=sums.sum(0),
        coactivation=ones[0],
        step_coactivation=ones,
    ).save(path)


def activations(_: noesis.Trace, path: Path) -> Path:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with noesis.capture(net, layers="all") as kept:
        net(torch.ones(2, 4))
    return kept.save(path)


Write = Callable[[noesis.Trace, Path], Path]
#: By name: what writes a good file, its name, and what reads it.
FORMATS: dict[str, tuple[Write, str, type]] = {
    "trace.safetensors": (lambda trace, path: trace.save(path), "t.safetensors", noesis.Trace),
    "trace.json": (lambda trace, path: trace.save(path), "t.json", noesis.Trace),
    "trace.json.gz": (lambda trace, path: trace.save(path), "t.json.gz", noesis.Trace),
    "soulprint.safetensors": (lambda trace, path: trace.soulprint().save(path), "s.safetensors", noesis.Soulprint),
    "soulprint.json": (lambda trace, path: trace.soulprint().save(path), "s.json", noesis.Soulprint),
    "soulprint.json.gz": (lambda trace, path: trace.soulprint().save(path), "s.json.gz", noesis.Soulprint),
    "routes.safetensors": (routes, "r.safetensors", noesis.Routes),
    "routes.json": (routes, "r.json", noesis.Routes),
    "activations": (activations, "a.safetensors", noesis.Activations),
    "v0.1 soulprint": (v01_soulprint, "soulprint.json", noesis.Soulprint),
    "v0.1 steps": (v01_steps, "x.json.gz", noesis.Trace),
    "v0.1 single file": (v01_single, "x.json", noesis.Trace),
}
EACH = CASES // (len(FORMATS) + 2)


# ---------------------------------------------------------------- making them strange


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*at, key), *places(item, (*at, key)))]


def with_odd_values(value: Any, chance: random.Random) -> Any:
    """A JSON value with some of its values exchanged, left out or put twice."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 3)):
        found = places(value)
        if not found:
            break
        # Those near the top are few, and matter more than any of the numbers.
        *path, last = min(chance.sample(found, min(len(found), chance.randint(1, 4))), key=len)
        holder = value
        for key in path:
            holder = holder[key]
        how = chance.random()
        if how < 0.15:
            del holder[last]
        elif how < 0.25 and isinstance(holder, list):
            holder.append(holder[last])
        elif how < 0.35 and isinstance(holder, dict):
            holder[str(chance.choice(ODD))] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(chance.choice(ODD))
    return value


def with_odd_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes cut, exchanged, put in, left out or put twice."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        # Half of all changes are near the beginning, where the structure is.
        at = chance.randrange(max(1, min(len(changed), 64 if chance.random() < 0.5 else len(changed))))
        length = chance.choice([0, 1, 1, 2, 8, 64])
        how = chance.random()
        if how < 0.08:
            del changed[at:]
        elif how < 0.4:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif how < 0.7:
            changed[at : at + length] = chance.choice(PIECES)
        elif how < 0.85:
            changed[at : at + length] = changed[at : at + length] * 2
        else:
            del changed[at : at + length]
    return bytes(changed)


def with_odd_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose own header, or noesis' inside it, is strange and well formed."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.7:
        inner = json.loads(header["__metadata__"]["noesis"])
        header["__metadata__"]["noesis"] = json.dumps(with_odd_values(inner, chance))
    else:
        header = with_odd_values(header, chance)
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :]


def strange(data: bytes, chance: random.Random) -> bytes:
    """A strange version of a good file of any format."""
    if data[:2] == b"\x1f\x8b":
        inside = chance.random() < 0.7
        return gzip.compress(strange(gzip.decompress(data), chance), 1) if inside else with_odd_bytes(data, chance)
    if chance.random() < 0.5:
        return with_odd_bytes(data, chance)
    if data[:1] == b"{":
        return json.dumps(with_odd_values(json.loads(data), chance)).encode()
    return with_odd_header(data, chance)


# ---------------------------------------------------------------- reading them


def assert_sound(result: Any) -> None:
    """It fits together, and can be shown, written and asked."""
    if isinstance(result, noesis.Activations):
        assert isinstance(repr(result), str)
        return
    layers = len(result.layers)
    assert all(isinstance(name, str) for name in result.layers)
    assert len(set(result.layers)) == layers
    assert isinstance(result.meta, dict)
    assert isinstance(repr(result), str)
    json.loads(result.to_json())
    if isinstance(result, noesis.Soulprint):
        assert result.vector.shape == (2 * layers,)
    if not isinstance(result, noesis.Trace):
        return
    steps = len(result.steps)
    assert result.values.shape == (steps, layers, len(result.stats))
    assert result.calls.shape == result.order.shape == (steps, layers)
    assert len(result.branches) == steps == len(result.timesteps) == len(result.batches)
    assert isinstance(result.soulprint(), noesis.Soulprint)
    for sample in result.samples:
        assert_sound(sample)


@pytest.mark.parametrize("name", FORMATS)
def test_strange_files_are_read_or_refused(trace: noesis.Trace, tmp_path: Path, name: str) -> None:
    write, file, reader = FORMATS[name]
    path = write(trace, tmp_path / file)
    good, there = path.read_bytes(), sorted(tmp_path.iterdir())
    assert_sound(reader.load(path))
    chance, refused = random.Random(name), 0
    for case in range(EACH):
        data = strange(good, chance)
        path.write_bytes(data)
        try:
            assert_sound(reader.load(path))
        except noesis.NoesisError as error:
            refused += 1
            assert str(tmp_path) in str(error), error  # noqa: PT017
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__} for {data[:2000]!r}") from error
    assert refused > EACH // 4  # most of the changes matter
    assert sorted(tmp_path.iterdir()) == there


def test_strange_calibrations_are_read_or_refused(calibrated: noesis.Wrapped, tmp_path: Path) -> None:
    path = calibrated.save_calibration(tmp_path / "c.safetensors")
    good = path.read_bytes()
    other = model(codebook=True)
    other(torch.randn(5, 4))
    want = None
    chance, refused = random.Random(0), 0
    for case in range(EACH):
        data = strange(good, chance)
        path.write_bytes(data)
        before = other.calibration
        try:
            other.load_calibration(path)
        except noesis.NoesisError:
            refused += 1
            assert other.calibration is before  # nothing half taken
            continue
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__} for {data[:2000]!r}") from error
        want = other.surprise()
        assert not np.isnan(want.score).any()
        assert ((want.p_value > 0) & (want.p_value <= 1)).all()
        repr(want)
    assert EACH // 4 < refused < EACH


def test_strange_states_of_runs_are_read_or_refused(calibrated: noesis.Wrapped, tmp_path: Path) -> None:
    path = noesis.RunState(calibrated).save(tmp_path / "run.json")
    good = json.loads(path.read_text())
    other = model(codebook=True)
    other(torch.randn(5, 4))
    chance, refused = random.Random(0), 0
    for case in range(EACH):
        data = strange(json.dumps(good).encode(), chance)
        if chance.random() < 0.7:  # inside what is text in there
            part = chance.choice(["run", "codes"])
            inner = json.dumps(with_odd_values(json.loads(good[part]), chance))
            data = json.dumps({**good, part: inner}).encode()
        path.write_bytes(data)
        before = other.calibration, other._recorder.earlier
        try:
            noesis.RunState(other).load(path)
        except noesis.NoesisError:
            refused += 1
            assert (other.calibration, other._recorder.earlier) == before  # nothing half taken
            continue
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__} for {data[:2000]!r}") from error
        other(torch.randn(5, 4))
        assert_sound(other.trace())
        if other.calibration is not None:
            assert not np.isnan(other.surprise().score).any()
    assert EACH // 4 < refused < EACH


def changed(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
    """A calibration file with its header and arrays changed in place."""
    arrays = safetensors.numpy.load(data)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["noesis"])
    change(header, arrays)
    return safetensors.numpy.save(arrays, {"noesis": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header, arrays: header.update(settings=5), "or no settings"),
        (lambda header, arrays: header.update(layers=[]), "names"),
        (lambda header, arrays: header.update(counted=["a", "a"]), "a name twice"),
        (lambda header, arrays: header.update(samples=[math.inf, 1, 50]), "OverflowError"),
        (lambda header, arrays: header.update(samples=[200, 50, -1]), "50 scores of -1 samples"),
        (lambda header, arrays: header.update(classes=[math.inf]), "OverflowError"),
        (lambda header, arrays: arrays["0.norm"].fill(math.nan), "norm of 0 holds no numbers"),
        (lambda header, arrays: arrays["0.codes"].fill(math.inf), "codes of 0 holds no numbers"),
        (lambda header, arrays: arrays["1.residual"].fill(-1), "residual or norm of 1 holds no numbers"),
        (lambda header, arrays: arrays.update({"0.codes": np.zeros((4, 5), np.float32)}), "codes of 0 has shape"),
        (lambda header, arrays: arrays.update({"0.codes": np.zeros((4, 4))}), "codes of 0 has dtype float64"),
        (lambda header, arrays: arrays["1.ranks.tail"].fill(math.inf), "a tail of inf"),
        (
            lambda header, arrays: arrays.update(scores=arrays["scores"].astype(np.complex64)),
            "scores is of dtype complex64",
        ),
    ],
)
def test_calibrations_that_would_give_no_scores_are_refused(
    calibrated: noesis.Wrapped, tmp_path: Path, change: Any, said: str
) -> None:
    path = calibrated.save_calibration(tmp_path / "c.safetensors")
    path.write_bytes(changed(path.read_bytes(), change))
    with pytest.raises(noesis.NoesisError, match=said) as caught:
        model(codebook=True).load_calibration(path)
    assert str(path) in str(caught.value)


def test_numbers_of_v01_that_have_no_variance_in_float64(trace: noesis.Trace, tmp_path: Path) -> None:
    """They are said to be infinite or NaN, without a warning, and NaN is not averaged away."""
    path = v01_single(trace, tmp_path / "x.json")
    value = json.loads(path.read_text())
    value["records"][0]["mean"], value["records"][1]["mean"] = 1e308, math.nan
    path.write_text(json.dumps(value))
    again = noesis.Trace.load(path)
    assert again.totals[0, again.stats.index("std")] == math.inf
    assert math.isnan(again.totals[1, again.stats.index("mean")])
    assert np.isfinite(again.totals[2]).all()


def test_a_small_gzip_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noesis.files.bounded_json.LARGEST_JSON", 1 << 16)
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(b'{"a": "' + b"a" * (1 << 24) + b'"}'))
    for reader in (noesis.Trace, noesis.Soulprint):
        with pytest.raises(noesis.NoesisError, match="unpacks to more than 65536 bytes"):
            reader.load(path)


# ---------------------------------------------------------------- memory

#: Loads each file in a process of its own, and prints how much memory that took, and what came of it.
MEASURED = """
    import os, sys
    import numpy as np
    import noesis
    import noesis.files.bounded_json
    from noesis.wrapping.capturing import Activations

    def kilobytes(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name))

    readers = [noesis.Trace, noesis.Soulprint, noesis.Routes, noesis.Comparison, noesis.TokenDeltas, Activations]
    readers = {reader.__name__: reader for reader in readers}
    noesis.files.bounded_json.LEAST_BOUND = int(sys.argv[1])
    for each in sys.argv[2:]:
        kind, path = each.split("=", 1)
        child = os.fork()
        if child == 0:
            with open("/proc/self/clear_refs", "w") as marks:
                marks.write("5")
            before = kilobytes("VmRSS")
            try:
                said = f"read {type(readers[kind].load(path)).__name__}"
            except noesis.NoesisError as error:
                said = f"refused {type(error).__name__}"
            print((kilobytes("VmHWM") - before) * 1024, said, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""
#: What reading may take beside the file: arenas, pages of libraries that were not read before.
BESIDE = 24 << 20


def memory_of(*given: tuple[type, Path], least: int = LEAST_BOUND) -> list[tuple[int, str]]:
    """Bytes that reading each file takes at most, and "read ..." or "refused ..."; JSON may always take `least`."""
    names = [f"{reader.__name__}={path}" for reader, path in given]
    done = python("-c", textwrap.dedent(MEASURED), str(least), *names, timeout=None)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == len(given), done.stderr
    return [(int(peak), said) for peak, said in lines]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def large_trace(steps: int, layers: int = 200) -> noesis.Trace:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((steps, layers, 7), np.float32).astype(np.float64)
    values[..., 0], values[..., 6] = 4096, 0
    names = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    return noesis.Trace.of(values, names, ALWAYS, steps=np.arange(steps), meta={"run": "large"})


@on_linux
@pytest.mark.slow
def test_reading_takes_at_most_four_times_the_file(tmp_path: Path) -> None:
    """Of 7 to 20 MB, in every format; of a gzip, four times what it unpacks to."""
    small, large = large_trace(300), large_trace(1350)
    numbers = np.random.default_rng(0).standard_normal((2, 150_000))
    soulprint = noesis.Soulprint(*numbers, [f"model.layers.{layer}" for layer in range(150_000)], meta={"run": "large"})
    experts = np.arange(700 * 100 * (16 + FIELDS)).reshape(700, 100, -1)
    ones = np.ones((4, 100, 16, 16), np.int64)
    moe = noesis.Routes(
        sums=experts,
        experts=np.full(100, 16),
        layers=[str(layer) for layer in range(100)],
        steps=np.arange(700),
        whole=experts.sum(0),
        coactivation=ones.sum(0),
        step_coactivation=ones,
    )
    one, other = (noesis.Soulprint(*numbers[::way, :20_000], soulprint.layers[:20_000]) for way in (1, -1))
    words = [f"word{number % 5000}" for number in range(10_000)]
    deltas = noesis.TokenDeltas(
        np.abs(np.random.default_rng(0).standard_normal((10_000, 30))) % 1,
        [str(layer) for layer in range(30)],
        words,
        words,
        list(range(10_000)),
        list(range(10_000)),
        0.1,
    )
    plain, gzipped = small.save(tmp_path / "t.json"), tmp_path / "t.json.gz"
    gzipped.write_bytes(gzip.compress(plain.read_bytes(), 1))
    files = [
        (noesis.Trace, large.save(tmp_path / "t.safetensors")),
        (noesis.Trace, plain),
        (noesis.Trace, gzipped),
        (noesis.Trace, large_trace(170).save_v01(tmp_path, single_file=True, compress=False)[0]),
        (noesis.Soulprint, soulprint.save(tmp_path / "s.safetensors")),
        (noesis.Soulprint, soulprint.save(tmp_path / "s.json")),
        (noesis.Comparison, noesis.compare(one, other).save(tmp_path / "c.json")),
        (noesis.TokenDeltas, deltas.save(tmp_path / "d.json")),
        (noesis.Routes, moe.save(tmp_path / "r.safetensors")),
        (noesis.Activations, noesis.Activations({"a": [torch.ones(4_300_000)]}).save(tmp_path / "a.safetensors")),
    ]
    for (_, path), (peak, said) in zip(files, memory_of(*files, least=0), strict=True):
        size = path.stat().st_size
        if path.suffix == ".gz":
            size = plain.stat().st_size
        assert said.startswith("read"), (path.name, said)
        assert peak < 4 * size + BESIDE // 2, (path.name, peak / size)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_large_files_of_our_own_are_read(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts that are escaped, once in JSON and twice in safetensors, and arrays of short numbers in short rows."""
    monkeypatch.setattr(bounded_json, "LEAST_BOUND", LEAST_BOUND // 8)  # so that files of some MB are large
    for text in ("\u4e2d" * 190_000, "\u00e9" * 250_000, "\n" * 1_000_000, "x" * 5_000_000, 'a"\\' * 375_000):
        print_ = noesis.Soulprint(np.ones(1), np.ones(1), ["0"], meta={"log": text})
        assert noesis.Soulprint.load(print_.save(tmp_path / f"s.{suffix}")).meta["log"] == text
    for steps, layers in ((12_500, 1), (7500, 3), (2500, 40)):
        values = np.zeros((steps, layers, 7))
        values[..., 0] = 2
        trace = noesis.Trace.of(values, [str(layer) for layer in range(layers)], ALWAYS, steps=np.arange(steps))
        again = noesis.Trace.load(trace.save(tmp_path / f"t.{suffix}"))
        np.testing.assert_array_equal(again.values, trace.values)
    counts = np.random.default_rng(0).integers(0, 2, size=(1024, 32, 8 + FIELDS))
    routes = noesis.Routes(
        sums=counts,
        experts=np.full(32, 8),
        layers=[str(layer) for layer in range(32)],
        steps=np.arange(1024),
        whole=counts.sum(0),
        coactivation=np.zeros((32, 8, 8), np.int64),
        step_coactivation=np.zeros((2, 32, 8, 8), np.int64),
    )
    np.testing.assert_array_equal(noesis.Routes.load(routes.save(tmp_path / f"r.{suffix}")).sums, counts)


def test_small_files_may_take_more(tmp_path: Path) -> None:
    """A soulprint of v0.1 has a dict of its layers, which takes five times its text; real ones have some hundreds."""
    names = [f"model.layers.{layer}" for layer in range(20_000)]
    soulprint = noesis.Soulprint(np.arange(20_000) / 3, np.ones(20_000), names)
    assert len(noesis.Soulprint.load(soulprint.save_v01(tmp_path / "s.json")).layers) == 20_000


def repeated(head: str, unit: str, tail: str, size: int) -> bytes:
    return (head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail).encode()


HEAD = '{"format": "noesis.trace", "format_version": 1, "arrays": {"values": '
#: What makes many objects of few bytes, and what takes long or is large at once.
BOMBS: dict[str, tuple[str, str, str]] = {
    "empty lists": (f"{HEAD}[", "[],", "[]]}}"),
    "empty objects": (f"{HEAD}[", "{},", "{}]}}"),
    "empty strings": (f"{HEAD}[", '"",', '""]}}'),
    "short strings": (f"{HEAD}[", '"a",', '"a"]}}'),
    "small numbers": (f"{HEAD}[", "1,", "1]}}"),
    "short numbers": (f"{HEAD}[", "1.5,", "1]}}"),
    "longer numbers": (f"{HEAD}[", "1.25e-7,", "1]}}"),
    "lists of numbers": (f"{HEAD}[", "[1.5,2.5],", "[]]}}"),
    "pairs": (f"{HEAD}[", '{"a":1},', "{}]}}"),
    "deep lists": (HEAD, "[", ""),
    "deep objects": (HEAD, '{"a":', ""),
    "a huge whole number": (HEAD, "9", "}}"),
    "a huge number": (HEAD, "9", ".5}}"),
    "a long string": (f'{HEAD}"', "a", '"}}'),
    "escapes": (f'{HEAD}"', "\\u0000", '"}}'),
    "one wide character": (f'{HEAD}"\U0001f980', "a", '"}}'),
    "wide characters": (f'{HEAD}"', "\U0001f980", '"}}'),
    "spaces": (HEAD, " ", "1}}"),
}


def bombs(folder: Path, size: int) -> list[Path]:
    """Files of this size, one of each kind."""
    paths = [folder / f"{name}.json" for name in BOMBS]
    for path, parts in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(repeated(*parts, size))
    return paths


@on_linux
@pytest.mark.slow
def test_json_bombs_take_no_more_memory_than_large_files(tmp_path: Path) -> None:
    """At most four times the file, where it would be up to thirty times."""
    size = 1 << 24
    paths = bombs(tmp_path, size)
    keys = tmp_path / "keys.json"
    keys.write_text(HEAD + "{" + ",".join(f'"{number:x}":0' for number in range(1_400_000)) + "}}}")
    paths.append(keys)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = memory_of(*((noesis.Trace, path) for path in paths), least=0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own seconds, not those of a busy machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 40
    for path, (peak, said) in zip(paths, found, strict=True):
        assert said == "refused BadFile", (path.name, said)
        assert peak < 4 * size + BESIDE, (path.name, peak / size)


@on_linux
@pytest.mark.slow
def test_small_json_bombs_take_little(tmp_path: Path) -> None:
    paths = bombs(tmp_path, 1 << 20)
    for path, (peak, said) in zip(paths, memory_of(*((noesis.Trace, path) for path in paths)), strict=True):
        assert said == "refused BadFile", (path.name, said)
        assert peak < LEAST_BOUND + BESIDE // 2, (path.name, peak)


@on_linux
@pytest.mark.slow
def test_gzip_and_safetensors_bombs_take_little_memory(tmp_path: Path) -> None:
    packer, megabyte = zlib.compressobj(9, wbits=31), b"[]," * (1 << 18) + b" " * (1 << 18)
    pieces = [packer.compress(megabyte) for _ in range(1 << 8)]
    bomb = tmp_path / "bomb.json.gz"
    bomb.write_bytes(b"".join([*pieces, packer.flush()]))
    assert bomb.stat().st_size < 1 << 20
    # Bytes that would be float64 eight times as large, and a header of very many empty tensors.
    count = 28_000_000
    layers, kinds = [str(layer) for layer in range(100)], list(ALWAYS)
    inner = json.dumps({"format": "noesis.trace", "format_version": 1, "layers": layers, "stats": kinds})
    header = {
        "__metadata__": {"noesis": inner},
        "values": {"dtype": "U8", "shape": [count // 700, 100, 7], "data_offsets": [0, count // 700 * 700]},
    }
    packed = json.dumps(header).encode()
    narrow, empty = tmp_path / "narrow.safetensors", tmp_path / "empty.safetensors"
    narrow.write_bytes(struct.pack("<Q", len(packed)) + packed + bytes(count // 700 * 700))
    tensors = ",".join(f'"{number:x}":{{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}' for number in range(400_000))
    packed = ("{" + tensors + "}").encode()
    empty.write_bytes(struct.pack("<Q", len(packed)) + packed)
    files: list[tuple[type, Path]] = [(noesis.Trace, path) for path in (bomb, narrow, empty)]
    files += [(noesis.Soulprint, bomb), (noesis.Activations, empty), (noesis.Comparison, bomb), (noesis.Routes, bomb)]
    for (_, path), (peak, said) in zip(files, memory_of(*files), strict=True):
        assert said == "refused BadFile", (path.name, said)
        least = 1 << 26 if path is bomb else path.stat().st_size
        assert peak < 4 * least + BESIDE, (path.name, peak)


def test_many_steps_of_a_layer_each_do_not_fill_the_memory(tmp_path: Path) -> None:
    """A v0.1 trace of 1 MB whose table of steps by layers would have 16 million rows."""
    path = tmp_path / "x.json"
    record = {"shape": [1], "dtype": "", "device": "", "mean": 0, "std": 0, "abs_mean": 0, "max": 0, "min": 0}
    records = [{"name": str(step), **record, "step": step} for step in range(4000)]
    path.write_text(json.dumps({"type": "sdxl_unet", "run_id": "a", "meta": {}, "records": records}))
    tracemalloc.start()
    with pytest.raises(noesis.NoesisError, match="4000 layers over 4000 steps, and 4000 records"):
        noesis.Trace.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


# ---------------------------------------------------------------- names and meta are data

NAMES = [
    "../../escaped", "/etc/passwd", "..", "C:\\x", "<script>alert(1)</script>", "--><b>", "]]>", "&lt;",
    "$(touch escaped)", "`touch escaped`", "; touch escaped", "a\x00b",
    "two\nlines", "\r\x1b[2J\x1b]0;title\x07", "\u202egnp",
    "$x_1^2$", "%s{}", "", "=cmd()", "a" * 5000, "\ud800",
]  # fmt: skip
#: What a terminal would obey, beside the ends of lines.
CONTROL = {chr(code) for code in (*range(32), *range(127, 160), 0x2028, 0x2029, 0x202E)} - {"\n"}


def hostile() -> noesis.Trace:
    values = np.random.default_rng(0).standard_normal((3, len(NAMES), 7))
    values[..., 0], values[..., 6] = 8, 0
    values[1, 3, 6] = 1
    meta = {"run": "../../escaped", "prompt": "<script>\x1b[2J\n$(touch escaped)", "model": "\x1b[31m", "seed": "\x07"}
    return noesis.Trace.of(
        values,
        NAMES,
        ALWAYS,
        steps=np.arange(3),
        unmeasured={"\x1b[2J": "\x1b[31m"},
        meta={**meta, **dict.fromkeys(NAMES, 1)},
    )


def other() -> noesis.Soulprint:
    """With one layer of these, and another."""
    return noesis.Soulprint(np.ones(2), np.ones(2), [NAMES[0], "\x1b[2J"])


def test_names_and_meta_come_back_and_go_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    trace = hostile()
    for suffix in ("safetensors", "json", "json.gz"):
        for one in (trace, trace.soulprint()):
            again = type(one).load(one.save(f"{type(one).__name__}.{suffix}"))
            assert again.layers == NAMES
            assert again.meta == one.meta
    with pytest.raises(noesis.NoesisError, match="cannot be part of a file name"):
        trace.save_v01("v01")
    again = noesis.Soulprint.load(trace.soulprint().save_v01("v01.json"))
    assert again.layers == NAMES
    assert again.meta["run"] == "../../escaped"
    compared = noesis.compare(trace.soulprint(), other())
    assert noesis.Comparison.load(compared.save("c.json")).only_in_a == NAMES[1:]
    kept = noesis.Activations({name: [torch.ones(1)] for name in NAMES[:-1]})
    assert noesis.Activations.load(kept.save("a.safetensors")).layers == NAMES[:-1]
    here = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent for path in here} == {inside}
    assert len(here) == 9


def test_what_is_shown_obeys_no_name() -> None:
    """No line more than there are rows, and nothing that a terminal would do."""
    trace, routes_ = hostile(), noesis.Activations({name: [torch.ones(1)] for name in NAMES})
    routes_.unmeasured["\x1b[2J"] = "\x1b[31m"
    for shown in (
        repr(trace),
        repr(trace.soulprint()),
        repr(noesis.compare(trace.soulprint(), other())),
        noesis.compare(trace, trace.at([False, True, True])).summary(100),
        repr(routes_),
    ):
        assert not CONTROL & set(shown)
        assert len(shown) < 40_000
        assert shown.count("\n") < 40


@pytest.mark.parametrize("command", ["summarize", "compare"])
def test_the_command_line_prints_no_control_characters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    from noesis.cli.command_line import main

    path = hostile().save(tmp_path / "t.safetensors")
    second = other().save(tmp_path / "o.json")
    arguments = [command, str(path), *([str(second)] if command == "compare" else [])]
    broken = tmp_path / "b.json"
    broken.write_text(json.dumps({"type": "sdxl_unet", "run_id": "\x1b[2J", "meta": {}, "records": [], "steps": 1}))
    for given in (
        arguments,
        [*arguments, "--json"],
        ["summarize", str(broken)],
        ["summarize", "\x1b[2J.json"],
    ):
        main(given)
        out, err = capfd.readouterr()
        assert out + err
        assert (given[1] != "\x1b[2J.json") or "\\x1b[2J.json is not there" in err
        assert not CONTROL & set(out + err), given


def test_plots_and_logs_hold_names_as_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = hostile()
    trace.plot(path=tmp_path / "t.svg")
    trace.soulprint().plot(path=tmp_path / "s.svg")
    noesis.compare(trace, hostile()).plot(10, tmp_path / "c.svg")
    for path in sorted(tmp_path.glob("*.svg")):
        tree = ElementTree.parse(path)
        assert not [
            node for node in tree.iter() if str(node.tag).rpartition("}")[2] in ("script", "b", "foreignObject")
        ]
    # Half of a surrogate pair is no UTF-8, and csv reads NUL from Python 3.11 on.
    numbers = {f"noesis/{name}/std": 0.5 for name in NAMES[:-1] if "\0" not in name}
    for name in ("l.csv", "l.jsonl"):
        for step in range(2):
            writer(tmp_path / name)(numbers, step)
    with (tmp_path / "l.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", *numbers]
    assert [len(row) for row in rows] == [1 + len(numbers)] * 3
    lines = (tmp_path / "l.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, **numbers} for step in range(2)]


# ---------------------------------------------------------------- interrupted writing

KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import numpy as np
    import noesis

    folder, chance = Path(sys.argv[1]), random.Random(0)
    layers = [str(index) for index in range(50_000)]
    both = [noesis.Soulprint(np.full(len(layers), float(value)), np.ones(len(layers)), layers) for value in (1, 2)]
    path = both[0].save(folder / "soulprint.safetensors")
    seen, left = set(), []
    for number in range(100):
        if number >= 12 and left:
            break
        child = os.fork()
        if child == 0:
            while True:
                for each in both:
                    each.save(path)
        time.sleep(0.05 + 0.1 * chance.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        again = noesis.Soulprint.load(folder)
        assert again.layers == layers
        assert len(set(again.means.tolist())) == 1
        seen.add(again.means[0])
        left = [name.name for name in folder.iterdir() if name != path]
    assert all(name.startswith(".soulprint.safetensors.") for name in left), left
    print(len(left), sorted(seen))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.slow
def test_killed_while_saving_there_is_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    script = textwrap.dedent(KILLED)
    done = python("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0  # what was being written when it was killed


@pytest.mark.parametrize("meta", [True, False])
def test_more_samples_than_there_are_take_no_memory(trace: noesis.Trace, tmp_path: Path, meta: bool) -> None:
    payload = json.loads(trace.to_json())
    payload["samples"] = 2**31
    if not meta:  # as in older files
        del payload["sample_meta"]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(payload))
    tracemalloc.start()
    try:
        with pytest.raises(noesis.NoesisError, match="not a valid trace"):
            noesis.Trace.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6
