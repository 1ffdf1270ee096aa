"""The paired sign-flip test: is the mean of differences not zero, with nothing assumed but symmetry."""

from __future__ import annotations

import numpy as np

from .arrays import Floats

#: Patterns of signs that are all tried; of more, as many are drawn.
LEAST_DRAWS, MOST_DRAWS = 1 << 15, 1 << 17
#: Patterns per cell, where there are many cells: adjusted for all of them, a single one's p has to be small enough.
DRAWS_PER_CELL = 100
#: Numbers that are held at a time.
HELD = 1 << 23


def sign_flip_test(differences: Floats, *, seed: int = 0) -> Floats:
    """Two-sided p-values of the mean of paired differences, if the sign of each were left to chance.

    All 2^n patterns of signs are tried where there are few; else patterns are drawn, and
    p = (1 + as extreme as the data) / (1 + drawn), which is no smaller than it should be (Phipson and Smyth 2010,
    "Permutation p-values should never be zero"). A pair whose difference is 0 says nothing, whatever its sign.

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import sign_flip_test
        >>> sign_flip_test(np.array([[1.0, 1.0, 0.0], [2.0, -2.0, 0.0], [3.0, 1.0, 0.0]]))
        array([0.25, 1.  , 1.  ])

    Args:
        differences: finite float64 [pairs, cells].
        seed: of the patterns, where they are drawn.

    Returns:
        float64 [cells].
    """
    found = np.ones(differences.shape[1])
    moved = differences.any(0)
    differences = differences[:, moved]
    pairs, cells = differences.shape
    if not cells:
        return found
    size = np.abs(differences).sum(0)
    least = np.abs(differences.sum(0)) - 1e-9 * size  # sums of the same numbers in another order are as extreme
    draws = int(np.clip(DRAWS_PER_CELL * cells, LEAST_DRAWS, MOST_DRAWS))
    exact = pairs - 1 <= np.log2(draws)
    if exact:
        draws = 2 ** (pairs - 1)  # a pattern and its reverse are as extreme: the first sign stays
    generator = np.random.default_rng(seed)
    extreme = np.zeros(cells)
    step = max(1, HELD // max(pairs, cells))
    for first in range(0, draws, step):
        count = min(step, draws - first)
        if exact:
            flipped = (np.arange(first, first + count)[:, None] >> np.arange(pairs)) & 1
        else:
            flipped = generator.integers(0, 2, size=(count, pairs), dtype=np.int8)
        sums = (1.0 - 2.0 * flipped) @ differences
        extreme += (np.abs(sums) >= least).sum(0)
    found[moved] = extreme / draws if exact else (1 + extreme) / (1 + draws)
    return found


def pairs_needed(level: float, cells: int = 1) -> int:
    """Pairs without which the sign-flip test can call nothing significant: 2 / 2^n is its smallest p.

    Examples:
        >>> from noesis.numerics import pairs_needed
        >>> pairs_needed(0.05), pairs_needed(0.05, cells=144)
        (6, 13)

    Args:
        level: what p, or the false discovery rate, may be.
        cells: of how many only one differs.
    """
    return int(np.ceil(np.log2(2 * cells / level)))
