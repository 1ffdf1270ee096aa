"""Metrics: closed forms, one number per example, and where they look."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import noesis
from helpers.families import family, inputs
from noesis import interp
from noesis.interp.metrics import last_positions, one_each

LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))


def test_closed_forms() -> None:
    right, wrong = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    last = LOGITS[:, -1].double()
    rows = torch.arange(3)
    assert torch.equal(interp.logit_difference(right, wrong)(LOGITS), last[rows, right] - last[rows, wrong])
    expected = last.exp()[rows, right] / last.exp().sum(1)
    torch.testing.assert_close(interp.answer_probability(right)(LOGITS), expected)
    p = torch.distributions.Categorical(logits=LOGITS[:, -1].double())
    q = torch.distributions.Categorical(logits=LOGITS.flip(0)[:, -1].double())
    torch.testing.assert_close(interp.kl(LOGITS)(LOGITS.flip(0)), torch.distributions.kl_divergence(p, q))
    never = LOGITS.clone()
    never[..., 0] = -torch.inf  # a token that neither has
    assert interp.kl(never)(never.clone()).tolist() == [0.0] * len(never)
    assert interp.kl(LOGITS)(LOGITS).abs().max() < 1e-15


def test_several_tokens_and_positions() -> None:
    several = interp.logit_difference(right=[[1, 2], [1, 2], [3, 4]], wrong=0, positions=[0, 2, -1])
    there = LOGITS[torch.arange(3), torch.tensor([0, 2, 4])].double()
    expected = torch.stack([there[0, [1, 2]].mean(), there[1, [1, 2]].mean(), there[2, [3, 4]].mean()]) - there[:, 0]
    torch.testing.assert_close(several(LOGITS), expected)
    both = interp.answer_probability([[1, 2]] * 3, positions=2)(LOGITS)
    torch.testing.assert_close(both, LOGITS[:, 2].double().softmax(-1)[:, [1, 2]].sum(1))
    assert several.tokens is not None
    assert several.tokens.tolist() == [[1, 2, 0], [1, 2, 0], [3, 4, 0]]
    assert interp.answer_probability(1).tokens is None  # a softmax is over all


def test_classes_have_no_positions() -> None:
    classes = LOGITS[:, 0]
    assert torch.equal(interp.logit_difference(1, 2)(classes), classes[:, 1].double() - classes[:, 2].double())
    assert interp.kl(classes)(classes).abs().max() < 1e-15
    with pytest.raises(noesis.NoesisError, match="has positions, and logits have none"):
        interp.logit_difference(1, 2, positions=0)(classes)


def test_the_last_token_of_a_padded_row_is_the_last_that_is_no_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert last_positions(mask).tolist() == [2, 4, 4]
    metric = interp.logit_difference(1, 2)
    bound = metric.bound({"attention_mask": mask})
    assert torch.equal(bound(LOGITS), interp.logit_difference(1, 2, positions=[2, 4, 4])(LOGITS))
    assert metric.positions is None
    assert interp.logit_difference(1, 2, positions=0).bound({"attention_mask": mask}).positions == 0  # what was asked
    both = {"attention_mask": mask, "decoder_input_ids": mask, "decoder_attention_mask": mask[:, :3]}
    assert metric.bound(both).positions.tolist() == [2, 2, 2]
    with pytest.raises(noesis.NoesisError, match="padding alone"):
        metric.bound({"attention_mask": torch.zeros(1, 3)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: interp.logit_difference([1, 2, 3], [4, 5, 6], positions=[0, 1, 2]),
        lambda: interp.logit_difference([1, 2, 3], 0),
        lambda: interp.answer_probability([1, 2, 3]),
        lambda: interp.kl(LOGITS.flip(1)),
        lambda: interp.kl(LOGITS[:, 0]),
    ],
)
def test_a_metric_of_some_examples_is_that_of_all_there(make: Any) -> None:
    """Engines give a batch of some examples, repeated for as many cells."""
    metric, rows = make(), [2, 0, 0, 1, 2]
    assert torch.equal(metric.of(rows)(LOGITS[rows]), metric(LOGITS)[rows])
    places = metric.places(3, 5)
    at = LOGITS[torch.arange(3), places]
    assert torch.equal(metric.score(at), metric(LOGITS))  # logits that were taken where it looks


def test_outputs_of_models_and_runs() -> None:
    model = family("llama")
    run = interp.run(model, inputs("llama"))
    assert interp.kl(run)(run.output).abs().max() < 1e-15
    assert interp.logit_difference(3, 4)(run.output).shape == (2,)


def test_gradients_pass_through() -> None:
    logits = LOGITS.clone().requires_grad_()
    interp.logit_difference(1, 2)(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, -1, 1].tolist() == [1.0] * 3
    assert logits.grad.abs().sum() == 6


def test_a_mean_is_refused() -> None:
    def mean(output: Tensor) -> Tensor:
        return output[:, -1, 0].mean()

    with pytest.raises(
        noesis.NoesisError, match="the metric mean gave a single number, such as a mean, for a batch of 3"
    ):
        one_each(mean, LOGITS, 3)
    with pytest.raises(noesis.NoesisError, match=r"gave 0\.5 for a batch of 3.*without \.item"):
        one_each(lambda output: 0.5, LOGITS, 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(noesis.NoesisError, match=r"shape \(3, 5\)"):
        one_each(lambda output: output[..., 0], LOGITS, 3)
    with pytest.raises(noesis.NoesisError, match="metric is 3"):
        one_each(3, LOGITS, 3)  # type: ignore[arg-type]
    assert one_each(lambda output: output[:, 0, 0], LOGITS, 3).tolist() == LOGITS[:, 0, 0].double().tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interp.logit_difference(0.5, 1), "right is 0.5"),
        (lambda: interp.logit_difference("Mary", 1), "right is 'Mary'"),
        (lambda: interp.logit_difference([1, 2], [1, 2, 3]), "right has 2 examples and wrong has 3"),
        (lambda: interp.logit_difference([1, 2], 0)(LOGITS), "right of 2 examples, and logits are of 3"),
        (lambda: interp.logit_difference(1, 7)(LOGITS), "tokens below 7"),
        (lambda: interp.answer_probability(-1)(LOGITS), "tokens below 7"),
        (lambda: interp.answer_probability(1, positions=5)(LOGITS), "positions from -5 to 4"),
        (lambda: interp.answer_probability(1, positions=[0, 1])(LOGITS), "positions of 2 examples, and there are 3"),
        (lambda: interp.answer_probability(1, positions=[[0, 1]]), "one position, or one per example"),
        (lambda: interp.kl("reference"), "without logits"),
        (lambda: interp.answer_probability(1)(object()), "was given object"),
        (lambda: interp.answer_probability(1)(torch.zeros(4)), "logits of shape"),
    ],
)
def test_what_does_not_fit_says_so(call: Any, message: str) -> None:
    with pytest.raises(noesis.NoesisError, match=message):
        call()


def test_probabilities_of_half_precision_are_computed_in_double() -> None:
    logits = torch.tensor([[0.0, 20.0]], dtype=torch.bfloat16)
    assert interp.answer_probability(0)(logits).item() == pytest.approx(1 / (1 + math.exp(20)), rel=1e-12)
