"""A tuned lens finds the map that there is, and is tried on rows that it was not fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import noesis
from helpers.families import family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp import TunedLens, logit_lens

WIDTH, VOCABULARY = 8, 20


class Affine(nn.Module):
    """A block that adds an affine function of the stream, unless that is very large."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x)) + torch.relu(x - 50) ** 2


class Truth(nn.Module):
    """A model of which the exact lens is known: what its blocks still add is affine."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Affine(), Affine()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if attention_mask is not None:  # what is padded is very large
            x = torch.where(attention_mask[..., None] > 0, x, x + 60)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def truth() -> Truth:
    torch.manual_seed(0)
    model = Truth().eval()
    for block in model.blocks:
        for linear in (block.inner, block.outer):
            linear.weight.data.mul_(2)
    return model


def rows(count: int = 40, length: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def left(block: Any) -> tuple[Tensor, Tensor]:
    """What a block does, as x + A x + b."""
    weight = block.outer.weight @ block.inner.weight
    return weight.detach().double(), (block.outer.weight @ block.inner.bias + block.outer.bias).detach().double()


def test_the_regression_finds_the_map_that_there_is() -> None:
    model = truth()
    lens = TunedLens.fit(model, rows().split(10), steps=0, ridge=1e-9)
    (first, first_bias), (second, second_bias) = map(left, model.blocks)
    assert np.allclose(lens.weight[1], second.numpy(), atol=1e-4)
    assert np.allclose(lens.bias[1], second_bias.numpy(), atol=1e-4)
    assert np.allclose(lens.weight[0], (first + second + second @ first).numpy(), atol=1e-4)
    assert np.allclose(lens.bias[0], (first_bias + second_bias + second @ first_bias).numpy(), atol=1e-4)
    assert (lens.held_out_kl < 1e-6).all()
    assert (lens.logit_kl > 0.05).all()


def test_padding_is_not_fitted() -> None:
    ids = rows()
    mask = torch.ones_like(ids)
    mask[::2, :4] = 0
    given = [
        {"input_ids": part, "attention_mask": seen} for part, seen in zip(ids.split(10), mask.split(10), strict=True)
    ]
    model = truth()
    lens = TunedLens.fit(model, given, steps=0, ridge=1e-9)
    assert np.allclose(lens.weight[1], left(model.blocks[1])[0].numpy(), atol=1e-4)
    assert (lens.held_out_kl < 1e-6).all()


def test_where_some_logits_are_asked_for_those_positions_are_fitted() -> None:
    model, ids = build("llama"), prompts(20)
    some = TunedLens.fit(model, [{"input_ids": ids, "logits_to_keep": 2}], steps=0, ridge=0.1)
    run = interp.run(model, ids, keep=["resid_pre.1", "resid_post.2"])
    trained = torch.arange(20) % 10 != 9
    x, y = (run[name][trained][:, -2:].flatten(0, 1).double() for name in ("resid_pre.1", "resid_post.2"))
    x, y = x - x.mean(0), y - y.mean(0)
    spread = x.T @ x / len(x)
    strength = 0.1 * spread.diagonal().mean() * torch.eye(32)
    expected = torch.linalg.solve(spread + strength, x.T @ (y - x) / len(x)).T
    assert np.allclose(some.weight[1], expected.numpy(), atol=1e-4)


def test_a_strong_ridge_is_the_logit_lens() -> None:
    model = truth()
    lens = TunedLens.fit(model, rows().split(10), steps=0, ridge=1e9)
    assert np.abs(lens.weight).max() < 1e-6


def test_training_goes_from_the_logit_lens_towards_the_model() -> None:
    model = truth()
    lens = TunedLens.fit(model, rows().split(10), steps=60, start="identity", lr=0.3)
    assert (lens.held_out_kl < 0.5 * lens.logit_kl).all()
    assert (lens.train_kl < 0.5 * lens.logit_kl).all()


def test_held_out_rows_are_not_trained_on() -> None:
    """What they hold does not matter to the maps, and matters to the figures."""
    ids = rows()
    other = ids.clone()
    other[9::10] = 3
    one, two = (TunedLens.fit(truth(), each.split(8), steps=5) for each in (ids, other))
    assert (one.train_rows, one.held_out_rows) == (36, 4)
    assert np.array_equal(one.weight, two.weight)
    assert np.array_equal(one.train_kl, two.train_kl)
    assert not np.array_equal(one.held_out_kl, two.held_out_kl)


def test_the_figures_are_those_of_the_lens() -> None:
    ids = rows()
    model = truth()
    lens = TunedLens.fit(model, ids.split(10), steps=3)
    held_out = ids[9::10]
    for how, expected in ((lens, lens.held_out_kl), (None, lens.logit_kl)):
        found = logit_lens(model, held_out, lens=how)
        assert np.allclose(found.kl.mean((1, 2))[:2], expected, rtol=1e-4)
        assert (found.kl[-1] == 0).all()  # the last layer has no map
    assert found.by == "logit lens"
    assert logit_lens(model, held_out, lens=lens).by == "tuned lens"


@pytest.mark.parametrize("name", ["gemma2", "bert", "t5", "vit"])
def test_whatever_comes_after_the_blocks_is_trained_through(name: str) -> None:
    model, given = family(name), inputs(name)
    lens = TunedLens.fit(model, [given], steps=3, start="identity", held_out=0.5)
    assert (lens.train_kl < logit_kl_of(model, given)).all()


def logit_kl_of(model: Any, given: Any) -> Any:
    return np.nanmean(logit_lens(model, given).kl[:-1, :1], axis=(1, 2))


def test_the_model_is_left_as_it_is() -> None:
    model, ids = build("llama"), prompts(10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        TunedLens.fit(model, [ids], steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["lens.safetensors", "lens.json"])
def test_files(tmp_path: Path, name: str) -> None:
    lens = TunedLens.fit(truth(), [rows()], steps=1)
    again = TunedLens.load(lens.save(tmp_path / name))
    assert repr(again) == repr(lens)
    assert np.array_equal(again.weight, lens.weight)
    assert np.array_equal(logit_lens(truth(), rows(2), lens=again).kl, logit_lens(truth(), rows(2), lens=lens).kl)
    assert len(lens.to_dataframe()) == 2


def test_a_lens_that_does_not_help_says_so() -> None:
    lens = TunedLens.fit(truth(), [rows()], steps=0, start="identity")
    assert "no better than the logit lens at resid_pre.0, resid_pre.1" in repr(lens)
    assert "no better" not in repr(TunedLens.fit(truth(), [rows()], steps=0))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"steps": -1}, "0 or more"),
        ({"lr": 0}, "a positive number"),
        ({"start": "zero"}, '"ridge" or "identity"'),
        ({"ridge": 0}, "a positive number"),
        ({"held_out": 0.9}, "a share up to 0.5"),
        ({"loader": []}, "gave no batches"),
        ({"loader": [prompts(4)]}, "at least 10, of which one is held out"),
        ({"loader": ["text"]}, "without tensors"),
    ],
)
def test_bad_input_says_what_to_do(what: dict[str, Any], said: str) -> None:
    with pytest.raises(noesis.NoesisError, match=said):
        TunedLens.fit(build("llama"), **{"loader": [prompts(10)], **what})


def test_a_lens_of_another_model_is_refused() -> None:
    lens = TunedLens.fit(truth(), [rows()], steps=0)
    with pytest.raises(noesis.NoesisError, match="the model's are 3, 32 wide"):
        logit_lens(build("llama"), prompts(), lens=lens)


@pytest.mark.data
@pytest.mark.slow
def test_of_a_trained_model_it_is_far_nearer_than_the_logit_lens(data: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "stories260k").eval()
    torch.manual_seed(0)
    stories = model.generate(torch.ones(60, 1, dtype=torch.int64), max_new_tokens=63, do_sample=True, top_k=None)
    lens = TunedLens.fit(model, stories.split(10), steps=40)
    assert (lens.held_out_kl < [3.0, 2.5, 2.0, 1.3, 0.8]).all()
    assert (lens.held_out_kl < 0.8 * lens.logit_kl).all()
    assert isinstance(interp.logit_lens(model, stories[:1], lens=lens), interp.Lens)
