"""Streams: what a module returns beside its hidden state, told by its source, and how to select it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

import noesis
from helpers.models import Block
from noesis.layers import choose, hidden_index, select, stream
from noesis.layers import streams as streams_file
from noesis.layers.streams import streams


class Dual(nn.Module):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """A docstring
        of which a line is not indented."""
        return encoder_hidden_states, hidden_states


class ImageFirst(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states, temb=None):
        def inner():
            return temb, temb, temb

        inner()
        return hidden_states + 1, self.to_out(encoder_hidden_states)


class Four(nn.Module):
    def forward(self, hidden_states, audio_hidden_states, text_hidden_states, encoder_hidden_states):
        return (hidden_states, audio_hidden_states, text_hidden_states, encoder_hidden_states)


class OtherNames(nn.Module):
    def forward(self, img, txt):
        img_out, txt_out = img + txt.mean(), txt
        return img_out, txt_out


class Either(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None):
        if encoder_hidden_states is None:
            return hidden_states
        return (hidden_states, encoder_hidden_states) if self.training else [hidden_states, encoder_hidden_states]


class HereOrThere(nn.Module):
    def forward(self, hidden_states, context):
        if self.training:
            return hidden_states, context
        return hidden_states, None, context


class Nested(nn.Module):
    def forward(self, vision, text):
        return (vision, text), (vision.sum(), text.sum())


class Named(nn.Module):
    def forward(self, x, y):
        return {"first": x, "second": y + 1}


class Rest(nn.Module):
    def forward(self, x, y):
        rest = (y, y)
        return x, *rest, y


class Single(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class Assembled(nn.Module):
    def forward(self, hidden_states, attention):
        outputs = (hidden_states,)
        outputs += (attention,)
        return outputs


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Dual):
    @doubled
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, hidden_states


class Short(nn.Module):
    forward = lambda self, x, y: (x, y)  # noqa: E731


@pytest.mark.parametrize(
    ("module", "index", "found"),
    [
        (Dual, 1, {"text": (0,)}),
        (ImageFirst, 0, {"text": (1,)}),
        (Four, 0, {"audio": (1,), "text": (2,), "encoder_hidden_states": (3,)}),
        (OtherNames, None, {"txt_out": (1,)}),
        (Either, 0, {"text": (1,)}),
        (HereOrThere, 0, {}),
        (Nested, None, {"text": (0, 1)}),
        (Named, None, {"first": ("first",), "second": ("second",)}),
        (Rest, None, {}),
        (Single, None, {}),
        (Assembled, None, {}),
        (Decorated, 1, {"text": (0,)}),
        (Short, None, {}),
        (nn.Identity, None, {}),
    ],
)
def test_what_a_module_returns_by_its_source(module: type[nn.Module], index: int | None, found: dict[str, Any]) -> None:
    assert (hidden_index(module()), streams(module())) == (index, found)


def test_around_and_inside_other_things() -> None:
    """Subclasses, accelerate's forward on the instance, what torch.compile returned, and an observed module."""

    class Logged(Dual):
        pass

    hooked = Dual()
    accelerate.hooks.add_hook_to_module(hooked, accelerate.hooks.ModelHook())
    assert "forward" in vars(hooked)
    observed = Dual()
    noesis.wrap(nn.Sequential(observed), layers="0")
    for module in (Logged(), hooked, torch.compile(Dual(), backend="eager"), observed):
        assert (hidden_index(module), streams(module)) == (1, {"text": (0,)})


def blocks_of_diffusers() -> list[type[nn.Module]]:
    TransformerBlockRegistry._register()
    return list(TransformerBlockRegistry._registry)


@pytest.mark.parametrize("cls", blocks_of_diffusers(), ids=lambda cls: cls.__name__)
def test_source_and_registry_of_diffusers_agree(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself says the same of diffusers' blocks, and so does the other where one has nothing to say."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    both = hidden_index(module), streams(module)
    declared = TransformerBlockRegistry.get(cls)
    if cls.__name__ in ("BriaTransformerBlock", "Flux2SingleTransformerBlock"):
        # The registry is wrong of the first, and says of the second what it returns by default: one tensor.
        assert both == (1, {"text": (0,)})
        return
    monkeypatch.setattr(streams_file, "declared_streams", lambda module: {})
    by_source = hidden_index(module), streams(module)
    monkeypatch.undo()
    streams_file._returned_by.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(inspect, "getsource", no_source)
        by_registry = hidden_index(module), streams(module)
    streams_file._returned_by.cache_clear()
    assert by_registry == both
    assert both[0] == declared.return_hidden_states_index
    assert len(both[1]) == (declared.return_encoder_hidden_states_index is not None)
    if both[1] and cls.__name__ != "Cosmos3VLTextMoTDecoderLayer":  # which returns sums of other names
        assert by_source == both
        assert list(both[1]) == ["text"]


def no_source(_: Any) -> str:
    raise OSError("could not get source code")


def test_without_source_there_are_no_streams() -> None:
    made: dict[str, Any] = {"nn": nn}
    exec("class Dual(nn.Module):\n    def forward(self, x, text):\n        return x, text", made)
    assert streams(made["Dual"]()) == {}
    with pytest.raises(noesis.NoesisError, match="These return one, as far as their source tells"):
        noesis.wrap(nn.Sequential(made["Dual"]()), layers="0:text")


def test_source_that_changed_since_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    streams_file._returned_by.cache_clear()
    monkeypatch.setattr(inspect, "getsource", lambda _: "    def backward(self, x, y):\n        return x, y\n")
    assert streams(Dual()) == {}
    streams_file._returned_by.cache_clear()
    monkeypatch.setattr(inspect, "getsource", lambda _: "    return x, (\n")
    assert streams(Dual()) == {}
    streams_file._returned_by.cache_clear()


def test_the_tensor_at_a_place() -> None:
    x, y = torch.ones(1), torch.zeros(2)
    assert stream((x, y), (1,)) is y
    assert stream([x, (y, x)], (1, 0)) is y
    assert stream({"a": x, "b": y}, ("b",)) is y
    # Never what happens to lie there in something else: an element of a tensor, of a text.
    for output, place in [(y, (0,)), ((x,), (1,)), ((None, x), (0,)), ({"a": x}, ("b",)), ("text", (0,)), (None, (0,))]:
        assert stream(output, place) is None


# ---------------------------------------------------------------- selecting


def model() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Dual(), Four(), Dual()])
            self.single = nn.ModuleList([Block(), Block()])

    return Model()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks.0:text", ["blocks.0:text"]),
        (["blocks.0", "blocks.0:text"], ["blocks.0", "blocks.0:text"]),
        (["blocks.1:text", "blocks.1:audio", "blocks.1"], ["blocks.1", "blocks.1:audio", "blocks.1:text"]),
        ("blocks.*:text", ["blocks.0:text", "blocks.1:text", "blocks.2:text"]),
        ("blocks.1:*", ["blocks.1:audio", "blocks.1:text", "blocks.1:encoder_hidden_states"]),
        ("blocks.1:[at]*", ["blocks.1:audio", "blocks.1:text"]),
        ("**:audio", ["blocks.1:audio"]),
        ("all:audio", ["blocks.1:audio"]),
        (r"re:^blocks\.[12]$:text", ["blocks.1:text", "blocks.2:text"]),
        (r"re:^(?:blocks)\.0:text", ["blocks.0:text"]),
        # Who does not ask for a stream has none.
        ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("re:^blocks", ["blocks.0", "blocks.1", "blocks.2"]),
        (Dual, ["blocks.0", "blocks.2"]),
        ([lambda name, module: name == "blocks.2", "blocks.2:text"], ["blocks.2", "blocks.2:text"]),
    ],
)
def test_selectors(layers: Any, expected: list[str]) -> None:
    found = model()
    assert [layer.name for layer in choose(found, layers)] == expected
    assert [name for name, _ in select(found, layers)] == expected


def test_a_preset() -> None:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    found = [layer.name for layer in choose(transformer, ["blocks", "blocks:text"])]
    blocks = ["transformer_blocks.0", "single_transformer_blocks.0"]
    assert found == [name for block in blocks for name in (block, f"{block}:text")]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            "blocks.0:txt",
            r"'blocks.0:txt' means a stream 'txt', which 'blocks.0' of Model has not. .* \(text\). Use 'blocks.0:text'",
        ),
        ("blocks.*:video", r"Expected one of its streams \(text, audio, encoder_hidden_states\)"),
        (
            "single.1:text",
            "layers whose forward returns several tensors by name. These return one, .* use 'single.1'",
        ),
        (["blocks.0", "single.*:*"], r"layers='single.\*:\*' means a stream '\*'"),
        ("block.0:text", "layers='block.0:text' selects nothing in Model.*Did you mean: .*blocks.0"),
        ("blocks.0:", "layers='blocks.0:' selects nothing"),
        (":text", "layers=':text' selects nothing"),
        ("blocks.0:text:text", "layers='blocks.0:text:text' selects nothing"),
        ("re:(:text", "no regular expression"),
    ],
)
def test_streams_that_are_not_there(layers: Any, message: str) -> None:
    with pytest.raises(noesis.NoesisError, match=message):
        choose(model(), layers)


def test_modules_that_have_a_colon_in_their_names() -> None:
    """They are meant as before; streams come second."""
    found = nn.Sequential(nn.ModuleDict({"a": Dual(), "a:text": Dual(), "b:c": Dual()}))
    for layers, expected in (
        ("0.a:text", ["0.a:text"]),
        ("*:text", ["0.a:text"]),
        ("0.b:c", ["0.b:c"]),
        ("0.b:c:text", ["0.b:c:text"]),
        (Dual, ["0.a", "0.a:text", "0.b:c"]),
    ):
        chosen = choose(found, layers)
        assert [layer.name for layer in chosen] == expected
        assert [layer.place for layer in chosen] == [(0,) if layer.name == "0.b:c:text" else None for layer in chosen]
