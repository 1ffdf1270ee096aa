"""Pictures from plain arrays."""

from .heat_maps import draw_heat_map, heat_map, token_map
from .layer_bars import bars, draw_effects, effects
from .score_histograms import histograms
from .style import SOFT, new_figure, shortened, thinned, write_figure

__all__ = [
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
    "token_map",
    "write_figure",
]
