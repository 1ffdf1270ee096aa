"""The arrays of a trace: one declaration each, from which making, slicing, saving, loading and merging follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import Arrays
from ..kernels import layout
from ..numerics import Floats, Ints
from .runs import Recorded
from .statistics import COUNTS, fields_of
from .tabular import Cells

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """One array of a trace, which is also a field of `Trace`.

    Attributes:
        name: of the field, and in files.
        axes: "steps", "layers", "stats", or a size.
        dtype: float for float64; int for int64 from 0; str for a list of names or None, in the header of files.
        field: which field of the rows [steps, layers, FIELDS] it is, if it is one.
        known: which part of what is known of each step [steps, KNOWN] it is, if it is one; names are codes there.
        absent: what it is where nobody said, from which layers ran [steps, layers]; None where somebody has to.
        merged: for what is known of steps, that of all ranks from each rank's [ranks, steps], NaN where a rank lacks
            the step.
        optional: whether there are files of the current version without it.
        singular: what it is called in a table with a row per step and layer; None where it is not in it.
    """

    name: str
    axes: tuple[str | int, ...]
    dtype: type
    field: int | None = None
    known: int | None = None
    absent: Callable[[Mask], Any] | None = None
    merged: Callable[[Floats], Floats] | None = None
    optional: bool = False
    singular: str | None = None

    def at(self, value: Any, mask: Mask) -> Any:
        """That of some steps alone."""
        if self.axes[0] != "steps":
            return value
        return [each for each, yes in zip(value, mask, strict=True) if yes] if self.dtype is str else value[mask]

    def read(self, value: Any, sizes: Mapping[str, int], name: str) -> Any:
        """What a file holds under this name, if it is one of these.

        Raises:
            ValueError: if it is not.
        """
        shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)
        if self.dtype is str:
            names = [None if each is None else str(each) for each in value]
            if (len(names),) != shape:
                raise ValueError(f"{name} has {len(names)} entries, expected {shape[0]}")
            return names
        if value.shape != shape and value.size + np.prod(shape):
            raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
        numbers = value.reshape(shape).astype(np.float64, copy=False)
        return whole(numbers, name) if self.dtype is int else numbers


def whole(array: Floats, name: str) -> Ints:
    """Whole numbers from 0, that a file holds as floats.

    Raises:
        ValueError: for others.
    """
    if not (np.isfinite(array) & (array >= 0) & (array < 2**53) & (array == np.floor(array))).all():
        raise ValueError(f"{name} holds something else than whole numbers from 0")
    return array.astype(np.int64)


# ---------------------------------------------------------------- where nobody said


def _in_turn(ran: Mask) -> Ints:
    return np.where(ran, np.arange(1, ran.shape[1] + 1), 0)


def _once(ran: Mask) -> Ints:
    return ran.astype(np.int64)


def _nan(ran: Mask) -> Floats:
    return np.full(len(ran), np.nan)


def _zero(ran: Mask) -> Ints:
    return np.zeros(len(ran), dtype=np.int64)


def _nameless(ran: Mask) -> list[str | None]:
    return [None] * len(ran)


# ---------------------------------------------------------------- over ranks


def _alike(parts: Floats) -> Floats:
    """What all ranks say that have the step; NaN where they differ, which `merged_known` tells."""
    least: Floats = np.fmin.reduce(parts)
    return np.where(least == np.fmax.reduce(parts), least, np.nan)


def _added(parts: Floats) -> Floats:
    added: Floats = np.nansum(parts, axis=0)
    return added


def _of_one_clock(parts: Floats) -> Floats:
    """The lowest rank's that has any: those of two ranks, which began their runs apart, make no differences."""
    timed = np.flatnonzero(np.isfinite(parts).any(1))
    first: Floats = parts[timed[0] if len(timed) else 0]
    return first


#: In the order of the arrays in a file. How rows, `totals` and `averages` merge, `noesis.distributed` knows.
COLUMNS = (
    Column("values", ("steps", "layers", "stats"), float),
    Column("steps", ("steps",), int, known=layout.NUMBER, merged=_alike, singular="step"),
    Column("order", ("steps", "layers"), int, field=layout.ORDER, absent=_in_turn, singular="order"),
    Column("calls", ("steps", "layers"), int, field=layout.CALLS, absent=_once, singular="calls"),
    Column("totals", ("layers", "stats"), float),
    Column("averages", ("layers", 3), float),
    Column("timesteps", ("steps",), float, known=layout.TIMESTEP, absent=_nan, merged=_alike, singular="timestep"),
    Column("batches", ("steps",), int, known=layout.BATCH, absent=_zero, merged=_added, singular="batch_size"),
    Column("branches", ("steps",), str, known=layout.BRANCH, absent=_nameless, merged=_alike, singular="branch"),
    Column(
        "seconds",
        ("steps",),
        float,
        known=layout.SECONDS,
        absent=_nan,
        merged=_of_one_clock,
        optional=True,
        singular="seconds",
    ),
)


# ---------------------------------------------------------------- from what was recorded, and back


def from_rows(rows: Floats) -> dict[str, Any]:
    """The columns that are fields of rows [steps, layers, FIELDS], by name."""
    return {column.name: rows[..., column.field].astype(column.dtype) for column in COLUMNS if column.field is not None}


def to_rows(trace: Recorded, at: Ints) -> Floats:
    """The rows of a trace's steps at these positions [len(at), layers, FIELDS]."""
    rows = fields_of(trace.values[at], trace.stats)
    for column in COLUMNS:
        if column.field is not None:
            rows[..., column.field] = getattr(trace, column.name)[at]
    return rows


def from_known(known: Floats, names: Sequence[str]) -> dict[str, Any]:
    """The columns of what is known of steps [steps, KNOWN], by name; codes count `names`, and none is -1 or NaN."""
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        if column.known is not None:
            told = known[:, column.known]
            named = column.dtype is str
            columns[column.name] = (
                [names[int(code)] if code >= 0 else None for code in told] if named else told.astype(column.dtype)
            )
    return columns


def names_of(trace: Recorded) -> list[str]:
    """All names that its steps go by."""
    columns = [getattr(trace, column.name) for column in COLUMNS if column.dtype is str]
    return list(dict.fromkeys(name for names in columns for name in names if name is not None))


def to_known(trace: Recorded, at: Ints, names: Sequence[str]) -> Floats:
    """What is known of a trace's steps at these positions [len(at), KNOWN]."""
    codes = {name: code for code, name in enumerate(names)}
    known = np.full((len(at), layout.KNOWN), np.nan)
    for column in COLUMNS:
        if column.known is not None:
            told = getattr(trace, column.name)
            known[:, column.known] = [codes.get(told[i], -1) for i in at] if column.dtype is str else told[at]
    return known


def merged_known(parts: Floats) -> tuple[Floats, list[str]]:
    """What all ranks together know of steps, from each rank's [ranks, steps, KNOWN], and where they differ."""
    known, differing = np.full(parts.shape[1:], np.nan), []
    for column in COLUMNS:
        if column.known is not None and column.merged is not None:
            told = parts[..., column.known]
            merged = column.merged(told)
            known[:, column.known] = merged
            if column.merged is _alike and (np.isnan(merged) & ~np.isnan(told).all(0)).any():
                differing.append(column.name)
    return known, differing


# ---------------------------------------------------------------- in files


def to_arrays(trace: Recorded) -> Arrays:
    """The columns that files hold as arrays."""
    return {column.name: getattr(trace, column.name) for column in COLUMNS if column.dtype is not str}


def to_header(trace: Recorded) -> dict[str, Any]:
    """The columns that files hold in their header."""
    return {column.name: getattr(trace, column.name) for column in COLUMNS if column.dtype is str}


def from_file(
    arrays: Arrays, header: Mapping[str, Any], layers: int, stats: Sequence[str], prefix: str
) -> dict[str, Any]:
    """The columns by name, from the arrays of a file, which are taken out of it one by one, and its header.

    Raises:
        KeyError, ValueError: where one is not there, or is something else.
    """
    values = arrays[prefix + "values"]
    sizes = {"steps": len(values), "layers": layers, "stats": len(stats)}
    found: dict[str, Any] = {}
    for column in COLUMNS:
        text = column.dtype is str
        name = column.name if text else prefix + column.name
        if column.optional and column.absent is not None and name not in (header if text else arrays):
            found[column.name] = column.absent(found["values"][..., stats.index("count")] > 0)
        else:
            found[column.name] = column.read(header[name] if text else arrays.pop(name), sizes, name)
    return found


# ---------------------------------------------------------------- as a table


def to_table(trace: Recorded) -> dict[str, Cells]:
    """The columns of a table with a row per step and layer: what is known of the step, then of the layer in it."""
    layers = len(trace.layers)
    of_steps: dict[str, Cells] = {}
    of_layers: dict[str, Cells] = {"layer": trace.layers * len(trace)}
    for column in COLUMNS:
        value = getattr(trace, column.name)
        if column.singular is None:
            continue
        if "layers" in column.axes:
            of_layers[column.singular] = value.ravel()
        elif column.dtype is str:
            of_steps[column.singular] = [name for name in value for _ in range(layers)]
        else:
            of_steps[column.singular] = value.repeat(layers)
    return of_steps | of_layers | _of_statistics(trace)


def _of_statistics(trace: Recorded) -> dict[str, Cells]:
    found: dict[str, Cells] = {}
    for place, name in enumerate(trace.stats):
        values = trace.values[..., place].ravel()
        found[name] = values.astype(np.int64) if name in COUNTS and np.isfinite(values).all() else values
    return found
