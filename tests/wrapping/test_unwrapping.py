"""Modules get their classes back: without the container, in copies and parts, around foreign parents, for a block."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import noesis


class Pair(nn.Module):
    """Two linear layers by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


class Stack(nn.Module):
    """Three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair(), Pair()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def observed(model: nn.Module, kind: type = nn.Module) -> list[str]:
    return [
        n for n, module in model.named_modules() if isinstance(module, noesis.Observed) and isinstance(module, kind)
    ]


# ---------------------------------------------------------------- for good


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_unwrap_needs_no_container(lost: bool, compiled: bool) -> None:
    model = Stack()
    classes = [type(module) for module in model.modules()]
    given = torch.compile(model, backend="eager") if compiled else model
    wrapped = noesis.wrap(given, layers="linear")
    wrapped(torch.ones(1, 4))
    if lost:
        del wrapped
    assert noesis.unwrap(given if lost else wrapped) is given
    assert [type(module) for module in model.modules()] == classes
    again = noesis.wrap(given, layers="blocks")  # with other settings
    again(torch.ones(1, 4))
    assert again.trace().calls.tolist() == [[1, 1, 1]]


def test_the_container_knows_that_its_model_was_unwrapped_without_it() -> None:
    wrapped = noesis.wrap(Stack(), layers="linear")
    wrapped(torch.ones(1, 4))
    noesis.unwrap(wrapped.observed_model)
    trace = wrapped.trace()
    assert not trace.unmeasured
    assert trace.calls.tolist() == [[1] * 6]


def test_copies_of_layers_inside_the_model_are_unwrapped_with_it() -> None:
    model = Stack()
    wrapped = noesis.wrap(model, layers="linear")
    model.layers.append(copy.deepcopy(model.layers[1]))
    model.teacher = copy.deepcopy(model.layers)
    assert len(observed(model, nn.Linear)) == 8 + 8
    wrapped.unwrap()
    assert not observed(model)


def test_models_that_were_wrapped_by_themselves_inside_are_left() -> None:
    inner, outer = Stack(), nn.Sequential(nn.Linear(4, 4))
    noesis.wrap(inner, layers="linear")
    wrapped = noesis.wrap(outer, layers="linear")
    outer.append(inner)
    wrapped.unwrap()
    assert len(observed(outer, nn.Linear)) == 6
    noesis.unwrap(outer)
    assert not observed(outer)


@pytest.mark.parametrize("taken", [lambda m: m.layers[0], lambda m: m.layers[2].b, lambda m: m])
def test_a_part_that_was_saved_is_plain_after_unwrap(taken: Any) -> None:
    model = Stack()
    noesis.wrap(model, layers="linear")
    file = io.BytesIO()
    torch.save(taken(model), file)
    file.seek(0)
    part = noesis.unwrap(torch.load(file, weights_only=False))
    assert not observed(part)
    assert type(part) is type(noesis.unwrap(taken(model)))
    assert torch.equal(part(torch.ones(1, 4)), taken(model)(torch.ones(1, 4)))


def test_unwrap_of_what_is_not_wrapped() -> None:
    model = Stack()
    assert noesis.unwrap(model) is model
    with pytest.raises(noesis.NoesisError, match=r"of type str. Expected an nn.Module or a diffusers pipeline"):
        noesis.unwrap("model")


# ---------------------------------------------------------------- parents put around


class Around(nn.Module):
    """Anybody's wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_parent_put_around_an_observed_layer_takes_nothing_away() -> None:
    model = Stack()
    wrapped = noesis.wrap(model, layers="linear", gradients=True)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Pair))
    model.layers[0] = Around(model.layers[0])
    wrapped(torch.ones(2, 4)).sum().backward()
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[1] * 6]
    assert not trace.unmeasured
    assert not wrapped.gradients().unmeasured
    model.layers[1] = nn.Linear(4, 4)
    assert set(wrapped.trace().unmeasured) == {"layers.1.a", "layers.1.b"}
    assert "another module took its place" in wrapped.trace().unmeasured["layers.1.a"]


def test_layers_inside_checkpointing_are_named_and_chosen_as_without() -> None:
    plain = Stack()
    model = copy.deepcopy(plain)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, (Pair, nn.Linear)))
    x = torch.randn(2, 4)
    for layers in ("layers.*.a", "linear", "blocks", "leaves", Pair, "re:b$", "layers.1"):
        found = []
        for each in (plain, model):
            wrapped = noesis.wrap(each, layers=layers)
            wrapped(x).sum().backward()
            found.append(wrapped.trace())
            wrapped.unwrap()
        assert found[0].layers == found[1].layers
        assert found[0].values.tobytes() == found[1].values.tobytes()
        assert found[1].calls.tolist() == [[1] * len(found[1].layers)]


# ---------------------------------------------------------------- for a block


def test_unwrapped_has_the_plain_classes_and_gives_the_observed_ones_back() -> None:
    model = Stack()
    wrapped = noesis.wrap(model, layers="linear")
    with noesis.unwrapped(wrapped) as bare:
        assert bare is model
        assert not observed(model)
        bare(torch.ones(1, 4))
        file = io.BytesIO()
        torch.save(model, file)
        assert b"noesis" not in file.getvalue()
    wrapped(torch.ones(1, 4))
    assert wrapped.trace().calls.tolist() == [[1] * 6]
    with pytest.raises(KeyError), noesis.unwrapped(model):
        raise KeyError
    assert len(observed(model, nn.Linear)) == 6


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_unwrapped_serves_lookups_by_exact_class() -> None:
    model = Stack().eval()
    noesis.wrap(model, layers="linear")
    assert not _quantised(model)  # passed over, without a word
    with noesis.unwrapped(model):
        assert len(_quantised(model)) == 6


def _quantised(model: nn.Module) -> list[str]:
    made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    return [
        name
        for name, module in made.named_modules()
        if type(module).__name__ == "Linear" and "quantized" in type(module).__module__
    ]


def test_what_was_given_another_class_inside_keeps_it() -> None:
    model = Stack()
    wrapped = noesis.wrap(model, layers="linear")
    with noesis.unwrapped(model):
        nn.utils.parametrizations.weight_norm(model.layers[0].a)
    assert "layers.0.a" not in observed(model)
    wrapped(torch.ones(1, 4))
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[0, 1, 1, 1, 1, 1]]
    assert list(trace.unmeasured) == ["layers.0.a"]


def test_compiled_models_go_through_a_block_unwrapped() -> None:
    model = Stack()
    wrapped = noesis.wrap(torch.compile(model, backend="eager"), layers="linear")
    x = torch.ones(1, 4)
    expected = wrapped(x)
    with noesis.unwrapped(wrapped) as bare:
        assert torch.equal(bare(x), expected)
    assert torch.equal(wrapped(x), expected)
    assert wrapped.trace().calls.tolist() == [[1] * 6] * 2
