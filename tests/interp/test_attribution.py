"""Attribution patching: right where things are linear, wrong where they are saturated, and then it says so."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.circuits import induction
from helpers.families import family
from helpers.language_models import VOCABULARY, prompts
from helpers.selection import by_default
from noesis import interp
from noesis.interp.estimating import middles

PAIRS = 4
METRIC = interp.logit_difference(right=[5, 6, 7, 8], wrong=[9, 10, 11, 12])
#: Sharpness, steps -> what the head that finds the previous token is estimated at; its exact effect is 1.
ESTIMATES = {(40, 0): 0.0, (20, 0): 0.0, (8, 0): 0.12, (3, 0): 0.36, (40, 50): 0.81, (20, 50): 0.81, (3, 50): 1.06}


def ids_of(corrupted: bool) -> Tensor:
    ids = prompts(PAIRS, 7)
    if corrupted:
        ids = ids.clone()
        ids[:, 3] = (ids[:, 3] + 1) % VOCABULARY
    return ids


def attributed(*args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", noesis.NoesisWarning)
        return interp.attribute(*args, **options)


# ---------------------------------------------------------------- the truth of circuits by construction


@pytest.mark.parametrize(("sharpness", "steps"), by_default(3, ESTIMATES))
def test_saturated_attention_hides_a_necessary_head_and_this_is_said(sharpness: int, steps: int) -> None:
    made = induction(0, sharpness)
    pairs = made.sample(16)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    options: dict[str, Any] = {"sites": "z", "positions": "all", "steps": steps}
    found = attributed(made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric, **options)
    assert found[made.site("z", "previous")].mean == pytest.approx(ESTIMATES[sharpness, steps], abs=0.01)
    assert found[made.site("z", "induction")].mean == pytest.approx(1.0, abs=0.16 if steps else 0.06)
    exact = dict(zip(map(str, found.checked), found.effects_of(found.exact).mean(1), strict=True))
    assert exact[made.site("z", "previous")] == pytest.approx(1.0, abs=0.02)
    wrong = abs(ESTIMATES[sharpness, steps] - 1) > 0.1
    assert found.trusted is not wrong
    assert ("NOT TO BE TRUSTED" in repr(found)) is wrong
    if wrong:
        (one, *_) = [each for each in found.disagreements if str(each.site) == made.site("z", "previous")]
        assert one.estimated == pytest.approx(ESTIMATES[sharpness, steps], abs=0.01)
        assert one.exact == pytest.approx(1.0, abs=0.02)
        assert one.q_value < 0.05
        with pytest.warns(noesis.NoesisWarning, match="not to be trusted: [12] of 2 cells"):
            interp.attribute(made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_warns_whatever_the_sizes_and_whichever_cells_are_asked_for(seed: int) -> None:
    made = induction(seed, 40.0)
    pairs = made.sample(16, ragged=True)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    for sites, steps in (("z", 0), (["attn", "mlp"], 0), ("resid_post", 0), ("z", 5)):
        with pytest.warns(noesis.NoesisWarning, match="not to be trusted"):
            interp.attribute(made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric, sites=sites, steps=steps)


@pytest.mark.slow
def test_few_steps_have_not_converged_and_this_is_said() -> None:
    made = induction(0, 40.0)
    pairs = made.sample(16)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    given = (made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric)
    few, many = (attributed(*given, sites="z", positions="all", steps=steps) for steps in (5, 100))
    assert few.convergence > 0.3
    assert "10 steps instead of 5 change it by" in repr(few)
    assert many.convergence < 0.05
    assert "instead of" not in repr(many)
    assert np.isnan(attributed(*given, sites="z", positions="all", steps=5, check=0).convergence)


def test_steps_are_the_midpoint_rule() -> None:
    assert middles(0) == [0.0]
    assert middles(4) == [0.125, 0.375, 0.625, 0.875]


# ---------------------------------------------------------------- against definitions


class Cubes(nn.Module):
    """A sum of cubes of an embedding: gradients are 3 x^2, and their mean along a path is known."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)))
        self.head = nn.Linear(4, 10)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(input_ids) ** self.power))
        return logits


def small(power: int) -> nn.Module:
    torch.manual_seed(0)
    return Cubes(power).double().eval()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 5, 9]])
OTHERS = torch.tensor([[1, 2, 4], [4, 5, 1], [7, 8, 2], [1, 5, 3]])


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_where_all_is_linear_the_estimate_is_exact(steps: int, direction: Any) -> None:
    metric = interp.logit_difference(1, 2)
    options: dict[str, Any] = {"sites": ["embed", "resid_post", "blocks.1.0"]}
    options["direction"] = direction
    model = small(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = interp.attribute(model, IDS, OTHERS, metric, steps=steps, **options)
    exact = interp.patch(model, IDS, OTHERS, metric, **options)
    assert list(map(str, found.sites)) == list(map(str, exact.sites))
    np.testing.assert_allclose(found.patched, exact.patched, atol=1e-12)
    assert found.trusted
    assert "agree with exact patching" in repr(found)


@pytest.mark.parametrize("steps", [0, 2, 7])
def test_gradients_are_means_along_the_path_of_the_embedding(steps: int) -> None:
    model: Any = small(3)
    metric = interp.logit_difference(1, 2)
    found = attributed(model, IDS, OTHERS, metric, sites="embed", positions=[-1], steps=steps)
    clean, corrupted = (model.embed(ids[:, -1]).detach() for ids in (IDS, OTHERS))
    gradient = 0.0
    for share in middles(steps):
        point = (corrupted + share * (clean - corrupted)).requires_grad_()
        logits = model.head(model.blocks(point**3))
        (each,) = torch.autograd.grad((logits[:, 1] - logits[:, 2]).sum(), point)
        gradient = gradient + each / len(middles(steps))
    expected = ((clean - corrupted) * gradient).sum(1)
    np.testing.assert_allclose((found.patched - found.corrupted)[0], expected.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "mixtral"])
def test_cells_are_differences_times_gradients_in_real_models(name: str) -> None:
    model = family(name)
    sites = ["embed", "resid_pre", "attn", "mlp", "z", "q", "k", "v", "pattern"]
    found = attributed(model, ids_of(False), ids_of(True), METRIC, sites=sites, positions="all", steps=0, check=0)
    keep = sorted({site.component for site in found.sites})
    clean = interp.run(model, ids_of(False), keep=keep)
    corrupted = interp.run(model, ids_of(True), keep=keep, grad_of=METRIC)
    for at, site in enumerate(found.sites):
        whole = str(site._replace(head=None))
        product = (clean[whole] - corrupted[whole]) * corrupted.grad[whole]
        if site.head is not None:
            product = product.select(1 if site.component == "pattern" else 2, site.head)
        np.testing.assert_allclose(
            (found.patched - found.corrupted)[at], product.flatten(1).sum(1).numpy(), atol=2e-5, rtol=1e-4
        )


def test_batches_and_padding_change_nothing() -> None:
    made = induction(1, 8.0)
    pairs = made.sample(12, ragged=True)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    given = (made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric)
    for options in ({"sites": "z"}, {"edges": True}):
        whole = attributed(*given, steps=2, check=0, **options)
        parts = attributed(*given, steps=2, check=0, batch=5, **options)
        np.testing.assert_allclose(parts.values, whole.values, atol=1e-5)
    cells = attributed(*given, sites="z", steps=0, check=0)
    for at, site in enumerate(cells.sites):
        padding = ~pairs.mask[:, site.position].bool().numpy()
        assert (np.isnan(cells.patched[at]) == padding).all()


def test_observed_models_and_functions_as_metrics() -> None:
    model = family("llama")

    def own(logits: Any) -> Tensor:
        return logits[:, -1, 5] - logits[:, -1, 9]

    plain = attributed(model, ids_of(False), ids_of(True), own, sites="z", positions="all", batch=2)
    observed = noesis.wrap(model)
    again = attributed(observed, ids_of(False), ids_of(True), own, sites="z", positions="all", batch=2)
    assert len(observed.trace()) == 0  # none of it is a step of the user's
    observed.unwrap()
    np.testing.assert_array_equal(plain.patched, again.patched)
    metric = interp.logit_difference(5, 9)
    same = attributed(model, ids_of(False), ids_of(True), metric, sites="z", positions="all")
    np.testing.assert_allclose(plain.values, same.values, atol=1e-4)


def test_frozen_parameters_get_no_gradients_and_no_less_is_estimated() -> None:
    model = family("gpt2")
    found = attributed(model, ids_of(False), ids_of(True), METRIC, sites="z", check=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen = family("gpt2").requires_grad_(False)
    again = attributed(frozen, ids_of(False), ids_of(True), METRIC, sites="z", check=0)
    np.testing.assert_allclose(again.patched, found.patched, atol=1e-6)


# ---------------------------------------------------------------- the result


def test_magnitude_sees_effects_that_cancel() -> None:
    one, zero = np.ones(4), np.zeros(4)
    sites = [interp.Site("z", 0, 0), interp.Site("z", 0, 1)]
    found = interp.Attribution(sites, one, zero, np.array([[1, -1, 1, -1.0], [0.5] * 4]), "denoise", "m", "gradients")
    assert found.mean.tolist() == [0.0, 0.5]
    assert found.magnitude.tolist() == [1.0, 0.5]


def test_an_estimate_that_was_not_checked_says_so_and_is_not_trusted() -> None:
    model = family("gpt2")
    found = attributed(model, ids_of(False), ids_of(True), METRIC, check=0)
    assert "estimated by attribution patching with integrated gradients of 5 steps" in repr(found)
    assert "not checked against exact patching" in repr(found)
    assert not found.trusted


def test_largest_and_near_zero_cells_are_checked() -> None:
    model = family("gpt2")
    found = attributed(model, ids_of(False), ids_of(True), METRIC, sites="resid_pre", check=3, steps=0)
    sizes = dict(zip(map(str, found.sites), found.magnitude, strict=True))
    assert found.tops == 3
    assert [sizes[str(site)] for site in found.checked[:3]] == sorted(sizes.values(), reverse=True)[:3]
    held = {str(site) for site in found.sites if site.position >= 3 and (site.layer or site.position == 3)}
    assert {str(site) for site in found.checked} <= held  # the others hold the same in both runs
    exact = interp.patch(model, ids_of(False), ids_of(True), METRIC, sites=found.checked)
    np.testing.assert_allclose(found.effects_of(found.exact), exact.values, atol=1e-6)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("edges", [False, True])
def test_files(tmp_path: Any, suffix: str, edges: bool) -> None:
    model = family("gpt2")
    found = attributed(model, ids_of(False), ids_of(True), METRIC, edges=edges, check=2)
    again = type(found).load(found.save(tmp_path / f"found.{suffix}"))
    assert repr(again) == repr(found)
    assert again.sites == found.sites
    assert again.checked == found.checked
    assert again.to_csv() == found.to_csv()
    assert type(found).from_json(found.to_json()).disagreements == found.disagreements
    assert len(found.to_dataframe()) == len(found)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"check": 1.5}, "check is 1.5"),
        ({"batch": 0}, "batch is 0"),
        ({"direction": "both"}, "direction is 'both'"),
        ({"edges": True, "sites": "z"}, "edges=True"),
        ({"sites": "logits"}, "logits"),
    ],
)
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        interp.attribute(family("gpt2"), ids_of(False), ids_of(True), METRIC, **options)


def test_a_model_in_training_mode_is_refused() -> None:
    model = family("gpt2")
    anatomy = interp.anatomy(model, ids_of(False))
    with pytest.raises(RuntimeError, match="training mode"):
        interp.attribute(model.train(), ids_of(False), ids_of(True), METRIC, anatomy=anatomy)
