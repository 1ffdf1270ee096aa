"""Algorithms on plain arrays: significance, k-means, alignment, sampling, probes."""

from .alignment import Token, align, with_substitutions
from .arrays import Floats, Ints, as_floats, no_nan
from .clustering import k_means, spread_start
from .cosine import cosine_delta
from .ridge import group_folds, ridge_predictions, shuffled
from .sampling import Reservoir
from .sign_flips import pairs_needed, sign_flip_test
from .significance import benjamini_hochberg, layer_tests, paired_tests, roc_auc

__all__ = [
    "Floats",
    "Ints",
    "Reservoir",
    "Token",
    "align",
    "as_floats",
    "benjamini_hochberg",
    "cosine_delta",
    "group_folds",
    "k_means",
    "layer_tests",
    "no_nan",
    "paired_tests",
    "pairs_needed",
    "ridge_predictions",
    "roc_auc",
    "shuffled",
    "sign_flip_test",
    "spread_start",
    "with_substitutions",
]
