"""`soulprint_snapshot` in real sessions of pytest: what passes, what fails and how it says so, what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from helpers.models import small
from helpers.processes import python
from noesis.testing.fixture import file_name
from noesis.testing.snapshot import Snapshot

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "noesis.testing.pytest_plugin", "-p", "no:cacheprovider")

MODEL = """
import json, os, pathlib
import pytest, torch, noesis

def run(scale=1.0, layers="all", steps=1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    model[2].weight.data.mul_(scale)
    wrapped = noesis.wrap(model, layers=layers)
    for step in range(steps):
        wrapped(torch.linspace(-1, 1 + step, 20).reshape(5, 4))
    return wrapped
"""


class Project:
    """A folder of tests, in which pytest runs."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester

    def write(self, body: str, name: str = "test_it") -> None:
        self.pytester.makepyfile(**{name: MODEL + body})

    def run(self, *arguments: str) -> tuple[dict[str, int], str]:
        """The outcomes, and what was printed."""
        done = self.pytester.runpytest_inprocess(*PLUGIN, *arguments)
        return done.parseoutcomes(), done.stdout.str()

    def file(self, name: str, of: str = "test_it") -> Path:
        return self.pytester.path / "__snapshots__" / of / f"{name}.json"


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What registers operations is imported before pytester forgets what its sessions imported."""
    for dtype in (torch.float32, torch.float64):
        traced(small().to(dtype))


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # else it would come twice where noesis is installed
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return Project(pytester)


ONE = "def test_one(soulprint_snapshot):\n    soulprint_snapshot(run({}))\n"


def test_missing_fails_update_writes_and_then_it_passes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write(ONE.format(""))
    for ci in ("", "true"):
        monkeypatch.setenv("CI", ci)
        outcomes, text = project.run()
        assert outcomes == {"failed": 1}
        assert "test_one: there is no snapshot __snapshots__/test_it/test_one.json" in text
        assert "differs" not in text
        assert "pytest test_it.py::test_one --soulprint-update" in text
        assert not project.file("test_one").parent.exists()
    outcomes, text = project.run("--soulprint-update")
    assert outcomes == {"passed": 1}
    assert "1 written, 0 unchanged, 0 obsolete" in text
    assert "written: __snapshots__/test_it/test_one.json" in text
    before = project.file("test_one").read_bytes()
    outcomes, text = project.run()
    assert outcomes == {"passed": 1}
    assert "soulprint snapshots" not in text
    assert "0 written, 1 unchanged, 0 obsolete" in project.run("--soulprint-update")[1]
    assert project.file("test_one").read_bytes() == before


def test_a_failure_names_step_layer_statistic_and_how_large(project: Project) -> None:
    project.write(ONE.format("steps=2"))
    project.run("--soulprint-update")
    before = project.file("test_one").read_bytes()
    project.write(ONE.format("1.001, steps=2"))
    outcomes, text = project.run()
    assert outcomes == {"failed": 1}
    assert "first: step 0, layer 2, mean: expected " in text
    assert "apart, " in text
    assert " times the " in text
    assert "numbers in 1 of 3 common layers differ" in text
    assert "SoulprintSnapshot.__call__" not in text
    assert "fixture.py" not in text, "the trace ends in the test"
    assert project.file("test_one").read_bytes() == before
    _, text = project.run("--soulprint-update")
    assert "1 written, 0 unchanged" in text
    assert project.run()[0] == {"passed": 1}


def test_layers_and_steps_of_one_side_are_named(project: Project) -> None:
    project.write(ONE.format("layers=['0', '1'], steps=3"))
    project.run("--soulprint-update")
    project.write(ONE.format("layers=['1', '2'], steps=2"))
    _, text = project.run()
    assert "layers only in the snapshot: 0" in text
    assert "layers only in this run: 2" in text
    assert "steps: expected 3, got 2 (only expected: 2; only got: none)" in text


SEVERAL = """
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_params(scale, soulprint_snapshot):
    soulprint_snapshot(run(scale))

@pytest.mark.parametrize("name", ["a/b", "a?b", "x" * 300, "ä"])
def test_ids(name, soulprint_snapshot):
    soulprint_snapshot(run())

class TestGroup:
    def test_two(self, soulprint_snapshot):
        soulprint_snapshot(run(), name="first")
        soulprint_snapshot(run(2.0).soulprint(), name="second", tolerance=1e-3)
        soulprint_snapshot(run(2.0))

def test_shares(soulprint_snapshot):
    soulprint_snapshot(run().trace(), "first")
"""


def test_names(project: Project) -> None:
    project.write(SEVERAL)
    outcomes, text = project.run("--soulprint-update")
    assert outcomes == {"passed": 8}, text
    assert "9 written, 0 unchanged, 0 obsolete" in text
    there = {path.stem for path in project.file("x").parent.iterdir()}
    assert {"test_params-1.0", "test_params-2.0", "TestGroup.test_two", "first", "second"} < there
    assert len(there) == 9
    assert all(len(name) < 140 and name.isascii() for name in there)
    assert project.run()[0] == {"passed": 8}


def test_one_name_for_two_runs_that_differ_is_no_silent_overwriting(project: Project) -> None:
    project.write("def test_one(soulprint_snapshot):\n    for scale in (1.0, 2.0): soulprint_snapshot(run(scale))\n")
    outcomes, text = project.run("--soulprint-update")
    assert outcomes == {"failed": 1}
    assert "Another snapshot of that name was taken in this session" in text


def test_obsolete_ones_are_named_and_kept(project: Project) -> None:
    both = ONE.format("") + ONE.replace("test_one", "test_other").format("")
    project.write(both)
    project.run("--soulprint-update")
    project.write(ONE.format(""))
    _, text = project.run("--soulprint-update")
    assert "0 written, 1 unchanged, 1 obsolete" in text
    assert "needs it: __snapshots__/test_it/test_other.json" in text
    assert project.file("test_other").is_file()
    # Where not all tests ran and passed, nobody knows.
    project.write(both)
    for chosen in (["-k", "one"], ["test_it.py::test_one"]):
        assert "0 written, 1 unchanged, 0 obsolete" in project.run("--soulprint-update", *chosen)[1]
    project.write(ONE.format("") + "def test_other():\n    pytest.skip('not here')\n")
    assert "0 written, 1 unchanged, 0 obsolete" in project.run("--soulprint-update")[1]


def test_names_that_differ_in_case_alone_are_refused(project: Project) -> None:
    project.write(
        "@pytest.mark.parametrize('kind', ['a', 'A'])\n"
        "def test_one(kind, soulprint_snapshot):\n    soulprint_snapshot(run())\n"
    )
    outcomes, text = project.run("--soulprint-update")
    assert outcomes == {"passed": 1, "failed": 1}
    assert "in case alone" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("soulprint_snapshot(torch.nn.Linear(1, 1))", "was given a Linear.*Wrap the model"),
        ("soulprint_snapshot(noesis.wrap(torch.nn.Sequential(torch.nn.ReLU()), 'all'))", "no observed layer ran"),
        ("soulprint_snapshot(run(), name='a/b')", "name='a/b'"),
        ("soulprint_snapshot(run(), name='..')", "name='..'"),
        ("soulprint_snapshot(run(), tolerance=-1)", "tolerance=-1"),
        ("soulprint_snapshot(run(), tolerance=float('nan'))", "tolerance=nan"),
    ],
)
def test_bad_calls(project: Project, call: str, message: str) -> None:
    project.write(
        f"def test_one(soulprint_snapshot):\n    with pytest.raises(noesis.NoesisError, match={message!r}):\n"
        f"        {call}\n"
    )
    outcomes, text = project.run("--soulprint-update")
    assert outcomes == {"passed": 1}, text
    assert "0 written" in text


def test_broken_files_fail_and_are_written_again(project: Project) -> None:
    project.write(ONE.format(""))
    project.run("--soulprint-update")
    path = project.file("test_one")
    whole = path.read_text()
    for broken in (whole[:200], "[]", whole.replace('"step", ', ""), whole.replace("[0, ", "[-1, ")):
        assert broken != whole
        path.write_text(broken)
        outcomes, text = project.run()
        assert outcomes == {"failed": 1}
        assert "test_one.json" in text
    assert "1 written" in project.run("--soulprint-update")[1]
    assert path.read_text() == whole


def test_a_tighter_tolerance_needs_more_digits(project: Project) -> None:
    call = "def test_one(soulprint_snapshot):\n    soulprint_snapshot(run(), tolerance={})\n"
    project.write(call.format("1e-2"))
    project.run("--soulprint-update")
    assert project.run()[0] == {"passed": 1}
    rough = project.file("test_one").stat().st_size
    project.write(call.format("0"))
    assert "rounded for a larger tolerance" in project.run()[1]
    assert "1 written" in project.run("--soulprint-update")[1]
    assert project.run()[0] == {"passed": 1}
    assert project.file("test_one").stat().st_size > rough


@pytest.mark.slow
def test_processes_of_xdist_count_together(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist")
    for name in ("test_it", "test_more"):
        project.write(SEVERAL.partition("class")[0].replace('"x" * 300', '"y"'), name)
    arguments = ["-p", "xdist", "-n", "2", "--dist", "load"]
    command = [sys.executable, "-m", "pytest", *PLUGIN, *arguments]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))

    def run(*more: str) -> str:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=240, check=False).stdout

    text = run("--soulprint-update")
    assert "12 written, 0 unchanged, 0 obsolete" in text, text
    project.file("old").write_text("{}")
    text = run("--soulprint-update")
    assert "0 written, 12 unchanged, 1 obsolete" in text, text
    assert "12 passed" in run()


def test_the_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light(request):\n"
        "    assert request.config.getoption('soulprint_update') is False\n"
        "    assert 'noesis.testing.pytest_plugin' in sys.modules\n"
        "    heavy = {'torch', 'numpy', 'safetensors', 'noesis.results'} & set(sys.modules)\n"
        "    assert not heavy\n"
    )
    done = python("-m", "pytest", *PLUGIN, "-q", tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS="")
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- the files


def traced(model: nn.Module, steps: int = 2) -> noesis.Trace:
    wrapped = noesis.wrap(model, layers="all", stats=("zeros", "rms"))
    for step in range(steps):
        wrapped(torch.linspace(-1, 1 + step, 20, dtype=next(model.parameters()).dtype).reshape(5, 4))
    trace = wrapped.trace()
    wrapped.unwrap()
    return trace


def read(path: Path) -> Snapshot:
    return Snapshot.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tolerance", [None, 0.0, 1e-3])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, tolerance: float | None) -> None:
    trace = traced(small().to(dtype))
    for run in (trace, trace.soulprint()):
        new = Snapshot.of(run, tolerance)
        old = read(new.save(tmp_path / "a.json"))
        assert old.differences(new) == []
        assert old.to_json() == new.to_json()
        assert not old.is_coarser(tolerance)
        np.testing.assert_array_equal(old.values, new.values)
    assert new.meta == {"dtype": str(dtype).removeprefix("torch.")}


def test_a_row_is_a_line_and_has_few_digits(tmp_path: Path) -> None:
    text = Snapshot.of(traced(small(), steps=3)).to_json()
    rows = [line for line in text.splitlines() if line.startswith("  [")]
    assert len(rows) == 9
    assert max(map(len, rows)) < 130
    assert max(map(len, Snapshot.of(traced(small().bfloat16(), steps=3)).to_json().splitlines()[6:])) < 100
    assert json.loads(text)["rows"][3][:3] == [1, "0", 1]


def test_rounding_costs_little_of_the_tolerance() -> None:
    values = np.random.default_rng(0).normal(size=(4, 50, 2)) * 10.0 ** np.arange(-20, 30)[:, None]
    for row in np.abs(values):
        run = noesis.Soulprint(row[:, 0], row[:, 1], [str(n) for n in range(50)])
        off = np.abs(Snapshot.of(run, 1e-3).values[0] - row)
        assert (off <= 1e-3 / 20 * np.hypot(row[:, :1], row[:, 1:]) * (1 + 1e-9)).all()


def test_lines_stand_in_the_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(self.first(x))

    rows = json.loads(Snapshot.of(traced(Backwards())).to_json())["rows"]
    assert [row[:2] for row in rows] == [[0, "first"], [0, "last"], [1, "first"], [1, "last"]]


def test_nan_equals_nan_and_nothing_else(tmp_path: Path) -> None:
    broken = small()
    nn.init.constant_(broken[2].bias, float("nan"))
    before = Snapshot.of(traced(broken))
    assert read(before.save(tmp_path / "a.json")).differences(before) == []
    for a, b in ((before, Snapshot.of(traced(small()))), (Snapshot.of(traced(small())), before)):
        assert a.differences(b)[0].startswith("first: step 0, layer 2, count: expected ")
    a, b = (noesis.Soulprint([mean], [1.0], ["a"]) for mean in (float("nan"), 0.0))
    assert Snapshot.of(a).differences(Snapshot.of(a)) == []
    assert Snapshot.of(a).differences(Snapshot.of(b)) == ["first: layer a, mean: expected nan, got 0"]
    far = Snapshot.of(noesis.Soulprint([float("inf")], [1.0], ["a"]))
    assert read(far.save(tmp_path / "a.json")).differences(far) == []


def test_the_tolerance_is_of_the_size_of_elements() -> None:
    """Sums of large numbers that hardly vary are rounded in their size, not in their spread."""
    old, *new = (Snapshot.of(noesis.Soulprint([mean], [0.5], ["a"])) for mean in (13.8, 13.80006, 13.8003))
    assert [len(old.differences(each)) for each in new] == [0, 1]


def test_another_dtype_is_a_difference() -> None:
    a, b = Snapshot.of(traced(small())), Snapshot.of(traced(small().bfloat16()))
    assert a.differences(b)[0] == "dtype: expected float32, got bfloat16"
    assert a.differences(Snapshot.of(traced(small()).soulprint()))[0] == "kind: expected a trace, got a soulprint"


def test_another_number_of_steps_of_a_soulprint_is_a_difference() -> None:
    a, b = (noesis.Soulprint([0.0], [1.0], ["a"], steps) for steps in (2, 3))
    assert Snapshot.of(a).differences(Snapshot.of(b)) == ["steps: expected 2, got 3"]


def test_layers_that_do_not_run_in_every_step() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.when = 0

        def forward(self, x: torch.Tensor) -> Any:
            self.when += 1
            return self.b(x) if self.when % 2 else self.a(x)

    model = Sometimes()
    new = Snapshot.of(traced(model, steps=4))
    assert new.layers == ["a", "b"]
    old = Snapshot.from_json(new.to_json())
    assert old.differences(new) == []
    model.when = 1
    assert old.differences(Snapshot.of(traced(model, steps=4)))[0].startswith(
        "first: step 0, layer b, calls: expected 1, got 0; 1 apart, and has to be equal"
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numba", [True, False])
def test_threads_and_kernels_change_less_than_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, threads: int, numba: bool
) -> None:
    def recorded() -> Snapshot:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(28800, 64))
        wrapped = noesis.wrap(model, layers="all")
        wrapped(torch.randn(4, 4, 34, 34))
        return Snapshot.of(wrapped)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = recorded()
        torch.set_num_threads(threads)
        if not numba:
            monkeypatch.setattr("noesis.kernels.moments.op.by_numba", lambda name: None)
        assert expected.differences(recorded()) == []
    finally:
        torch.set_num_threads(before)


def test_names_of_tests_as_names_of_files() -> None:
    names = [
        "test_a",
        "test_a[b]",
        "test_a[b]]",
        "test_a[b c]",
        "test_a[b_c]",
        "T::test_a",
        "test_a[" + "x" * 500 + "]",
    ]
    made = [file_name(name) for name in names]
    assert made[0] == "test_a"
    assert len(set(made)) == len(names)
    assert all(len(name) < 140 for name in made)
