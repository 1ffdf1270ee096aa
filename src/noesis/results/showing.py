"""A trace for people: as text, and as a picture whose colours, marks and labels say what happened."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from .. import files
from ..errors import BadValue
from ..numerics import Floats, Ints
from ..text import counted, plain, table
from .runs import Recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Shown(Recorded, Protocol):
    """A trace, with what is said of it."""

    totals: Floats
    seconds: Floats
    branches: list[str | None]
    unmeasured: dict[str, str]

    def __getitem__(self, stat: str) -> Floats:
        """One statistic as float64 [steps, layers]."""
        ...

    @property
    def samples(self) -> Sized:
        """Traces of the elements of a batch."""
        ...

    @property
    def never_ran(self) -> list[str]:
        """Layers that did not run."""
        ...

    def first_nonfinite(self) -> tuple[int, str] | None:
        """Step and layer of the first NaN or infinity."""
        ...


def first_ran(order: Ints) -> Ints:
    """`order` [steps, layers] of each layer in the first step it ran in, int [layers]; 0 if it never ran."""
    if not len(order):
        return np.zeros(order.shape[1], dtype=np.int64)
    first: Ints = order[(order > 0).argmax(0), range(order.shape[1])]
    return first


# ---------------------------------------------------------------- as text


def text_of(trace: Shown) -> str:
    """The totals of each layer in a table, and what is out of the ordinary."""
    stats = trace.stats
    head = f"Trace of {counted(len(trace), 'step')} x {counted(len(trace.layers), 'layer')} x {len(stats)} stats"
    if (pace := _seconds_per_step(trace)) is not None:
        head += f", {pace:.3g} s per step" if pace >= 1 else f", {1000 * pace:.3g} ms per step"
    if trace.dropped_steps:
        head += f" ({trace.dropped_steps} earlier steps are in the totals only)"
    if trace.samples:
        head += f", {counted(len(trace.samples), 'sample')}"
    shown = [name for name in stats if name != "count"]
    columns, silent = [stats.index(name) for name in shown], set(trace.never_ran)
    lines = [
        [name, *(f"{value:.4g}" for value in trace.totals[index, columns])]
        for index, name in enumerate(trace.layers)
        if name not in silent
    ]
    parts = [head, table(["layer", *shown], lines)]
    if trace.never_ran:
        parts.append(f"never ran: {', '.join(map(plain, trace.never_ran))}")
    parts += [f"not measured: {plain(name)} ({plain(why)})" for name, why in trace.unmeasured.items()]
    if note := _note(trace):
        parts.append(note)
    return "\n".join(parts)


def _seconds_per_step(trace: Shown) -> float | None:
    """From the begin of a step to that of the next, in the median; the first, which may compile, is left out."""
    timed = np.isfinite(trace.seconds)
    passed, steps = np.diff(trace.seconds[timed])[1:], np.diff(trace.steps[timed])[1:]
    if not len(steps) or (steps <= 0).any() or (passed < 0).any():  # files may hold anything
        return None
    return float(np.median(passed / steps))


# ---------------------------------------------------------------- as a picture


#: What colours of statistics are that are no numbers of the output's own kind.
UNITS = {
    "count": "finite elements",
    "nonfinite": "NaN and infinite elements",
    "zeros": "elements that are zero",
}


def draw_trace(trace: Shown, stat: str, path: files.PathLike | None, scale: str, order: str) -> Figure:
    """See `Trace.plot`."""
    from .. import plots

    plots.check_path(path)
    plots.check_order(order)
    if scale not in ("all", "layer"):
        raise BadValue(f"scale={scale!r}", '"all" or "layer"', 'Pass scale="layer" for a scale per layer')
    values = trace[stat]
    if not values.size:
        raise BadValue(
            f"The trace has {counted(len(trace), 'step')} and {counted(len(trace.layers), 'layer')}",
            "at least one of each",
            "Run the model first",
        )
    nonfinite = trace["nonfinite"] > 0
    silent = (trace["count"] == 0) & ~nonfinite
    rows = plots.in_turn(first_ran(trace.order)) if order == "run" else np.arange(len(trace.layers))
    by: Literal["all", "row"] = "row" if scale == "layer" else "all"
    figure = plots.map_figure(trace.layers, len(trace), by)
    column_axis, columns = _columns(trace)
    plots.draw_heat_map(
        figure.add_subplot(),
        np.where(silent, np.nan, values).T[rows],
        [trace.layers[at] for at in rows],
        columns,
        title=f"{stat} by layer and {column_axis}",
        row_axis="layer, in the order they run" if order == "run" else "layer, in the order of the model's modules",
        column_axis=column_axis,
        colour_bar=UNITS.get(stat, f"{stat} of the layer's output"),
        scale=by,
        nonfinite=np.zeros_like(nonfinite.T) if stat == "nonfinite" else nonfinite.T[rows],
        missing="no value" if (trace.calls[silent] > 0).any() else "did not run",
        note=_note(trace),
    )
    return plots.written(figure, path)


def _columns(trace: Shown) -> tuple[str, list[str]]:
    """What steps are called, and each step: by timesteps where a sampler goes from one to the next."""
    timesteps = trace.timesteps
    moves = np.diff(timesteps)
    sampled = np.isfinite(timesteps).all() and ((moves <= 0).all() or (moves >= 0).all()) and (moves != 0).any()
    labels = [f"{timestep:.4g}" for timestep in timesteps] if sampled else [str(step) for step in trace.steps.tolist()]
    if len(set(trace.branches)) > 1:
        labels = [f"{label} {branch or ''}".rstrip() for label, branch in zip(labels, trace.branches, strict=True)]
    return "timestep" if sampled else "step", labels


def _note(trace: Shown) -> str:
    found = trace.first_nonfinite()
    return "" if found is None else f"first NaN or infinity: step {found[0]}, layer {plain(found[1])}"
