"""Alarms of gradients: what goes wrong in a backward pass is told there, and not as what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noesis
from noesis.wrapping import Alarm, Alarms
from noesis.wrapping.condition import PATIENCE, SCARCE, WARM_UP


class Fault(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Net(nn.Module):
    """Four blocks; what comes back from the third is multiplied by `factor`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 3)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(Fault.apply(x, self.factor) if index == 2 and self.factor != 1 else x)
        return self.head(x)


class Loop:
    """A wrapped network in training, and the alarms it raises."""

    def __init__(self, layers: Any = "blocks", every: int = 1, **options: Any) -> None:
        self.net = Net()
        watching = {name: options.pop(name) for name in ("gradients", "dead", "vanishing") if name in options}
        self.wrapped = noesis.wrap(self.net, layers=layers, gradients=True, **options)
        self.found: list[Alarm] = []
        self.alarms = Alarms(self.wrapped, self.found.append, **watching)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.every, self.step = every, 0

    def loss(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.step)
        x = torch.randn(16, 8, generator=generator)
        return F.cross_entropy(self.wrapped(x), x[:, :3].argmax(1))

    def run(self, steps: int, scale: float = 1.0, update: bool = True) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            (scale * self.loss()).backward()
            if update:
                self.optimizer.step()
            if self.step % self.every == 0:
                self.alarms.check(self.step)
            self.step += 1

    def told(self) -> list[tuple[str, str, str, int]]:
        return [(alarm.of, alarm.kind, alarm.layer, alarm.step) for alarm in self.found]


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("every", [1, 4, 50])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_what_is_born_in_a_backward_pass_is_told_there(factor: float, every: int) -> None:
    loop = Loop(every=every)
    loop.run(9)
    loop.net.factor = factor
    loop.run(1)
    loop.net.factor = 1.0
    loop.run(41)
    loop.alarms.check()
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 9)]
    [alarm] = loop.found
    number = int(alarm.value)
    assert alarm.message == (
        f"step 9: the gradient of layer 'blocks.1' has {number} NaN or infinite elements, "
        "the first of the backward pass"
    )
    assert alarm.at == {1: 9, 4: 12, 50: 50}[every]
    assert (loop.wrapped.trace()["nonfinite"][-1] > 0).all(), "it went through the optimizer, and is not told again"


def test_in_the_first_step_of_all_too() -> None:
    loop = Loop()
    loop.net.factor = math.nan
    loop.run(3)
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 0)]


def test_what_comes_up_in_the_gradient_of_a_weight_alone_is_seen_in_the_next_forward() -> None:
    loop = Loop()
    loop.net.blocks[2][0].weight.register_hook(lambda gradient: gradient * math.nan)
    loop.run(2)
    assert loop.told() == [("outputs", "nonfinite", "blocks.2", 1)]


def test_gradients_that_follow_from_an_output_are_not_told() -> None:
    loop = Loop()
    loop.run(5)
    with torch.no_grad():
        loop.net.blocks[1][0].bias[2] = math.nan
    loop.run(5)
    assert loop.told() == [("outputs", "nonfinite", "blocks.1", 5)]


def test_a_check_between_forward_and_backward_misses_nothing() -> None:
    loop = Loop()
    for step in range(6):
        loop.step, loop.net.factor = step, math.nan if step == 3 else 1.0
        loss = loop.loss()
        loop.alarms.check()
        loss.backward()
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 3)]


def test_accumulated_gradients_name_where_they_came_from() -> None:
    loop = Loop()
    for step in range(12):
        loop.step, loop.net.factor = step, math.inf if step == 4 else 1.0
        loop.loss().backward()
        loop.alarms.check()
        if step % 4 == 3:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 4), ("outputs", "nonfinite", "blocks.0", 8)]
    assert loop.found[1].message.endswith(
        "NaN or infinite elements, which the gradient of layer 'blocks.1' had at step 4 and may have handed on to the "
        "weights"
    )


def test_after_a_skipped_update_outputs_are_looked_at_as_before() -> None:
    """As a GradScaler skips it."""
    loop = Loop()
    loop.run(3)
    loop.net.factor = math.inf
    loop.run(1, update=False)
    loop.net.factor = 1.0
    with torch.no_grad():  # evaluation: no gradients come
        loop.loss()
        loop.net.blocks[2][0].bias.fill_(math.nan)
        loop.loss()
    loop.alarms.check()
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 3), ("outputs", "nonfinite", "blocks.2", 5)]


def test_gradients_of_forwards_long_past_are_looked_at() -> None:
    loop = Loop(every=1)
    losses = []
    for step in range(8):
        loop.step, loop.net.factor = step, math.nan if step == 2 else 1.0
        losses.append(loop.loss())
        loop.alarms.check()
    for step in (7, 5, 2, 0):
        losses[step].backward()
        loop.alarms.check()
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 2)]


def test_a_second_pass_through_the_same_forward_is_looked_at() -> None:
    loop = Loop()
    loss = loop.loss()
    loss.backward(retain_graph=True)
    assert loop.alarms.check() == []
    (loss * math.inf).backward()
    assert loop.alarms.check()[0].of == "gradients"
    assert loop.told() == [("gradients", "nonfinite", "blocks.3", 0)]
    assert loop.alarms.check() == []


def test_what_the_ring_dropped_is_found_in_the_totals() -> None:
    loop = Loop(every=100, capacity=4)
    loop.run(1)
    loop.net.factor = math.nan
    loop.run(1, update=False)
    loop.net.factor = 1.0
    loop.run(10)
    [alarm] = loop.alarms.check()
    assert (alarm.of, alarm.kind, alarm.layer, alarm.step) == ("gradients", "nonfinite", "blocks.0", 7)
    assert alarm.message.startswith("steps 1 to 7: the gradient of layer 'blocks.0' (and 1 more) had NaN or infinite")
    loop.run(20)
    assert loop.alarms.check() == []


def test_a_new_run_and_pauses() -> None:
    loop = Loop()
    loop.run(3)
    loop.net.factor = math.nan
    with loop.wrapped.paused():
        loop.run(2, update=False)
    assert loop.told() == []
    with loop.wrapped.run(epoch=1):
        loop.run(1, update=False)
    assert loop.told() == [("gradients", "nonfinite", "blocks.1", 0)]
    loop.alarms.reset()
    assert loop.alarms.check() == []


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize("scale", [1e6, 30.0])
def test_a_loss_that_explodes(scale: float) -> None:
    loop = Loop(every=5)
    loop.run(60)
    loop.run(1, scale, update=False)
    loop.run(4)
    loop.alarms.check()
    assert loop.told() == [("gradients", "exploding", f"blocks.{index}", 60) for index in (3, 2, 1, 0)]
    alarm = loop.found[0]
    assert alarm.value / alarm.expected == pytest.approx(scale, rel=0.5)
    assert alarm.message.startswith("step 60: the gradient of layer 'blocks.3' is exploding: its rms ")
    loop.run(WARM_UP)
    loop.run(1, scale, update=False)
    loop.alarms.check()
    assert len(loop.found) == 8, "again after it had recovered"


def test_an_explosion_on_the_way_back_begins_where_it_begins() -> None:
    loop = Loop()
    loop.run(60)
    loop.net.factor = 1e4
    loop.run(1, update=False)
    assert loop.told() == [("gradients", "exploding", f"blocks.{index}", 60) for index in (1, 0)]


def test_gradients_that_vanish() -> None:
    loop = Loop()
    loop.run(60)
    loop.run(SCARCE - 1, 1e-6)
    loop.run(5)
    assert loop.told() == [], "a batch or two that are learned already"
    loop.run(10, 1e-6)
    assert loop.told() == [("gradients", "vanishing", f"blocks.{index}", 67) for index in (3, 2, 1, 0)]
    assert loop.found[0].at == 67 + SCARCE - 1
    assert "is vanishing: its rms" in loop.found[0].message


def test_gradients_that_are_zero_are_dead() -> None:
    loop = Loop()
    loop.run(30)
    loop.run(PATIENCE + 3, 0.0)
    assert loop.told() == [("gradients", "dead", f"blocks.{index}", 30) for index in (3, 2, 1, 0)]
    assert loop.found[0].message == (
        f"step 30: the gradient of layer 'blocks.3' is dead: it is zero, for {PATIENCE} steps"
    )


def test_constant_and_sparse_gradients_are_not_dead() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4)), stats=["zeros"], gradients=True)
    alarms = Alarms(wrapped, exploding=None)
    for _ in range(3 * PATIENCE):
        wrapped(torch.randn(4000, 2)).mean().backward()
    assert alarms.check() == []
    for _ in range(3 * PATIENCE):
        wrapped(torch.randn(4000, 2))[-1].square().mean().backward()
    assert alarms.check() == []


@pytest.mark.slow
def test_alarms_do_not_depend_on_how_often_they_are_checked() -> None:
    found = []
    for every in (1, 7, 64):
        loop = Loop(every=every)
        for _ in range(4):
            loop.run(39)
            loop.run(1, 50.0, update=False)
        loop.alarms.check()
        found.append([(alarm.of, alarm.kind, alarm.layer, alarm.step, alarm.value) for alarm in loop.found])
    assert found[0] == found[1] == found[2]
    assert {step for *_, step, _ in found[0]} == {39, 79, 119, 159}


# ---------------------------------------------------------------- telling


def test_gradients_can_be_left_out_and_need_be_observed() -> None:
    loop = Loop(gradients=False)
    loop.net.factor = math.nan
    loop.run(1, update=False)
    assert loop.told() == []
    wrapped = noesis.wrap(Net())
    alarms = Alarms(wrapped)
    wrapped(torch.ones(2, 8)).sum().backward()
    assert alarms.check() == []
    assert repr(alarms) == "Alarms(none now; 4 layers, looked at 1 forwards)"


def test_the_text_tells_outputs_and_gradients_apart() -> None:
    loop = Loop("linear")
    loop.run(60)
    loop.run(1, 1e6)
    loop.run(1)
    assert {(alarm.of, alarm.step) for alarm in loop.found} >= {("gradients", 60), ("outputs", 61)}
    assert loop.found[0].of == "gradients"
    assert all(("the gradient of" in alarm.message) == (alarm.of == "gradients") for alarm in loop.found)
    outputs, gradients = (sum(alarm.of == of for alarm in loop.found) for of in ("outputs", "gradients"))
    assert f"Alarms({outputs} exploding; gradients: " in repr(loop.alarms)
    assert gradients >= 5


def test_training_is_bitwise_the_same() -> None:
    def parameters(watched: Callable[[Loop], Any]) -> list[Tensor]:
        loop = Loop()
        loop.alarms.check = watched(loop)  # type: ignore[method-assign]
        loop.run(30)
        return list(loop.net.parameters())

    one = parameters(lambda loop: loop.alarms.check)
    other = parameters(lambda loop: lambda step: [])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
