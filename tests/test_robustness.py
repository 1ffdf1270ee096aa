"""Odd values and odd classes, which no library hands out: the model goes on, and what cannot be measured is named."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.models import Returns, small

# ---------------------------------------------------------------- timesteps


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 4)

    def forward(self, x, t=None):
        return self.layer(x).sum()


@pytest.mark.parametrize(
    "t",
    [
        10**400,
        torch.tensor([]),
        torch.tensor(1j),
        torch.ones(2).to_sparse(),
        torch.ones((), device="meta"),
        torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        "x",
    ],
)
def test_timesteps_without_a_value_are_left_out(t):
    wrapped = noesis.wrap(Timed(), layers="all")
    wrapped(torch.ones(2, 1), t)
    assert math.isnan(wrapped.trace().timesteps[0])


def test_timesteps_in_vmap():
    class OfTime(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 4)

        def forward(self, t):
            return self.layer(t).sum()

    model = OfTime()
    expected = torch.func.vmap(model)(torch.ones(5, 1))
    noesis.wrap(model, layers="all")
    assert torch.equal(torch.func.vmap(model)(torch.ones(5, 1)), expected)


# ---------------------------------------------------------------- odd outputs


@dataclasses.dataclass
class Unset:
    value: Tensor = dataclasses.field(init=False)


def cycle(x: Tensor) -> list:
    output: list = []
    output.append(output)
    return output


class Refuses(dict):
    def values(self):
        raise RuntimeError("not for you")


@pytest.mark.parametrize("value", [cycle, lambda x: Unset, lambda x: Unset(), lambda x: Refuses()])
def test_odd_outputs_do_not_stop_the_model(value):
    wrapped = noesis.wrap(nn.Sequential(Returns(value)), layers="all")
    wrapped(torch.ones(1))
    assert list(wrapped.trace().unmeasured) == ["0"]


def test_an_output_picker_that_fails_is_reported():
    wrapped = noesis.wrap(small(), layers="all", output=lambda output: output[99])
    wrapped(torch.ones(1, 4))
    assert wrapped.trace().unmeasured["0"].startswith("IndexError: ")


def test_an_output_picker_that_returns_text():
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="all", output=lambda output: "text")
    wrapped(torch.ones(1, 2))
    assert wrapped.trace().unmeasured == {"0": "no floating tensor, in an output of type Tensor"}


@pytest.mark.parametrize("value", [1e20, torch.finfo(torch.float32).min, 0.1, 0.0])
def test_constant_outputs(value):
    wrapped = noesis.wrap(nn.Sequential(Returns(lambda x: torch.full((10,), value))), layers="all", stats=["zeros"])
    wrapped(torch.ones(1))
    want = torch.tensor(value).item()
    trace = wrapped.trace()
    assert trace.layer("0")[0].tolist() == [10, want, 0, abs(want), want, want, 0, 10 * (value == 0)]


def test_an_output_without_elements():
    wrapped = noesis.wrap(small(), layers="all")
    wrapped(torch.ones(0, 4))
    assert wrapped.trace()["count"].tolist() == [[0, 0, 0]]
    assert wrapped.trace().never_ran == []


# ---------------------------------------------------------------- notes of a run


def test_meta_may_be_anything(tmp_path):
    wrapped = noesis.wrap(small(), layers="all")
    with wrapped.run(loss=np.float32("nan"), grid={(1, 2): 3}, path=tmp_path, many=np.int64(4)):
        wrapped(torch.ones(2, 4))
    trace = wrapped.trace()
    for name in ("t.safetensors", "t.json"):
        meta = noesis.Trace.load(trace.save(tmp_path / name)).meta
        assert (meta["loss"], meta["grid"], meta["many"]) == (None, {"(1, 2)": 3}, 4)
    assert "NaN" not in (tmp_path / "t.json").read_text()
    json.loads(noesis.compare(trace, trace).to_json())
    circle: dict = {}
    circle["me"] = circle
    trace.meta["circle"] = circle
    with pytest.raises(noesis.NoesisError, match="holds itself"):
        trace.save(tmp_path / "t.json")


# ---------------------------------------------------------------- classes


def test_a_registry_of_subclasses_stays_as_it_was():
    class Registered(nn.Module):
        known: dict = {}  # noqa: RUF012

        def __init_subclass__(cls, *, key: str, **kwargs) -> None:
            super().__init_subclass__(**kwargs)
            Registered.known[key] = cls

    class Layer(Registered, key="layer"):
        def forward(self, x):
            return x

    noesis.wrap(nn.Sequential(Layer()), layers="all")
    assert Registered.known == {"layer": Layer}

    class Later(type(Layer()), key="later"):
        pass

    assert Registered.known["later"] is Later


class Recipe(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        return x

    def __reduce__(self):
        return type(self), (self.size,)


def test_pickling_a_module_with_a_recipe_of_its_own():
    model = nn.Sequential(Recipe(3))
    noesis.wrap(model, layers="all")
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is Recipe
    assert again[0].size == 3
