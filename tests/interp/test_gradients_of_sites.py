"""Gradients at sites, against differences of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.families import family, inputs
from helpers.language_models import build, prompts
from noesis import interp


def difference(output: Any) -> Tensor:
    """One number per example."""
    return output.logits[:, -1, 5] - output.logits[:, -1, 9]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize(
    "component", ["resid_pre", "resid_mid", "attn", "neurons", "q", "k", "v", "z", "pattern", "result"]
)
def test_gradients_are_those_of_finite_differences(name: str, component: str) -> None:
    model, given = family(name), inputs(name)
    site = f"{component}.1"
    found = interp.anatomy(model, **given)
    if component in found.blocks[1].refused:
        pytest.skip("refused")
    run = interp.run(model, given, keep=site, grad_of=difference, anatomy=found)
    assert run.grad is not None
    gradient = run.grad[site]
    assert gradient.shape == run[site].shape
    direction = run[site].std() * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    step = 0.02

    def moved(scale: float) -> Tensor:
        edit = interp.Custom(site, lambda part: part + (scale * step * direction).to(part.dtype))
        return difference(interp.run(model, given, edits=[edit], anatomy=found).output).double()

    truth = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    ours = (gradient.double() * direction).nan_to_num().flatten(1).sum(1)  # NaN where padding has it
    assert torch.allclose(ours, truth, rtol=1e-2, atol=1e-4)


def test_outputs_and_what_is_kept_are_the_same() -> None:
    model, ids = build("llama"), prompts()
    keep = ["resid_post", "z.1.2@-1", "pattern.1", "embed"]
    plain, with_grad = interp.run(model, ids, keep=keep), interp.run(model, ids, keep=keep, grad_of=difference)
    assert torch.equal(plain.logits, with_grad.logits.detach())
    assert all(torch.equal(plain[site], with_grad[site]) for site in plain.fired)
    assert with_grad.grad is not None
    assert with_grad.grad.fired == plain.fired
    assert with_grad.grad["z.1.2@-1"].shape == with_grad["z.1.2@-1"].shape
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_metric_does_not_depend_on_has_zeros() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "beside": nn.Linear(2, 2)})
    model.forward = lambda x: (model["beside"](x), model["used"](x))[1]  # type: ignore[method-assign]
    run = interp.run(model, torch.ones(3, 2), keep=["used", "beside"], grad_of=lambda y: y.sum(1))
    assert run.grad is not None
    assert torch.equal(run.grad["beside"], torch.zeros(3, 2))
    assert torch.equal(run.grad["used"], torch.ones(3, 2))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda output: output.logits.mean(), "never a mean"),
        (lambda output: 3.0, "returned a float"),
        (lambda output: output.logits.detach()[:, -1, 0], "no gradient"),
    ],
)
def test_a_metric_that_is_none_is_refused(metric: Any, message: str) -> None:
    with pytest.raises(noesis.NoesisError, match=message):
        interp.run(build("gpt2"), prompts(), keep="z.1", grad_of=metric)
