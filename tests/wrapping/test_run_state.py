"""`RunState`: what checkpoints keep of a run, and how a run goes on from it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import noesis
from helpers.models import small
from noesis import RunState, Wrapped


def net(**settings: Any) -> Wrapped:
    return noesis.wrap(small(), **{"layers": "leaves", "stats": ["zeros", "rms"], "capacity": 4, **settings})


def batch(step: int, size: int = 5) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step)) * (1 + step)


def go(wrapped: Wrapped, steps: range, backward: bool = False) -> Wrapped:
    for step in steps:
        output = wrapped(batch(step))
        if backward:
            output.square().sum().backward()
    return wrapped


def carried(wrapped: Wrapped, other: Wrapped) -> Wrapped:
    """Another wrap that goes on from a checkpoint of the first."""
    RunState(other).load_state_dict(RunState(wrapped).state_dict())
    return other


def alike(one: noesis.Trace, other: noesis.Trace) -> None:
    np.testing.assert_allclose(one.totals, other.totals, rtol=1e-12)
    np.testing.assert_allclose(one.averages, other.averages, rtol=1e-12)
    assert one.dropped_steps + len(one) == other.dropped_steps + len(other)
    np.testing.assert_allclose(one.soulprint().vector, other.soulprint().vector, rtol=1e-12)


@pytest.mark.parametrize("stops", [(3,), (7,), (0, 9), (2, 6, 9)])
def test_totals_are_those_of_a_run_that_never_stopped(stops: tuple[int, ...]) -> None:
    whole = go(net(gradients=True), range(10), backward=True)
    wrapped, begin = net(gradients=True), 0
    for stop in stops:
        go(wrapped, range(begin, stop), backward=True)
        wrapped, begin = carried(wrapped, net(gradients=True)), stop
    go(wrapped, range(begin, 10), backward=True)
    alike(wrapped.trace(), whole.trace())
    alike(wrapped.gradients(), whole.gradients())
    assert wrapped.trace().steps.tolist() == list(range(10 - begin))[-4:]


def test_the_run_it_was_resumed_from_is_named() -> None:
    first = go(net(), range(2))
    with first.run(note="one"):
        go(first, range(2))
        second = go(carried(first, net()), range(3))
    assert second.trace().meta["resumed"] == first.trace().meta["run"] != second.trace().meta["run"]
    second.reset()
    assert "resumed" not in second.trace().meta
    assert second.trace().dropped_steps == 0


def test_layers_that_never_ran_and_nothing_at_all() -> None:
    wrapped = carried(net(), net())
    assert wrapped.trace().never_ran == ["0", "1", "2"]
    wrapped.observed_model[0](batch(0))
    again = carried(wrapped, net())
    assert again.trace().never_ran == ["1", "2"]
    assert again.trace().totals[0, 0] == 30


def test_files_and_torch_save(tmp_path) -> None:
    wrapped = go(net(), range(6))
    path = RunState(wrapped).save(tmp_path / "run.json.gz")
    torch.save({"noesis": RunState(wrapped).state_dict()}, tmp_path / "all.pt")
    from_file, from_torch = net(), net()
    RunState(from_file).load(path)
    RunState(from_torch).load_state_dict(torch.load(tmp_path / "all.pt", weights_only=True)["noesis"])
    for other in (from_file, from_torch):
        alike(go(other, range(6, 8)).trace(), go(net(), range(8)).trace())


@pytest.mark.filterwarnings("ignore:.*single process", "ignore:.*TypedStorage")  # torch's own, as it pleases
def test_distributed_checkpoint_of_one_process(tmp_path) -> None:
    wrapped = go(net(), range(6))
    dcp.save({"model": wrapped.state_dict(), "noesis": RunState(wrapped)}, checkpoint_id=tmp_path / "c")
    other = net()
    dcp.load({"model": other.state_dict(), "noesis": RunState(other)}, checkpoint_id=tmp_path / "c")
    alike(go(other, range(6, 8)).trace(), go(net(), range(8)).trace())


def test_calibration_comes_along() -> None:
    wrapped, other = (net(codebook=noesis.Codebook(size=4, dim=3), logits="2") for _ in range(2))
    calibration = wrapped.calibrate([batch(step, 50) for step in range(6)], progress=False)
    carried(wrapped, other)
    for one in (wrapped, other):
        one(batch(7))
    assert np.array_equal(wrapped.surprise().p_value, other.surprise().p_value)
    assert np.array_equal(wrapped.surprise().score, other.surprise().score)
    assert sum(calibration.samples) == 300
    with pytest.raises(noesis.NoesisError, match="input of 2, which is not observed here"):
        carried(wrapped, net(codebook=noesis.Codebook(size=4, dim=3)))


def test_codes_that_only_learned_come_along_into_the_same_parameters() -> None:
    wrapped, other = (net(codebook=noesis.Codebook(size=4, dim=3, learn="gradient")) for _ in range(2))
    held = other.codebook_parameters()
    for step in range(3):
        wrapped(batch(step))
        wrapped.coding_loss()
    carried(wrapped, other)
    for one in (wrapped, other):
        one(batch(7))
    assert torch.equal(wrapped.coding_loss(), other.coding_loss())
    assert all(a is b for a, b in zip(held, other.codebook_parameters(), strict=True))


def test_another_wrap_is_refused_and_loses_nothing() -> None:
    state = RunState(go(net(), range(2))).state_dict()
    for settings, what in (({"layers": "linear"}, "layers"), ({"stats": []}, "stats")):
        other = go(net(**settings), range(3))
        with pytest.raises(noesis.NoesisError, match=f"other {what} than the wrap: '(1|zeros)'"):
            RunState(other).load_state_dict(state)
        assert len(other.trace()) == 3
    with pytest.raises(noesis.NoesisError, match=r"RunState\(Linear\).*Wrap the model first"):
        RunState(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"run": "{}"},
        {"run": "[1]", "codes": "{}"},
        {"run": "{", "codes": "{}"},
        {"run": '{"trace": 3}', "codes": "{}"},
        {"run": '{"trace": {"format": "noesis.trace", "format_version": 1}}', "codes": "{}"},
        {"run": "{}", "codes": '{"calibration": "?"}'},
        {"run": "{}", "codes": '{"calibration": "aGVsbG8="}'},
        {"run": "{}", "codes": '{"codebooks": 3}'},
        {"run": 3, "codes": b"{}"},
    ],
)
def test_what_is_no_state_is_refused(broken: Any) -> None:
    wrapped = go(net(codebook=noesis.Codebook(size=4, dim=3)), range(3))
    with pytest.raises(noesis.NoesisError):
        RunState(wrapped).load_state_dict(broken)
    assert len(wrapped.trace()) == 3


def test_a_state_that_was_edited() -> None:
    state = RunState(go(net(), range(3))).state_dict()
    run = json.loads(state["run"])
    run["trace"]["arrays"]["totals"] = run["trace"]["arrays"]["totals"][:1]
    with pytest.raises(noesis.NoesisError, match="totals has shape"):
        RunState(net()).load_state_dict({**state, "run": json.dumps(run)})
