"""The classes that modules and pipelines take on: one per class, which goes with it and stays out of the way."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import noesis

CYCLES = 200


def local_class() -> type[nn.Module]:
    """A class that only its caller holds, and a megabyte with it."""

    class Local(nn.Module):
        table = torch.zeros(1 << 18)

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.table[0]

    return Local


def test_classes_go_with_their_originals() -> None:
    """Looked up weakly, all of them; and no memory is left of them."""
    seen: list[weakref.ref[Any]] = []
    for cycle in range(CYCLES):
        cls = local_class()
        model = nn.Sequential(cls())
        wrapped = noesis.wrap(model, layers="0")
        wrapped(torch.ones(1, 2))
        seen += [weakref.ref(cls), weakref.ref(type(model[0])), weakref.ref(cls.table)]
        wrapped.unwrap()
        if cycle % 50 == 49:
            del cls, model, wrapped
            gc.collect()
            assert not [ref for ref in seen if ref() is not None]


@pytest.mark.slow
def test_classes_of_pipelines_go_with_their_originals() -> None:
    diffusers = pytest.importorskip("diffusers")
    seen: list[weakref.ref[Any]] = []
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    for _ in range(CYCLES):
        cls = type("Local", (diffusers.DDPMPipeline,), {"table": torch.zeros(1 << 18)})
        pipe = cls(unet, diffusers.DDPMScheduler())
        wrapped = noesis.wrap(pipe)
        assert type(pipe) is not cls
        seen += [weakref.ref(cls), weakref.ref(type(pipe)), weakref.ref(cls.table)]
        wrapped.unwrap()
    del cls, pipe, wrapped
    gc.collect()
    assert not [ref for ref in seen if ref() is not None]


def test_a_class_is_made_once_and_outlives_a_wrap() -> None:
    cls = local_class()
    model = nn.Sequential(cls(), cls())
    wrapped = noesis.wrap(model, layers=cls)
    assert type(model[0]) is type(model[1]) is not cls
    made = weakref.ref(type(model[0]))
    wrapped.unwrap()
    gc.collect()
    noesis.wrap(model, layers=cls)
    assert type(model[0]) is made()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.slow
@pytest.mark.core
def test_compiled_code_is_used_again_after_unwrapping_and_wrapping() -> None:
    counter = CompileCounter()
    model = local_class()()
    model.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        wrapped = noesis.wrap(model, layers="all")
        wrapped(torch.ones(1, 2))
        assert (wrapped.trace()["count"] > 0).all()
        wrapped.unwrap()
        gc.collect()
    assert counter.frame_count == 1


def test_a_class_made_of_anothers_attributes_has_a_subclass_of_its_own() -> None:
    """As `dataclass(slots=True)` and class decorators make them."""
    cls = local_class()
    noesis.wrap(nn.Sequential(cls()), layers=cls).unwrap()
    other = type("Other", cls.__bases__, {**vars(cls), "__qualname__": "Other", "forward": lambda self, x: x})
    module = other.__new__(other)
    nn.Module.__init__(module)
    wrapped = noesis.wrap(nn.Sequential(module), layers="0")
    assert isinstance(module, other)
    assert wrapped(torch.full((1, 2), 3.0)).mean() == 3
    wrapped.unwrap()
    assert type(module) is other


class Registered(nn.Module):
    """Its subclasses are entered in a registry, as plugin systems do it."""

    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Frozen(type):
    """A metaclass whose classes do not change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(name)


class Fixed(nn.Module, metaclass=Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_classes_that_watch_over_themselves() -> None:
    """Registries of subclasses see no new one, and classes that do not change are observed all the same."""
    wrapped = noesis.wrap(nn.Sequential(Registered(), Fixed()), layers="all")
    wrapped(torch.ones(1, 2))
    assert wrapped.trace()["mean"].tolist() == [[1, 1]]
    assert Registered.known == []
    again = pickle.loads(pickle.dumps(wrapped))
    assert type(again.model[1]) is type(wrapped.model[1])
    assert type(wrapped.unwrap()[1]) is Fixed


def test_a_class_that_is_pickled_by_value_takes_nothing_of_noesis_along() -> None:
    """As cloudpickle does with classes of a script: where it is loaded there may be no noesis."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cls = local_class()
    model = nn.Sequential(cls())
    noesis.wrap(model, layers="0").unwrap()
    pickled = cloudpickle.dumps(model)
    assert b"noesis." not in pickled.replace(__name__.encode(), b"")
    twin = pickle.loads(pickled)
    wrapped = noesis.wrap(twin, layers="0")
    wrapped(torch.ones(1, 2))
    assert wrapped.trace().never_ran == []
    assert type(wrapped.unwrap()[0]).__name__ == "Local"
