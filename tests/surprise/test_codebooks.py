"""Codebooks: how large they are, how they are fitted and how they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.codebooks import fitted, in_float64, sample
from noesis.kernels.coding import code_reference, directions
from noesis.surprise import Codebook, LayerCodebook
from noesis.surprise.layer_codebook import shrunk


def test_shrinkage_is_that_of_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    x = sample(10, 30)
    x -= x.mean(0)
    theirs = covariance.OAS(assume_centered=True).fit(x).covariance_
    np.testing.assert_allclose(shrunk(x.T @ x / 30, 30), theirs, rtol=0.05)  # theirs leaves out the terms in 2 / dim


def test_sizes_follow_the_number_of_vectors():
    settings = Codebook()
    assert settings.sizes(2000, 512) == (89, 64)
    assert settings.sizes(100_000, 512) == (256, 64)
    assert settings.sizes(80, 512) == (18, 20)
    assert settings.sizes(80, 3) == (18, 3)
    assert settings.sizes(2, 3) == (1, 1)


def test_the_same_seed_fits_the_same_codes_and_no_global_numbers_are_drawn():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (it is the global state that has to stay)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = fitted(8, 300), fitted(8, 300)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    "x", [np.ones((50, 4)), np.zeros((50, 4)), np.repeat(np.eye(4), 20, 0), np.ones((50, 1))], ids=str
)
def test_degenerate_vectors(x):
    book = LayerCodebook(Codebook(), torch.device("cpu"))
    book.fit(x, np.random.default_rng(0))
    assert book.code(torch.from_numpy(x).float()).total.isfinite().all()
    strange = book.code(torch.tensor(np.where(x == 0, 3.0, -x)).float()).total
    assert (strange > book.code(torch.from_numpy(x).float()).total + 1).all() or x.shape[1] == 1


def test_usage_is_reported():
    book = fitted(4, 300, Codebook(size=16, decay=0.5))
    assert book.utilisation == 1
    assert book.dead == []
    assert "codes=16" in repr(book)
    for _ in range(20):
        book.loss(torch.from_numpy(sample(4, 2)).float())
    assert book.utilisation in (1 / 16, 2 / 16)
    assert len(book.dead) == 16 - book.utilisation * 16


def test_many_codes_survive_training():
    """nervecode 0.1.1 ends with one code of sixteen."""
    settings = Codebook(size=16, dim=4, learn="gradient")
    book = LayerCodebook(settings, torch.device("cpu"))
    clusters = np.random.default_rng(0).standard_normal((16, 10)) * 2
    generator = np.random.default_rng(1)

    def batch(count: int) -> np.ndarray:
        return clusters[generator.integers(16, size=count)] + 0.1 * generator.standard_normal((count, 10))

    book.begin(batch(64), generator)
    optimiser = torch.optim.Adam(book.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        loss = book.loss(torch.from_numpy(batch(128)).float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    book.loss(torch.from_numpy(batch(2000)).float())
    assert book.utilisation >= 12 / 16


def test_codes_follow_the_vectors_by_ema():
    settings = Codebook(size=4, dim=2, learn="ema", decay=0.5)
    book = LayerCodebook(settings, torch.device("cpu"))
    x = sample(6, 400)
    book.begin(x, np.random.default_rng(0))

    def error() -> float:
        points = (directions(torch.from_numpy(x).float())[0] - book.centre) @ book.projection
        return torch.cdist(points, book.codes).amin(1).square().mean().item()

    before = error()
    for _ in range(20):
        loss = book.loss(torch.from_numpy(x).float())
    assert not book.codes.requires_grad
    assert loss.requires_grad  # of the projection
    assert error() < 0.9 * before


def test_running_estimates_follow_a_model_that_changes():
    """The covariance, weights and lengths of the first batch would call everything later strange."""
    book = LayerCodebook(Codebook(size=8, dim=4, learn="gradient", decay=0.9), torch.device("cpu"))
    book.begin(sample(6, 200), np.random.default_rng(0))
    later = torch.from_numpy(5 * sample(6, 400, seed=1) + 2).float()
    first = book.loss(later).item()
    for _ in range(100):
        last = book.loss(later).item()
    assert first > last
    assert last < 1.5
    log_length = directions(later)[1]
    torch.testing.assert_close(book.norm, torch.stack([log_length.mean(), log_length.std()]), rtol=0.02, atol=0.02)
    held = in_float64(book)
    nearest = code_reference(later.double(), held).nearest
    about = (directions(later.double())[0] - held.centre) @ held.projection - held.codes[nearest]
    covariance = torch.linalg.inv(held.whiten @ held.whiten.T)
    expected = (about.T @ about / len(about)).diagonal()
    torch.testing.assert_close(covariance.diagonal(), expected, rtol=0.2, atol=1e-4)
