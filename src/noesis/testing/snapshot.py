"""What a run did, as a small file that people read, and in which words another run differs from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import files
from ..errors import BadType, BadValue, WrongState
from ..numerics import Floats, Ints
from ..results import COUNTS, Divergence, Saved, Soulprint, Trace, allowances, allowed, divergences
from ..text import counted, first_few, plain

#: What is written of a number is this much finer than what it may differ by, at least.
FINER = 10
#: What of a run's meta says how exactly it computed.
PRECISION = ("dtype", "autocast")
INFINITIES = ("Infinity", "-Infinity")


@dataclass(eq=False, repr=False)
class Snapshot(Saved):
    """What a run did: the statistics of each layer, step by step or averaged over the steps.

    A layer that did not run in a step has no row there, so `calls` are 0 and values NaN.

    Attributes:
        values: float64 [steps, layers, stats], rounded to what matters at the tolerance.
        layers: dotted names of those that ran.
        stats: names of the last axis.
        steps: int [steps], the number of the forward each step was; of a soulprint, 0 alone.
        order: int [steps, layers], when a layer first ran within the step, from 1; 0 if it did not.
        calls: int [steps, layers], how often it ran within the step.
        averaged: of a soulprint, over how many steps it was averaged; None of a trace.
        tolerance: by how much of the size of a layer's elements another run may differ; None for what its dtype rounds.
        meta: the dtype of its parameters, and that of autocast where it was on.

    Examples:
        >>> import noesis
        >>> from noesis.testing import snapshot
        >>> before = snapshot.Snapshot.of(noesis.Soulprint([0.0, 1.0], [1.0, 1.0], ["conv", "head"]))
        >>> after = snapshot.Snapshot.of(noesis.Soulprint([0.0, 1.5], [1.0, 1.0], ["conv", "head"]))
        >>> print("".join(before.differences(after)))
        first: layer head, mean: expected 1, got 1.5; 0.5 apart, 2.77e+04 times the 1.8e-05 that is allowed
    """

    kind: ClassVar[str] = "snapshot"
    suffixes: ClassVar[str] = ".json"

    values: Floats
    layers: list[str]
    stats: tuple[str, ...]
    steps: Ints
    order: Ints
    calls: Ints
    averaged: int | None = None
    tolerance: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    dropped_steps: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    @classmethod
    def of(cls, run: Any, tolerance: float | None = None) -> Snapshot:
        """That of a wrapped model's run, of a `Trace`, or of a `Soulprint`.

        Raises:
            NoesisError: for anything else, a run in which no layer ran, or a tolerance below 0.
        """
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise BadValue(
                f"tolerance={tolerance!r}", "a number from 0", "0 means bitwise equal, None as the dtype rounds"
            )
        if not isinstance(run, (Trace, Soulprint)) and callable(getattr(run, "trace", None)):
            run = run.trace()
        if isinstance(run, Soulprint):
            ran = np.ones((1, len(run.layers)), dtype=np.int64)
            values, order = np.stack([run.means, run.stds], axis=-1)[None], ran.cumsum(1)
            made = cls(values, run.layers, ("mean", "std"), np.zeros(1, np.int64), order, ran, run.steps)
        elif isinstance(run, Trace):
            at = np.flatnonzero((run.calls > 0).any(0))
            names = [run.layers[place] for place in at]
            made = cls(run.values[:, at], names, run.stats, run.steps, run.order[:, at], run.calls[:, at])
        else:
            raise BadType(
                f"soulprint_snapshot was given a {type(run).__name__}",
                "what noesis.wrap returned, a Trace or a Soulprint",
                "Wrap the model, run it, and pass what noesis.wrap returned",
            )
        if not made.layers:
            raise WrongState("There is nothing to compare: no observed layer ran", "a run", "Run the model first")
        made.tolerance = tolerance
        made.meta = {key: run.meta[key] for key in PRECISION if run.meta.get(key)}
        made.values = _rounded(made.values, allowances(made, _within(made, made, tolerance)))
        return made

    # ------------------------------------------------------------ comparing

    def is_coarser(self, tolerance: float | None) -> bool:
        """Whether it was rounded for a larger tolerance than this."""
        wanted, had = (allowances(self, _within(self, self, each)) for each in (tolerance, self.tolerance))
        return bool((wanted < had).any())

    def differences(self, new: Snapshot) -> list[str]:
        """In which ways another run differs from this one, in words, by its tolerance; none if it does not."""
        found = [f"{key}: expected {mine}, got {its}" for key, mine, its in self._settings(new) if mine != its]
        mine, its = set(self.steps.tolist()), set(new.steps.tolist())
        if mine != its:
            found.append(
                f"steps: expected {len(mine)}, got {len(its)} (only expected: {_few(sorted(mine - its))}; "
                f"only got: {_few(sorted(its - mine))})"
            )
        for what, names in (
            ("statistics only in the snapshot", _without(self.stats, new.stats)),
            ("statistics only in this run", _without(new.stats, self.stats)),
            ("layers only in the snapshot", _without(self.layers, new.layers)),
            ("layers only in this run", _without(new.layers, self.layers)),
        ):
            if names:
                found.append(f"{what}: {_few(names)}")
        apart = list(divergences(self, new, _within(self, new, new.tolerance)))
        if apart:
            found.append(f"first: {self._told(*apart[0])}")
        if len(apart) > 1:
            layers = len({where.layer for where, _ in apart})
            worst = max(apart, key=lambda pair: pair[1])
            more = "" if worst == apart[0] else f"; the furthest: {self._told(*worst)}"
            both = counted(len(set(self.layers) & set(new.layers)), "common layer")
            found.append(f"{counted(len(apart), 'number')} in {layers} of {both} differ{more}")
        return found

    @property
    def _of_what(self) -> str:
        return "a trace" if self.averaged is None else "a soulprint"

    def _settings(self, new: Snapshot) -> Iterator[tuple[str, Any, Any]]:
        yield "kind", self._of_what, new._of_what
        for key in PRECISION:
            yield key, self.meta.get(key), new.meta.get(key)
        if self.averaged is not None and new.averaged is not None:
            yield "steps", self.averaged, new.averaged

    def _told(self, where: Divergence, times: float) -> str:
        step = f"step {where.step}, " if self.averaged is None else ""
        text = f"{step}layer {plain(where.layer)}, {where.stat}: expected {where.a:.8g}, got {where.b:.8g}"
        by = abs(where.a - where.b)
        if not math.isfinite(by):
            return text
        if not math.isfinite(times):
            return f"{text}; {by:.3g} apart, and has to be equal"
        return f"{text}; {by:.3g} apart, {times:.3g} times the {by / times:.2g} that is allowed"

    # ------------------------------------------------------------ files

    def save(self, path: files.PathLike) -> Path:
        """Write the file, whole or not at all; one that is there is replaced."""
        if Path(path).suffix != ".json":
            raise files.unknown_suffix(Path(path), self.suffixes)
        return files.write_bytes(path, self.to_json().encode())

    def to_json(self) -> str:
        """All of it as JSON with a line for each step and layer, in the order in which they ran."""
        payload = self._payload()
        rows = ",\n".join(f"  {files.dump_json(row)}" for row in payload.pop("rows"))
        head = {**files.heading(self.kind), **payload}
        lines = [f" {json.dumps(key)}: {files.dump_json(value)}," for key, value in head.items()]
        return "\n".join(["{", *lines, ' "rows": [', rows, " ]", "}", ""])

    def _payload(self) -> dict[str, Any]:
        known = {"averaged": self.averaged, "tolerance": self.tolerance}
        return {
            **self.meta,
            **{key: value for key, value in known.items() if value is not None},
            "columns": [*self._places(), *self.stats],
            "rows": list(self._rows()),
        }

    def _places(self) -> list[str]:
        return ["step", "layer", "calls"] if self.averaged is None else ["layer"]

    def _rows(self) -> Iterator[list[Any]]:
        for i, step in enumerate(self.steps.tolist()):
            ran = np.flatnonzero(self.calls[i] > 0)
            for at in ran[np.argsort(self.order[i, ran], kind="stable")]:
                numbers = files.number_lists(self.values[i, at])
                whole = [
                    int(value) if stat in COUNTS and isinstance(value, float) else value
                    for stat, value in zip(self.stats, numbers, strict=True)
                ]
                name, calls = self.layers[at], int(self.calls[i, at])
                yield [step, name, calls, *whole] if self.averaged is None else [name, *whole]

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Snapshot:
        averaged, tolerance = payload.get("averaged"), payload.get("tolerance")
        if averaged is not None:
            _check(averaged, "averaged")
        places = 3 if averaged is None else 1
        stats = tuple(str(name) for name in payload["columns"][places:])
        rows = [row if averaged is None else [0, row[0], 1, *row[1:]] for row in payload["rows"]]
        steps, layers = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
        if not rows or not {"mean", "std"} <= set(stats) or not all(isinstance(name, str) for name in layers):
            raise ValueError("no rows, no mean and std, or layers without names")
        shape = (len(steps), len(layers))
        values, order, calls = np.full((*shape, len(stats)), np.nan), np.zeros(shape, int), np.zeros(shape, int)
        for counter in (at for at, name in enumerate(stats) if name in COUNTS):
            values[..., counter] = 0
        at_step, at_layer = ({name: at for at, name in enumerate(names)} for names in (steps, layers))
        for number, (step, name, times, *numbers) in enumerate(rows, start=1):
            at = at_step[_check(step, "step")], at_layer[name]
            if calls[at] or len(numbers) != len(stats) or not _check(times, "calls"):
                raise ValueError(f"row {number}")
            values[at], order[at], calls[at] = [_number(each) for each in numbers], number, times
        meta = {key: payload[key] for key in PRECISION if key in payload}
        tolerance = None if tolerance is None else _number(tolerance)
        return cls(values, layers, stats, np.asarray(steps, dtype=np.int64), order, calls, averaged, tolerance, meta)


def _within(a: Snapshot, b: Snapshot, tolerance: float | None) -> tuple[float, float]:
    """As within one machine, and in the size of the elements too: on others, sums are rounded in another order."""
    base, rounding = allowed(a, b, tolerance)
    return base, max(base, rounding)


def _rounded(values: Floats, allowed: Floats) -> Floats:
    """Numbers with the decimals that matter where so much is allowed; all of them where nothing is."""
    return np.reshape([_shortest(*pair) for pair in zip(values.flat, allowed.flat, strict=True)], values.shape)


def _shortest(value: float, allowed: float) -> float:
    if not (math.isfinite(value) and 0 < allowed < math.inf):
        return float(value)
    return round(float(value), math.ceil(-math.log10(allowed / FINER))) + 0.0  # no -0.0


def _check(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{what} is {value!r}")
    return value


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) and value not in INFINITIES:
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _without(names: Iterable[str], others: Iterable[str]) -> list[str]:
    others = set(others)
    return [name for name in names if name not in others]


def _few(names: Iterable[Any]) -> str:
    return first_few([plain(str(name)) for name in names])
