"""Drift: the stated chance of a false alarm holds, real drift is found, and memory stays what it is."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import noesis
from noesis.errors import BadFile, BadType, BadValue, WrongState
from noesis.surprise import Calibration, DriftMonitor
from noesis.surprise.drift import EXPONENTS, _cash

Floats = NDArray[np.float64]


def calibration_of(scores: Any) -> Calibration:
    made = Calibration(["layer"], {}, None, (0, 0, len(scores)))
    made.settle(np.asarray(scores, np.float64), None)
    return made


def normal(rng: np.random.Generator, size: int) -> Floats:
    return rng.normal(size=size)


def rounded(rng: np.random.Generator, size: int) -> Floats:
    """Scores with many ties, as few calibration samples give."""
    return np.round(rng.normal(size=size), 1)


def most(chance: float, trials: int) -> float:
    """What a share of trials of this chance exceeds less than once in a thousand times."""
    return chance + 3.1 * math.sqrt(chance * (1 - chance) / trials)


def naive_alarm(p: Floats, scores: int, alpha: float, rng: np.random.Generator) -> bool:
    """The same bets on the p-values as if they were independent."""
    uniform = p - rng.random(len(p)) / (scores + 1)
    logs = np.cumsum(np.log(EXPONENTS)[:, None] + (EXPONENTS - 1)[:, None] * np.log(uniform), 1)
    return bool(np.logaddexp.reduce(logs, 0).max() - math.log(len(EXPONENTS)) >= -math.log(alpha))


# ---------------------------------------------------------------- false alarms


@pytest.mark.slow
@pytest.mark.parametrize("draw", [normal, rounded])
def test_false_alarms_stay_within_the_bound(draw: Callable[[np.random.Generator, int], Floats]) -> None:
    rng, alpha, streams = np.random.default_rng(0), 0.05, 400
    alarms = naive = 0
    for seed in range(streams):
        calibration = calibration_of(draw(rng, 200))
        p = calibration.p_value(draw(rng, 2000))
        alarms += DriftMonitor(calibration, alpha=alpha, seed=seed).update(p)
        naive += naive_alarm(p, 200, alpha, rng)
    assert alarms / streams <= most(alpha, streams)
    assert naive / streams > 2 * most(alpha, streams) or draw is rounded, "an easy bound"


def test_ranks_are_uniform_and_independent() -> None:
    rng = np.random.default_rng(0)
    ranks = []
    for seed in range(500):
        calibration = calibration_of(rng.normal(size=20))
        monitor = DriftMonitor(calibration, seed=seed)
        row: list[float] = []
        monitor._bet = row.append  # type: ignore[method-assign]
        monitor.update(calibration.p_value(rng.normal(size=30)))
        ranks.append(row)
    table = np.array(ranks)
    counts = np.histogram(table, 10, (0, 1))[0]
    assert ((counts - 1500) ** 2 / 1500).sum() < 27.9  # chi-square of 9 degrees: one in a thousand
    correlations = np.corrcoef(table.T)[np.triu_indices(30, 1)]
    assert abs(correlations.mean() * math.sqrt(len(correlations)) * math.sqrt(500)) < 3.3
    assert np.abs(correlations).max() < 4.5 / math.sqrt(500)


def test_ties_make_ranks_less_strange() -> None:
    rng = np.random.default_rng(0)
    ranks: list[float] = []
    for seed in range(1000):
        calibration = calibration_of(rng.integers(0, 12, 30))
        monitor = DriftMonitor(calibration, seed=seed)
        monitor._bet = ranks.append  # type: ignore[method-assign]
        monitor.update(calibration.p_value(rng.integers(0, 12, 20).astype(float)))
    shares = {bound: np.mean(np.array(ranks) <= bound) for bound in (0.02, 0.1, 0.3, 0.5, 0.8)}
    assert all(share <= bound for bound, share in shares.items()), shares
    assert shares[0.1] > 0.01


def test_a_bet_on_uniform_ranks_keeps_its_capital_in_the_mean() -> None:
    roots = (np.arange(2000) + 0.5) / 2000
    monitor = DriftMonitor(calibration_of(np.arange(9.0)))
    for _ in range(5):
        before, bets = monitor.capital, monitor._bets
        after = []
        for root in roots:  # rank = root^40, since the bets reach to infinity at 0
            monitor._bets = bets
            monitor._bet(root**40)
            after.append(40 * root**39 * (_cash(monitor.seen + 1) + monitor._bets.sum()))
        assert np.mean(after) == pytest.approx(before, rel=1e-3)
        monitor._bets = bets
        monitor.update(0.3)


@pytest.mark.slow
def test_an_unlucky_calibration_set() -> None:
    """The bound is over calibration sets too; the unluckiest of twenty is no disaster, as without online ranks."""
    rng, alpha = np.random.default_rng(0), 0.05
    many = rng.normal(size=20_000)
    sets = [calibration_of(rng.normal(size=100)) for _ in range(20)]
    unlucky = min(sets, key=lambda made: float(made.p_value(many).mean()))
    assert unlucky.p_value(many).mean() < 0.46
    streams = [unlucky.p_value(rng.normal(size=2000)) for _ in range(100)]
    alarms = sum(DriftMonitor(unlucky, alpha=alpha, seed=seed).update(p) for seed, p in enumerate(streams))
    naive = sum(naive_alarm(p, 100, alpha, rng) for p in streams)
    assert naive > 80
    assert alarms < 30


# ---------------------------------------------------------------- drift


def strange(rng: np.random.Generator, size: int) -> Floats:
    """Scores beyond the 95th percentile of normal ones."""
    usual = np.sort(rng.normal(size=20 * size))
    return rng.permutation(usual[-size:])


@pytest.mark.parametrize(("before", "within"), [(0, 12), (5000, 30)])
def test_strange_inputs_are_found_soon(before: int, within: int) -> None:
    rng = np.random.default_rng(0)
    for seed in range(10):
        calibration = calibration_of(rng.normal(size=500))
        monitor = DriftMonitor(calibration, seed=seed)
        assert not monitor.update(calibration.p_value(rng.normal(size=before)))
        assert monitor.update(calibration.p_value(strange(rng, 50)))
        assert monitor.alarm_at is not None
        assert before <= monitor.alarm_at < before + within


def test_a_few_strange_inputs_among_many_are_found() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(20):
        calibration = calibration_of(rng.normal(size=500))
        stream = np.where(rng.random(300) < 0.26, strange(rng, 300), rng.normal(size=300))  # 0.3 with p <= 0.05
        found += DriftMonitor(calibration, seed=seed).update(calibration.p_value(stream))
    assert found >= 18


def test_drift_in_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook(), logits="2")
    monitor = DriftMonitor(wrapped.calibrate([torch.randn(900, 4)]))
    for _ in range(20):
        wrapped(torch.randn(16, 4))
        assert not monitor.update(wrapped.surprise())
    wrapped(2 * torch.randn(64, 4))
    assert monitor.update(wrapped.surprise().p_value)
    assert monitor.alarm
    wrapped(torch.randn(16, 4))
    assert monitor.update(wrapped.surprise()), "an alarm stays"
    monitor.reset()
    assert (monitor.alarm, monitor.alarm_at, monitor.seen, monitor.capital) == (False, None, 0, 1.0)
    assert not monitor.update(wrapped.surprise())


def test_classes_are_ranked_together_from_the_surprise() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook(), logits="2")
    calibration = wrapped.calibrate([torch.randn(900, 4)], by_class=True)
    together = dataclasses.replace(calibration, classes=None)
    wrapped(torch.randn(64, 4))
    surprise = wrapped.surprise()
    monitor, same = DriftMonitor(calibration), DriftMonitor(together)
    monitor.update(surprise)
    same.update(together.p_value(surprise.score))
    assert monitor.capital == same.capital != 1
    with pytest.raises(WrongState, match=r"by class\. Expected what ranks .* together\. Pass the surprise itself"):
        monitor.update(surprise.p_value)
    assert monitor.seen == 64


# ---------------------------------------------------------------- state


def test_how_a_stream_is_cut_makes_no_difference() -> None:
    rng = np.random.default_rng(0)
    calibration = calibration_of(rng.normal(size=50))
    p = calibration.p_value(rng.normal(size=60))
    whole, cut = DriftMonitor(calibration, seed=3), DriftMonitor(calibration, seed=3)
    other = DriftMonitor(calibration, seed=4)
    whole.update(p)
    other.update(p)
    for part in (p[:1], p[1:1], p[1:40], p[40]):
        cut.update(part)
    restored = pickle.loads(pickle.dumps(cut))
    restored.update(torch.from_numpy(p[41:]).float())
    assert restored.capital == whole.capital != other.capital
    assert cut.seen == 41
    whole.reset()
    whole.update(p)
    assert restored.capital == whole.capital


def test_memory_does_not_grow() -> None:
    rng = np.random.default_rng(0)
    calibration = calibration_of(rng.normal(size=50))
    monitor = DriftMonitor(calibration)
    fresh = len(pickle.dumps(monitor))
    monitor.update(calibration.p_value(rng.normal(size=20_000)))
    assert len(pickle.dumps(monitor)) < fresh + 64
    assert monitor.seen == 20_000


def test_endless_winning_stays_finite() -> None:
    monitor = DriftMonitor(calibration_of(np.arange(3000.0)))
    monitor.update(np.full(2000, 1 / 3001))
    assert 1e100 < monitor.capital < math.inf
    assert monitor.alarm_at is not None
    assert monitor.alarm_at < 5


def test_repr() -> None:
    monitor = DriftMonitor(calibration_of(np.arange(99.0)), alpha=0.05)
    assert repr(monitor) == ("DriftMonitor(no alarm, 0 seen, capital 1, alarm at 20: false in at most 5 % of streams)")
    monitor.update([0.01] * 8)
    assert repr(monitor).startswith("DriftMonitor(alarm at observation ")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("how", ["safetensors", "json", "json.gz", "text"])
def test_a_stream_that_is_cut_in_two_is_judged_as_if_it_were_not(tmp_path: Path, how: str) -> None:
    rng = np.random.default_rng(0)
    scores = np.append(rng.normal(size=98), math.inf)
    p = calibration_of(scores).p_value(np.concatenate([rng.normal(size=60), rng.normal(2.0, size=60)]))
    whole = DriftMonitor(calibration_of(scores), alpha=0.05, seed=3)
    whole.update(p)
    assert whole.alarm_at is not None
    assert whole.alarm_at > 60
    for cut in (0, 1, 50, whole.alarm_at + 1, 120):
        before = DriftMonitor(calibration_of(scores), alpha=0.05, seed=3)
        before.update(p[:cut])
        if how == "text":
            after = DriftMonitor.from_json(before.to_json())
        else:
            after = DriftMonitor.load(before.save(tmp_path / f"monitor.{how}"))
        assert repr(after) == repr(before)
        after.update(p[cut:])
        assert (after.capital, after.alarm_at, after.seen) == (whole.capital, whole.alarm_at, whole.seen)
        np.testing.assert_array_equal(after._counts, whole._counts)
        after.reset()
        after.update(p)
        assert after.capital == whole.capital


def test_a_loaded_monitor_knows_its_calibration(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook(), logits="2")
    by_class = DriftMonitor(wrapped.calibrate([torch.randn(3000, 4)], by_class=True))
    monitor = DriftMonitor.load(by_class.save(tmp_path / "monitor.safetensors"))
    wrapped(torch.randn(20, 4))
    surprise = wrapped.surprise()
    with pytest.raises(WrongState, match="p-values of a calibration by class"):
        monitor.update(surprise.p_value)
    monitor.update(noesis.Surprise.from_json(surprise.to_json()))
    assert monitor.seen == 20
    plain = DriftMonitor(wrapped.calibrate([torch.randn(600, 4)]))
    wrapped.calibrate([torch.randn(600, 4)])
    wrapped(torch.randn(20, 4))
    with pytest.raises(BadValue, match=r"p-values of another calibration than Calibration\(600 samples"):
        DriftMonitor.load(plain.save(tmp_path / "monitor.json")).update(wrapped.surprise())


@pytest.mark.parametrize(
    "change",
    [
        {"scores": []},
        {"scores": [1.0, 0.0, 2.0]},
        {"scores": [0.0, None, 2.0]},
        {"scores": [[0.0, 1.0, 2.0]]},
        {"counts": [0, 1, 0]},
        {"counts": [0, -1, 3, 0]},
        {"counts": [0, 0.5, 1.5, 0]},
        {"counts": [0, 1, 2, 0]},
        {"counts": None},
        {"bets": [0.1]},
        {"bets": [-1.0] * 10},
        {"bets": [None] * 10},
        {"bets": ["Infinity"] * 10},
        {"alpha": 0},
        {"alpha": None},
        {"alpha": 1.5},
        {"seed": "0"},
        {"seed": -1},
        {"seen": 3},
        {"seen": True},
        {"alarm_at": 2},
        {"alarm_at": -1},
        {"alarm_at": "x"},
        {"generator": None},
        {"generator": {}},
        {"generator": {"state": "1"}},
        {"generator": {"state": "-1", "inc": "3"}},
        {"generator": {"state": str(2**200), "inc": "3"}},
        {"generator": {"state": "x", "inc": "3"}},
    ],
)
def test_broken_files(tmp_path: Path, change: dict[str, Any]) -> None:
    monitor = DriftMonitor(calibration_of([0.0, 1.0, 2.0]))
    monitor.update([0.5, 0.75])
    path = monitor.save(tmp_path / "monitor.json")
    payload = json.loads(path.read_text())
    DriftMonitor.load(path)
    path.write_text(json.dumps({**payload, **change}))
    with pytest.raises(BadFile, match=r"monitor\.json is not a valid drift monitor .*DriftMonitor\.save"):
        DriftMonitor.load(path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = noesis.Soulprint([0.0], [1.0], ["a"]).save(tmp_path / "soulprint.json")
    with pytest.raises(BadFile, match=r"is no noesis drift_monitor: .* Pass a file written by DriftMonitor\.save"):
        DriftMonitor.load(path)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("wrong", [math.nan, 0.0, -0.1, 1.1, math.inf])
def test_what_is_no_p_value(wrong: float) -> None:
    monitor = DriftMonitor(calibration_of(np.arange(99.0)))
    with pytest.raises(BadValue, match=r"p-value .* at 1\. Expected numbers in \(0, 1\]\. Pass surprise\(\)\.p_value"):
        monitor.update([0.5, wrong])
    assert monitor.seen == 0


def test_p_values_of_another_calibration() -> None:
    monitor = DriftMonitor(calibration_of(np.arange(99.0)))
    with pytest.raises(BadValue, match=r"p-value 0\.123 at 0\. Expected multiples of 1/100.* Pass surprise"):
        monitor.update(0.123)
    with pytest.raises(BadValue, match=r"shape \(2, 2\)\. Expected \[N\]"):
        monitor.update(np.full((2, 2), 0.5))
    model = torch.nn.Sequential(torch.nn.Linear(4, 16))
    wrapped = noesis.wrap(model, layers="0", codebook=noesis.Codebook())
    first = wrapped.calibrate([torch.randn(600, 4)])
    wrapped.calibrate([torch.randn(600, 4)])
    wrapped(torch.randn(20, 4))
    with pytest.raises(BadValue, match=r"p-values of another calibration than Calibration\(600 samples"):
        DriftMonitor(first).update(wrapped.surprise())


def test_bad_arguments() -> None:
    with pytest.raises(BadType, match=r"DriftMonitor\(None\)\. Expected a calibration\. Pass wrapped\.calibrate"):
        DriftMonitor(None)  # type: ignore[arg-type]
    for alpha in (0, 1, math.nan):
        with pytest.raises(BadValue, match=r"alpha=.*\. Expected a chance between 0 and 1\. Pass alpha=0\.01"):
            DriftMonitor(calibration_of(np.arange(99.0)), alpha=alpha)
    for seed in (None, -1, 0.5):
        with pytest.raises(BadType, match=r"seed=.*\. Expected a whole number from 0"):
            DriftMonitor(calibration_of(np.arange(99.0)), seed=seed)  # type: ignore[arg-type]
