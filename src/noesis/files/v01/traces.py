"""Traces of v0.1: one file per step, or one file for a run."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BadValue, MissingFile
from ..atomic import PathLike, write_all
from ..formats import json_bytes, read_json
from .fields import (
    ASK_PATH,
    FIT,
    LARGEST_COUNT,
    LARGEST_STEP,
    MOST_SIZES,
    TRACE,
    bad,
    check_identity,
    check_type,
    get,
    head,
    numbers,
    trace_files,
    whole,
)
from .names import bare_names, execution_order, qualified

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray


#: The last axis of `Run.values`.
STATS = ("mean", "std", "abs_mean", "min", "max")

#: Steps x layers of one run, at most so many, or so many times its records. A hostile file could name a new layer in
#: every step and fill the memory.
_MOST_CELLS, _MOST_PER_RECORD = 1 << 16, 8


@dataclass(frozen=True, eq=False)
class Run:
    """The rows of one v0.1 run.

    Attributes:
        run_id: what v0.1 called the run.
        meta: what v0.1 noted about it (prompt, seed, ...), as it is.
        layers: one name per row, in order of execution; `name#k` is the k-th call of a module called several times.
        steps: the step numbers, rising; gaps are allowed.
        values: float64 `[steps, layers, 5]` in the order of `STATS`; NaN where a layer did not run.
        counts: float64 `[steps, layers]`, number of elements; 0 where a layer did not run.
    """

    run_id: str
    meta: dict[str, Any]
    layers: list[str]
    steps: list[int]
    values: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Step:
    """One step as it stands in a file; `names` are bare, in order of execution."""

    path: Path
    meta: dict[str, Any]
    step: int
    names: list[str]
    values: NDArray[np.float64]  # [records, 5]
    counts: NDArray[np.float64]  # [records]


#: Gives the run id and the steps of a trace file, as `read_steps` does.
StepsReader = Callable[[Path], tuple[str, list[Step]]]


def runs_in(folder: PathLike) -> dict[str, list[Path]]:
    """The runs whose traces lie in a folder.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.files.v01 import Run, runs_in, write_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("night", "day"):
        ...         _ = write_run(Run(name, {}, ["conv"], [0], np.ones((1, 1, 5)), np.full((1, 1), 8.0)), folder)
        ...     print({run: [path.name for path in paths] for run, paths in runs_in(folder).items()})
        {'day': ['unet_trace_day_step000.json.gz'], 'night': ['unet_trace_night_step000.json.gz']}

    Args:
        folder: a folder; files not named `unet_trace_*.json[.gz]` are passed over.

    Returns:
        The trace files of each run id, sorted by step. The run id is the one inside the file, not in its name.

    Raises:
        MissingFile: there is no such folder.
        BadFile: a trace file is broken.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in trace_files(Path(folder)):
        run_id, steps = read_steps(path)
        found.setdefault(run_id, []).append((min(one.step for one in steps), path))
    return {run_id: [path for _, path in sorted(files)] for run_id, files in sorted(found.items())}


def read_run(path: PathLike, run: str | None = None) -> Run:
    """Read a v0.1 trace.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.files.v01 import Run, read_run, write_run
        >>> run = Run("night", {}, ["act#1", "conv", "act#2"], [0, 1], np.ones((2, 3, 5)), np.full((2, 3), 8.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_run(run, folder)
        ...     back = read_run(folder)
        >>> back.run_id, back.steps, back.layers
        ('night', [0, 1], ['act#1', 'conv', 'act#2'])

    Args:
        path: a folder of traces, a single-file trace, or the file of one step (then only that step).
        run: which run to read; needed where a folder holds several, since runs are never pooled.

    Returns:
        The run, its layers aligned over steps by name and call.

    Raises:
        MissingFile: there is no such path, or the folder holds no trace.
        BadFile: a file is broken, or two files hold the same step of the run.
        BadValue: several runs and no `run`, or no run of that id.
    """
    path = Path(path)
    runs = _by_run(map(read_steps, trace_files(path) if path.is_dir() else [path]))
    if not runs:
        raise MissingFile(f"{path} holds no v0.1 trace", "files named unet_trace_<run>_step<k>.json[.gz]", ASK_PATH)
    return _chosen(runs, run, path)


def run_of(value: dict[str, Any], path: Path, run: str | None = None) -> Run:
    """The run in the JSON object that a trace file holds; see `read_run`."""
    return _chosen(_by_run([steps_of(value, path)]), run, path)


def _chosen(runs: dict[str, list[Step]], run: str | None, path: Path) -> Run:
    listing = ", ".join(f"{run_id!r} (as in {steps[0].path.name})" for run_id, steps in sorted(runs.items()))
    if run is None and len(runs) > 1:
        raise BadValue(f"{path} holds {len(runs)} runs: {listing}", "one run", "Choose one by its id: run=...")
    if run is not None and run not in runs:
        raise BadValue(f"{path} holds no run {run!r}; it holds {listing}", "a run that is there", "Change run=")
    chosen = next(iter(runs)) if run is None else run
    return _merge(chosen, runs[chosen], path)


def read_runs(folder: PathLike, read: StepsReader | None = None) -> list[Run]:
    """All runs whose traces lie in a folder, by their ids; each file is read once.

    Args:
        folder: a folder.
        read: in the place of `read_steps`.

    Raises:
        MissingFile: there is no such folder.
        BadFile: a file is broken, or two files hold the same step of a run.
    """
    folder = Path(folder)
    runs = _by_run(map(read or read_steps, trace_files(folder)))
    return [_merge(run_id, steps, folder) for run_id, steps in sorted(runs.items())]


def write_run(
    run: Run,
    folder: PathLike,
    *,
    single_file: bool = False,
    compress: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Path]:
    """Write a run as v0.1 did; `read_run` gives back what was read.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.files.v01 import Run, write_run
        >>> run = Run("night", {}, ["conv"], [0, 1], np.ones((2, 1, 5)), np.full((2, 1), 8.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_run(run, folder, compress=False, shapes={"conv": (2, 4)})]
        ['unet_trace_night_step000.json', 'unet_trace_night_step001.json']

    Args:
        run: what to write. A layer that ran in no step leaves no record, as in v0.1.
        folder: where; made if it is not there.
        single_file: all steps in one file instead of one file per step.
        compress: gzip, and `.gz` in the name.
        shapes: the output shape of each layer, by its name in `run.layers`. Used in the steps whose number of elements
            it fits; elsewhere the shape is written flat, as `[count]`.

    Returns:
        The files written.

    Raises:
        BadValue: the run does not fit together, its id cannot be part of a file name, or `single_file` cannot hold
            a step in which nothing ran.
    """
    _check_run(run, shapes or {})
    ran = run.counts > 0
    bare = bare_names(run.layers, ran)
    where = {key: str(run.meta.get(key, "unknown")) for key in ("dtype", "device")}
    records: list[list[dict[str, Any]]] = [[] for _ in run.steps]
    for at, row in np.argwhere(ran).tolist():
        count, stats = int(run.counts[at, row]), dict(zip(STATS, run.values[at, row].tolist(), strict=True))
        shape = [int(size) for size in (shapes or {}).get(run.layers[row], ())]
        shape = shape if math.prod(shape) == count else [count]
        stats = {key: stats[key] for key in ("mean", "std", "abs_mean", "max", "min")}
        records[at].append({"name": bare[row], "shape": shape, **where, **stats, "step": int(run.steps[at])})
    suffix = ".json.gz" if compress else ".json"
    stem = Path(folder) / f"unet_trace_{run.run_id}"
    head = {"type": TRACE, "run_id": run.run_id}
    if not single_file:
        each = (
            (f"{stem}_step{step:03d}{suffix}", {**head, "step": int(step), "meta": run.meta, "records": rows})
            for step, rows in zip(run.steps, records, strict=True)
        )
        return write_all((name, json_bytes(name, payload)) for name, payload in each)
    if empty := [step for step, rows in zip(run.steps, records, strict=True) if not rows]:
        given = f"nothing ran in steps {empty[:5]}, and a single-file trace keeps a step only through its records"
        raise BadValue(given, "a record in every step", "Write one file per step: single_file=False")
    flat = [record for rows in records for record in rows]
    name = f"{stem}{suffix}"
    return write_all([(name, json_bytes(name, {**head, "meta": run.meta, "records": flat}))])


def _by_run(files: Iterable[tuple[str, list[Step]]]) -> dict[str, list[Step]]:
    runs: dict[str, list[Step]] = {}
    for run_id, steps in files:
        runs.setdefault(run_id, []).extend(steps)
    return runs


def read_steps(path: Path) -> tuple[str, list[Step]]:
    """The run id and the steps of a trace file, at least one, in the order of the file."""
    return steps_of(read_json(path), path)


def steps_of(value: dict[str, Any], path: Path) -> tuple[str, list[Step]]:
    """The same from the JSON object that the file holds."""
    check_type(value, TRACE, path)
    run_id, meta = head(value, path)
    steps = []
    for step, records in _records_by_step(value, path):
        parsed = [_record(record, step, f"{path}, step {step}, record {at}") for at, record in enumerate(records)]
        values = np.array([stats for _, stats, _ in parsed], dtype=np.float64).reshape(-1, len(STATS))
        counts = np.array([count for _, _, count in parsed], dtype=np.float64)
        steps.append(Step(path, meta, step, [name for name, _, _ in parsed], values, counts))
    if not steps:
        raise bad(path, "there are no records", "a trace with at least one step")
    return run_id, steps


def _records_by_step(value: dict[str, Any], path: Path) -> Iterator[tuple[int, Iterable[Any]]]:
    """Yield (step, records) in any of the three layouts: one step, records of all steps, a list of steps."""
    if "records" not in value and "steps" in value:
        for at, entry in enumerate(get(value, "steps", list, path)):
            step = whole(entry, "step", f"{path}, steps[{at}]")
            records = get(entry, "records", list, f"{path}, steps[{at}]")
            # Here the records need not repeat the step.
            yield step, ({"step": step, **one} if isinstance(one, dict) else one for one in records)
    elif value.get("step") is not None:
        yield whole(value, "step", path), get(value, "records", list, path)
    else:
        # A step that comes back after another one is a second group, and refused as a duplicate on merging.
        records = get(value, "records", list, path)
        yield from groupby(records, key=lambda record: whole(record, "step", f"{path}, a record"))


def _record(record: Any, step: int, where: str) -> tuple[str, list[float], float]:
    """(name, statistics in the order of STATS, number of elements) of one record."""
    name, shape = get(record, "name", str, where), get(record, "shape", list, where)
    for key in ("dtype", "device"):
        get(record, key, str, where)
    if whole(record, "step", where) != step:
        raise bad(where, f"the record is of step {record['step']}", f"step {step}, as in its file", "Keep runs apart")
    # An empty tensor has no maximum, so v0.1 could not record one.
    sizes_fit = len(shape) <= MOST_SIZES and all(type(size) is int and size >= 1 for size in shape)
    if not sizes_fit or math.prod(shape) > LARGEST_COUNT:
        raise bad(where, f"'shape' is {reprlib.repr(shape)}", "positive sizes, 2**53 elements at most")
    return name, numbers([get(record, key, object, where) for key in STATS], where), float(math.prod(shape))


def _merge(run_id: str, steps: list[Step], path: Path) -> Run:
    steps = sorted(steps, key=lambda one: one.step)
    for one, two in pairwise(steps):
        _check_pair(one, two, run_id)
    most_calls: Counter[str] = Counter()
    for one in steps:
        most_calls |= Counter(one.names)
    names = [qualified(one.names, most_calls) for one in steps]
    layers = execution_order(names)
    if not layers:
        raise bad(path, f"there are no records of run {run_id!r}", "a trace with at least one record")
    if len(layers) != sum(most_calls.values()):
        raise bad(path, f"layers of run {run_id!r} are called like calls of others ('name#2')", "other names")
    records = sum(len(one.names) for one in steps)
    most = max(_MOST_CELLS, _MOST_PER_RECORD * records)
    if len(steps) * len(layers) > most:
        what = f"run {run_id!r} has {len(layers)} layers over {len(steps)} steps, and {records} records"
        raise bad(path, what, f"{most} rows at most", "Read it file by file, or do not trust it")
    column = {name: at for at, name in enumerate(layers)}
    values = np.full((len(steps), len(layers), len(STATS)), np.nan)
    counts = np.zeros((len(steps), len(layers)))
    for at, (one, called) in enumerate(zip(steps, names, strict=True)):
        columns = [column[name] for name in called]
        values[at, columns], counts[at, columns] = one.values, one.counts
    return Run(run_id, steps[0].meta, layers, [one.step for one in steps], values, counts)


def _check_pair(one: Step, two: Step, run_id: str) -> None:
    """Refuse two neighbouring steps that cannot be of one run."""
    where = " and ".join(dict.fromkeys((str(one.path), str(two.path))))
    if one.step == two.step:
        raise bad(where, f"step {one.step} of run {run_id!r} comes twice", "each step once", "Keep one of them")
    # v0.1 named runs after the second they began in, so two can share an id. As text, since NaN differs from itself.
    notes, others = ({key: json.dumps(note, sort_keys=True) for key, note in of.meta.items()} for of in (one, two))
    if differing := [key for key in {**notes, **others} if notes.get(key) != others.get(key)]:
        what = f"both say run {run_id!r}, but their meta differs in {reprlib.repr(differing)}"
        raise bad(where, what, "the steps of one run", "Keep runs in folders of their own")


def _check_run(run: Run, shapes: Mapping[str, Sequence[int]]) -> None:
    check_identity(run.run_id, run.meta, run.layers)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", run.run_id):
        given = f"the run id {reprlib.repr(run.run_id)} cannot be part of a file name"
        raise BadValue(given, "1 to 200 of letters, digits, '.', '_' and '-', no '.' in front", "Give it another id")
    rising = all(one < two for one, two in pairwise([-1, *run.steps, LARGEST_STEP + 1]))
    rows = (len(run.steps), len(run.layers))
    if not rising or run.values.shape != (*rows, len(STATS)) or run.counts.shape != rows:
        given = f"{rows[0]} steps, {rows[1]} layers, values {run.values.shape}, counts {run.counts.shape}"
        raise BadValue(given, "rising steps, values [steps, layers, 5], counts [steps, layers]", FIT)
    counts = run.counts
    if not ((counts >= 0) & (counts <= LARGEST_COUNT) & (counts == np.floor(counts))).all():
        raise BadValue("counts are not all numbers of elements", "whole numbers up to 2**53", FIT)
    if not (counts > 0).any():
        raise BadValue(f"no layer of run {run.run_id!r} ran in any step", "a run with a row", "Record a step first")
    if not np.isnan(run.values[counts == 0]).all():
        raise BadValue("there are values where the count is 0", "NaN where a layer did not run", FIT)
    for name, shape in shapes.items():
        if name not in run.layers or len(shape) > MOST_SIZES or any(size < 1 for size in shape):
            given = f"shapes says {reprlib.repr(shape)} for {name!r}"
            raise BadValue(given, "positive sizes, and names from run.layers", "Correct shapes")
