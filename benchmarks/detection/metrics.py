"""How well scores tell strange inputs from a model's own: AUROC, FPR95, AUPR, with bootstrap intervals.

Strange inputs are the positives, and a higher score is stranger. All three are computed on the
scores' distinct values, weighted by how often each occurs, so that ties are handled exactly and a
resample is nothing but other weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """The chance that a strange input scores above one of the model's own; ties count half."""
    return float(_auroc(*_weights(inside, outside))[0])


def fpr95(inside: ArrayLike, outside: ArrayLike) -> float:
    """The share of strange inputs that pass under the lowest threshold that lets 95 % of the model's own pass."""
    return float(_fpr95(*_weights(inside, outside))[0])


def aupr(inside: ArrayLike, outside: ArrayLike) -> float:
    """Average precision with the strange inputs as positives."""
    return float(_aupr(*_weights(inside, outside))[0])


def figures(inside: ArrayLike, outside: ArrayLike, *, resamples: int = 200, seed: int = 0) -> dict[str, Any]:
    """All three in percent, each with the 95 % interval of a bootstrap over both samples."""
    whole = _weights(inside, outside)
    drawn = _weights(inside, outside, resamples, np.random.default_rng(seed))
    told: dict[str, Any] = {}
    for name, measure in {"auroc": _auroc, "fpr95": _fpr95, "aupr": _aupr}.items():
        told[name] = 100 * float(measure(*whole)[0])
        told[f"{name}_interval"] = (100 * np.quantile(measure(*drawn), [0.025, 0.975])).tolist()
    return told


def _weights(
    inside: ArrayLike, outside: ArrayLike, resamples: int = 0, generator: np.random.Generator | None = None
) -> tuple[Array, Array]:
    """How often each distinct score, in ascending order, occurs inside and outside: [resamples or 1, scores] each."""
    samples = [np.asarray(side, dtype=np.float64).ravel() for side in (inside, outside)]
    if any(len(side) == 0 or np.isnan(side).any() for side in samples):
        raise ValueError(f"{len(samples[0])} and {len(samples[1])} scores: both need some, and none may be NaN")
    values, index = np.unique(np.concatenate(samples), return_inverse=True)
    places = np.split(index, [len(samples[0])])
    weights = []
    for place in places:
        if generator is None:
            weights.append(np.bincount(place, minlength=len(values))[None].astype(np.float64))
            continue
        drawn = place[generator.integers(len(place), size=(resamples, len(place)))]
        rows = drawn + len(values) * np.arange(resamples)[:, None]
        counts = np.bincount(rows.ravel(), minlength=resamples * len(values))
        weights.append(counts.reshape(resamples, -1).astype(np.float64))
    return weights[0], weights[1]


def _auroc(inside: Array, outside: Array) -> Array:
    below = inside.cumsum(1) - inside / 2
    return (outside * below).sum(1) / (outside.sum(1) * inside.sum(1))


def _fpr95(inside: Array, outside: Array) -> Array:
    accepted = inside.cumsum(1) >= 0.95 * inside.sum(1, keepdims=True) - 1e-9
    threshold = accepted.argmax(1)
    return outside.cumsum(1)[np.arange(len(outside)), threshold] / outside.sum(1)


def _aupr(inside: Array, outside: Array) -> Array:
    found = outside[:, ::-1].cumsum(1)
    flagged = found + inside[:, ::-1].cumsum(1)
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    return (outside[:, ::-1] * precision).sum(1) / outside.sum(1)
