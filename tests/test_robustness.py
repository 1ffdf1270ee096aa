"""What models, libraries and people do around a wrap, and what must hold all the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import noesis
from helpers.models import Returns, small

# ---------------------------------------------------------------- modes


class Summing(nn.Module):
    """Has a sum of its own, of which there is one in measuring too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.a(x))
        h = h / h.abs().sum()
        return x + self.b(torch.tanh(h))


class Selective(nn.Module):
    """Checkpoints its blocks and saves the results of some operations, told by their names."""

    saved = (torch.ops.aten.sum.default, torch.ops.aten.addmm.default)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Summing(), Summing()])

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, list(self.saved))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def test_selective_checkpointing_has_the_same_gradients():
    torch.manual_seed(0)
    bare = Selective()
    observed = copy.deepcopy(bare)
    wrapped = noesis.wrap(observed, layers="leaves")
    x = torch.randn(4, 8)
    for model in (bare, wrapped):
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(bare.parameters(), observed.parameters(), strict=True))
    assert (wrapped.trace().calls == 1).all()


def test_dispatch_modes_do_not_see_the_measuring():
    class Counts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    model = small()
    x = torch.randn(2, 4)
    with Counts() as bare:
        model(x)
    wrapped = noesis.wrap(model, layers="all")
    with Counts() as observed:
        model(x)
    assert observed.seen == bare.seen
    assert len(wrapped.trace()) == 1


def test_fake_tensor_mode():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(2, 4))
        assert len(noesis.wrap(small(), layers="all").trace()) == 0
        assert list(wrapped.trace().unmeasured) == ["0", "1", "2"]


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


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_float_timestep_does_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    model = Timed()
    wrapped = noesis.wrap(model, layers="all")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        call(torch.ones(2, 1), 1 - step / 16)
    assert counter.frame_count <= 2
    np.testing.assert_allclose(wrapped.trace().timesteps, 1 - np.arange(12) / 16)


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


# ---------------------------------------------------------------- runs


def test_forward_with_trace_takes_what_was_called_before():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    x = torch.ones(2, 4)
    model[0](x)
    _, trace = wrapped.forward_with_trace(x)
    assert trace.calls.tolist() == [[2, 1, 1]]


def test_pausing_inside_a_forward_that_is_left_out():
    model = small()
    wrapped = noesis.wrap(model, layers="all", every=2)

    def blink(*_):
        with wrapped.paused():
            pass

    model[0].register_forward_hook(blink)
    for _ in range(3):
        wrapped(torch.ones(2, 4))
    assert wrapped.trace().calls.tolist() == [[1, 1, 1], [1, 1, 1]]


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


def test_a_module_that_left_the_model_is_given_back_too():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    removed = model[2]
    model[2] = nn.Linear(6, 3)
    wrapped.unwrap()
    assert type(removed) is nn.Linear
    noesis.wrap(nn.Sequential(removed), layers="all")


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


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated since 2.13
def test_scripting_a_wrapped_model():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    x = torch.ones(2, 4)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), wrapped(x))


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
