"""Merging over ranks: the algebra in this process, and what ranks under torchrun got."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import noesis
from helpers.processes import python, torchrun
from noesis import Trace
from noesis.distributed import merge
from noesis.distributed import traces as distributed
from noesis.files import load_tensors
from noesis.kernels import layout, rows
from noesis.results import ALWAYS, fields_of, stats_of

SCRIPTS = Path(__file__).parent


def script(name: str) -> ModuleType:
    """A script of the ranks, for its models and batches."""
    spec = importlib.util.spec_from_file_location(f"ranks_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(name: str, processes: int, folder: Path) -> Path:
    """Run a script on so many ranks; returns the folder with what they wrote."""
    done = torchrun(processes, SCRIPTS / f"{name}.py", folder)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """What four ranks wrote."""
    return launch("four", 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two ranks wrote."""
    return launch("two", 2, tmp_path_factory.mktemp("two"))


def told(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"told.{rank}.json").read_text())


def merged(folder: Path, case: str, ranks: int) -> Trace:
    """The merged trace, once it is known that all ranks got the same to the bit."""
    first, *others = [(folder / f"{case}.{rank}.safetensors").read_bytes() for rank in range(ranks)]
    assert all(other == first for other in others)
    return Trace.load(folder / f"{case}.0.safetensors")


def own(folder: Path, case: str, ranks: int) -> list[Trace]:
    return [Trace.load(folder / f"{case}.own{rank}.safetensors") for rank in range(ranks)]


# ---------------------------------------------------------------- the algebra


def described(x: np.ndarray) -> list[float]:
    """The statistics of elements, in float64."""
    good = x[np.isfinite(x)]
    if not len(good):
        return [0, np.nan, np.nan, np.nan, np.nan, np.nan, len(x)]
    std = good.std(ddof=1) if len(good) > 1 else 0.0
    return [len(good), good.mean(), std, np.abs(good).mean(), good.min(), good.max(), len(x) - len(good)]


def traced(data: dict[tuple[int, str], np.ndarray], layers: list[str]) -> Trace:
    """The trace of one rank, exact to float64, from its data by step and layer."""
    steps = sorted({step for step, _ in data})
    values = [[described(data.get((step, name), np.zeros(0))) for name in layers] for step in steps]
    return Trace.of(np.array(values).reshape(len(steps), len(layers), 7), layers, ALWAYS, steps=np.array(steps))


@pytest.mark.parametrize("seed", range(20))
def test_merging_is_one_process_over_the_union(seed: int, monkeypatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(distributed, "PIECE", int(rng.choice([1, 3000, 1 << 20])))  # so that rows come in pieces
    layers = ["a", "b", "c", "d"]
    union: dict[tuple[int, str], np.ndarray] = {}
    traces = []
    for rank in range(int(rng.integers(1, 7))):
        mine = list(rng.permutation(layers)[: rng.integers(1, 5)])
        data = {}
        for step in range(int(rng.integers(0, 5))):
            for name in mine:
                size = int(rng.choice([0, 1, 2, 50]))
                x = rng.normal(1000 * rank, rng.choice([1e-3, 1, 30]), size)
                x[rng.random(size) < 0.1] = np.nan
                data[step, name] = x
                union[step, name] = np.concatenate([union.get((step, name), np.zeros(0)), x])
        traces.append(traced(data, mine))
    whole = merge(traces)
    expected = traced(union, whole.layers)
    assert whole.steps.tolist() == expected.steps.tolist()
    # A std far below its mean has fewer digits than float64 has, in one process as in many.
    np.testing.assert_allclose(whole.values, expected.values, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(whole.totals, expected.totals, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(whole.averages, expected.averages, rtol=1e-12, atol=1e-11)
    assert whole.meta["ranks"]["averages"] == "exact"


def test_merging_in_two_stages_is_merging_at_once() -> None:
    rng = np.random.default_rng(0)
    traces = [traced({(step, "a"): rng.normal(size=9) for step in range(3)}, ["a"]) for _ in range(6)]
    at_once, in_two = merge(traces), merge([merge(traces[:2]), merge(traces[2:])])
    np.testing.assert_allclose(in_two.values, at_once.values, rtol=1e-12)
    np.testing.assert_allclose(in_two.averages, at_once.averages, rtol=1e-12)


def test_infinite_rows_stay_infinite() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="0")
    wrapped(torch.full((2, 1), 1e300, dtype=torch.float64))  # beyond float32
    whole = merge([wrapped.trace(), wrapped.trace()])
    assert whole["max"].item() == np.inf
    assert whole.totals[0, whole.stats.index("max")] == np.inf


def test_what_differs_is_named() -> None:
    data = {(0, "a"): np.ones(3)}
    one, other = traced(data, ["a"]), traced(data, ["a"])
    one.meta, other.meta = {"run": "x", "prompt": "a cat", "seed": 1}, {"run": "y", "prompt": "a dog", "seed": 1}
    one.timesteps, other.timesteps = np.array([5.0]), np.array([7.0])
    one.branches, other.branches = ["cond"], ["uncond"]
    other.unmeasured = {"a": "a DTensor"}
    whole = merge([one, other])
    assert whole.meta["ranks"]["differing"] == ["timesteps", "branches", "prompt"]
    assert whole.meta["ranks"]["runs"] == ["x", "y"]
    assert whole.meta["prompt"] == "a cat"
    assert np.isnan(whole.timesteps).all()
    assert whole.branches == [None]
    assert whole.unmeasured == {"a": "a DTensor; on rank 1"}
    other.timesteps, other.branches, other.meta = one.timesteps, one.branches, one.meta
    whole = merge([one, other])
    assert whole.meta["ranks"]["differing"] == []
    assert whole.timesteps.tolist() == [5.0]
    assert whole.branches == ["cond"]


def test_too_many_samples_are_refused(monkeypatch) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="0", per_sample=True)
    wrapped(torch.ones(3, 2))
    monkeypatch.setattr(distributed, "MOST_BYTES", 100)
    with pytest.raises(MemoryError, match="6 samples on 2 ranks, over 1 steps and 1 layers"):
        merge([wrapped.trace(), wrapped.trace()])


def test_no_traces() -> None:
    with pytest.raises(noesis.NoesisError, match="No traces. Expected one per rank"):
        merge([])


# ---------------------------------------------------------------- four ranks


def outputs_of_all(steps: range, part: str) -> list[np.ndarray]:
    """What a linear layer gives on all ranks together, by step, in float64."""
    ranks, found = script("four"), []
    model = ranks.Sometimes()
    for step in steps:
        seen: list[np.ndarray] = []
        hook = getattr(model, part).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.detach().double().numpy().ravel())
        )
        for rank in range(3):
            if not (rank == 1 and step == 6):
                model(ranks.batch(step, rank, 3 * (rank + 1)), other=rank == 2 and step % 2 == 0)
        hook.remove()
        found.append(np.concatenate([np.zeros(0), *seen]))
    return found


@pytest.mark.slow
def test_uneven_and_empty_ranks(four: Path) -> None:
    whole, traces = merged(four, "uneven", 4), own(four, "uneven", 4)
    assert [len(trace) for trace in traces] == [7, 6, 7, 0]
    assert whole.layers == ["first", "other", "last"]
    assert whole.stats == (*ALWAYS, "zeros", "rms")
    # The ranks' float32 rows, merged in float64.
    parts = np.zeros((4, 7, 3, len(layout.FIELDS)))
    for rank, trace in enumerate(traces):
        parts[rank, : len(trace)] = fields_of(trace.values, trace.stats)
    expected = stats_of(rows.combine(parts), whole.stats)
    np.testing.assert_allclose(whole.values, expected, rtol=1e-12)
    # The elements themselves, which a row rounds to float32.
    for index, name in enumerate(whole.layers):
        values = np.array([described(x) for x in outputs_of_all(range(7), name)])
        np.testing.assert_allclose(whole.values[:, index, :7], values, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_steps_calls_and_meta_of_four_ranks(four: Path) -> None:
    whole = merged(four, "uneven", 4)
    assert whole.batches.tolist() == [18] * 6 + [12]
    assert whole.calls[:, 0].tolist() == [1] * 7
    assert whole.calls[:, 1].tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert whole.order[:2].tolist() == [[1, 2, 2], [1, 0, 2]]
    assert whole.averages[:, 0].tolist() == [7, 4, 7]
    ranks = whole.meta["ranks"]
    assert ranks["merged"] == 4
    assert ranks["steps"] == [7, 6, 7, 0]
    assert len(set(ranks["runs"])) == 4
    assert ranks["differing"] == []
    soulprint = noesis.Soulprint.load(four / "soulprint.2.safetensors")
    np.testing.assert_allclose(soulprint.means[0], whole["mean"][:, 0].mean(), rtol=1e-12)
    np.testing.assert_array_equal(soulprint.vector, whole.soulprint().vector)


@pytest.mark.slow
def test_steps_that_a_ring_dropped(four: Path) -> None:
    whole, full = merged(four, "ring", 4), merged(four, "uneven", 4)
    assert [trace.dropped_steps for trace in own(four, "ring", 4)] == [3, 2, 3, 0]
    assert whole.steps.tolist() == [3, 4, 5, 6]
    assert whole.dropped_steps == 3
    np.testing.assert_allclose(whole.totals, full.totals[:, :7], rtol=1e-12)
    np.testing.assert_allclose(whole.values, full.values[3:, :, :7], rtol=1e-12)
    assert whole.meta["ranks"]["averages"] == ("weighted by elements over the first 3 steps, which a ring has dropped")
    assert whole.averages[:, 0].tolist() == [7, 4, 7]
    # Each rank's share of the dropped steps was the same, so that means are exact; stds are within a few percent.
    np.testing.assert_allclose(whole.averages[:, 1], full.averages[:, 1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.averages[:, 2], full.averages[:, 2], rtol=0.05)
    assert (whole.averages[:, 2] != full.averages[:, 2]).any()


@pytest.mark.slow
def test_samples_stand_side_by_side(four: Path) -> None:
    whole, traces = merged(four, "samples", 4), own(four, "samples", 4)
    assert [len(trace.samples) for trace in traces] == [3, 6, 9, 0]
    assert len(whole.samples) == 18
    for sample, expected in zip(whole.samples, [s for trace in traces for s in trace.samples], strict=True):
        np.testing.assert_allclose(sample.values[: len(expected)], expected.values, rtol=1e-12)
        np.testing.assert_array_equal(sample.totals, expected.totals)
        np.testing.assert_array_equal(sample.averages, expected.averages)
        np.testing.assert_array_equal(sample.calls[: len(expected)], expected.calls)
    assert whole.samples[4]["count"][6].tolist() == [0, 0, 0]  # rank 1 had six steps
    np.testing.assert_allclose(whole.values, merged(four, "uneven", 4).values[..., :7], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_was_resumed(four: Path) -> None:
    whole, full = merged(four, "resumed", 4), merged(four, "uneven", 4)
    assert (whole.dropped_steps, whole.steps.tolist()) == (3, [0, 1, 2, 3])
    np.testing.assert_allclose(whole.totals, full.totals[:, :7], rtol=1e-12)
    np.testing.assert_allclose(whole.averages, full.averages, rtol=1e-12)
    np.testing.assert_allclose(whole.values, full.values[3:, :, :7], rtol=1e-12)


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_is_resumed_by_one(four: Path) -> None:
    wrapped = noesis.wrap(script("four").Sometimes(), layers="linear")
    with pytest.warns(UserWarning, match="single process"):
        dcp.load({"noesis": noesis.RunState(wrapped)}, checkpoint_id=four / "checkpoint")
    assert wrapped.trace().dropped_steps == 3
    assert wrapped.trace().totals[0, 0] == 3 * (3 + 6 + 9) * 8


@pytest.mark.slow
def test_stages_of_a_pipeline(four: Path) -> None:
    whole = merged(four, "stages", 4)
    assert whole.layers == [f"stage{rank}.{part}" for rank in range(4) for part in (0, 1)]
    assert whole.order[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    for rank, trace in enumerate(own(four, "stages", 4)):
        np.testing.assert_allclose(whole.values[:, 2 * rank : 2 * rank + 2], trace.values, rtol=1e-12)
    assert whole.never_ran == []


@pytest.mark.slow
def test_nothing_is_sent_unless_asked(four: Path) -> None:
    assert told(four, 2)["alone"] < 5
    trace = Trace.load(four / "uneven.own2.safetensors")
    assert trace.batches.tolist() == [9] * 7


@pytest.mark.slow
def test_a_group_of_some_ranks(four: Path) -> None:
    assert (four / "some.1.safetensors").read_bytes() == (four / "some.2.safetensors").read_bytes()
    some = Trace.load(four / "some.1.safetensors")
    assert some.batches.tolist() == [15] * 6 + [9]
    for rank in (0, 3):
        assert told(four, rank)["outside"].startswith("BadType: group=a group that this process is not in.")


@pytest.mark.slow
def test_wrong_groups_and_times(four: Path) -> None:
    said = told(four, 0)
    assert said["not a group"] == (
        "BadType: group=[0, 1]. Expected a torch.distributed.ProcessGroup. Pass torch.distributed.group.WORLD."
    )
    assert said["no time"].startswith("BadValue: timeout=0. Expected seconds to wait for the other ranks")


@pytest.mark.slow
def test_ranks_with_other_statistics(four: Path) -> None:
    for rank in (0, 1, 3):
        assert "Rank 1 has the statistics count, mean" in told(four, rank)["stats"]
        assert "Pass the same stats= to wrap" in told(four, rank)["stats"]


@pytest.mark.slow
def test_a_rank_that_died_is_named(four: Path) -> None:
    assert "missing" not in told(four, 2)
    for rank in (0, 1, 3):
        assert told(four, rank)["missing"] == (
            "TimedOut: Rank 2 of 4 did not come in time to trace or soulprint. Expected every rank of the group to "
            f"make this call. See whether they died, left the loop early or are slow; timeout={3 if rank == 0 else 2} "
            "may be longer."
        )


# ---------------------------------------------------------------- two ranks


def one_process(steps: int) -> Trace:
    """What one process sees that gets the batches of both ranks as one."""
    ranks = script("two")
    wrapped = noesis.wrap(ranks.small(), layers="linear")
    for step in range(steps):
        wrapped(torch.cat([ranks.batch(step, 0), ranks.batch(step, 1)]))
    return wrapped.trace()


@pytest.mark.parametrize("way", ["around the model", "around the container", "inside"])
@pytest.mark.slow
def test_data_parallel(two: Path, way: str) -> None:
    assert told(two, 0)["ddp"][way]  # to the bit as the bare model trains
    assert told(two, 1)["ddp"][way]
    whole, traces, expected = merged(two, way, 2), own(two, way, 2), one_process(1)
    assert whole.layers == (["module.0", "module.2"] if way == "inside" else ["0", "2"])
    assert whole.batches.tolist() == [11, 11, 11]
    parts = np.stack([fields_of(trace.values, trace.stats) for trace in traces])
    np.testing.assert_allclose(whole.values, stats_of(rows.combine(parts), ALWAYS), rtol=1e-12)
    np.testing.assert_allclose(whole.values[0], expected.values[0], rtol=1e-5)  # before the first update


@pytest.mark.parametrize("way", ["wrap, then shard", "shard, then wrap"])
@pytest.mark.slow
def test_fully_sharded(two: Path, way: str) -> None:
    assert told(two, 0)["fsdp"][way]  # gradients to the bit as without noesis
    assert told(two, 1)["fsdp"][way]
    whole, expected = merged(two, way, 2), one_process(3)
    assert whole.layers == ["0", "2"]
    assert whole.unmeasured == {}
    np.testing.assert_allclose(whole.values, expected.values, rtol=1e-5)
    assert whole.batches.tolist() == [11, 11, 11]


@pytest.mark.parametrize("way", ["local", "dtensor", "rows", "partial", "compiled"])
@pytest.mark.slow
def test_tensor_parallel(two: Path, way: str) -> None:
    for rank in range(2):
        said = told(two, rank)
        assert said["compiled"] if way == "compiled" else said["tensor parallel"][way]  # to the bit as the bare model
    ranks = script("two")
    wrapped = noesis.wrap(ranks.small(), layers="linear")
    wrapped(ranks.batch(0, 1))
    expected = wrapped.trace().values[0]
    whole = merged(two, "compiled" if way == "compiled" else f"tensor parallel {way}", 2)
    # The columns of a layer that is split: every rank has its own, and together they are the layer's output.
    assert whole["count"][0, 0] == expected[0, 0]
    np.testing.assert_allclose(whole.values[0, 0], expected[0], rtol=1e-6, atol=1e-7)
    assert whole.never_ran == []
    if way == "partial":
        reason = "a DTensor with the placement Partial, a sum over ranks that is not taken yet"
        assert whole.unmeasured == {"2": f"{reason}, in an output of type DTensor"}
        return
    assert whole.unmeasured == {}
    # The sum of what they have is split once more, by rows (four of seven here), or every rank has all of it.
    times = 1 if way == "rows" else 2
    assert whole["count"][0, 1] == times * expected[1, 0]
    np.testing.assert_allclose(whole["mean"][0, 1], expected[1, 1], rtol=1e-6)
    np.testing.assert_allclose(whole.values[0, 1, 4:], expected[1, 4:], rtol=1e-6)


@pytest.mark.parametrize("way", ["local", "dtensor", "rows", "partial"])
@pytest.mark.slow
def test_gradients_in_tensor_parallel_training(two: Path, way: str) -> None:
    ranks = script("two")
    wrapped = noesis.wrap(ranks.small(), layers="linear", gradients=True)
    wrapped(ranks.batch(0, 1)).square().sum().backward()
    expected = wrapped.gradients().values[0]
    whole = merged(two, f"tensor parallel gradients {way}", 2)
    assert whole["count"][0, 0] == expected[0, 0]
    np.testing.assert_allclose(whole.values[0, 0], expected[0], rtol=1e-5, atol=1e-6)
    if way == "partial":
        assert "Partial" in whole.unmeasured["2"]
        return
    assert whole.unmeasured == {}
    assert whole["count"][0, 1] == (1 if way == "rows" else 2) * expected[1, 0]
    np.testing.assert_allclose(whole["mean"][0, 1], expected[1, 1], rtol=1e-5)


@pytest.mark.slow
def test_vectors_that_are_spread_over_ranks_are_not_kept(two: Path) -> None:
    reason = "a DTensor, whose vectors are spread over ranks"
    assert told(two, 0)["uncoded"] == {"local": {}, "dtensor": {"0": reason}, "rows": {"2": reason}, "partial": {}}


@pytest.mark.slow
def test_dtensors_cost_nothing_where_there_are_none() -> None:
    code = (
        "import sys, torch, noesis\n"
        "wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()), layers='all')\n"
        "wrapped(torch.ones(2)), wrapped(torch.ones(2).to_sparse())\n"
        "assert len(wrapped.trace().unmeasured) == 2\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def calibrated() -> noesis.Wrapped:
    ranks = script("two")
    model = ranks.coded()
    model.calibrate(ranks.normal(), progress=False)
    return model


@pytest.mark.parametrize("case", ["shared", "one"])
@pytest.mark.slow
def test_calibration_is_that_of_one_process(two: Path, case: str, tmp_path: Path) -> None:
    files = [two / f"{case}.{rank}.safetensors" for rank in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    found, header = load_tensors(files[0], "calibration")
    expected, known = load_tensors(calibrated().save_calibration(tmp_path / "one.safetensors"), "calibration")
    assert header == known
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert told(two, 0)[case] == told(two, 1)[case]
    assert "600 samples: 400 fitted" in told(two, 0)[case]
    assert told(two, 0)["p"] == told(two, 1)["p"]


@pytest.mark.slow
def test_what_padding_does_is_known_to_all_ranks(two: Path) -> None:
    found = {"words": "masked", "numbered": "depends"}
    for rank in range(2):
        assert told(two, rank)["padded"] == {"layers": ["words"], "padding": found, "used": found}


@pytest.mark.slow
def test_more_samples_than_are_kept(two: Path) -> None:
    assert told(two, 0)["chosen"] == told(two, 1)["chosen"]
    assert "Calibration(240 samples" in told(two, 0)["chosen"]


@pytest.mark.slow
def test_a_loader_that_breaks_is_an_error_on_all_ranks(two: Path) -> None:
    first, second = told(two, 0), told(two, 1)
    assert second["broken"] == "ValueError: the disk is gone"
    assert first["broken"].startswith("WrongState: calibrate failed on rank 1: ValueError: the disk is gone.")
    assert first["few"].startswith("BadValue: The loader gave 40 samples")
    assert second["few"].startswith("WrongState: calibrate failed on rank 0: BadValue: The loader gave 40 samples")
    assert ".." not in second["few"]
    assert first["none"].startswith("BadValue: The loader is empty")
    assert "rank 0: BadValue: The loader is empty" in second["none"]
    assert first["labels"] == second["labels"]
    assert first["labels"].startswith("BadValue: Rank 1 has no labels, and others have")
    assert first["untouched"]
    assert second["untouched"]


@pytest.mark.slow
def test_ranks_that_ask_for_different_things(two: Path) -> None:
    assert told(two, 0)["mixed"].startswith("WrongState: This rank calls calibrate, and rank 1 trace or soulprint")
    assert told(two, 1)["mixed"].startswith("WrongState: This rank calls trace or soulprint, and rank 0 calibrate")


@pytest.mark.slow
def test_a_rank_that_comes_late(two: Path) -> None:
    assert told(two, 0)["late"].startswith("TimedOut: Rank 1 of 2 did not come in time to trace or soulprint")
    assert told(two, 1)["too late"].startswith(
        "TimedOut: Rank 1 of 2 came to trace or soulprint after others had given up"
    )
    assert told(two, 0)["seconds"] < 15
    assert told(two, 0)["again"] == told(two, 1)["again"] == "nothing"  # the group is as good as before
