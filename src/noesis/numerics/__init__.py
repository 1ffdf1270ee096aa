"""Algorithms on plain arrays: significance, k-means, alignment, sampling."""

from .alignment import Token, align, with_substitutions
from .arrays import Floats, Ints, as_floats, no_nan
from .clustering import k_means, spread_start
from .cosine import cosine_delta
from .sampling import Reservoir
from .sign_flips import pairs_needed, sign_flip_test
from .significance import benjamini_hochberg, layer_tests, paired_tests

__all__ = [
    "Floats",
    "Ints",
    "Reservoir",
    "Token",
    "align",
    "as_floats",
    "benjamini_hochberg",
    "cosine_delta",
    "k_means",
    "layer_tests",
    "no_nan",
    "paired_tests",
    "pairs_needed",
    "sign_flip_test",
    "spread_start",
    "with_substitutions",
]
