"""A container feels like its model: attributes, operators, class, and what Python and torch look up."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
from collections.abc import Iterable, Sized
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import noesis
from helpers.checkout import ROOT
from noesis.wrapping.proxy import YIELDING


class Stack(nn.Module):
    """Has attributes by the names that yield, operators of its own, and an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.entered = 0

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.model(x) * scale

    def __enter__(self) -> Stack:
        self.entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.entered -= 1

    def __contains__(self, layer: object) -> bool:
        return any(layer is each for each in self.layers)

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers[index]

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


# ---------------------------------------------------------------- operators


def test_a_sequential_has_length_items_and_iteration() -> None:
    model = sequential()
    wrapped = noesis.wrap(model, layers="linear")
    assert (len(wrapped), wrapped[0] is model[0], wrapped[-1] is model[2]) == (3, True, True)
    assert [*wrapped] == [*model]
    assert model[1] in wrapped
    assert nn.ReLU() not in wrapped
    assert isinstance(wrapped, Sized)
    assert isinstance(wrapped, Iterable)
    wrapped[1] = nn.Tanh()
    del wrapped[2]
    assert [type(each).__name__ for each in model] == ["Linear", "Tanh"]
    assert (wrapped + nn.Sequential(nn.ReLU()))[2].__class__ is nn.ReLU
    same = wrapped
    same += nn.Sequential(nn.ReLU())
    assert same is wrapped
    assert len(model) == 3


def test_operators_of_other_models() -> None:
    wrapped = noesis.wrap(Stack(), layers="linear")
    with wrapped as entered:
        assert entered is wrapped
        assert wrapped.entered == 1
    assert wrapped.entered == 0
    assert wrapped.layers[1] in wrapped
    assert wrapped[1] is wrapped.observed_model.layers[1]
    assert (wrapped @ torch.ones(1, 4)).shape == (1, 4)
    holder = noesis.wrap(nn.ModuleDict({"a": sequential(), "b": sequential()}), layers="linear")
    assert ("a" in holder, list(holder), len(holder)) == (True, ["a", "b"], 2)


def test_what_the_model_lacks_fails_as_there() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    wrapped: Any = noesis.wrap(Plain(), layers="linear")
    assert wrapped  # no length, and true
    assert not isinstance(wrapped, Sized)
    for fails in (len, iter, lambda w: w[0], lambda w: 1 in w, lambda w: w + 1):
        with pytest.raises(TypeError):
            fails(wrapped)
    with pytest.raises(AttributeError, match="'Plain' object has no attribute 'depth'"):
        _ = wrapped.depth


@pytest.mark.parametrize("make", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_have_the_operators_too(make: Any) -> None:
    wrapped = noesis.wrap(sequential(), layers="linear")
    made = make(wrapped)
    assert isinstance(made, noesis.Wrapped)
    assert len(made) == 3
    assert made[0] is not wrapped[0]
    made(torch.ones(1, 4))
    assert (len(made.trace()), len(wrapped.trace())) == (1, 0)


# ---------------------------------------------------------------- attributes


def test_the_models_own_model_and_layers_are_read_and_written() -> None:
    model = Stack()
    wrapped = noesis.wrap(model, layers="linear")
    assert wrapped.model is model.model
    assert wrapped.layers is model.layers
    assert wrapped.observed_model is model
    assert wrapped.observed_layers == ["model", "layers.0", "layers.1"]
    wrapped.model = nn.Linear(4, 8)
    assert wrapped.model is model.model
    assert wrapped(torch.ones(1, 4)).shape == (1, 8)
    del wrapped.model
    assert wrapped.model is model  # which has none of its own now


def test_where_the_model_has_none_they_are_noesis_own() -> None:
    model = sequential()
    wrapped = noesis.wrap(model, layers="linear")
    assert wrapped.model is model
    assert wrapped.layers == ["0", "2"]
    wrapped.layers = 3  # set on the model, and read from it
    assert (wrapped.layers, model.layers, wrapped.observed_layers) == (3, 3, ["0", "2"])


@pytest.mark.parametrize("name", ["codebooks", "calibration"])
def test_answers_that_are_not_there_are_missing_attributes(name: str) -> None:
    wrapped = noesis.wrap(sequential(), layers="linear")
    assert not hasattr(wrapped, name)
    assert getattr(wrapped, name, "none") == "none"
    with pytest.raises(noesis.NoesisError, match="no codebooks.*codebook=noesis.Codebook") as caught:
        getattr(wrapped, name)
    assert isinstance(caught.value, AttributeError)
    setattr(wrapped, name, 7)
    assert getattr(wrapped, name) == getattr(wrapped.observed_model, name) == 7
    with_codes = noesis.wrap(sequential(), layers="linear", codebook=noesis.Codebook())
    assert hasattr(with_codes, name)


def test_names_of_noesis_cannot_be_overwritten() -> None:
    wrapped = noesis.wrap(sequential(), layers="linear")
    for name in ("trace", "run", "observed_model", "observed_layers"):
        with pytest.raises(AttributeError, match=f"{name} is noesis' own.*observed_model.{name}"):
            setattr(wrapped, name, None)
        with pytest.raises(AttributeError, match="cannot be deleted"):
            delattr(wrapped, name)
    wrapped.every = 2
    assert wrapped.every == 2
    assert not hasattr(wrapped.observed_model, "every")


def test_completion_and_members_show_both() -> None:
    wrapped = noesis.wrap(Stack(), layers="linear")
    assert {"trace", "soulprint", "run", "unwrap", "observed_layers", "entered", "state_dict"} <= {*dir(wrapped)}
    members = dict(inspect.getmembers(wrapped))
    assert "codebooks" not in members
    assert members["observed_model"] is wrapped.observed_model


def test_the_documented_names_are_all_that_noesis_takes() -> None:
    text = (ROOT / "docs" / "guides" / "selecting.md").read_text().split("## The container")[1]
    always, yielding = (set(row.split(" | ")[0].replace("`", "").split()) for row in text.split("\n| ")[2:4])
    public = {name for name in dir(noesis.Wrapped) if not name.startswith("_")} - {*dir(nn.Module)}
    assert always == noesis.Wrapped._own == public - YIELDING | {"observed_model"}
    assert yielding == YIELDING


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_no_model_of_the_libraries_has_a_name_that_noesis_takes(library: str) -> None:
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {library}")
    own = frozenset(noesis.Wrapped._own | {"_root", "_recorder", "_pipeline"})
    found = {
        (name, path.name)
        for path in (Path(spec.origin).parent / "models").rglob("*.py")
        for name in own.intersection(_attributes(path.read_text(), own))
    }
    assert not found


def _attributes(text: str, wanted: frozenset[str]) -> set[str]:
    """Names that the modules of a file define or set on themselves."""
    either = "|".join(wanted)
    if not re.search(rf"def (?:{either})\(|self\.(?:{either})\b", text):
        return set()
    names = set()
    for cls in ast.walk(ast.parse(text)):
        if isinstance(cls, ast.ClassDef) and any(
            re.search(r"Module|Model|Mixin", ast.unparse(base)) for base in cls.bases
        ):
            names |= {each.name for each in cls.body if isinstance(each, ast.FunctionDef)}
            names |= {
                node.attr
                for node in ast.walk(cls)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            }
    return names


# ---------------------------------------------------------------- torch


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated since 2.13
def test_scripting_and_tracing_the_container_give_the_model() -> None:
    x = torch.randn(3, 4)
    wrapped = noesis.wrap(sequential(), layers="linear")
    expected = wrapped(x)
    assert torch.equal(torch.jit.script(wrapped)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(wrapped)(x), expected)
    assert torch.equal(torch.jit.trace(wrapped, (x,))(x), expected)
    other = noesis.wrap(Stack(), layers="linear")
    traced = torch.fx.symbolic_trace(other, concrete_args={"scale": 3.0})
    assert torch.equal(traced(x, 3.0), other(x, 3.0))
    assert inspect.signature(other.forward) == inspect.signature(other.observed_model.forward)
