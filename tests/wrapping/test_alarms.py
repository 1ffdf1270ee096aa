"""Alarms on real training runs: what was planted is caught and located, and healthy runs are left in peace."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noesis
from noesis.errors import BadType, BadValue
from noesis.wrapping import Alarm, AlarmRaised, Alarms
from noesis.wrapping.condition import PATIENCE, WARM_UP


def classifier() -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(20, 64), nn.ReLU())]
    blocks += [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(64, 5))


class Pictures(nn.Module):
    """Convolutions with normalisation and a residual branch that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        nn.init.zeros_(self.branch[1].weight)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.unflatten(1, (1, 4, 5)))
        return self.head(F.relu(x + self.branch(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer over the inputs as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 32)
        layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (5, 4)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    each: Callable[[int], Any] = lambda step: None,
    seed: int = 0,
) -> list[float]:
    """Learn which of five directions an input lies in; `each` is called before each step's forward."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(5, 20, generator=generator)
    losses = []
    for step in range(steps):
        each(step)
        labels = torch.randint(5, (32,), generator=generator)
        inputs = directions[labels] + 1.5 * torch.randn(32, 20, generator=generator)
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Watch:
    """Alarms that are checked before every `every`-th step, as a training loop would."""

    def __init__(self, wrapped: noesis.Wrapped, every: int = 1, **options: Any) -> None:
        self.found: list[Alarm] = []
        self.alarms = Alarms(wrapped, self.found.append, **options)
        self.every = every

    def __call__(self, step: int) -> None:
        if step % self.every == 0:
            self.alarms.check(step)


# ---------------------------------------------------------------- healthy runs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("network", [classifier, Pictures, Tokens])
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.slow
def test_healthy_training_raises_none(network: Callable[[], nn.Module], optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = network()
    wrapped = noesis.wrap(model, layers="all", stats=["zeros"], gradients=True)
    watch = Watch(wrapped, every=10)
    losses = train(wrapped, optimizer(model), 300, watch, seed)
    assert watch.alarms.check() == []
    assert watch.found == []
    assert sum(losses[-30:]) < 0.9 * sum(losses[:30]), "it learned"


# ---------------------------------------------------------------- planted


@pytest.mark.parametrize("every", [1, 7, 50])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.slow
def test_the_first_nan_is_located(value: float, every: int) -> None:
    model = classifier()
    wrapped = noesis.wrap(model, layers="all")
    watch = Watch(wrapped, every)

    def plant(step: int) -> None:
        watch(step)
        if step == 57:
            model[2][0].bias.data[3] = value

    train(wrapped, sgd(model), 101, plant)
    watch.alarms.check()
    [alarm] = watch.found
    assert (alarm.kind, alarm.layer, alarm.step, alarm.value) == ("nonfinite", "2.0", 57, 32)
    assert alarm.message == "step 57: layer '2.0' has 32 NaN or infinite elements, the first of all layers"
    assert alarm.at == {1: 58, 7: 63, 50: 100}[every]
    assert (wrapped.trace()["nonfinite"][-1] > 0).all(), "it went through the optimizer, and is not reported again"


def test_nan_is_reported_again_after_recovery() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    alarms = Alarms(wrapped, lambda alarm: None)
    x = torch.ones(3, 2)
    for value in (x, x * math.nan, x * math.nan, x, x * math.inf, x):
        wrapped(value)
    assert [(alarm.step, alarm.layer) for alarm in alarms.check()] == [(1, "0"), (4, "0")]
    assert alarms.check() == []


def test_order_of_execution_decides_which_is_first() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    wrapped = noesis.wrap(Backwards(), layers="linear")
    alarms = Alarms(wrapped, lambda alarm: None)
    wrapped(torch.full((1, 2), math.nan))
    [alarm] = alarms.check()
    assert alarm.layer == "first"


def test_a_layer_that_gives_infinity_by_design_hides_no_nan() -> None:
    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -math.inf).triu(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask, self.body = Mask(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.mask(x).exp()

    wrapped = noesis.wrap(Net(), layers="leaves")
    alarms = Alarms(wrapped, lambda alarm: None)
    for value in (1.0, 2.0, math.nan, math.nan):
        wrapped(torch.full((3, 3), value))
    assert [(alarm.step, alarm.layer) for alarm in alarms.check()] == [(0, "mask"), (2, "body")]


def test_nan_in_steps_that_are_gone_is_found_in_the_totals() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2)), capacity=4)
    alarms = Alarms(wrapped, lambda alarm: None)
    for value in (1.0, math.nan, *[1.0] * 6):
        wrapped(torch.full((1, 2), value))
    [alarm] = alarms.check()
    assert (alarm.kind, alarm.layer, alarm.step, alarm.value) == ("nonfinite", "0", 3, 2)
    assert alarm.message.startswith("steps 0 to 3: layer '0' had NaN or infinite elements. The ring no longer holds")
    for _ in range(9):
        wrapped(torch.ones(1, 2))
    assert alarms.check() == []


@pytest.mark.parametrize("stats", [["zeros"], []])
def test_a_dead_layer_is_located(stats: list[str]) -> None:
    model = classifier()
    wrapped = noesis.wrap(model, layers="all", stats=stats)
    watch = Watch(wrapped, every=5, vanishing=None)

    def plant(step: int) -> None:
        watch(step)
        if step == 103:
            model[1][0].bias.data.fill_(-100.0)

    train(wrapped, sgd(model), 140, plant)
    dead = [alarm for alarm in watch.found if alarm.kind == "dead"]
    assert [(alarm.layer, alarm.step, alarm.value) for alarm in dead] == [("1.1", 103, 0.0), ("1", 103, 0.0)]
    assert {alarm.at for alarm in dead} == {115}, f"after {PATIENCE} steps"
    what = "0 % of its elements are not zero" if stats else "its output is constant"
    assert dead[0].message == f"step 103: layer {dead[0].layer!r} is dead: {what}, for {PATIENCE} steps"


def test_a_layer_that_is_dead_for_a_moment_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU())
    wrapped = noesis.wrap(model, layers="1", stats=["zeros"])
    alarms = Alarms(wrapped, lambda alarm: None)
    x = torch.randn(16, 2)
    for step in range(60):
        model[0].bias.data.fill_(-100.0 if step % PATIENCE else 0.0)
        wrapped(x)
    assert alarms.check() == []
    model[0].bias.data.fill_(-100.0)
    for _ in range(PATIENCE):
        wrapped(x)
    assert [alarm.step for alarm in alarms.check()] == [51]


@pytest.mark.parametrize(("network", "optimizer"), [(classifier, sgd), (Pictures, sgd), (Tokens, adam)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_too_high_a_learning_rate_is_caught(network: Callable[[], nn.Module], optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = network()
    optimiser = optimizer(model)
    wrapped = noesis.wrap(model, layers="all")
    watch = Watch(wrapped, every=5)

    def plant(step: int) -> None:
        watch(step)
        if step == 150:
            optimiser.param_groups[0]["lr"] *= 100

    train(wrapped, optimiser, 175, plant, seed)
    first = watch.found[0]
    assert first.kind in ("exploding", "nonfinite")
    assert 151 <= first.step <= 158, "the forward after the first such step, or soon"
    assert first.value > 10 * first.expected


@pytest.mark.parametrize("kind", ["exploding", "vanishing"])
def test_scale(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    wrapped = noesis.wrap(model, layers="linear")
    watch = Watch(wrapped, every=3)
    usual, odd = model[2].weight.detach().clone(), {"exploding": 30.0, "vanishing": 1 / 30}[kind]

    def plant(factor: float) -> None:
        for step in range(60):
            watch(step)
            model[2].weight.data = usual * factor
            wrapped(torch.randn(32, 4))

    plant(1.0)
    plant(odd)
    watch.alarms.check()
    [alarm] = watch.found
    assert (alarm.kind, alarm.layer, alarm.step) == (kind, "2", 60)
    assert alarm.value / alarm.expected == pytest.approx(odd, rel=0.2)
    ratio = "times" if kind == "exploding" else "of"
    assert f"step 60: layer '2' is {kind}: its rms {alarm.value:.4g} is " in alarm.message
    assert alarm.message.endswith(f"{ratio} the usual {alarm.expected:.4g}")
    plant(odd)
    assert len(watch.found) == 1, "once, and what is unusual does not become the baseline"
    plant(1.0)
    plant(odd)
    watch.alarms.check()
    assert [alarm.step for alarm in watch.found] == [60, 240], "again after it had recovered"


def test_a_layer_that_is_always_wild_is_usual() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4, bias=False)))
    watch = Watch(wrapped, every=20)
    scales = torch.randn(300, generator=torch.Generator().manual_seed(0)).exp()
    assert scales.max() / scales.median() > 10
    for step, scale in enumerate(scales):
        watch(step)
        wrapped(scale * torch.randn(32, 4))
    assert watch.alarms.check() == watch.found == []
    wrapped(1e4 * torch.randn(32, 4))
    assert [alarm.step for alarm in watch.alarms.check()] == [300]


def test_no_baseline_before_the_warm_up() -> None:
    for before, expected in ((WARM_UP - 1, 0), (WARM_UP + 8, 1)):
        wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4)))
        alarms = Alarms(wrapped, lambda alarm: None)
        for _ in range(before):
            wrapped(torch.randn(8, 4))
        wrapped(1000 * torch.randn(8, 4))
        assert len(alarms.check()) == expected


def test_alarms_do_not_depend_on_how_often_they_are_checked() -> None:
    found = []
    for every in (1, 4, 64):
        torch.manual_seed(0)
        wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), layers="all")
        watch = Watch(wrapped, every)
        for step in range(128):
            watch(step)
            wrapped(torch.randn(8, 4) * (50.0 if step % 40 == 39 else 1.0))
        watch.alarms.check()
        found.append([(alarm.kind, alarm.layer, alarm.step, alarm.value) for alarm in watch.found])
    assert found[0] == found[1] == found[2]
    assert {step for _, _, step, _ in found[0]} == {39, 79, 119}


def test_every_reset_runs_and_pauses() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2)), every=2)
    alarms = Alarms(wrapped, lambda alarm: None)
    bad = torch.full((1, 2), math.nan)
    with wrapped.paused():
        wrapped(bad)
    wrapped(torch.ones(1, 2))
    wrapped(bad)  # left out
    assert alarms.check() == []
    wrapped(bad)
    assert [alarm.step for alarm in alarms.check()] == [2]
    with wrapped.run(epoch=1):
        wrapped(torch.ones(1, 2))
        wrapped(torch.ones(1, 2))
        wrapped(bad)
        assert [alarm.step for alarm in alarms.check()] == [2]
    wrapped(torch.ones(1, 2))
    wrapped(bad)
    alarms.reset()
    assert alarms.check() == []


# ---------------------------------------------------------------- telling


@pytest.fixture
def broken() -> noesis.Wrapped:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped = noesis.wrap(model)
    nn.init.constant_(model[1].bias, math.nan)
    return wrapped


def test_a_warning(broken: noesis.Wrapped) -> None:
    alarms = noesis.Alarms(broken)
    broken(torch.ones(1, 2))
    with pytest.warns(noesis.NoesisWarning, match=r"^step 0: layer '1' has 2 NaN or infinite elements") as caught:
        alarms.check()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alarms.check()


def test_an_error(broken: noesis.Wrapped) -> None:
    alarms = noesis.Alarms(broken, "raise")
    broken(torch.ones(1, 2))
    with pytest.raises(AlarmRaised, match=r"^step 0: layer '1' has 2 NaN.* See \.alarms of this error") as caught:
        alarms.check(step=12)
    assert isinstance(caught.value, noesis.NoesisError)
    assert [(alarm.layer, alarm.at) for alarm in caught.value.alarms] == [("1", 12)]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert alarms.check() == []


def test_several_at_once_are_one_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    wrapped = noesis.wrap(model)
    alarms = noesis.Alarms(wrapped)
    for _ in range(40):
        wrapped(torch.randn(8, 4))
    wrapped(1e4 * torch.randn(8, 4))
    with pytest.warns(noesis.NoesisWarning, match=r"step 40: layer '0' is exploding.* \(and 2 more\)$") as caught:
        found = alarms.check()
    assert len(caught) == 1
    assert [alarm.layer for alarm in found] == ["0", "1", "2"]
    assert repr(alarms) == "Alarms(3 exploding; 3 layers, looked at 41 forwards)"


def test_kinds_can_be_left_out(broken: noesis.Wrapped) -> None:
    alarms = noesis.Alarms(broken, "raise", nonfinite=False, dead=None, exploding=None, vanishing=None)
    for scale in (1.0, 1e9):
        for _ in range(40):
            broken(scale * torch.ones(4, 2))
        assert alarms.check() == []


def test_training_is_bitwise_the_same() -> None:
    def run(watched: bool) -> list[float]:
        torch.manual_seed(0)
        model = Tokens()
        if not watched:
            return train(model, adam(model), 40)
        wrapped = noesis.wrap(model, layers="all", stats=["zeros"])
        return train(wrapped, adam(model), 40, Watch(wrapped))

    assert run(True) == run(False)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"on_alarm": "shout"}, BadValue, r"on_alarm='shout'\. Expected \"warn\", \"raise\" or a function"),
        ({"dead": 1.0}, BadValue, r"dead=1\.0\. Expected a share from 0, below 1"),
        ({"exploding": 1.0}, BadValue, r"exploding=1\.0\. Expected a factor above 1.*pass None for never"),
        ({"vanishing": math.nan}, BadValue, r"vanishing=nan\. Expected a factor above 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Alarms(noesis.wrap(nn.Sequential(nn.Linear(2, 2))), **options)
    with pytest.raises(BadType, match=r"Alarms\(Linear\)\. Expected what noesis\.wrap returned\. Wrap the model first"):
        Alarms(nn.Linear(2, 2))


def test_nan_that_left_the_ring_after_resuming_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = noesis.wrap(model, layers="0", capacity=2)
    wrapped(torch.full((9, 2), float("nan")))
    noesis.RunState(wrapped).load_state_dict(noesis.RunState(wrapped).state_dict())
    alarms = noesis.Alarms(wrapped, on_alarm=lambda alarm: None)
    wrapped(torch.full((1, 2), float("nan")))
    for _ in range(3):
        wrapped(torch.ones(1, 2))
    assert [alarm.kind for alarm in alarms.check()] == ["nonfinite"]
