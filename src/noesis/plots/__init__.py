"""Pictures from plain arrays."""

from .figures import (
    LOUD,
    MISSING,
    SOFT,
    bars,
    draw_effects,
    draw_heat_map,
    effects,
    heat_map,
    new_figure,
    shortened,
    thinned,
    write_figure,
)

__all__ = [
    "LOUD",
    "MISSING",
    "SOFT",
    "bars",
    "draw_effects",
    "draw_heat_map",
    "effects",
    "heat_map",
    "new_figure",
    "shortened",
    "thinned",
    "write_figure",
]
