"""Norms of parameters, of their gradients and of their updates: right, when asked, and without a trace in training."""

from __future__ import annotations

import copy
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from helpers.models import small


def train(model: nn.Module, steps: int, weigh: Any = None) -> list[torch.Tensor]:
    """Weights after each step of a small training."""
    torch.manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for _ in range(steps):
        optimiser.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimiser.step()
        if weigh is not None:
            weigh()
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_are_those_of_float64(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    wrapped = noesis.wrap(model, parameters=True)
    states: list[dict[str, torch.Tensor]] = []
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 10**step
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        wrapped.weigh(every=1)
        states.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
    found = wrapped.parameter_norms()
    assert found.parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for at, name in enumerate(found.parameters):
        for step in range(3):
            now = states[step][name]
            assert found.norms[step, at] == pytest.approx(now.norm().item(), rel=1e-6)
            if step:
                update = (now - states[step - 1][name]).norm().item()
                assert found.update_norms[step, at] == pytest.approx(update, rel=1e-6)
                ratio = update / states[step - 1][name].norm().item()
                assert found.update_ratios[step, at] == pytest.approx(ratio, rel=1e-6)
    assert np.isnan(found.update_norms[0]).all()
    gradients = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    assert found.gradient_total[-1] == pytest.approx(gradients.norm().item(), rel=1e-6)
    assert found.total[-1] == pytest.approx(
        torch.cat([w.flatten() for w in states[-1].values()]).norm().item(), rel=1e-6
    )


def test_training_is_bitwise_what_it_was() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="linear", parameters=True)
    bare = train(small(), 5)
    for ours, theirs in zip(train(model, 5, lambda: wrapped.weigh(every=1)), bare, strict=True):
        assert torch.equal(ours, theirs)
    assert len(wrapped.trace()) == 5
    assert wrapped.parameter_norms().steps.tolist() == [0, 1, 2, 3, 4]


def test_weighing_in_inference_mode_leaves_no_trap() -> None:
    wrapped = noesis.wrap(small(), parameters=True)
    with torch.inference_mode():
        wrapped.weigh(every=1)
    wrapped(torch.ones(1, 4)).sum().backward()
    wrapped.weigh(every=1)
    assert (wrapped.parameter_norms().update_norms[1] == 0).all()


def test_what_is_not_there_is_nan_and_what_is_broken_is_infinite() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    wrapped = noesis.wrap(model, parameters=True)
    wrapped.weigh(every=1)
    model[2].weight.grad = torch.full_like(model[2].weight, torch.nan)
    model[2].bias.data[0] = torch.inf
    wrapped.weigh(every=1)
    found = wrapped.parameter_norms()
    assert np.isnan(found.gradient_norms[0]).all()
    assert np.isnan(found.update_norms[:, 0]).all()  # frozen
    assert found.update_norms[1, 1] == 0
    assert math.isinf(found.gradient_norms[1, 2])
    assert math.isinf(found.gradient_total[1])
    assert math.isinf(found.norms[1, 3])
    assert "inf" in repr(found)


def test_parameters_that_came_and_went() -> None:
    model = small()
    wrapped = noesis.wrap(model, parameters=True)
    del model[2].bias
    model[2].register_parameter("bias", None)
    model[2].register_parameter("scale", nn.Parameter(torch.ones(3)))
    wrapped.weigh(every=1)
    found = wrapped.parameter_norms()
    assert found.parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert found.unmeasured == {"2.bias": "the model has no parameter of this name any more"}
    assert "not measured: 2.bias" in repr(found)


def test_runs_pauses_and_copies() -> None:
    model = small()
    wrapped = noesis.wrap(model, parameters=True)
    wrapped.weigh(every=1)
    with wrapped.paused():
        wrapped.weigh(every=1)
    with wrapped.run(note="second"):
        wrapped.weigh(every=1)
        found = wrapped.parameter_norms()
        assert (len(found.steps), found.meta["note"]) == (1, "second")
        assert (found.update_norms == 0).all()  # since the last weighing, of whichever run
    for made in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        made.weigh(every=1)
        assert np.isnan(made.parameter_norms().update_norms[-1]).all()
    plain = len(pickle.dumps(noesis.wrap(nn.Sequential(nn.Linear(512, 512)))))
    weighed = noesis.wrap(nn.Sequential(nn.Linear(512, 512)), parameters=True)
    weighed.weigh(every=1)
    assert len(pickle.dumps(weighed)) < plain + 200_000  # without the copy of a million bytes


def test_the_log_has_them(tmp_path: Path) -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="linear", parameters=True)
    wrapped.weigh(every=1)
    train(model, 1)
    found = wrapped.log_to(tmp_path / "a.jsonl", layers=["2"])
    norms = wrapped.parameter_norms()
    assert found["noesis/parameters/norm"] == norms.total[-1]
    assert found["noesis/parameters/gradient_norm"] == norms.gradient_total[-1]
    assert found["noesis/parameters/largest_update_ratio"] == norms.update_ratios[-1].max()
    assert found["noesis/parameters/2.weight/update_ratio"] == norms.update_ratios[-1, 2]
    assert "noesis/parameters/0.weight/norm" not in found
    wrapped.weigh(every=1)  # the weighing that the log takes
    assert wrapped.log_to(tmp_path / "a.jsonl", layers=["2"])["noesis/parameters/largest_update_ratio"] == 0
    assert len(wrapped.parameter_norms().steps) == 3
    every = wrapped.log_to(tmp_path / "b.jsonl", layers="each")
    assert {f"noesis/parameters/{name}/norm" for name in norms.parameters} <= every.keys()


def test_without_parameters_it_says_what_to_do() -> None:
    wrapped = noesis.wrap(small())
    for ask in (wrapped.weigh, wrapped.parameter_norms):
        with pytest.raises(noesis.NoesisError, match=r"Parameters are not measured.*parameters=True"):
            ask()
    with pytest.raises(noesis.NoesisError, match=r"parameters=1. Expected True or False"):
        noesis.wrap(small(), parameters=1)
    assert "wrapped.weigh()" in repr(noesis.wrap(small(), parameters=True).parameter_norms())


def test_of_ten_calls_one_measures_and_an_update_is_of_one_step() -> None:
    model = small()
    wrapped = noesis.wrap(model, parameters=True)
    weights = train(model, 25, wrapped.weigh)
    found = wrapped.parameter_norms()
    assert len(found.steps) == 3
    assert found.total[2] == pytest.approx(weights[20].norm().item(), rel=1e-6)
    updates = np.sqrt((found.update_norms**2).sum(1))
    assert np.isnan(updates[0])
    for at, step in ((1, 10), (2, 20)):
        assert updates[at] == pytest.approx((weights[step] - weights[step - 1]).norm().item(), rel=1e-5)
    with wrapped.run():
        wrapped.weigh(every=3)
        assert len(wrapped.parameter_norms().steps) == 1  # the first of a run
    for wrong in (0, 1.5, True, None):
        with pytest.raises(noesis.NoesisError, match=r"every=.* whole number from 1"):
            wrapped.weigh(every=wrong)


def test_the_log_does_not_weigh_where_the_loop_does(tmp_path: Path) -> None:
    model = small()
    wrapped = noesis.wrap(model, parameters=True)
    logged: list[bool] = []

    def look() -> None:
        wrapped.weigh(every=3)
        logged.append("noesis/parameters/norm" in wrapped.log_to(tmp_path / "a.jsonl"))

    train(model, 5, look)
    assert logged == [True, False, False, True, False]
    assert len(wrapped.parameter_norms().steps) == 2


def test_the_ring_holds_the_latest() -> None:
    model = small()
    wrapped = noesis.wrap(model, parameters=True, capacity=3)
    weights = train(model, 5, lambda: wrapped.weigh(every=1))
    found = wrapped.parameter_norms()
    assert found.steps.tolist() == [2, 3, 4]
    assert found.total.tolist() == pytest.approx([each.norm().item() for each in weights[2:]], rel=1e-6)


def test_weighing_costs_at_most_one_percent_of_a_training_step() -> None:
    """As the guide to costs has it; in time of the processor, and the least of many turns, which noise only adds to."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)))
    wrapped = noesis.wrap(model, parameters=True)
    optimiser = torch.optim.AdamW(model.parameters())
    x = torch.randn(2048, 256)
    training, calls = [], []
    for _ in range(40):
        begin = time.process_time()
        optimiser.zero_grad()
        wrapped(x).square().mean().backward()
        optimiser.step()
        between = time.process_time()
        wrapped.weigh()
        training.append(between - begin)
        calls.append(time.process_time() - between)
    ten = [min(calls[at::10][1:]) for at in range(10)]  # of each place in a round of ten
    assert ten[0] > 5 * ten[5]  # which does nothing
    assert sum(ten) < 0.01 * 10 * min(training)  # 0.0033 as measured
