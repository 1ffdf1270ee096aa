"""A forward that is taken up at a block is bit for bit the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.families import NAMES, family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp.anatomy import logits_of
from noesis.interp.replaying import Replay
from zoo.of_transformers import ZOO


@pytest.mark.parametrize("name", NAMES)
def test_taken_up_at_any_block_it_is_the_whole_forward(name: str) -> None:
    model = family(name)
    with torch.no_grad():
        bare = model(**inputs(name)).logits
    replay = Replay(model, inputs(name))
    assert torch.equal(replay.output.logits, bare)
    layers = len(replay.anatomy.blocks)
    last = interp.run(model, inputs(name), keep=f"resid_post.{layers - 1}")[f"resid_post.{layers - 1}"]
    with torch.no_grad():
        assert all(torch.equal(replay.from_block(n, replay.residuals[n]).logits, bare) for n in range(layers))
        assert torch.equal(replay.from_block(layers, last).logits, bare)


def test_another_stream_is_what_a_change_of_the_whole_forward_gives() -> None:
    model, ids = build("gpt2"), prompts()
    replay = Replay(model, ids)
    other = torch.randn_like(replay.residuals[1])

    def put(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (other, *args[1:]), kwargs

    handle = model.transformer.h[1].register_forward_pre_hook(put, with_kwargs=True)
    with torch.no_grad():
        whole = model(ids).logits
        handle.remove()
        assert torch.equal(replay.from_block(1, other).logits, whole)
        assert torch.equal(replay.from_block(1, other, logits_to_keep=1).logits, whole[:, -1:])


def test_several_streams_are_one_batch() -> None:
    model, given = family("llama"), inputs("llama")  # with a mask, which is repeated
    replay = Replay(model, given)
    streams = [replay.residuals[2], 2 * replay.residuals[2], replay.residuals[2].flip(1)]
    with torch.no_grad():
        together = replay.from_block(2, torch.cat(streams)).logits.chunk(3)
        assert all(
            torch.allclose(part, replay.from_block(2, stream).logits, atol=1e-6)
            for part, stream in zip(together, streams, strict=True)
        )


def test_blocks_that_change_their_input_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.linear(x))

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(InPlace() for _ in range(3)))).eval()
    replay = Replay(model, torch.ones(2, 4))
    with torch.no_grad():
        for layer in range(3):
            assert torch.equal(replay.from_block(layer, replay.residuals[layer]), replay.output)


def test_gradients_flow_from_the_block_on() -> None:
    replay = Replay(build("llama"), prompts())
    stream = replay.residuals[2].clone().requires_grad_()
    logits_of(replay.from_block(2, stream)).square().sum().backward()
    assert stream.grad is not None
    assert stream.grad.abs().sum() > 0


def test_what_cannot_be_taken_up_says_why() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.layers, *self.layers):
                x = layer(x)
            return x

    with pytest.raises(noesis.NoesisError, match="'layers.0' runs more than once"):
        Replay(Again().eval(), torch.ones(1, 4))
    with pytest.raises(noesis.NoesisError, match="training mode"):
        Replay(Again().train(), torch.ones(1, 4))
    replay = Replay(build("llama"), prompts())
    with pytest.raises(noesis.NoesisError, match="3 rows"):
        replay.from_block(0, replay.residuals[0][:1].repeat(3, 1, 1))
    with pytest.raises(noesis.NoesisError, match="layer 7"):
        replay.from_block(7, replay.residuals[0])


def test_what_a_model_takes_from_between_other_blocks_is_there() -> None:
    """A Llava reads a hidden state from within its tower for images, whose blocks are of another stream."""
    torch.manual_seed(0)
    entry = next(entry for entry in ZOO if entry.name == "llava")
    model, given = entry.build().eval(), entry.inputs()
    replay = Replay(model, given)
    with torch.no_grad():
        bare = model(**given).logits
        for layer in replay.residuals:
            assert torch.equal(replay.from_block(layer, replay.residuals[layer]).logits, bare)
        assert list(replay.stream()) == [2, 3, 4]
        assert torch.equal(replay.from_block(4, replay.stream()[4]).logits, bare)


def test_a_model_that_is_observed_and_paused_is_visited() -> None:
    """Layers that are off are passed by, but not while somebody stops at them."""
    wrapped = noesis.wrap(build("llama"))
    with wrapped.paused():
        replay = Replay(wrapped, prompts())
        with torch.no_grad():
            changed = replay.from_block(1, 2 * replay.residuals[1]).logits
    assert not torch.equal(changed, replay.output.logits)
    wrapped(prompts())
    assert wrapped.trace().steps.tolist() == [0]
