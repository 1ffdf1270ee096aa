"""compare, its statistics, and what it says of runs that do not fit together."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from noesis.results import ALWAYS


def soulprint(means, stds, layers=None) -> noesis.Soulprint:
    return noesis.Soulprint(
        np.array(means, float), np.array(stds, float), layers or [f"l{i}" for i in range(len(means))]
    )


def test_effects_are_free_of_scale():
    a, b = soulprint([1.0, 0.0], [2.0, 1.0]), soulprint([2.0, 0.0], [2.0, math.e])
    result = noesis.compare(a, b)
    first, second = result.row("l0"), result.row("l1")
    assert (first.mean_effect, first.std_effect, first.effect) == (0.5, 0.0, 0.5)
    assert second.std_effect == pytest.approx(1.0)
    assert [row.layer for row in result.rows] == ["l1", "l0"]
    assert result.distance == pytest.approx(math.sqrt((0.25 + 1.0) / 2))
    assert first.salience == 1.0
    scaled = noesis.compare(soulprint([1e6, 0.0], [2e6, 1e-6]), soulprint([2e6, 0.0], [2e6, 1e-6 * math.e]))
    assert scaled.distance == pytest.approx(result.distance)
    assert a.compare(b).distance == result.distance


@pytest.mark.parametrize(
    ("a", "b", "effect"),
    [
        (([0.0], [0.0]), ([0.0], [0.0]), 0.0),  # constant in both
        (([2.0], [0.0]), ([1.0], [0.0]), 0.5),  # constant in both, relative
        (([0.0], [0.0]), ([0.0], [1.0]), 20.0),  # constant in one
        (([math.nan], [math.nan]), ([math.nan], [math.nan]), 0.0),
        (([0.0], [1.0]), ([math.nan], [math.nan]), math.hypot(20, 20)),
    ],
)
def test_degenerate_layers(a, b, effect):
    assert noesis.compare(soulprint(*a), soulprint(*b)).rows[0].effect == pytest.approx(effect)


def test_layers_are_matched_by_name():
    a = soulprint([1, 2, 3], [1, 1, 1], ["x", "y", "z"])
    b = soulprint([3, 2, 9], [1, 1, 1], ["z", "y", "w"])
    result = noesis.compare(a, b)
    assert result.distance == 0
    assert (result.only_in_a, result.only_in_b) == (["x"], ["w"])
    assert "only in a: x" in repr(result)
    with pytest.raises(ValueError, match=r"no layer in common.*Wrap both with the same layers="):
        noesis.compare(a, soulprint([1], [1], ["other"]))


def test_only_runs_can_be_compared():
    a = soulprint([1], [1])
    with pytest.raises(TypeError, match="compare was given a dict. Expected a Trace, a Soulprint, a wrapped model"):
        noesis.compare(a, {})
    with pytest.raises(ValueError, match="The baseline has 1 run. Expected at least 2"):
        noesis.compare(a, a, baseline=[a])
    with pytest.raises(ValueError, match="The baseline lacks 1 of the layers, first 'l0'"):
        noesis.compare(a, a, baseline=[soulprint([1], [1], ["q"])] * 2)
    with pytest.raises(ValueError, match="b is 2 runs"):
        noesis.compare(a, [a, a])
    with pytest.raises(ValueError, match=r"alpha=2"):
        noesis.compare(a, a, alpha=2)
    with pytest.raises(ValueError, match="has no baseline"):
        noesis.compare(a, a).changed  # noqa: B018


# ---------------------------------------------------------------- divergence


def traced(edit=None, steps: int = 3) -> noesis.Trace:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped = noesis.wrap(model, layers="all")
    for step in range(steps):
        if edit is not None:
            edit(step, model)
        wrapped(torch.randn(6, 4))
    return wrapped.trace()


def test_first_divergence_is_the_earliest_step_and_layer():
    def nudge(step, model):
        if step == 1:
            model[2].weight.data[0, 0] += 0.01

    where = noesis.compare(traced(), traced(nudge)).first_divergence
    assert (where.step, where.layer) == (1, "2")
    assert noesis.compare(traced(), traced()).first_divergence is None
    assert noesis.compare(traced(), traced(nudge), tolerance=10).first_divergence is None
    assert "first divergence: step 1, layer 2" in repr(noesis.compare(traced(), traced(nudge)))


def test_first_divergence_goes_by_execution_not_by_name():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.b(x))

    def run(scale: float) -> noesis.Trace:
        torch.manual_seed(0)
        model = Backwards()
        model.b.weight.data *= scale
        wrapped = noesis.wrap(model, layers="linear")
        wrapped(torch.randn(5, 3))
        return wrapped.trace()

    assert noesis.compare(run(1), run(1.1)).first_divergence.layer == "b"


def test_other_counts_diverge():
    nan = noesis.compare(traced(), traced(lambda s, m: m[0].bias.data.fill_(math.nan))).first_divergence
    assert (nan.step, nan.layer, nan.stat) == (0, "0", "count")


def test_other_numbers_of_calls_diverge():
    class Repeats(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = nn.Identity(), times

        def forward(self, x):
            for _ in range(self.times):
                self.layer(x[: len(x) // self.times])
            return x

    def run(times: int) -> noesis.Trace:
        wrapped = noesis.wrap(Repeats(times), layers="all")
        wrapped(torch.ones(6, 2))
        return wrapped.trace()

    where = noesis.compare(run(1), run(2)).first_divergence
    assert (where.stat, where.a, where.b) == ("calls", 1, 2)


def test_traces_without_a_common_step():
    torch.manual_seed(0)
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4)), layers="all", capacity=2)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    _, one = wrapped.forward_with_trace(x)
    _, other = wrapped.forward_with_trace(y)
    _, same = wrapped.forward_with_trace(x)
    assert noesis.compare(one, other).first_divergence.layer == "0"  # each call's trace begins at step 0
    assert noesis.compare(one, same).first_divergence is None
    wrapped.reset()
    wrapped(x)
    early = wrapped.trace()
    wrapped(x)
    wrapped(x)
    late = wrapped.trace()  # steps 1 and 2; the ring has dropped step 0
    result = noesis.compare(early, late)
    assert (result.first_divergence, result.lengths) == (None, (1, 3, 0))
    text = "different steps: a has 1, b has 3, the traces have none in common; rows are of the whole runs"
    assert text in repr(result)
    wrapped(y)
    assert noesis.compare(late, wrapped).lengths == (3, 4, 1)


def test_runs_of_different_lengths_are_compared_in_the_steps_that_both_have(tmp_path):
    def kick(step, model):
        if step == 4:
            model[0].weight.data.mul_(100)

    short, long = traced(steps=2), traced(kick, steps=6)
    for a, b, lengths in ((short, long, (2, 6, 2)), (long, short, (6, 2, 2))):
        result = noesis.compare(a, b)
        assert result.first_divergence is None
        assert (result.distance, result.lengths) == (0, lengths)
        text = f"different steps: a has {lengths[0]}, b has {lengths[1]}; compared are the 2 that both have"
        assert text in repr(result)
        again = noesis.Comparison.load(result.save(tmp_path / "c.json"))
        assert (repr(again), again.lengths) == (repr(result), lengths)
    assert noesis.compare(short, traced(steps=2)).lengths == (2, 2, 2)
    assert "different" not in repr(noesis.compare(short, traced(steps=2)))
    assert noesis.compare(short.soulprint(), long).lengths is None
    where = noesis.compare(traced(steps=5), long).first_divergence
    assert (where.step, where.layer) == (4, "0")
    base = [traced(lambda s, m, seed=seed: m[0].weight.data.mul_(1 + 0.01 * seed)) for seed in range(4)]
    judged = noesis.compare(short, long, baseline=base)
    assert judged.rows != noesis.compare(short, long.at(long.steps < 2), baseline=base).rows
    assert "; they part, if so, in the 2 that both have, and rows are of the whole runs" in repr(judged)


def test_parts_of_runs_are_matched_by_their_order():
    torch.manual_seed(0)
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4)), layers="all")
    inputs = torch.randn(4, 3, 4)
    for x in (*inputs, *inputs[:2]):
        wrapped(x)
    trace = wrapped.trace()
    result = noesis.compare(trace.at(trace.steps < 4), trace.at(trace.steps >= 4))
    assert (result.first_divergence, result.distance, result.lengths) == (None, 0, (4, 2, 2))
    assert noesis.compare(trace.at(trace.steps < 2), trace.at(trace.steps == 3)).first_divergence[:2] == (0, "0")


def test_long_runs_that_have_the_same_steps_are_compared_as_a_whole():
    def run(scale: float) -> noesis.Trace:
        torch.manual_seed(0)
        wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4)), layers="all", capacity=3)
        for step in range(8):
            wrapped(torch.randn(3, 4) * (scale if step == 0 else 1.0))
        return wrapped.trace()

    result = noesis.compare(run(1.0), run(5.0))
    assert result.distance > 0, "the step that only the totals hold counts"
    assert (result.first_divergence, result.lengths) == (None, (8, 8, 8))


def row_of(dtype: str = "float32", **stats: float) -> noesis.Trace:
    """A trace of one step and one layer of a thousand elements."""
    names = (*ALWAYS, "zeros", "rms")
    values = {"count": 1000, "mean": 0.5, "std": 2.0, "abs_mean": 1.7, "min": -6, "max": 7, "nonfinite": 0}
    values |= {"zeros": 20, "rms": 2.06, **stats}
    row = np.array([[[float(values[name]) for name in names]]])
    return noesis.Trace.of(row, ["layer"], names, steps=np.arange(1), meta={"dtype": dtype})


@pytest.mark.parametrize(
    ("stat", "near", "far"),  # in float32, then what bfloat16 rounds
    [
        ("mean", (0.500015, 0.54), (0.50005, 0.6)),
        ("std", (2.000015, 2.05), (2.00005, 2.1)),
        ("abs_mean", (1.700015, 1.75), (1.70005, 1.8)),
        ("rms", (2.060015, 2.1), (2.06005, 2.2)),
        ("min", (-6.0002, -6.5), (-6.0004, -7.0)),
        ("max", (7.0002, 7.6), (7.0005, 8.1)),
        ("zeros", (20, 110), (21, 120)),
        ("count", (1000, 1000), (999, 999)),
        ("nonfinite", (0, 0), (1, 1)),
        ("mean", (0.5, 0.5), (math.nan, math.nan)),
    ],
)
def test_each_statistic_has_the_tolerance_that_fits_it(stat, near, far):
    for dtype, same, other in zip(("float32", "bfloat16"), near, far, strict=True):
        for a, b in ((row_of(), row_of(dtype, **{stat: same})), (row_of(dtype, **{stat: same}), row_of())):
            assert noesis.compare(a, b).first_divergence is None
            exact = noesis.compare(a, b, tolerance=0).first_divergence
            assert (exact is None) == (row_of().values == row_of(**{stat: same}).values).all()
        found = noesis.compare(row_of(), row_of(dtype, **{stat: other})).first_divergence
        assert found[:3] == (0, "layer", stat)


def test_the_coarser_dtype_decides_and_the_text_says_how_far():
    def apart(*dtypes):
        return noesis.compare(row_of(dtypes[0]), row_of(dtypes[1], mean=0.505))

    for dtypes in (("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "bfloat16")):
        assert apart(*dtypes).first_divergence is None
        assert apart(*dtypes).tolerance == 2**-5
        assert "first divergence: none of more than 0.031 standard deviations" in repr(apart(*dtypes))
    for dtypes in (("float32", "float32"), ("float64", "float32"), ("float32", "int8"), ("float32", "")):
        assert apart(*dtypes).first_divergence is not None
        assert apart(*dtypes).tolerance == 1e-5
    shrunk = noesis.compare(row_of("float16"), row_of("float32", mean=0.505)).first_divergence
    assert shrunk is None, "half a percent of 2.06 is what float16 rounds, four times"
    assert noesis.compare(row_of("float16"), row_of(mean=0.52)).first_divergence.stat == "mean"
    calls = row_of("bfloat16")
    calls.meta["dtype"] = ["float32", "float16"]  # of two calls of a pipeline
    assert noesis.compare(row_of(), calls).tolerance == 2**-8


def test_the_mean_of_a_layer_far_from_zero_is_rounded_by_its_size():
    big = {"mean": 1000.0, "std": 0.01, "abs_mean": 1000.0, "rms": 1000.0, "min": 999.0, "max": 1001.0}
    rounded = big | {"mean": 1002.0, "abs_mean": 1002.0, "std": 0.0, "min": 1000.0, "max": 1004.0}
    assert noesis.compare(row_of(**big), row_of("bfloat16", **rounded)).first_divergence is None
    assert noesis.compare(row_of(**big), row_of(**rounded)).first_divergence.stat == "mean"


# ---------------------------------------------------------------- significance


def test_a_constant_layer_that_moves_is_found_and_one_that_does_not_is_not():
    base = [soulprint([0.0, 1.0, 0.5], [0.0, 1.0 + 0.1 * i, 1.0]) for i in range(4)]
    same = noesis.compare(base[0], base[1], baseline=base)
    assert same.changed == []
    moved = noesis.compare(base[0], soulprint([0.0, 1.0, 0.6], [1.0, 1.1, 1.0]), baseline=base)
    assert set(moved.changed) == {"l0", "l2"}


# ---------------------------------------------------------------- files and text


def test_save_and_load(tmp_path):
    base = [soulprint([0.0, 1.0], [1.0 + 0.1 * i, 2.0]) for i in range(4)]
    for result in (
        noesis.compare(traced(), traced(lambda s, m: m[0].bias.data.add_(1))),
        noesis.compare(base[0], base[1], baseline=base),
        noesis.compare(base[0], soulprint([math.nan, 1], [1, 1])),
    ):
        again = noesis.Comparison.load(result.save(tmp_path / "c.json"))
        assert repr(again) == repr(result)
        assert json.loads(result.to_json())["format"] == "noesis.comparison"
    lines = (result.save(tmp_path / "c.csv")).read_text().splitlines()
    assert lines[0].startswith("layer,mean_a,mean_b")
    assert len(lines) == 3
    for field, value in (("distance", "x"), ("only_in_a", 3), ("meta", None), ("rows", [1]), ("first_divergence", [0])):
        broken = json.loads(result.to_json()) | {field: value}
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(noesis.NoesisError, match="is not a valid comparison"):
            noesis.Comparison.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"suffix '.txt'. Expected .json, .json.gz or .csv"):
        result.save(tmp_path / "c.txt")


def test_the_text_shows_what_matters():
    rng = np.random.default_rng(0)
    base = [soulprint(rng.normal(size=30) * 0.1, np.exp(rng.normal(size=30) * 0.02)) for _ in range(8)]
    other = soulprint(base[0].means, base[0].stds * np.where(np.arange(30) == 4, 1.5, 1))
    text = repr(noesis.compare(base[0], other, baseline=base))
    assert "1 of 30 layers changed by more than the noise of 8 runs (false discovery rate 0.05)" in text
    assert text.splitlines()[3].startswith("l4 ")
    assert len(text.splitlines()) == 13


@pytest.mark.slow
def test_many_layers_take_no_longer_each():
    """A file from a stranger may name very many."""
    count = 40_000
    names = [f"layer{number}" for number in range(count)]
    traces = [
        noesis.Trace.of(np.full((1, count, 7), float(value)), list(order), ALWAYS, steps=np.arange(1))
        for value, order in ((1, names), (2, reversed(names)))
    ]
    start = time.perf_counter()
    compared = noesis.compare(*traces)
    assert len(compared.rows) == count
    assert compared.first_divergence.layer == names[0]
    assert f"{count} layers" in repr(traces[0])
    assert traces[0].after(traces[1]).layers == names
    assert time.perf_counter() - start < 20  # with a search in a list for each, minutes
