"""k-means for the codes of a layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arrays import Floats

#: Rounds of Lloyd's algorithm; by then codes move less than the noise in them.
ROUNDS = 30


def k_means(points: Floats, k: int, generator: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Codes for points, and which code each point belongs to.

    Args:
        points: [N, dim].
        k: how many codes at most; fewer come back where points coincide.
        generator: draws the start.

    Returns:
        Codes [K, dim], each with at least one point, and [N] positions among them.

    Source: Lloyd 1982, "Least squares quantization in PCM", from the start of Arthur and Vassilvitskii 2007,
    "k-means++: the advantages of careful seeding". A code that loses its points moves to the point coded worst.
    """
    codes = spread_start(points, k, generator)
    sizes = (points**2).sum(1)
    for _ in range(ROUNDS):
        distance = (codes**2).sum(1) - 2 * points @ codes.T
        nearest = distance.argmin(1)
        counts = np.bincount(nearest, minlength=len(codes))
        moved = _sums(points, nearest, len(codes)) / np.maximum(counts, 1)[:, None]
        dead = np.flatnonzero(counts == 0)
        if len(dead):
            worst = np.argsort(-(distance[np.arange(len(points)), nearest] + sizes), kind="stable")
            moved[dead] = points[worst[: len(dead)]]
        elif np.allclose(moved, codes):
            break
        codes = moved
    nearest = ((codes**2).sum(1) - 2 * points @ codes.T).argmin(1)
    used, nearest = np.unique(nearest, return_inverse=True)
    counts = np.bincount(nearest, minlength=len(used))
    return _sums(points, nearest, len(used)) / counts[:, None], nearest


def spread_start(points: Floats, k: int, generator: np.random.Generator) -> Floats:
    """Points far from each other: each drawn in proportion to its squared distance from those before (k-means++)."""
    codes = [points[generator.integers(len(points))]]
    distance = ((points - codes[0]) ** 2).sum(1)
    for _ in range(k - 1):
        total = distance.sum()
        if not total > 0:
            break
        codes.append(points[generator.choice(len(points), p=distance / total)])
        distance = np.minimum(distance, ((points - codes[-1]) ** 2).sum(1))
    return np.stack(codes)


def _sums(points: Floats, group: NDArray[np.int64], groups: int) -> Floats:
    order = np.argsort(group, kind="stable")
    sums = np.zeros((groups, points.shape[1]))
    present, starts = np.unique(group[order], return_index=True)
    sums[present] = np.add.reduceat(points[order], starts)
    return sums
