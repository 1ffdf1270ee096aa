"""What fails around noesis: exceptions, interrupts, full disks. Nothing is half done, and the next step is right."""

from __future__ import annotations

import copy
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.failing import OnPurpose, failing
from helpers.models import TopKRouter
from noesis.errors import Inaccessible

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- a model with something of everything


class RoutedBlock(nn.Module):
    """What a router chose scales what an MLP gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.router = TopKRouter(8, experts=3)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        _, scores, _ = self.router(hidden)
        out: Tensor = x + self.mlp(hidden) * scores.sum(-1).view(*x.shape[:-1], 1)
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([RoutedBlock(), RoutedBlock()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean(1))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


NAMES = [name for name, module in net().named_modules() if not isinstance(module, nn.ModuleList)]


def inputs(number: int, samples: int = 4) -> Tensor:
    return torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(number))


def assert_same_step(one: noesis.Trace, other: noesis.Trace) -> None:
    """The latest steps of two traces are bitwise the same."""
    for name in ("values", "order", "calls", "batches"):
        np.testing.assert_array_equal(getattr(one, name)[-1], getattr(other, name)[-1], err_msg=name)
    assert len(one.samples) == len(other.samples)
    for mine, others in zip(one.samples, other.samples, strict=True):
        assert_same_step(mine, others)


# ---------------------------------------------------------------- exceptions in forward


CONTEXTS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "eager": ({}, nullcontext),
    "without gradients": ({}, torch.inference_mode),
    "autocast": ({}, lambda: torch.autocast("cpu", torch.bfloat16)),
    "per sample": ({"per_sample": True}, nullcontext),
    "codebook": ({"codebook": noesis.Codebook(size=4, dim=4), "logits": "head"}, torch.no_grad),
    "every other": ({"every": 2}, nullcontext),
    "a small ring": ({"capacity": 1}, nullcontext),
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model above, with its codebook."""
    wrapped = noesis.wrap(net(), layers="all", **CONTEXTS["codebook"][0])
    wrapped.calibrate([inputs(number, 60) for number in range(10, 14)], progress=False)
    return wrapped.save_calibration(tmp_path_factory.mktemp("calibration") / "c.safetensors")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "context",
    [name if name in ("eager", "codebook") else pytest.param(name, marks=pytest.mark.slow) for name in CONTEXTS],
)
def test_an_exception_at_any_layer_leaves_the_next_step_right(context: str, when: str, calibration: Path) -> None:
    options, entered = CONTEXTS[context]
    every = options.get("every", 1)
    for name in NAMES:
        model = net()
        wrapped, fresh = (noesis.wrap(each, layers="all", **options) for each in (model, copy.deepcopy(model)))
        for each in (wrapped, fresh) if "codebook" in options else ():
            each.load_calibration(calibration)
        at = model.get_submodule(name)
        with entered():
            wrapped(inputs(1))
            for number in range(every):
                with pytest.raises(OnPurpose), failing(at, when):
                    wrapped(inputs(2, 3))
                if every == 1:
                    broken = wrapped.trace()
                    assert broken.steps[-1] == 1 + number
                    if name:
                        assert broken.calls[-1, broken.layers.index(name)] == 0, name
            for _ in range(every):
                output = wrapped(inputs(3))
            expected = fresh(inputs(3))
        assert torch.equal(output, expected), name
        trace = wrapped.trace()
        assert_same_step(trace, fresh.trace())
        np.testing.assert_array_equal(wrapped.routes().sums[-1], fresh.routes().sums[-1])
        if "codebook" in options:
            np.testing.assert_array_equal(wrapped.surprise().score, fresh.surprise().score)
            assert not wrapped.surprise().absent
        if trace.dropped_steps == 0 and every == 1:
            assert len(trace) == 3
            np.testing.assert_array_equal(trace.totals[:, 0], trace["count"].sum(0))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_in_training_leaves_gradients_and_the_next_step_right(when: str) -> None:
    bare = net()
    bare(inputs(3)).square().sum().backward()
    for name in NAMES:
        model = net()
        wrapped, fresh = noesis.wrap(model, layers="all"), noesis.wrap(net(), layers="all")
        with pytest.raises(OnPurpose), failing(model.get_submodule(name), when):
            wrapped(inputs(2)).sum().backward()
        wrapped(inputs(3)).square().sum().backward()
        fresh(inputs(3))
        for parameter, expected in zip(model.parameters(), bare.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad), name  # type: ignore[arg-type]
        assert_same_step(wrapped.trace(), fresh.trace())


def test_an_exception_in_backward_leaves_the_next_step_right() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise OnPurpose

    wrapped, fresh = noesis.wrap(net(), layers="all"), noesis.wrap(net(), layers="all")
    with pytest.raises(OnPurpose):
        Fails.apply(wrapped(inputs(2))).sum().backward()  # type: ignore[no-untyped-call]
    wrapped(inputs(3))
    fresh(inputs(3))
    assert len(wrapped.trace()) == 2
    assert_same_step(wrapped.trace(), fresh.trace())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [OnPurpose, KeyboardInterrupt])
def test_an_exception_in_paused_or_run_ends_both(when: str, error: type[BaseException]) -> None:
    for name in NAMES:
        model = net()
        wrapped, fresh = noesis.wrap(model, layers="all"), noesis.wrap(net(), layers="all")
        at = model.get_submodule(name)
        wrapped(inputs(1))
        with pytest.raises(error), failing(at, when, error), wrapped.paused():
            wrapped(inputs(2))
        assert len(wrapped.trace()) == 1, name
        wrapped(inputs(3))
        fresh(inputs(3))
        assert_same_step(wrapped.trace(), fresh.trace())
        with pytest.raises(error), failing(at, when, error), wrapped.run(note="broken"):
            wrapped(inputs(2))
        with wrapped.run(note="whole"):  # and not: "A run of this model is going on"
            wrapped(inputs(3))
        assert len(wrapped.trace()) == 1
        assert wrapped.trace().meta["note"] == "whole"
        assert_same_step(wrapped.trace(), fresh.trace())


# ---------------------------------------------------------------- interrupts


@pytest.fixture
def calibrated() -> noesis.Wrapped:
    model = net().train()
    wrapped = noesis.wrap(model, layers="blocks", codebook=noesis.Codebook(size=4, dim=4), logits="head")
    wrapped.calibrate([inputs(number, 60) for number in range(10, 14)], progress=False)
    wrapped(inputs(3))
    return wrapped


def others() -> list[Tensor]:
    return [3 * inputs(number, 60) for number in range(20, 24)]


def scores(wrapped: noesis.Wrapped) -> Any:
    with torch.no_grad():
        wrapped(inputs(3))
    return wrapped.surprise().score


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_in_a_forward_of_calibrate_changes_nothing(calibrated: noesis.Wrapped, when: str) -> None:
    model, before, expected = calibrated.model, calibrated.calibration, scores(calibrated)
    codes = {name: id(book.codes) for name, book in calibrated.codebooks.items()}
    for name in NAMES:
        steps = len(calibrated.trace())

        def loader(name: str = name) -> Iterator[Tensor]:
            yield from others()[:2]
            with failing(model.get_submodule(name), when, KeyboardInterrupt):
                yield others()[2]

        batches = loader()
        with pytest.raises(KeyboardInterrupt):
            calibrated.calibrate(batches, progress=False)
        batches.close()  # type: ignore[attr-defined]
        assert calibrated.calibration is before, name
        assert model.training
        assert len(calibrated.trace()) == steps
        np.testing.assert_array_equal(scores(calibrated), expected)
    assert {name: id(book.codes) for name, book in calibrated.codebooks.items()} == codes


class Interrupt:
    """Raises KeyboardInterrupt, as Python does between two lines, at the n-th line that runs in some files."""

    def __init__(self, at: int, *files: str) -> None:
        self.at, self.files, self.seen = at, files, 0
        self.where: tuple[str, int] | None = None

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _value: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        return self._line if "noesis" in path.parts and path.name in self.files else None

    def _line(self, frame: FrameType, event: str, _value: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                self.where = (Path(frame.f_code.co_filename).name, frame.f_lineno)
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


FITTING = ("scorer.py", "layer_codebook.py", "calibration.py", "clustering.py", "calibration_file.py")


@pytest.mark.parametrize("how", ["calibrate", "load"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.slow
def test_an_interrupt_in_fitting_leaves_the_old_calibration_or_the_new_one(
    calibrated: noesis.Wrapped, tmp_path: Path, how: str, before: bool
) -> None:
    """Also in the middle of taking over what was fitted, codebook by codebook."""
    twin = noesis.wrap(net(), layers="blocks", codebook=noesis.Codebook(size=4, dim=4), logits="head")
    twin.calibrate(others(), progress=False)
    path, new = twin.save_calibration(tmp_path / "c.safetensors"), scores(twin)

    def take(wrapped: noesis.Wrapped) -> None:
        if how == "load":
            wrapped.load_calibration(path)
        else:
            wrapped.calibrate(others(), progress=False)

    def begin() -> noesis.Wrapped:
        if before:
            return copy.deepcopy(calibrated)
        return noesis.wrap(net().train(), layers="blocks", codebook=noesis.Codebook(size=4, dim=4), logits="head")

    old = scores(calibrated)
    wrapped = begin()
    with Interrupt(-1, *FITTING) as count:
        take(wrapped)
    wrapped, taken = begin(), 0
    # Some of all the lines, and every one of the last, where what was found is taken over.
    for at in sorted({*range(1, count.seen, max(1, count.seen // 12)), *range(count.seen - 60, count.seen + 1)}):
        was = wrapped.calibration
        with suppress(KeyboardInterrupt), Interrupt(at, *FITTING) as interrupt:
            take(wrapped)
        if wrapped.calibration is not was:
            np.testing.assert_array_equal(scores(wrapped), new, err_msg=str(interrupt.where))
            taken += 1
            wrapped = begin()
        elif before:
            np.testing.assert_array_equal(scores(wrapped), old, err_msg=str(interrupt.where))
        else:
            assert wrapped.calibration is None
            assert not any(book.ready for book in wrapped.codebooks.values()), interrupt.where
    assert taken < 20
    take(wrapped)
    np.testing.assert_array_equal(scores(wrapped), new)


# ---------------------------------------------------------------- full disks, folders that cannot be written


def trace_of(scale: float) -> noesis.Trace:
    """Three steps; layers of the first did not run, so its rows are shorter."""
    values = scale * np.arange(1.0, 1 + 3 * 4 * 7).reshape(3, 4, 7)
    values[..., 0], values[..., 6] = 8, 0
    values[0, 1:, 0], values[0, 1:, 1:6] = 0, np.nan
    return noesis.Trace.of(
        values, ["a", "b", "c", "d"], noesis.results.trace.ALWAYS, steps=np.arange(3), meta={"run": "one"}
    )


def routes_of(scale: float) -> noesis.Routes:
    wrapped = noesis.wrap(net(), layers="routers")
    wrapped(scale * inputs(1))
    return wrapped.routes()


def activations_of(scale: float) -> noesis.Activations:
    model = net()
    with noesis.capture(model, layers="head") as kept:
        model(scale * inputs(1))
    return kept


def deltas_of(scale: float) -> noesis.TokenDeltas:
    from noesis.results import Activations

    acts = [Activations({"a": [factor * inputs(1, 1)]}) for factor in (1.0, scale)]
    return noesis.token_deltas(*acts, list("abcde"), list("abcde"))


def calibration_of(scale: float) -> noesis.Wrapped:
    wrapped = noesis.wrap(net(), layers="blocks", codebook=noesis.Codebook(size=4, dim=4))
    wrapped.calibrate([scale * inputs(number, 60) for number in range(3)], progress=False)
    return wrapped


def log(scale: float, path: Path) -> None:
    wrapped = noesis.wrap(net(), layers="all")
    wrapped(scale * inputs(1))
    wrapped.log_to(path, layers="each")


def plot(scale: float, path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace_of(scale).plot(path=path)


#: By name: writes what a number decides into a folder.
WRITERS: dict[str, Callable[[float, Path], Any]] = {
    "trace.safetensors": lambda scale, to: trace_of(scale).save(to / "t.safetensors"),
    "trace.json": lambda scale, to: trace_of(scale).save(to / "t.json"),
    "trace.json.gz": lambda scale, to: trace_of(scale).save(to / "t.json.gz"),
    "soulprint.safetensors": lambda scale, to: trace_of(scale).soulprint().save(to / "s.safetensors"),
    "soulprint.json": lambda scale, to: trace_of(scale).soulprint().save(to / "s.json"),
    "soulprint.json.gz": lambda scale, to: trace_of(scale).soulprint().save(to / "s.json.gz"),
    "v0.1 soulprint": lambda scale, to: trace_of(scale).soulprint().save_v01(to / "soulprint.json"),
    "v0.1 steps": lambda scale, to: trace_of(scale).save_v01(to),
    "v0.1 steps, plain": lambda scale, to: trace_of(scale).save_v01(to, compress=False),
    "v0.1 single file": lambda scale, to: trace_of(scale).save_v01(to, single_file=True),
    "calibration": lambda scale, to: calibration_of(scale).save_calibration(to / "c.safetensors"),
    "activations": lambda scale, to: activations_of(scale).save(to / "a.safetensors"),
    "routes.safetensors": lambda scale, to: routes_of(scale).save(to / "r.safetensors"),
    "routes.json": lambda scale, to: routes_of(scale).save(to / "r.json"),
    "comparison.json": lambda scale, to: noesis.compare(trace_of(1), trace_of(scale)).save(to / "c.json"),
    "comparison.csv": lambda scale, to: noesis.compare(trace_of(1), trace_of(scale)).save(to / "c.csv"),
    "deltas.json": lambda scale, to: deltas_of(scale).save(to / "d.json"),
    "plot.png": lambda scale, to: plot(scale, to / "p.png"),
    "plot.svg": lambda scale, to: plot(scale, to / "p.svg"),
    "log.jsonl": lambda scale, to: log(scale, to / "l.jsonl"),
    "log.csv": lambda scale, to: log(scale, to / "l.csv"),
}


@contextmanager
def full(largest: int) -> Iterator[None]:
    """No file can become larger: a write comes back short, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))  # Python ignores its signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made in the folder; root may everywhere, so it becomes somebody else."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="has no RLIMIT_FSIZE")
@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_there_is_the_old_file(name: str, tmp_path: Path) -> None:
    write = WRITERS[name]
    for folder in ("old", "trial"):
        (tmp_path / folder).mkdir()
        write(2.0, tmp_path / folder)
    before = contents(tmp_path / "old")
    write(3.0, tmp_path / "trial")
    room = max(map(len, contents(tmp_path / "trial").values())) - 1
    with pytest.raises(noesis.NoesisError, match=str(tmp_path / "old")) as caught, full(room):
        write(3.0, tmp_path / "old")
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, OSError)
    assert contents(tmp_path / "old") == before  # and no temporary file
    (tmp_path / "new").mkdir()
    with pytest.raises(noesis.NoesisError, match=str(tmp_path / "new")), full(16):
        write(3.0, tmp_path / "new")
    assert [path for path in contents(tmp_path / "new").items() if path[1]] == []
    write(3.0, tmp_path / "old")  # with room again, all is well
    assert contents(tmp_path / "old").keys() == contents(tmp_path / "trial").keys()
    assert contents(tmp_path / "old") != before


@pytest.mark.skipif(sys.platform == "win32", reason="has no users of this kind")
@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_written_is_named(name: str, tmp_path: Path, open_folder: Path) -> None:
    write = WRITERS[name]
    file = tmp_path / "file"
    file.write_bytes(b"a file")
    for where in (file, file / "below", Path("/proc/1/task"), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(Inaccessible) as caught:
            write(2.0, where)
        assert str(where) in str(caught.value)
    assert contents(tmp_path) == {"file": b"a file"}
    write(2.0, open_folder)
    before = contents(open_folder)
    if name.startswith("log"):
        for path in open_folder.iterdir():
            path.chmod(0o444)
    with pytest.raises(Inaccessible, match=str(open_folder)), read_only(open_folder):
        write(3.0, open_folder)
    assert contents(open_folder) == before


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """A folder, a pipe; as root a device would become a file for everybody."""
    (tmp_path / "t.json").mkdir()
    os.mkfifo(tmp_path / "t.safetensors")
    for name in ("t.json", "t.safetensors"):
        with pytest.raises(Inaccessible, match=rf"{name} cannot be written \(.*in its place"):
            trace_of(1).save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json", "t.safetensors"]
    assert (tmp_path / "t.safetensors").is_fifo()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_never_changes_the_umask(tmp_path: Path) -> None:
    """It is the whole process' own: other threads would make files that anybody can write."""
    seen = set()

    def look(frame: FrameType, _event: str, _value: Any) -> Any:
        if Path(frame.f_code.co_filename).parent.name != "files":
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        seen.add(next(line.split()[1] for line in lines if line.startswith("Umask")))
        return look

    before = os.umask(0o027)
    sys.settrace(look)
    try:
        path = trace_of(1).save(tmp_path / "t.json")
    finally:
        sys.settrace(None)
        os.umask(before)
    assert seen == {"0027"}
    assert path.stat().st_mode & 0o777 == 0o640
