"""Circuits: nodes by layers from bottom to top, edges as wide as their scores, and the curve of faithfulness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .. import files
from .names import shortened
from .style import GRID, INK, LOUD, SOFT, check_path, label_axis, new_figure, set_frame, set_title, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What an edge leads to: a colour that the colour-blind can tell from the others (Okabe and Ito 2008), and a dash.
KINDS = {
    "q": ("#0072B2", "solid", "queries"),
    "k": ("#D55E00", (0, (5, 1.5)), "keys"),
    "v": ("#009E73", (0, (1.5, 1)), "values"),
    "mlp": ("#CC79A7", "dashdot", "mlp"),
    "logits": ("#57606a", "solid", "logits"),
}
#: Points that edges are wide, from the smallest score to the largest.
WIDTHS = (0.7, 3.4)
#: More edges than this are drawn faintly.
CROWDED_EDGES = 60
CURVE = "#2f6db3"


def circuit_figure(
    nodes: Sequence[tuple[str, str, int, int]],
    edges: Sequence[tuple[str, str, str, float]],
    shares: ArrayLike,
    curve: ArrayLike,
    *,
    size: float,
    faithfulness: float,
    title: str,
    note: str = "",
    level: str = "edges",
    path: files.PathLike | None = None,
) -> Figure:
    """Draw a circuit, and beside it how faithful circuits of other sizes are.

    Examples:
        >>> from noesis.plots import circuit_figure
        >>> nodes = [("embed", "embed", 0, -1), ("z.0.1", "head 0.1", 1, 1), ("logits", "logits", 9, -1)]
        >>> edges = [("embed", "z.0.1", "v", 1.0), ("z.0.1", "logits", "logits", 0.5)]
        >>> figure = circuit_figure(nodes, edges, [0.1, 1], [0.8, 1], size=0.1, faithfulness=0.8, title="two edges")
        >>> len(figure.axes)
        2

    Args:
        nodes: name, label, height (the order of rows), and order within the row, -1 for what is no head.
        edges: from, to, what it leads to (`q`, `k`, `v`, `mlp`, `logits`), score.
        shares: sizes of the curve, as shares of all parts.
        curve: faithfulness at each.
        size: of the circuit, as a share.
        faithfulness: of the circuit.
        title: of the picture.
        note: beneath it.
        level: what parts are called.
        path: where to write it too.
    """
    check_path(path)
    heights = sorted({node[2] for node in nodes})
    rows = [[node for node in nodes if node[2] == height] for height in heights]
    widest = max((len(row) for row in rows), default=1)
    figure = new_figure(min(24.0, max(9.0, 4.8 + 1.0 * widest)), min(20.0, max(4.2, 1.5 + 0.85 * len(rows))))
    graph, beside = figure.subplots(1, 2, width_ratios=(max(2.0, widest * 0.45), 1.2))
    _draw_graph(graph, rows, edges)
    there = {kind for _, _, kind, _ in edges}
    key = {name: colour for kind, (colour, _, name) in KINDS.items() if kind in there}
    set_title(graph, title, note, {f"into {name}": colour for name, colour in key.items()} or None)
    _draw_curve(beside, np.asarray(shares, float), np.asarray(curve, float), size, faithfulness, level)
    return written(figure, path)


def _draw_graph(axes: Axes, rows: Sequence[Sequence[Any]], edges: Sequence[tuple[str, str, str, float]]) -> None:
    from matplotlib.patches import FancyArrowPatch

    places: dict[str, tuple[float, float]] = {}
    aside = max((len(row) for row in rows), default=1) / 2 + 0.35  # where mlps stand, so that no edge runs behind one
    for height, row in enumerate(rows):
        for at, (name, _, _, order) in enumerate(sorted(row, key=lambda node: node[3])):
            # Odd rows stand off the middle, so that an edge that skips a row does not run through its nodes.
            shift = 0.28 * (1 if height % 4 == 1 else -1) if height % 2 and height < len(rows) - 1 else 0.0
            alone = order < 0 and 0 < height < len(rows) - 1
            places[name] = (aside if alone else at - (len(row) - 1) / 2 + shift, float(height))
    axes.set_facecolor("white")
    axes.set_axis_off()
    reach = max((abs(x) for x, _ in places.values()), default=0.5) + 0.75
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    largest = max((score for *_, score in edges), default=1.0) or 1.0
    faint = 0.35 if len(edges) > CROWDED_EDGES else 0.85
    turns: dict[tuple[str, str], int] = {}
    for start, end, kind, score in sorted(edges, key=lambda edge: edge[3]):
        colour, dash, _ = KINDS[kind]
        turn = turns[start, end] = turns.get((start, end), -1) + 1  # those between two nodes stand apart
        skips = abs(places[end][1] - places[start][1]) > 1
        bend = (-1) ** turn * (0.2 * ((turn + 1) // 2) + 0.1 * skips)
        axes.add_patch(
            FancyArrowPatch(
                places[start],
                places[end],
                arrowstyle="-|>",
                mutation_scale=9,
                shrinkA=13,
                shrinkB=13,
                connectionstyle=f"arc3,rad={bend}",
                linewidth=WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * score / largest,
                linestyle=dash,
                color=colour,
                alpha=faint,
                zorder=1,
            )
        )
    words: dict[str, Any] = {"parse_math": False, "usetex": False}
    for row in rows:
        for name, label, _, _ in row:
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": INK, "linewidth": 0.9}
            x, y = places[name]
            axes.text(
                x, y, shortened(label, 24), ha="center", va="center", fontsize=8, color=INK, bbox=box, zorder=3, **words
            )


def _draw_curve(axes: Axes, shares: Any, curve: Any, size: float, faithfulness: float, level: str) -> None:
    set_frame(axes)
    axes.axhline(1, color=GRID, linewidth=0.8)
    axes.axhline(0, color=GRID, linewidth=0.8)
    axes.plot(shares, curve, color=CURVE, marker="o", markersize=3, linewidth=1.4)
    axes.plot([size], [faithfulness], color=LOUD, marker="D", markersize=6, linewidth=0, label="this circuit")
    axes.legend(loc="best", fontsize=8, labelcolor=SOFT, frameon=False)
    axes.set_xscale("log")
    label_axis(axes, "x", f"share of all {level}")
    label_axis(axes, "y", "faithfulness (1: the model, 0: ablated)")
    set_title(axes, "other sizes")
