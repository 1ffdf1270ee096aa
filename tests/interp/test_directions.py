"""Directions between two kinds of inputs: found where planted, nowhere else, and exact as edits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers import trained_toys
from helpers.language_models import build
from noesis import interp
from noesis.numerics import roc_auc


def prompts(last: int, rows: int = 16, seed: int = 0) -> Tensor:
    """Random tokens before a given one."""
    ids = torch.randint(10, 99, (rows, 8), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = last
    return ids


def test_the_direction_between_two_tokens_is_that_of_their_embeddings() -> None:
    model = build("llama")
    found = interp.direction(model, prompts(5), prompts(7, seed=1), site="embed")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        expected = (embedding[5] - embedding[7]).double().numpy()
        norms = (embedding[5].norm() + embedding[7].norm()) / 2
    assert np.allclose(found.vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert found.auc == 1.0
    assert found.cosine == pytest.approx(1.0)
    assert found.p_value == 1 / 200
    assert found.mean_norm == pytest.approx(float(norms), rel=1e-5)
    assert found.length == pytest.approx(np.linalg.norm(expected), rel=1e-5)


def test_auc_is_of_the_half_that_was_not_used() -> None:
    """In more dimensions than examples, what was used is separated perfectly, and means nothing."""
    model = nn.Sequential(nn.Identity())
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(20, 400, generator=generator), torch.randn(20, 400, generator=generator)
    found = interp.direction(model, one, other, site="0")
    assert roc_auc(one.double().numpy() @ found.vector, other.double().numpy() @ found.vector) > 0.65
    assert abs(found.auc - 0.5) < 0.25
    assert found.p_value > 0.05
    assert abs(found.cosine) < 0.3
    assert abs(found.shuffled.mean() - 0.5) < 0.05


def test_p_is_uniform_where_there_is_nothing() -> None:
    model = nn.Sequential(nn.Identity())
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 20, 4, generator=generator) for _ in range(150)]
    p = np.sort([interp.direction(model, a, b, site="0", seed=seed).p_value for seed, (a, b) in enumerate(draws)])
    assert np.abs(p - (np.arange(len(p)) + 0.5) / len(p)).max() < 1.63 / np.sqrt(len(p))  # Kolmogorov, 1 %


def test_padding_is_no_last_token() -> None:
    model = build("llama")
    ids, mask = prompts(5), torch.ones(16, 10, dtype=torch.int64)
    padded = torch.cat([ids, torch.zeros(16, 2, dtype=torch.int64)], dim=1)
    mask[:, 8:] = 0
    plain = interp.direction(model, ids, prompts(7), site="resid_post.1")
    right = interp.direction(model, {"input_ids": padded, "attention_mask": mask}, prompts(7), site="resid_post.1")
    assert np.allclose(plain.vector, right.vector, atol=1e-4)
    one_by_one = interp.direction(model, list(ids.split(1)), list(prompts(7).split(1)), site="resid_post.1")
    assert np.allclose(plain.vector, one_by_one.vector, atol=1e-4)


# As edits.


def test_adding_is_in_mean_norms_of_the_site() -> None:
    model, ids = build("llama"), prompts(9, seed=3)
    found = interp.direction(model, prompts(5), prompts(7), site="resid_post.1")
    before, after = (
        interp.run(model, ids, keep="resid_post.1", edits=edits)["resid_post.1"]
        for edits in ([], [found.add(0.5, positions=-1)])
    )
    moved = (after - before).double()
    assert moved[:, :-1].abs().max() == 0
    expected = torch.tensor(0.5 * found.mean_norm * found.vector)
    assert torch.allclose(moved[:, -1], expected.expand(16, -1), atol=1e-5)


def test_taken_away_there_is_nothing_left_of_it() -> None:
    model, ids = build("llama"), prompts(9, seed=3)
    found = interp.direction(model, prompts(5), prompts(7), site="resid_post.1")
    before, after = (
        interp.run(model, ids, keep="resid_post.1", edits=edits)["resid_post.1"].double().numpy() @ found.vector
        for edits in ([], [found.ablate()])
    )
    assert np.abs(before).max() > 0.05
    assert np.abs(after).max() < 1e-5


@pytest.mark.slow
def test_a_direction_steers(induction: nn.Module) -> None:
    """Between what follows 5 and what follows 7: added, it makes the first likelier everywhere."""
    rows = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(seed)) for seed in range(40)])[
        :, :20
    ]

    def said_again(token: int) -> Tensor:
        ids = rows[(rows[:, :10] != token).all(1)][:16, :10].clone()
        ids[:, 4] = token  # after the fourth, which is said again
        return torch.cat([ids, ids[:, :4]], dim=1)

    found = interp.direction(induction, said_again(5), said_again(7), site="resid_post.1")
    assert found.p_value < 0.05
    neutral = said_again(11)
    logits = [interp.run(induction, neutral, edits=edits).logits[:, -1] for edits in ([], [found.add(1.0)])]
    lead = [(each[:, 5] - each[:, 7]).mean() for each in logits]
    assert lead[1] > lead[0] + 1


def test_what_it_costs_in_perplexity(induction: nn.Module) -> None:
    ids, _ = trained_toys.repeated(8, [12], torch.Generator().manual_seed(0))
    found = interp.direction(induction, ids[:4].repeat(2, 1), ids[4:].repeat(2, 1), site="resid_post.0")
    nothing, little, much = (found.perplexity_cost(induction, ids, scale=scale) for scale in (0.0, 0.2, 3.0))
    assert nothing.before == nothing.after == nothing.random
    assert nothing.tokens == 8 * 47
    assert much.ratio > little.ratio > 0.99
    assert much.ratio > 2
    with torch.no_grad():
        logits = induction(ids).logits
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert nothing.before == pytest.approx(float(expected), rel=1e-4)
    ablated = found.perplexity_cost(induction, list(ids.split(2)), scale=None)
    assert ablated.before == pytest.approx(nothing.before, rel=1e-4)
    assert ablated.after != ablated.before


# Bad input, files.


def test_bad_input_says_what_to_do() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="at least 4, half of which are held out"):
        interp.direction(model, prompts(5, rows=3), prompts(7), site="embed")
    with pytest.raises(ValueError, match="'resid_post' means 3"):
        interp.direction(model, prompts(5), prompts(7), site="resid_post")
    with pytest.raises(ValueError, match="Name a head"):
        interp.direction(model, prompts(5), prompts(7), site="z.1")
    with pytest.raises(ValueError, match="the same at this site"):
        interp.direction(model, prompts(5), prompts(5), site="embed")
    with pytest.raises(ValueError, match="position 8 of a row of 8 tokens"):
        interp.direction(model, prompts(5), prompts(7), site="embed", position=8)
    with pytest.raises(TypeError, match="tokenizer"):
        interp.direction(model, ["good"] * 4, ["bad"] * 4, site="embed")
    assert interp.direction(model, prompts(5), prompts(7), site="z.1.2").vector.shape == (8,)


def test_a_wrapped_model_records_no_steps() -> None:
    wrapped = noesis.wrap(build("llama"))
    found = interp.direction(wrapped, prompts(5), prompts(7), site="blocks.1.hook_resid_post")
    assert found.site == "resid_post.1"
    found.perplexity_cost(wrapped, prompts(9))
    assert len(wrapped.trace().steps) == 0


def test_files(tmp_path: Path) -> None:
    found = interp.direction(build("llama"), prompts(5), prompts(7), site="resid_mid.2")
    for name in ("direction.json", "direction.safetensors"):
        read = interp.Direction.load(found.save(tmp_path / name))
        assert repr(read) == repr(found)
        assert np.array_equal(read.vector, found.vector)
        assert torch.equal(read.add().direction, found.add().direction)
    assert found.to_dataframe().site.tolist() == ["resid_mid.2"]
