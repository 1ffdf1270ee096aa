"""Tests of layers for significance: against integration, and by how often they are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from noesis.numerics import significance


def test_student_t_against_integration():
    for freedom in (1, 2, 3, 4, 7, 12, 31):
        x = np.linspace(-400, 400, 400_001)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        for t in (0.0, 0.5, 2.0, 6.0):
            inside = np.trapezoid(np.where(np.abs(x) <= t, density, 0.0), x) / np.trapezoid(density, x)
            p = significance.student_t_two_sided(np.array([t, -t]), freedom)
            assert p == pytest.approx([1 - inside] * 2, abs=2e-3)


@pytest.mark.parametrize(("runs", "new"), [(4, 1), (8, 1), (8, 8)])
@pytest.mark.parametrize("layers", [5, 40])
def test_p_values_are_what_they_claim(runs, new, layers):
    """Equal runs of layers with unequal spreads: p <= alpha in at most alpha of the cases."""
    rng = np.random.default_rng(runs * layers)
    found = []
    for _ in range(300):
        spread = np.exp(rng.normal(-3, 0.4, size=layers))
        stds = np.exp(rng.normal(size=(runs + new, layers)) * spread)
        means = rng.normal(size=(runs + new, layers)) * spread
        judged = significance.layer_tests(means[:runs], stds[:runs], means[runs:], stds[runs:], 1e-5)
        found.append(
            [(judged.p_value <= alpha).mean() for alpha in (0.01, 0.05, 0.2)] + [(judged.q_value <= 0.05).any()]
        )
    rates = np.mean(found, axis=0)
    assert rates[0] <= 0.015
    assert rates[1] <= 0.06
    assert rates[2] <= 0.22
    assert rates[3] <= 0.08


def test_variances_borrow_strength():
    """With many layers a change is found that the layer's own 3 runs could not prove."""
    rng = np.random.default_rng(0)
    stds, means = np.exp(rng.normal(size=(4, 40)) * 0.05), rng.normal(size=(4, 40)) * 0.05
    stds[3, 7] *= 1.5
    judged = significance.layer_tests(means[:3], stds[:3], means[3:], stds[3:], 1e-5)
    assert judged.q_value.argmin() == 7
    assert judged.q_value[7] < 0.01
    alone = significance.layer_tests(means[:3, 5:9], stds[:3, 5:9], means[3:, 5:9], stds[3:, 5:9], 1e-5)
    assert alone.q_value.min() > 0.05
