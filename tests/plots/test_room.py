"""Labels stand within the picture and not over each other, whatever the number of layers and the length of names."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import noesis
from noesis.plots import heat_map
from noesis.results import Soulprint

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg


def crowded(figure: Any) -> list[str]:
    """Labels of axes that lie outside of a figure, and pairs of those along an axis that lie over each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, found = canvas.get_renderer(), []
    for axes, which in itertools.product(figure.axes, "xy"):
        axis = getattr(axes, f"{which}axis")
        box = axis.label.get_window_extent(renderer)
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
        if axis.label.get_text() and not inside:
            found.append(f"{axis.label.get_text()!r} is cut")
        low, high = sorted(axis.get_view_interval())
        drawn = [
            tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()
        ]
        for one, other in itertools.combinations([(text, text.get_window_extent(renderer)) for text in drawn], 2):
            wide = min(one[1].x1, other[1].x1) - max(one[1].x0, other[1].x0)
            tall = min(one[1].y1, other[1].y1) - max(one[1].y0, other[1].y0)
            if wide > 1 and tall > 3:
                found.append(f"{one[0].get_text()!r} is over {other[0].get_text()!r}")
    return found


@pytest.mark.parametrize("rows", [1, 3, 6, 25, 120])
@pytest.mark.parametrize("scale", ["all", "row"])
def test_heat_maps_have_room(rows: int, scale: Any) -> None:
    values = np.random.default_rng(0).standard_normal((rows, 9))
    names = [f"model.layers.{row}.self_attn.q_proj" for row in range(rows)]
    words = {"title": "mean by layer and step", "row_axis": "layer, in the order they run", "column_axis": "step"}
    figure = heat_map(values, names, range(9), **words, colour_bar="mean of the layer's output", scale=scale)
    assert crowded(figure) == []


@pytest.mark.parametrize("spread", [0, 3, 8, 30])
@pytest.mark.parametrize("layers", [3, 40])
def test_bars_have_room(layers: int, spread: int) -> None:
    generator = np.random.default_rng(layers + spread)
    size = 10.0 ** (spread * (generator.random((2, layers)) - 0.5))
    means, stds = size[0] * generator.choice([-1, 1], layers), size[1]
    soulprint = Soulprint(layers=[f"blocks.{n}" for n in range(layers)], means=means, stds=stds)
    assert crowded(soulprint.plot()) == []
    assert crowded(soulprint.plot(soulprint)) == []
    assert noesis.compare(soulprint, soulprint).distance == 0
