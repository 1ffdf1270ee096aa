"""p-values keep their promise, whatever the layers do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from noesis.errors import NoesisError
from noesis.results import Surprise
from noesis.surprise import Calibration, Codebook, Collected, Scorer
from noesis.surprise.calibration import LEAST, Doubt, ReferenceScores, combine, p_values, split


def inputs(generator: np.random.Generator, count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three layers that depend on each other strongly, and logits."""
    hidden = generator.standard_normal((count, 6)) * generator.gamma(2, size=(count, 1))
    layers = {
        name: np.concatenate([hidden[:, :4], hidden @ generator_matrix(seed)], 1).astype(np.float32)
        for seed, name in enumerate(("first", "second", "third"))
    }
    energy = np.abs(hidden).sum(1)
    return layers, np.stack([energy, (hidden[:, 0] > 0).astype(float)], 1)


def generator_matrix(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, 5))


def scorer(**settings) -> Scorer:
    return Scorer(Codebook(**settings), ("first", "second", "third"), torch.device("cpu"), logits=True)


def judged(made: Scorer, layers: dict[str, np.ndarray], logits: np.ndarray) -> Surprise:
    from noesis.surprise import Kept

    kept = {name: Kept(torch.from_numpy(values)) for name, values in layers.items()}
    return made.judge(kept, torch.from_numpy(logits))


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.slow
def test_false_alarms_are_as_many_as_promised_over_200_seeds(by_class):
    alphas = np.array([0.01, 0.05, 0.1])
    realised, possible = [], []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        layers, logits = inputs(generator, 660)
        made = scorer(size=8, dim=4, seed=seed)
        calibration = made.calibrate({k: Collected(v) for k, v in layers.items()}, logits, None, by_class)
        fresh = judged(made, *inputs(generator, 300))
        realised.append((fresh.p_value[:, None] <= alphas).mean(0))
        sizes = [len(calibration.scores)]
        if calibration.classes:
            sizes = [len(scores) for label, scores in calibration.classes.items() if label >= 0]
        possible.append(np.mean([np.floor(alphas * (n + 1)) / (n + 1) for n in sizes], 0))
    realised, expected = np.array(realised), np.mean(possible, 0)
    error = realised.std(0) / math.sqrt(len(realised))
    assert (np.abs(realised.mean(0) - expected) < 3.5 * error + 1e-9).all(), (realised.mean(0), expected, error)
    assert (realised.mean(0) <= alphas + 3.5 * error).all()


def test_adding_layers_up_by_fishers_table_would_break_it():
    """The reason for ranking the sum once more: layers that depend on each other raise false alarms."""
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    made = scorer(size=8, dim=4)

    def alike(count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        layers, logits = inputs(generator, count)
        return {name: layers["first"] + 0.1 * values for name, values in layers.items()}, logits

    layers, logits = alike(3000)
    made.calibrate({k: Collected(v) for k, v in layers.items()}, logits, None, False)
    fresh = judged(made, *alike(4000))
    fisher = 2 * sum(-np.log(layer.p_value) for layer in fresh.layers.values())
    assert (stats.chi2(6).sf(fisher) <= 0.05).mean() > 0.07
    assert (fresh.p_value <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


def test_p_values_are_ranks_with_the_new_score_among_them():
    scores = np.array([1.0, 2.0, 2.0, 4.0])
    np.testing.assert_allclose(
        p_values(scores, np.array([0.0, 1.0, 2.0, 3.0, 5.0, np.inf, np.nan])), np.array([5, 5, 4, 2, 1, 1, 1]) / 5
    )


def test_tails_keep_the_order_of_extremes():
    ranks = ReferenceScores.of(np.random.default_rng(0).exponential(size=500))
    scores = np.array([0.0, 1.0, 3.0, 5.0, 10.0, 1e3, 1e6, np.inf])
    surprisal = ranks.surprisal(scores)
    assert (np.diff(surprisal) >= 0).all()
    assert surprisal[-1] == np.inf
    # -log p of an exponential is the score itself, on which the tail was fitted
    np.testing.assert_allclose(surprisal[3:5], scores[3:5], rtol=0.2)
    few = ReferenceScores.of(np.arange(30.0))
    assert few.share == pytest.approx(1 / 3)
    assert ReferenceScores.of(np.full(50, 2.0)).surprisal(np.array([2.0, 3.0]))[1] > 100
    assert np.isnan(ranks.surprisal(np.array([np.nan]))).sum() == 0


def test_confidence_beyond_usual_is_strange_too():
    doubt = Doubt.of(np.random.default_rng(0).standard_normal(2000))
    low, usual, sure, unsure = doubt.surprisal(np.array([-1.5, 0.0, -8.0, 8.0]))
    assert low < 0.2
    assert usual < 1
    assert sure > 10
    assert unsure > 10


def test_combination():
    calm, loud = np.full((1, 4), 0.5), np.array([[0.5, 0.5, 0.5, 20.0]])
    assert combine(loud, None) > combine(calm, None) + 5
    one_of_many = np.array([[20.0, *[0.5] * 50]])
    assert combine(one_of_many, None) > combine(np.full((1, 51), 0.5), None) + 5  # not drowned
    np.testing.assert_allclose(combine(calm[:, :1], None), 0.5)
    assert combine(np.array([[np.inf, 1.0]]), None) == np.inf
    assert combine(np.array([[1.0, np.nan]]), np.zeros(1)) == np.inf
    np.testing.assert_allclose(combine(calm, np.array([4.0])), combine(calm, None) + 4)
    np.testing.assert_allclose(combine(loud, np.array([0.0])), combine(loud, None) * 1.25)
    assert combine(np.full((1, 3), 2000.0), None) == pytest.approx(2000)


def test_parts_of_a_calibration_set_do_not_overlap():
    parts = split(1000, np.random.default_rng(0))
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert [len(part) for part in parts] == [667, 166, 167]
    with pytest.raises(NoesisError, match=r"gave 119 samples.*at least 120"):
        split(LEAST - 1, np.random.default_rng(0))


def test_nothing_changes_when_calibration_fails():
    made = scorer(size=8, dim=4)
    layers, logits = inputs(np.random.default_rng(0), 300)
    first = made.calibrate({k: Collected(v) for k, v in layers.items()}, logits, None, False)
    codes = made.books["third"].codes.clone()
    layers["third"] = np.full_like(layers["third"], np.nan)
    with pytest.raises(NoesisError, match="third gave NaN or infinity for nearly every calibration input"):
        made.calibrate({k: Collected(v) for k, v in layers.items()}, logits, None, False)
    assert made.calibration is first
    assert torch.equal(made.books["third"].codes, codes)


def test_a_few_bad_calibration_inputs_are_calibration_inputs_all_the_same():
    made = scorer(size=8, dim=4)
    layers, logits = inputs(np.random.default_rng(0), 600)
    layers["second"][::20] = np.inf
    calibration = made.calibrate({k: Collected(v) for k, v in layers.items()}, logits, None, False)
    assert np.isinf(calibration.scores).sum() in range(1, 15)
    fresh = judged(made, *inputs(np.random.default_rng(1), 5))
    assert np.isfinite(fresh.score).all()


def test_logits_that_are_not_finite_are_strange_on_both_sides():
    made = scorer(size=8, dim=4)
    layers, logits = inputs(np.random.default_rng(0), 600)
    made.calibrate({k: Collected(v) for k, v in layers.items()}, logits, None, False)
    layers, logits = inputs(np.random.default_rng(1), 4)
    logits[:3, 0] = np.inf, -np.inf, np.nan
    assert judged(made, layers, logits).score.tolist()[:3] == [np.inf] * 3
    assert np.isfinite(judged(made, layers, logits).score[3])


def test_classes_have_p_values_of_their_own():
    calibration = Calibration(["a"], {"a": ReferenceScores.of(np.arange(50.0))}, None, (1, 1, 40))
    predicted = np.array([0] * 30 + [1] * 8 + [2] * 25)
    scores = np.where(predicted == 2, 100.0, 0.0) + np.arange(63)
    calibration.settle(scores, predicted)
    assert sorted(calibration.classes or {}) == [-1, 0, 2]
    found = calibration.p_value(np.array([50.0, 50.0, 50.0]), np.array([0, 1, 2]))
    np.testing.assert_allclose(found, [1 / 31, 1 / 9, 1.0])


def test_rare_classes_share_what_the_others_have_not_spent():
    generator = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        rare = generator.random(count) < 0.3
        label = np.where(rare, 10 + generator.integers(0, 60, count), generator.integers(0, 10, count))
        return generator.normal(size=count) + 2 * rare, label

    realised = []
    for _ in range(200):
        calibration = Calibration(["a"], {}, None, (1, 1, 1))
        calibration.settle(*draw(500))
        scores, labels = draw(2000)
        realised.append([(calibration.p_value(scores, labels) <= alpha).mean() for alpha in (0.01, 0.05, 0.1)])
    assert (np.mean(realised, 0) <= [0.011, 0.052, 0.103]).all()
