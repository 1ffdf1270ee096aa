"""Is a difference more than noise: one layer among many, few runs to judge by.

Every layer of every run gives two numbers, its mean (in units of its usual std) and the log of its
std. The new runs are compared with the baseline's by Student's t. With a handful of runs a layer's
own variance is a poor estimate, and with dozens of layers the most extreme of them decides; so
variances borrow strength from each other, and p-values are adjusted for the number of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .arrays import Floats

#: With fewer layers than this, their variances say too little about each other.
LAYERS_TO_MODERATE = 10
#: More degrees of freedom than this are as good as infinitely many.
MOST_FREEDOM = 1000
#: Where a layer is constant, or not finite, in the baseline and not so in the new runs.
LARGEST_T = 1e6


@dataclass(frozen=True)
class Judgement:
    """Per layer, float64 [layers]: t of the mean and of the log std, p- and q-values."""

    z_mean: Floats
    z_std: Floats
    p_value: Floats
    q_value: Floats


def layer_tests(base_means: Floats, base_stds: Floats, means: Floats, stds: Floats, tolerance: float) -> Judgement:
    """How surely new runs differ from a baseline, layer by layer.

    Args:
        base_means: [runs, layers] of the baseline, at least two runs.
        base_stds: likewise.
        means: [runs, layers] of the new runs, at least one.
        stds: likewise.
        tolerance: spreads narrower than this (in stds of the layer) are taken to be this wide.

    Returns:
        A layer's p-value is the smaller of those of its mean and of its std, doubled (Bonferroni).
    """
    unit = np.sqrt((base_stds**2).mean(0))
    unit = np.where(unit > 0, unit, np.abs(base_means).max(0))  # a constant layer: in its own size
    unit = np.where(unit > 0, unit, 1.0)
    with np.errstate(divide="ignore"):
        z_mean, free_mean = _student_t(base_means / unit, means / unit, tolerance)
        z_std, free_std = _student_t(np.log(base_stds), np.log(stds), tolerance)
    p_mean, p_std = student_t_two_sided(z_mean, free_mean), student_t_two_sided(z_std, free_std)
    p_value = np.minimum(1.0, 2 * np.minimum(p_mean, p_std))
    return Judgement(z_mean, z_std, p_value, benjamini_hochberg(p_value))


def _student_t(base: Floats, new: Floats, floor: float) -> tuple[Floats, int]:
    """Two-sample t [layers] of pooled and moderated variances, and its degrees of freedom."""
    n, m = len(base), len(new)
    freedom = n + m - 2
    with np.errstate(invalid="ignore"):
        deviation = new.mean(0) - base.mean(0)
        squares = ((base - base.mean(0)) ** 2).sum(0) + ((new - new.mean(0)) ** 2).sum(0)
        variance = squares / freedom
        prior, typical = _prior(variance[np.isfinite(variance) & (variance > floor**2)], freedom)
        variance = np.maximum((prior * typical + freedom * variance) / (prior + freedom), floor**2)
        t = deviation / np.sqrt(variance * (1 / n + 1 / m))
    # Not finite in every run alike is no difference (log 0 of a constant layer); in some, the largest.
    alike = ~np.isfinite(base).any(0) & ~np.isfinite(new).any(0)
    t = np.where(alike | (deviation == 0), 0.0, np.nan_to_num(t, nan=LARGEST_T))
    return np.clip(t, -LARGEST_T, LARGEST_T), freedom + prior


def _prior(variance: Floats, freedom: int) -> tuple[int, float]:
    """What the layers' variances say about any one of them: degrees of freedom, and typical variance.

    Source: Smyth 2004, "Linear models and empirical Bayes methods for assessing differential
    expression", section 6.2. Degrees of freedom are rounded down.
    """
    if len(variance) < LAYERS_TO_MODERATE:
        return 0, 0.0
    half = freedom / 2
    logs = np.log(variance) - _polygamma(0, half) + math.log(half)
    excess = float(logs.var(ddof=1)) - _polygamma(1, half)
    if excess <= 0:  # the layers differ no more than samples of one variance would
        return MOST_FREEDOM, float(np.exp(logs.mean()))
    prior_half = _inverse_trigamma(excess)
    typical = math.exp(float(logs.mean()) + _polygamma(0, prior_half) - math.log(prior_half))
    return min(MOST_FREEDOM, int(2 * prior_half)), typical


def _inverse_trigamma(value: float) -> float:
    """Newton's method on 1 / trigamma, which is nearly linear (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = _polygamma(1, x)
        step = trigamma * (1 - trigamma / value) / _polygamma(2, x)
        x += step
        if abs(step) < 1e-9 * x:
            break
    return x


def _polygamma(order: int, x: float) -> float:
    return float(torch.special.polygamma(order, torch.tensor(x, dtype=torch.float64)))


def paired_tests(differences: Floats, least_spread: float, *, larger: bool = False) -> Floats:
    """How surely the mean difference of pairs is not zero, layer by layer: the p-values of Student's paired t.

    Args:
        differences: [pairs, layers], finite, of at least two pairs.
        least_spread: a standard deviation over pairs that is smaller is taken to be this.
        larger: ask for a mean above zero alone (one-sided).

    Returns:
        float64 [layers].

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import paired_tests
        >>> paired_tests(np.array([[1.0, 1.0], [2.0, -2.0], [3.0, 1.0]]), 1e-6).round(3)
        array([0.074, 1.   ])
    """
    pairs = len(differences)
    mean = differences.mean(0)
    spread = np.maximum(differences.std(0, ddof=1), least_spread)
    t = np.clip(mean / (spread / math.sqrt(pairs)), -LARGEST_T, LARGEST_T)
    both = student_t_two_sided(t, pairs - 1)
    result: Floats = np.where(t > 0, both / 2, 1 - both / 2) if larger else both
    return result


def student_t_two_sided(t: Floats, freedom: int) -> Floats:
    """P(|T| >= |t|) for Student's t with a whole number of degrees of freedom.

    Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4.

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics.significance import student_t_two_sided
        >>> student_t_two_sided(np.array([0.0, 2.365]), 7).round(3)
        array([1.  , 0.05])
    """
    angle = np.arctan(np.abs(t) / np.sqrt(freedom))
    sine, cosine = np.sin(angle), np.cos(angle)
    odd = freedom % 2
    term = cosine if odd else np.ones_like(cosine)
    total = np.zeros_like(cosine)
    for k in range(1 + odd, freedom, 2):
        total = total + term
        term = term * cosine**2 * k / (k + 1)
    inside = 2 / np.pi * (angle + sine * total) if odd else sine * total
    result: Floats = np.clip(1 - inside, 0.0, 1.0)
    return result


def benjamini_hochberg(p_values: Floats) -> Floats:
    """P-values adjusted for the false discovery rate.

    Source: Benjamini & Hochberg 1995, "Controlling the false discovery rate".

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import benjamini_hochberg
        >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5]))
        array([0.04      , 0.05333333, 0.05333333, 0.5       ])
    """
    count = len(p_values)
    order = np.argsort(p_values)
    adjusted = p_values[order] * count / np.arange(1, count + 1)
    adjusted = np.minimum(1.0, np.minimum.accumulate(adjusted[::-1])[::-1])
    result = np.empty(count)
    result[order] = adjusted
    return result


def roc_auc(positive: Floats, negative: Floats) -> float:
    """The probability that a positive example scores higher than a negative one, ties counting half.

    Source: Mann & Whitney 1947, "On a test of whether one of two random variables is stochastically larger".

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import roc_auc
        >>> roc_auc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
        0.875
    """
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(negative)))
