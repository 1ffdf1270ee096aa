"""Reading and writing the files of v0.1, the predecessor of this noesis.

Three kinds: a trace with one file per step, a trace in a single file, and a soulprint. This module turns them into
plain data and back; what a trace or a soulprint can do lives with `Trace` and `Soulprint`.

v0.1 recorded one row per *call*, under the module's bare name. So a module called three times in a step has three
rows of one name, and the soulprint's `layer_index` keeps only the last of them: it has fewer names than rows. The
number of rows is `len(soulprint) / 2`, and calls are told apart here as `name#1`, `name#2`, ...
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from loguru import logger

from .errors import BadFile, BadValue, MissingFile
from .files import PathLike, dump_json, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

TRACE = "sdxl_unet"
SOULPRINT = "sdxl_unet_soulprint"
LAYOUT = "concat(means[0:L], stds[0:L])"
#: The last axis of `Run.values`.
STATS = ("mean", "std", "abs_mean", "min", "max")

#: float64 holds whole numbers exactly up to here.
_LARGEST_COUNT = 1 << 53
#: Dimensions of a tensor, as in NumPy.
_MOST_SIZES = 64
_LARGEST_STEP = (1 << 31) - 1
#: Steps x layers of one run. A hostile file could name a new layer in every step and fill the memory.
_MOST_CELLS = 1 << 25
#: diffusers' ResnetBlock2D calls its `nonlinearity` after norm1, before time_emb_proj and after norm2.
_RESNET_CALLS = 3
#: Levels looked at in a dotted name; real ones have about ten, a hostile one could have a million.
_DEEPEST = 64
_KINDS: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    object: "a number",
}
_ASK_PATH = "Check the path"
_FIT = "Build it from rows that belong together"

_T = TypeVar("_T")


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
class Print:
    """A v0.1 soulprint.

    Attributes:
        run_id: what v0.1 called the run.
        meta: what v0.1 noted about it, as it is.
        layers: one name per row, L of them, named as in `Run`; `unnamed#<row>` where the name is lost.
        means: float64 `[L]`, mean of each row, averaged over steps.
        stds: float64 `[L]`, standard deviation of each row, averaged over steps.
        steps: number of steps averaged over.
    """

    run_id: str
    meta: dict[str, Any]
    layers: list[str]
    means: NDArray[np.float64]
    stds: NDArray[np.float64]
    steps: int


@dataclass(frozen=True, eq=False)
class _Step:
    """One step as it stands in a file; `names` are bare, in order of execution."""

    path: Path
    meta: dict[str, Any]
    step: int
    names: list[str]
    values: NDArray[np.float64]  # [records, 5]
    counts: NDArray[np.float64]  # [records]


def looks_like(value: object) -> bool:
    """Whether parsed JSON is a trace or soulprint of v0.1, by its `type`.

    Example:
        >>> from noesis import v01
        >>> v01.looks_like({"type": "sdxl_unet_soulprint"}), v01.looks_like({"format": "noesis.trace"})
        (True, False)
    """
    return isinstance(value, dict) and value.get("type") in (TRACE, SOULPRINT)


def runs_in(folder: PathLike) -> dict[str, list[Path]]:
    """The runs whose traces lie in a folder.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.v01 import Run, runs_in, write_run
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
    for path in _trace_files(Path(folder)):
        run_id, steps = _read_steps(path)
        found.setdefault(run_id, []).append((min(one.step for one in steps), path))
    return {run_id: [path for _, path in sorted(files)] for run_id, files in sorted(found.items())}


def read_run(path: PathLike, run: str | None = None) -> Run:
    """Read a v0.1 trace.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.v01 import Run, read_run, write_run
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
    files = _trace_files(path) if path.is_dir() else [path]
    runs: dict[str, list[_Step]] = {}
    for file in files:
        run_id, steps = _read_steps(file)
        runs.setdefault(run_id, []).extend(steps)
    if not runs:
        raise MissingFile(f"{path} holds no v0.1 trace", "files named unet_trace_<run>_step<k>.json[.gz]", _ASK_PATH)
    listing = ", ".join(f"{run_id!r} (as in {steps[0].path.name})" for run_id, steps in sorted(runs.items()))
    if run is None and len(runs) > 1:
        raise BadValue(f"{path} holds {len(runs)} runs: {listing}", "one run", "Choose one by its id: run=...")
    if run is not None and run not in runs:
        raise BadValue(f"{path} holds no run {run!r}; it holds {listing}", "a run that is there", "Change run=")
    chosen = next(iter(runs)) if run is None else run
    return _merge(chosen, runs[chosen], path)


def write_run(
    run: Run,
    folder: PathLike,
    *,
    single_file: bool = False,
    compress: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Path]:
    """Write a run as v0.1 did; `read_run` gives back what was read.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.v01 import Run, write_run
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
    bare = _bare_names(run.layers, ran)
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
        return [
            write_json(f"{stem}_step{step:03d}{suffix}", {**head, "step": int(step), "meta": run.meta, "records": rows})
            for step, rows in zip(run.steps, records, strict=True)
        ]
    if empty := [step for step, rows in zip(run.steps, records, strict=True) if not rows]:
        given = f"nothing ran in steps {empty[:5]}, and a single-file trace keeps a step only through its records"
        raise BadValue(given, "a record in every step", "Write one file per step: single_file=False")
    flat = [record for rows in records for record in rows]
    return [write_json(f"{stem}{suffix}", {**head, "meta": run.meta, "records": flat})]


def read_soulprint(path: PathLike) -> Print:
    """Read a v0.1 soulprint, and name all its rows as far as they can be named.

    `layer_index` names a module called several times only at its last call. The names of the other rows come from a
    trace of the same run in the same folder, where it fits; else by inference: an unnamed row between two rows of one
    resnet is an earlier call of that resnet's `nonlinearity`, which diffusers' `ResnetBlock2D` calls three times. A
    row that neither explains is called `unnamed#<row>`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.v01 import Print, read_soulprint, write_soulprint
        >>> layers = ["r.norm1", "r.nonlinearity#1", "r.conv1", "r.nonlinearity#2"]
        >>> soul = Print("night", {}, layers, np.zeros(4), np.ones(4), steps=30)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     back = read_soulprint(write_soulprint(soul, f"{folder}/soulprint.json"))
        >>> back.layers
        ['r.norm1', 'r.nonlinearity#1', 'r.conv1', 'r.nonlinearity#2']

    Args:
        path: a soulprint file, gzipped or not.

    Returns:
        The soulprint; its number of rows is half the length of the vector.

    Raises:
        MissingFile: there is no such file.
        BadFile: the file is broken, or no soulprint of v0.1.
    """
    path = Path(path)
    value = _read_typed(path, SOULPRINT)
    run_id, meta = _head(value, path)
    steps = _whole(value, "steps_aggregated", path, least=1)
    layout = _get(value, "vector_layout", str, path)
    if layout != LAYOUT:
        raise _bad(path, f"'vector_layout' is {reprlib.repr(layout)}", repr(LAYOUT), "noesis reads no other layout")
    vector = np.array(_numbers(_get(value, "soulprint", list, path), f"{path}, 'soulprint'"), dtype=np.float64)
    if len(vector) == 0 or len(vector) % 2:
        raise _bad(path, f"the soulprint has {len(vector)} numbers", "L means and as many stds, L > 0")
    rows = len(vector) // 2
    index = _layer_index(value, rows, path)
    if "layer_names" in value:
        layers = _given_names(value, index, rows, path)
    else:
        layers = _names_from_traces(path, run_id, index, rows) or _inferred_names(index, rows)
    if (repeated := _repeated(layers)) is not None:
        raise _bad(path, f"two rows would be called {reprlib.repr(repeated)}", "a name for each call")
    return Print(run_id, meta, layers, vector[:rows], vector[rows:], steps)


def write_soulprint(p: Print, path: PathLike) -> Path:
    """Write a soulprint as v0.1 did; `read_soulprint` gives the same back.

    Where v0.1's `layer_index` would lose names that reading cannot infer, all names are written beside it as
    `layer_names`, which v0.1 passes over.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.v01 import Print, write_soulprint
        >>> soul = Print("night", {}, ["conv"], np.zeros(1), np.ones(1), steps=30)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_soulprint(soul, f"{folder}/a.json").name
        'a.json'

    Args:
        p: what to write.
        path: where; gzipped if the name ends in `.gz`.

    Returns:
        The path.

    Raises:
        BadValue: the soulprint does not fit together.
    """
    _check_identity(p)
    rows = len(p.layers)
    if not rows or p.means.shape != (rows,) or p.stds.shape != (rows,) or not 1 <= p.steps <= _LARGEST_STEP:
        given = f"{rows} layers, means {p.means.shape}, stds {p.stds.shape}, {p.steps} steps"
        raise BadValue(given, "one mean and one std per layer, at least one layer and step", _FIT)
    index = _index_of(p.layers)
    payload = {
        "type": SOULPRINT,
        "run_id": p.run_id,
        "meta": p.meta,
        "steps_aggregated": int(p.steps),
        "layer_index": index,
        "vector_layout": LAYOUT,
        "soulprint": [*p.means.tolist(), *p.stds.tolist()],
    }
    names = {} if _inferred_names(index, rows) == p.layers else {"layer_names": p.layers}
    return write_json(path, {**payload, **names})


# Reading: from JSON of unknown shape to checked values.


def _bad(where: object, what: str, expected: str, do: str = "The file may be damaged; write it again") -> BadFile:
    return BadFile(f"{where}: {what}", expected, do)


def _trace_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingFile(f"{folder} is no folder", "a folder of v0.1 traces", _ASK_PATH)
    return sorted(path for path in folder.iterdir() if re.match(r"unet_trace_.+\.json(\.gz)?\Z", path.name))


def _read_typed(path: Path, kind: str) -> dict[str, Any]:
    value = read_json(path)
    if value.get("type") != kind:
        reader = "read_soulprint" if kind == TRACE else "read_run"
        do = f"It is the other kind of v0.1 file: use {reader}" if looks_like(value) else _ASK_PATH
        raise _bad(path, f"'type' is {reprlib.repr(value.get('type'))}", f"a v0.1 file of type {kind!r}", do)
    return value


def _read_steps(path: Path) -> tuple[str, list[_Step]]:
    """The run id and the steps of a trace file, at least one, in the order of the file."""
    value = _read_typed(path, TRACE)
    run_id, meta = _head(value, path)
    steps = []
    for step, records in _records_by_step(value, path):
        parsed = [_record(record, step, f"{path}, step {step}, record {at}") for at, record in enumerate(records)]
        values = np.array([stats for _, stats, _ in parsed], dtype=np.float64).reshape(-1, len(STATS))
        counts = np.array([count for _, _, count in parsed], dtype=np.float64)
        steps.append(_Step(path, meta, step, [name for name, _, _ in parsed], values, counts))
    if not steps:
        raise _bad(path, "there are no records", "a trace with at least one step")
    return run_id, steps


def _records_by_step(value: dict[str, Any], path: Path) -> Iterator[tuple[int, Iterable[Any]]]:
    """Yield (step, records) in any of the three layouts: one step, records of all steps, a list of steps."""
    if "records" not in value and "steps" in value:
        for at, entry in enumerate(_get(value, "steps", list, path)):
            step = _whole(entry, "step", f"{path}, steps[{at}]")
            records = _get(entry, "records", list, f"{path}, steps[{at}]")
            # Here the records need not repeat the step.
            yield step, ({"step": step, **one} if isinstance(one, dict) else one for one in records)
    elif value.get("step") is not None:
        yield _whole(value, "step", path), _get(value, "records", list, path)
    else:
        # A step that comes back after another one is a second group, and refused as a duplicate on merging.
        records = _get(value, "records", list, path)
        yield from groupby(records, key=lambda record: _whole(record, "step", f"{path}, a record"))


def _record(record: Any, step: int, where: str) -> tuple[str, list[float], float]:
    """(name, statistics in the order of STATS, number of elements) of one record."""
    name, shape = _get(record, "name", str, where), _get(record, "shape", list, where)
    for key in ("dtype", "device"):
        _get(record, key, str, where)
    if _whole(record, "step", where) != step:
        raise _bad(where, f"the record is of step {record['step']}", f"step {step}, as in its file", "Keep runs apart")
    # An empty tensor has no maximum, so v0.1 could not record one.
    sizes_fit = len(shape) <= _MOST_SIZES and all(type(size) is int and size >= 1 for size in shape)
    if not sizes_fit or math.prod(shape) > _LARGEST_COUNT:
        raise _bad(where, f"'shape' is {reprlib.repr(shape)}", "positive sizes, 2**53 elements at most")
    return name, _numbers([_get(record, key, object, where) for key in STATS], where), float(math.prod(shape))


def _head(value: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    run_id, meta = _get(value, "run_id", str, path), _get(value, "meta", dict, path)
    if not run_id:
        raise _bad(path, "'run_id' is empty", "a name for the run")
    return run_id, meta


def _get(holder: Any, key: str, kind: type[_T], where: object) -> _T:
    """`holder[key]` if holder is an object, has the key, and its value is of the kind."""
    if not isinstance(holder, dict):
        raise _bad(where, f"it is {reprlib.repr(holder)}", "an object")
    if key not in holder:
        raise _bad(where, f"{key!r} is missing", _KINDS[kind])
    given = holder[key]
    if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
        raise _bad(where, f"{key!r} is {reprlib.repr(given)}", _KINDS[kind])
    return given


def _whole(holder: Any, key: str, where: object, *, least: int = 0, most: int = _LARGEST_STEP) -> int:
    given = _get(holder, key, int, where)
    if not least <= given <= most:
        raise _bad(where, f"{key!r} is {reprlib.repr(given)}", f"a whole number from {least} to {most}")
    return given


def _numbers(given: list[Any], where: str) -> list[float]:
    """The numbers as floats; NaN and infinity are numbers, as Python's JSON writes them."""
    for at, one in enumerate(given):
        if isinstance(one, bool) or not isinstance(one, (int, float)):
            raise _bad(where, f"value {at} is {reprlib.repr(one)}", "a number")
    try:
        return [float(one) for one in given]
    except OverflowError:
        raise _bad(where, "a number is too large for float64", "numbers below 1.8e308") from None


# Runs: steps to one table, layers aligned by name and call.


def _merge(run_id: str, steps: list[_Step], path: Path) -> Run:
    steps = sorted(steps, key=lambda one: one.step)
    for one, two in pairwise(steps):
        _check_pair(one, two, run_id)
    most_calls: Counter[str] = Counter()
    for one in steps:
        most_calls |= Counter(one.names)
    names = [_qualified(one.names, most_calls) for one in steps]
    layers = _execution_order(names)
    if not layers:
        raise _bad(path, f"there are no records of run {run_id!r}", "a trace with at least one record")
    if len(layers) != sum(most_calls.values()):
        raise _bad(path, f"layers of run {run_id!r} are called like calls of others ('name#2')", "other names")
    if len(steps) * len(layers) > _MOST_CELLS:
        what = f"run {run_id!r} has {len(layers)} layers over {len(steps)} steps"
        raise _bad(path, what, f"{_MOST_CELLS} rows at most", "Read it file by file, or do not trust it")
    column = {name: at for at, name in enumerate(layers)}
    values = np.full((len(steps), len(layers), len(STATS)), np.nan)
    counts = np.zeros((len(steps), len(layers)))
    for at, (one, called) in enumerate(zip(steps, names, strict=True)):
        columns = [column[name] for name in called]
        values[at, columns], counts[at, columns] = one.values, one.counts
    return Run(run_id, steps[0].meta, layers, [one.step for one in steps], values, counts)


def _check_pair(one: _Step, two: _Step, run_id: str) -> None:
    """Refuse two neighbouring steps that cannot be of one run."""
    where = " and ".join(dict.fromkeys((str(one.path), str(two.path))))
    if one.step == two.step:
        raise _bad(where, f"step {one.step} of run {run_id!r} comes twice", "each step once", "Keep one of them")
    # v0.1 named runs after the second they began in, so two can share an id. As text, since NaN differs from itself.
    notes, others = ({key: json.dumps(note, sort_keys=True) for key, note in of.meta.items()} for of in (one, two))
    if differing := [key for key in {**notes, **others} if notes.get(key) != others.get(key)]:
        what = f"both say run {run_id!r}, but their meta differs in {reprlib.repr(differing)}"
        raise _bad(where, what, "the steps of one run", "Keep runs in folders of their own")


def _qualified(names: Iterable[str], most_calls: Mapping[str, int]) -> list[str]:
    """The names with `#k` for the k-th call, where a module is called several times."""
    calls: Counter[str] = Counter()
    qualified = []
    for name in names:
        calls[name] += 1
        qualified.append(f"{name}#{calls[name]}" if most_calls[name] > 1 else name)
    return qualified


def _execution_order(sequences: Iterable[Sequence[str]]) -> list[str]:
    """All names in one order: each new one goes behind the one it followed when it first ran."""
    following: dict[str | None, str | None] = {None: None}  # a linked list that starts at None
    for sequence in sequences:
        before: str | None = None
        for name in sequence:
            if name not in following:
                following[before], following[name] = name, following[before]
            before = name
    order = []
    at = following[None]
    while at is not None:
        order.append(at)
        at = following[at]
    return order


def _bare_names(layers: Sequence[str], ran: NDArray[np.bool_]) -> list[str]:
    """The names as v0.1 wrote them, without `#k`; `ran` is `[steps, layers]`.

    A suffix is taken off only where reading puts the same one on again: calls 1 to n, n > 1, are there in order, each
    step ran the first few of them, some step all. So a module whose own name ends in `#1` keeps it.
    """
    bare = list(layers)
    families: dict[str, list[int]] = {}
    for row, name in enumerate(layers):
        base, mark, _ = name.rpartition("#")
        if mark:
            families.setdefault(base, []).append(row)
    for base in families.keys() - set(layers):
        rows = families[base]
        in_order = all(layers[row] == f"{base}#{call}" for call, row in enumerate(rows, start=1))
        first_few = (ran[:, rows[:-1]] >= ran[:, rows[1:]]).all() and ran[:, rows[-1]].any()
        if len(rows) > 1 and in_order and first_few:
            for row in rows:
                bare[row] = base
    return bare


# Soulprints: names for rows.


def _layer_index(value: dict[str, Any], rows: int, path: Path) -> dict[str, int]:
    where = f"{path}, 'layer_index'"
    given = _get(value, "layer_index", dict, path)
    index = {name: _whole(given, name, where, most=rows - 1) for name in given}
    if (row := _repeated(index.values())) is not None:
        raise _bad(where, f"row {row} belongs to two layers", "a row for each layer")
    return index


def _given_names(value: dict[str, Any], index: dict[str, int], rows: int, path: Path) -> list[str]:
    """`layer_names` as `write_soulprint` adds it, once it agrees with `layer_index`."""
    names = _get(value, "layer_names", list, path)
    if len(names) != rows or not all(isinstance(name, str) for name in names):
        raise _bad(path, f"'layer_names' is {reprlib.repr(names)}", f"{rows} strings")
    if _index_of(names) != index:
        raise _bad(path, "'layer_names' and 'layer_index' disagree", "the same layers in both")
    return names


def _index_of(layers: Sequence[str]) -> dict[str, int]:
    """v0.1's `layer_index`: the last row of each module, in order of first appearance, rows without a name left out."""
    bare = _bare_names(layers, np.ones((1, len(layers)), dtype=np.bool_))
    return {name: row for row, name in enumerate(bare) if layers[row] != f"unnamed#{row}"}


def _names_from_traces(path: Path, run_id: str, index: dict[str, int], rows: int) -> list[str] | None:
    """The names of the rows from a trace of the same run beside the soulprint, if one fits it."""
    pattern = rf"unet_trace_{re.escape(run_id)}(_step\d+)?\.json(\.gz)?"
    for file in _trace_files(path.parent) if len(index) < rows else ():
        if not re.fullmatch(pattern, file.name):
            continue
        try:
            found, steps = _read_steps(file)
        except (BadFile, MissingFile) as error:
            logger.debug("no layer names for {} from a trace: {}", path, error)
            continue
        for step in steps:
            last = {name: row for row, name in enumerate(step.names)}
            if found == run_id and len(step.names) == rows and last == index:
                return _qualified(step.names, Counter(step.names))
    return None


def _inferred_names(index: dict[str, int], rows: int) -> list[str]:
    """The names of all rows from `layer_index` alone, `unnamed#<row>` where it does not say."""
    names = [f"unnamed#{row}" for row in range(rows)]
    named = sorted((row, name) for name, row in index.items())
    for row, name in named:
        names[row] = name
    earlier: dict[str, list[int]] = {}
    for (low, before), (high, after) in pairwise(named):
        if high - low > 1 and (module := _nonlinearity(before, after, index, high - 1)) is not None:
            earlier.setdefault(module, []).extend(range(low + 1, high))
    for module, gaps in earlier.items():
        if len(gaps) < _RESNET_CALLS:
            for call, row in enumerate([*gaps, index[module]], start=1):
                names[row] = f"{module}#{call}"
    return names


def _nonlinearity(before: str, after: str, index: dict[str, int], row: int) -> str | None:
    """The `nonlinearity` of the innermost module around both rows, if its last call comes after `row`."""
    parent = before
    for _ in range(_DEEPEST):
        parent = parent.rpartition(".")[0]
        module = f"{parent}.nonlinearity"
        if after.startswith(f"{parent}.") and index.get(module, -1) > row:
            return module
    return None


# Writing: refuse what reading would not give back.


def _check_identity(of: Run | Print) -> None:
    if not of.run_id:
        raise BadValue("the run id is empty", "a name for the run", "Name the run")
    try:
        dump_json(of.meta)
    except (TypeError, ValueError, RecursionError) as error:
        given = f"meta does not fit into JSON ({error})"
        raise BadValue(given, "a dict with string keys", "Leave out what JSON cannot hold") from None
    if (repeated := _repeated(of.layers)) is not None:
        raise BadValue(f"two layers are called {repeated!r}", "a name for each row", "Name calls 'name#1', 'name#2'")


def _check_run(run: Run, shapes: Mapping[str, Sequence[int]]) -> None:
    _check_identity(run)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", run.run_id):
        given = f"the run id {reprlib.repr(run.run_id)} cannot be part of a file name"
        raise BadValue(given, "1 to 200 of letters, digits, '.', '_' and '-', no '.' in front", "Give it another id")
    rising = all(one < two for one, two in pairwise([-1, *run.steps, _LARGEST_STEP + 1]))
    rows = (len(run.steps), len(run.layers))
    if not rising or run.values.shape != (*rows, len(STATS)) or run.counts.shape != rows:
        given = f"{rows[0]} steps, {rows[1]} layers, values {run.values.shape}, counts {run.counts.shape}"
        raise BadValue(given, "rising steps, values [steps, layers, 5], counts [steps, layers]", _FIT)
    counts = run.counts
    if not ((counts >= 0) & (counts <= _LARGEST_COUNT) & (counts == np.floor(counts))).all():
        raise BadValue("counts are not all numbers of elements", "whole numbers up to 2**53", _FIT)
    if not (counts > 0).any():
        raise BadValue(f"no layer of run {run.run_id!r} ran in any step", "a run with a row", "Record a step first")
    if not np.isnan(run.values[counts == 0]).all():
        raise BadValue("there are values where the count is 0", "NaN where a layer did not run", _FIT)
    for name, shape in shapes.items():
        if name not in run.layers or len(shape) > _MOST_SIZES or any(size < 1 for size in shape):
            given = f"shapes says {reprlib.repr(shape)} for {name!r}"
            raise BadValue(given, "positive sizes, and names from run.layers", "Correct shapes")


def _repeated(values: Iterable[_T]) -> _T | None:
    """The first value that comes a second time; None if all differ."""
    seen: set[_T] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
