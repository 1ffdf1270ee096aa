"""Pictures from plain arrays."""

from .circuit_figures import circuit_figure
from .heat_maps import draw_heat_map, heat_map, map_figure, token_map
from .layer_bars import bars, draw_effects, effects
from .names import run_names, shortened, shortened_names
from .score_histograms import histograms
from .style import check_order, check_path, in_turn, new_figure, thinned, write_figure, written

__all__ = [
    "bars",
    "check_order",
    "check_path",
    "circuit_figure",
    "draw_effects",
    "draw_heat_map",
    "effects",
    "heat_map",
    "histograms",
    "in_turn",
    "map_figure",
    "new_figure",
    "run_names",
    "shortened",
    "shortened_names",
    "thinned",
    "token_map",
    "write_figure",
    "written",
]
