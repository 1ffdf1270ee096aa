"""Least-squares probes of many targets at once, as for labels that are shuffled hundreds of times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Floats, Ints

#: Ridge penalties that are tried, in units of the mean squared singular value.
PENALTIES = 10.0 ** np.arange(-4, 4)


def group_folds(groups: Ints, folds: int, generator: np.random.Generator) -> list[Ints]:
    """Cut samples into parts of about one size, so that no group is in two: the samples of each part.

    Labels have no say in it, which is what makes shuffled labels comparable.

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import group_folds
        >>> parts = group_folds(np.array([0, 0, 1, 1, 2, 2]), 3, np.random.default_rng(0))
        >>> sorted(part.tolist() for part in parts)
        [[0, 1], [2, 3], [4, 5]]
    """
    names, members = np.unique(groups, return_inverse=True)
    sizes = np.bincount(members)
    order = generator.permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, fold_of = np.zeros(folds, np.int64), np.zeros(len(names), np.int64)
    for group in order:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return [np.flatnonzero(fold_of[members] == fold) for fold in range(folds)]


def shuffled(labels: Floats | Ints, groups: Ints, times: int, generator: np.random.Generator) -> Ints:
    """Ways to shuffle labels that keep what groups have: indices `[times, samples]` of the labels to take.

    Samples of a group are alike, so to shuffle them one by one would take any difference between groups for a finding.
    Labels that are one to a group go to other groups as such; others go on in their order, groups in another order, so
    that neighbours stay neighbours (exact where groups are of one size).

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import shuffled
        >>> labels, groups = np.array([3, 4, 5, 6]), np.array([0, 0, 1, 1])
        >>> {tuple(labels[order]) for order in shuffled(labels, groups, 20, np.random.default_rng(0))} == {
        ...     (3, 4, 5, 6),
        ...     (5, 6, 3, 4),
        ... }
        True
    """
    _, first, members = np.unique(groups, return_index=True, return_inverse=True)
    constant = bool((labels == labels[first][members]).all())
    in_order = np.argsort(members, kind="stable")
    blocks = np.split(in_order, np.cumsum(np.bincount(members))[:-1])
    found = np.empty((times, len(labels)), np.int64)
    for order in found:
        drawn = generator.permutation(len(first))
        if constant:
            order[:] = first[drawn][members]
        else:
            order[in_order] = np.concatenate([blocks[group] for group in drawn])
    return found


def ridge_predictions(x: Floats, targets: Floats, folds: Sequence[Ints]) -> Floats:
    """What ridge regression predicts for each part from the others.

    Features are standardised on the parts that are learned from. The penalty of each target is chosen on them too, by
    generalised cross-validation (Golub, Heath & Wahba 1979, "Generalized cross-validation as a method for choosing a
    good ridge parameter"). A target may have several columns, which share their penalty.

    Args:
        x: `[samples, features]`.
        targets: `[samples, targets, columns]`.
        folds: the samples of each part.

    Returns:
        float64 `[samples, targets, columns]`.
    """
    predicted = np.empty(targets.shape)
    for part in folds:
        rest = np.setdiff1d(np.arange(len(x)), part, assume_unique=True)
        centre, scale = x[rest].mean(0), x[rest].std(0)
        scale = np.where(scale > 0, scale, 1.0)
        u, s, vt = np.linalg.svd((x[rest] - centre) / scale, full_matrices=False)
        mean = targets[rest].mean(0)
        y = targets[rest] - mean
        projected = np.tensordot(u, y, axes=(0, 0))  # [rank, targets, columns]
        shrink = s**2 / (s**2 + PENALTIES[:, None] * (s**2).mean())  # [penalties, rank]
        squares = (y**2).sum((0, 2)) - (2 * shrink - shrink**2) @ (projected**2).sum(2)  # [penalties, targets]
        left = 1 - (1 + shrink.sum(1)) / len(rest)  # the mean takes a degree of freedom as well
        score = np.where(left[:, None] > 0, squares / np.maximum(left, 1e-12)[:, None] ** 2, np.inf)
        best = shrink[score.argmin(0)]  # [targets, rank]
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(s > 1e-10 * s.max(initial=0.0), best / s, 0.0)
        weights = gain.T[:, :, None] * projected
        predicted[part] = mean + np.tensordot((x[part] - centre) / scale @ vt.T, weights, axes=1)
    return predicted
