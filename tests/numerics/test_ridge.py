"""Ridge probes of many targets at once, folds and shuffles that keep groups together."""

from __future__ import annotations

import numpy as np
import pytest

from noesis.numerics import group_folds, ridge_predictions, shuffled
from noesis.numerics.ridge import PENALTIES


def test_no_group_is_split_and_parts_are_of_about_one_size() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 40, size=500)
    parts = group_folds(groups, 5, generator)
    assert sorted(np.concatenate(parts).tolist()) == list(range(500))
    owners = [set(groups[part]) for part in parts]
    assert all(not a & b for i, a in enumerate(owners) for b in owners[:i])
    assert max(map(len, parts)) - min(map(len, parts)) <= 20


def test_predictions_are_those_of_ridge_regression_with_the_penalty_of_least_gcv() -> None:
    """Against the normal equations, target by target."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 6)) * [1, 5, 0.1, 1, 1, 0] + 3.0  # one feature is constant
    targets = np.stack([x[:, :1] + generator.normal(size=(40, 1)), generator.normal(size=(40, 1))], axis=1)
    folds = group_folds(np.arange(40), 4, generator)
    found = ridge_predictions(x, targets, folds)
    part, rest = folds[1], np.setdiff1d(np.arange(40), folds[1])
    scale = np.where(x[rest].std(0) > 0, x[rest].std(0), 1.0)
    a, b = (x[rest] - x[rest].mean(0)) / scale, (x[part] - x[rest].mean(0)) / scale
    unit = (np.linalg.svd(a, compute_uv=False) ** 2).mean()
    for target in range(2):
        y = targets[rest, target, 0]
        best = None
        for penalty in PENALTIES * unit:
            inverse = np.linalg.inv(a.T @ a + penalty * np.eye(6))
            hat = a @ inverse @ a.T
            gcv = ((y - y.mean() - hat @ (y - y.mean())) ** 2).sum() / (1 - (1 + np.trace(hat)) / len(rest)) ** 2
            if best is None or gcv < best[0]:
                best = (gcv, b @ inverse @ a.T @ (y - y.mean()) + y.mean())
        assert best is not None
        assert np.allclose(found[part, target, 0], best[1])


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 2, 3, 4]])
def test_labels_of_a_group_go_together(sizes: list[int]) -> None:
    groups = np.repeat(np.arange(4), sizes)
    one_each = np.array([5, 6, 7, 8])[groups]
    for order in shuffled(one_each, groups, 50, np.random.default_rng(0)):
        taken = one_each[order]
        assert all(len(set(taken[groups == group])) == 1 for group in range(4))
        assert len(set(taken)) == 4
    several = np.arange(len(groups))
    for order in shuffled(several, groups, 50, np.random.default_rng(0)):
        assert sorted(several[order]) == list(several)
        if len(set(sizes)) == 1:  # whole groups, in their order
            assert (several[order].reshape(4, 3) % 3 == [0, 1, 2]).all()
