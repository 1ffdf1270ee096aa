"""Soulprints of v0.1, and the names of their rows, of which the file itself gives only some."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from loguru import logger

from ...errors import BadFile, BadValue, MissingFile
from ..atomic import PathLike, write_bytes
from ..formats import json_bytes, read_json
from .fields import (
    FIT,
    LARGEST_STEP,
    SOULPRINT,
    bad,
    check_identity,
    check_type,
    get,
    head,
    numbers,
    repeated,
    trace_files,
    whole,
)
from .names import bare_names, qualified
from .traces import StepsReader, read_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


LAYOUT = "concat(means[0:L], stds[0:L])"

#: diffusers' ResnetBlock2D calls its `nonlinearity` after norm1, before time_emb_proj and after norm2.
_RESNET_CALLS = 3

#: Levels looked at in a dotted name; real ones have about ten, a hostile one could have a million.
_DEEPEST = 64


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


def read_soulprint(path: PathLike) -> Print:
    """Read a v0.1 soulprint, and name all its rows as far as they can be named.

    `layer_index` names a module called several times only at its last call. The names of the other rows come from a
    trace of the same run in the same folder, where it fits; else by inference: an unnamed row between two rows of one
    resnet is an earlier call of that resnet's `nonlinearity`, which diffusers' `ResnetBlock2D` calls three times. A
    row that neither explains is called `unnamed#<row>`.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.files.v01 import Print, read_soulprint, write_soulprint
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
    return print_of(read_json(path), path)


def print_of(value: dict[str, Any], path: Path, read: StepsReader | None = None) -> Print:
    """The soulprint in the JSON object that its file holds; see `read_soulprint`.

    Args:
        value: the object.
        path: where traces of the same run may lie beside it.
        read: in the place of `read_steps`, for these.
    """
    check_type(value, SOULPRINT, path)
    run_id, meta = head(value, path)
    steps = whole(value, "steps_aggregated", path, least=1)
    layout = get(value, "vector_layout", str, path)
    if layout != LAYOUT:
        raise bad(path, f"'vector_layout' is {reprlib.repr(layout)}", repr(LAYOUT), "noesis reads no other layout")
    vector = np.array(numbers(get(value, "soulprint", list, path), f"{path}, 'soulprint'"), dtype=np.float64)
    if len(vector) == 0 or len(vector) % 2:
        raise bad(path, f"the soulprint has {len(vector)} numbers", "L means and as many stds, L > 0")
    rows = len(vector) // 2
    index = _layer_index(value, rows, path)
    if "layer_names" in value:
        layers = _given_names(value, index, rows, path)
    else:
        layers = _names_from_traces(path, run_id, index, rows, read or read_steps) or _inferred_names(index, rows)
    if (twice := repeated(layers)) is not None:
        raise bad(path, f"two rows would be called {reprlib.repr(twice)}", "a name for each call")
    return Print(run_id, meta, layers, vector[:rows], vector[rows:], steps)


def write_soulprint(p: Print, path: PathLike) -> Path:
    """Write a soulprint as v0.1 did; `read_soulprint` gives the same back.

    Where v0.1's `layer_index` would lose names that reading cannot infer, all names are written beside it as
    `layer_names`, which v0.1 passes over.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from noesis.files.v01 import Print, write_soulprint
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
    check_identity(p.run_id, p.meta, p.layers)
    rows = len(p.layers)
    if not rows or p.means.shape != (rows,) or p.stds.shape != (rows,) or not 1 <= p.steps <= LARGEST_STEP:
        given = f"{rows} layers, means {p.means.shape}, stds {p.stds.shape}, {p.steps} steps"
        raise BadValue(given, "one mean and one std per layer, at least one layer and step", FIT)
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
    return write_bytes(path, json_bytes(path, {**payload, **names}))


def _layer_index(value: dict[str, Any], rows: int, path: Path) -> dict[str, int]:
    where = f"{path}, 'layer_index'"
    given = get(value, "layer_index", dict, path)
    for name in given:
        whole(given, name, where, most=rows - 1)
    if (row := repeated(given.values())) is not None:
        raise bad(where, f"row {row} belongs to two layers", "a row for each layer")
    return given


def _given_names(value: dict[str, Any], index: dict[str, int], rows: int, path: Path) -> list[str]:
    """`layer_names` as `write_soulprint` adds it, once it agrees with `layer_index`."""
    names = get(value, "layer_names", list, path)
    if len(names) != rows or not all(isinstance(name, str) for name in names):
        raise bad(path, f"'layer_names' is {reprlib.repr(names)}", f"{rows} strings")
    if _index_of(names) != index:
        raise bad(path, "'layer_names' and 'layer_index' disagree", "the same layers in both")
    return names


def _index_of(layers: Sequence[str]) -> dict[str, int]:
    """v0.1's `layer_index`: the last row of each module, in order of first appearance, rows without a name left out."""
    bare = bare_names(layers, np.ones((1, len(layers)), dtype=np.bool_))
    return {name: row for row, name in enumerate(bare) if layers[row] != f"unnamed#{row}"}


def _names_from_traces(
    path: Path, run_id: str, index: dict[str, int], rows: int, read: StepsReader
) -> list[str] | None:
    """The names of the rows from a trace of the same run beside the soulprint, if one fits it."""
    pattern = rf"unet_trace_{re.escape(run_id)}(_step\d+)?\.json(\.gz)?"
    for file in trace_files(path.parent) if len(index) < rows else ():
        if not re.fullmatch(pattern, file.name):
            continue
        try:
            found, steps = read(file)
        except (BadFile, MissingFile) as error:
            logger.debug("no layer names for {} from a trace: {}", path, error)
            continue
        for step in steps:
            last = {name: row for row, name in enumerate(step.names)}
            if found == run_id and len(step.names) == rows and last == index:
                return qualified(step.names, Counter(step.names))
    return None


def _inferred_names(index: dict[str, int], rows: int) -> list[str]:
    """The names of all rows from `layer_index` alone, `unnamed#<row>` where it does not say."""
    if len(index) == rows:
        return sorted(index, key=index.__getitem__)
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
