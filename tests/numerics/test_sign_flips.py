"""The sign-flip test: against every pattern written out, and by how often it is wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from noesis.numerics import pairs_needed, sign_flip_test


@pytest.mark.parametrize("pairs", [1, 2, 5, 9])
def test_every_pattern_is_tried_of_few_pairs(pairs: int) -> None:
    x = np.random.default_rng(pairs).normal(0.4, 1, (pairs, 6))
    x[0, 2] = 0
    signs = np.array(list(itertools.product([1, -1], repeat=pairs)))
    expected = (np.abs(signs @ x) >= np.abs(x.sum(0)) - 1e-12).mean(0)
    np.testing.assert_allclose(sign_flip_test(x), expected)


def test_ties_are_as_extreme() -> None:
    """Sums of the same numbers in another order differ in their last bits."""
    x = np.full((10, 1), 0.1)
    assert sign_flip_test(x)[0] == 2 / 2**10
    x[0] = -0.1  # as extreme as any single other minus: 2 x (1 + 10) patterns
    assert sign_flip_test(x)[0] == 22 / 2**10


@pytest.mark.parametrize("pairs", [8, 40])
def test_p_values_of_nothing_are_uniform(pairs: int) -> None:
    """Symmetric noise, whose size differs from pair to pair: p <= alpha in alpha of the cells."""
    rng = np.random.default_rng(pairs)
    x = rng.normal(size=(pairs, 1000)) * rng.exponential(size=(pairs, 1))
    p = sign_flip_test(x)
    for alpha in (0.05, 0.2, 0.5, 0.9):
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=0.045)
    assert sign_flip_test(np.zeros((pairs, 3))).tolist() == [1.0] * 3


def test_drawn_patterns_agree_with_all_of_them_and_are_never_zero() -> None:
    x = np.random.default_rng(0).normal(0.5, 1, (15, 8))
    exact = sign_flip_test(x)  # all of them
    padded = np.vstack([x, np.zeros((30, 8))])  # pairs that say nothing: the same test, with patterns drawn
    np.testing.assert_allclose(sign_flip_test(padded), exact, atol=0.01)
    assert np.array_equal(sign_flip_test(padded), sign_flip_test(padded))
    sure = np.ones((60, 1))
    assert sign_flip_test(sure)[0] == 1 / (1 + 2**15)
    assert sign_flip_test(np.ones((60, 1000))).max() < 0.05 / 1000  # more cells take more patterns
    assert sign_flip_test(np.ones((2000, 1)))[0] > 0
    assert sign_flip_test(np.ones((0, 2))).tolist() == [1.0, 1.0]


def test_pairs_that_it_takes() -> None:
    for level, cells in [(0.05, 1), (0.01, 1), (0.05, 144), (0.2, 768), (0.5, 1)]:
        least = pairs_needed(level, cells)
        assert cells * 2 / 2**least <= level < cells * 2 / 2 ** (least - 1)
