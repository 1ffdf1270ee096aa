"""Pictures from plain arrays."""

from .figures import bars, draw_effects, draw_heat_map, effects, heat_map, histograms
from .style import LOUD, MISSING, SOFT, new_figure, shortened, thinned, write_figure

__all__ = [
    "LOUD",
    "MISSING",
    "SOFT",
    "bars",
    "draw_effects",
    "draw_heat_map",
    "effects",
    "heat_map",
    "histograms",
    "new_figure",
    "shortened",
    "thinned",
    "write_figure",
]
