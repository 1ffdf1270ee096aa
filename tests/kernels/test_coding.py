"""Code lengths and pooling against float64 and explicit formulas; the Triton kernel against both."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from helpers.codebooks import fitted, in_float64, sample
from noesis.kernels.coding import Book, code_reference, directions
from noesis.kernels.dispatch import by_numba
from noesis.kernels.pooling import op as pooling
from noesis.kernels.pooling import pooled
from noesis.kernels.pooling import reference as pooling_reference
from noesis.surprise import Codebook, LayerCodebook
from noesis.surprise.layer_codebook import shrunk

PARTS = ("mixture", "residual", "norm", "distance")


# ---------------------------------------------------------------- the score


def test_code_length_is_minus_the_log_density():
    """Against scipy's densities, with the subspace being everything."""
    stats = pytest.importorskip("scipy.stats")
    book = fitted(4, 300, Codebook(size=3))
    x = torch.from_numpy(sample(4, 20, seed=1))
    held = in_float64(book)
    unit, log_length = directions(x)
    z = ((unit - held.centre) @ held.projection).numpy()
    covariance = torch.linalg.inv(held.whiten @ held.whiten.T).numpy()
    density = sum(
        math.exp(weight) * stats.multivariate_normal(code.numpy(), covariance).pdf(z)
        for weight, code in zip(held.log_weights.tolist(), held.codes, strict=True)
    )
    found = code_reference(x, held)
    np.testing.assert_allclose(found.mixture.numpy(), -np.log(density), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        found.norm.numpy(), ((log_length - held.norm[0]) / held.norm[1]).numpy() ** 2 / 2, rtol=1e-12
    )
    assert found.residual.abs().max() == 0


def test_one_code_is_mahalanobis_and_class_means_mahalanobis_plus_plus():
    x = sample(6, 400)
    labels = np.arange(400) % 4
    x += labels[:, None] * np.linspace(0, 1, 6)
    one = fitted(6, 400, Codebook(size=1))
    assert one.codes.shape == (1, 6)
    classes = LayerCodebook(Codebook(), torch.device("cpu"))
    classes.fit(x, np.random.default_rng(0), labels)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = np.stack([unit[labels == i].mean(0) for i in range(4)])
    within = unit - means[labels]
    precision = np.linalg.inv(shrunk(within.T @ within / (400 - 4), 400 - 4))
    expected = np.min([np.einsum("ij,jk,ik->i", unit - mean, precision, unit - mean) for mean in means], axis=0)
    found = code_reference(torch.from_numpy(x), in_float64(classes)).distance
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("channels", [3, 40, 200])
def test_strangeness_rises_with_distance(channels):
    book = fitted(channels, 500)
    x = torch.from_numpy(sample(channels, 8, seed=1)).float()
    away = torch.randn(200, 1, channels, generator=torch.Generator().manual_seed(2))
    moved = [book.code((x + scale * away).flatten(0, 1)).total.mean() for scale in (0, 3, 10, 100)]
    assert moved == sorted(moved)
    sizes = [book.code(x * scale).total.median() for scale in (1, 10, 100, 1e4)]
    assert sizes == sorted(sizes)
    assert len(set(map(float, sizes))) == 4
    faint = [book.code(x * scale).total.median() for scale in (1, 0.1, 0.01, 1e-4)]
    assert faint == sorted(faint)


def test_each_vector_is_coded_by_itself():
    book = fitted(20, 300)
    x = torch.from_numpy(sample(20, 30, seed=1)).float()
    alone = torch.cat([book.code(row[None]).total for row in x])
    torch.testing.assert_close(book.code(x).total, alone, rtol=1e-5, atol=1e-4)
    x[3] = torch.nan
    x[4] = torch.inf
    found = book.code(x).total
    assert torch.isinf(found[3:5]).all()
    torch.testing.assert_close(found[5:], alone[5:], rtol=1e-5, atol=1e-4)


def test_lengths_beyond_float32_squares():
    book = fitted(5, 200)
    x = torch.tensor(sample(5, 3, seed=1)).float()
    for scale in (1e30, 1e-30):
        found = book.code(x * scale)
        torch.testing.assert_close(found.mixture, book.code(x).mixture, rtol=1e-4, atol=1e-3)
        assert (found.norm > book.code(x).norm + 100).all()
    assert book.code(torch.zeros(1, 5)).total.isfinite().all()


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    ("shape", "samples", "channel", "positions"),
    [
        ((4, 7), 4, 1, None),
        ((4, 5, 7), 4, 2, (1,)),
        ((4, 7, 5), 4, 1, (2,)),
        ((4, 7, 5, 3), 4, 1, (2, 3)),
        ((4, 5, 3, 7), 4, 3, (1, 2)),
        ((4, 7, 2, 5, 3), 4, 1, (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooling(shape, samples, channel, positions, dtype):
    x = (torch.randn(shape) * 2 + 30).to(dtype)
    wide = x.double()
    expected = wide if positions is None else torch.cat([wide.mean(positions), wide.std(positions, correction=0)], 1)
    found = pooled(x, samples, channel, True)
    assert found.dtype == torch.float32
    assert found.shape[1] == pooling_reference.width(x, samples, channel, True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        pooled(x, samples, channel, False).double(), expected[:, : shape[channel]], rtol=1e-5, atol=1e-5
    )


def test_pooling_windows_tokens_of_flattened_samples_and_masks():
    x = torch.randn(6, 4, 8)
    torch.testing.assert_close(pooled(x, 2, 2, False), x.reshape(2, 12, 8).mean(1))
    mask = torch.tensor([[1, 1, 0, 0]] * 6)
    found = pooled(x, 6, 2, True, mask)
    torch.testing.assert_close(found, pooled(x[:, :2], 6, 2, True), rtol=1e-5, atol=1e-5)
    x[:, 2:] = torch.nan
    torch.testing.assert_close(pooled(x, 6, 2, True, mask), found)
    assert pooled(x, 6, 2, True, torch.zeros(6, 4)).isnan().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2],
        lambda x: x[1:2],
        lambda x: x.transpose(2, 3),
    ],
)
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("spread", [True, False])
def test_the_cpu_kernel_pools_alike(view, offset, spread):
    assert by_numba("pooling") is not None
    x = view(torch.randn(3, 20, 30, 40) + offset)
    samples = x.shape[0]
    kept = Kept(4, pooling_reference.width(x, samples, 1, spread))
    kept.control[0] = 1
    pooling.pool_cpu(x, samples, 1, spread, None, kept.buffer, kept.stamp, kept.control)
    torch.testing.assert_close(
        kept.buffer[:samples], pooled(x.double(), samples, 1, spread).float(), rtol=1e-4, atol=1e-4
    )
    assert not kept.buffer[samples:].any()


class Kept:
    def __init__(self, samples: int, width: int) -> None:
        self.buffer = torch.zeros(samples, width)
        self.stamp = torch.full((pooling_reference.STAMP,), -1)
        self.control = torch.zeros(9, dtype=torch.int64)
        self.control[4] = 1  # ACTIVE

    def keep(self, path, x: torch.Tensor, forward: int) -> None:
        self.control[0] = forward
        path(x, x.shape[0], x.dim() - 1, True, None, self.buffer, self.stamp, self.control)


@pytest.mark.parametrize("path", [pooling_reference.pool_reference, pooling.pool_cpu])
def test_calls_of_one_forward_are_averaged_and_forwards_are_not(path):
    kept = Kept(4, 6)
    first, second, third = (torch.randn(3, 5, 3) for _ in range(3))
    kept.keep(path, first, 1)
    kept.keep(path, second, 1)
    kept.keep(path, third, 1)
    mean = torch.stack([pooled(x, 3, 2, True) for x in (first, second, third)]).mean(0)
    torch.testing.assert_close(kept.buffer[:3], mean)
    assert kept.stamp.tolist() == [1, 3, 3]
    kept.keep(path, second[:2], 2)
    torch.testing.assert_close(kept.buffer[:2], pooled(second[:2], 2, 2, True))
    assert kept.stamp.tolist() == [2, 2, 1]
    kept.control[4] = 0
    kept.keep(path, third, 3)
    assert kept.stamp.tolist() == [2, 2, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("shape", "channel"),
    [((3, 40), 1), ((3, 300, 40), 2), ((3, 40, 300), 1), ((3, 5, 17, 19), 1), ((3, 17, 19, 70), 3), ((6, 50, 8), 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.slow
def test_the_triton_kernel_pools_alike(shape, channel, dtype, spread):
    pytest.importorskip("triton")
    from noesis.kernels.pooling._triton import pool_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outputs = [(torch.randn(shape) + 100 * offset).to(device, dtype) for offset in (1, 3, 0)]
    if len(shape) == 4:
        outputs[1] = outputs[1].to(memory_format=torch.channels_last)
    width = pooling_reference.width(outputs[0], 3, channel, spread)
    ours, theirs = Kept(4, width), Kept(4, width)
    for kept in (ours, theirs):
        kept.buffer, kept.stamp, kept.control = (t.to(device) for t in (kept.buffer, kept.stamp, kept.control))
    for active, forward, x in ((1, 1, outputs[0]), (1, 1, outputs[1]), (0, 2, outputs[0]), (1, 2, outputs[2])):
        for kept in (ours, theirs):
            kept.control[4], kept.control[0] = active, forward
        pool_triton(x, 3, channel, spread, ours.buffer, ours.stamp, ours.control)
        pooling_reference.pool_reference(x, 3, channel, spread, None, theirs.buffer, theirs.stamp, theirs.control)
        torch.testing.assert_close(ours.buffer, theirs.buffer, rtol=1e-4, atol=1e-4)
        assert ours.stamp.tolist() == theirs.stamp.tolist()
    x = outputs[0].clone()
    x.view(-1)[0] = torch.nan
    ours.control[0] = 3
    pool_triton(x, 3, channel, spread, ours.buffer, ours.stamp, ours.control)
    assert ours.buffer[0].isnan().any()
    assert ours.buffer[1:3].isfinite().all()


def test_the_registered_op_passes_torchs_own_checks():
    kept = Kept(4, 6)
    torch.library.opcheck(
        torch.ops.noesis.pool.default, (torch.randn(3, 5, 3), 3, 2, True, None, kept.buffer, kept.stamp, kept.control)
    )


# ---------------------------------------------------------------- Triton


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which the interpreter computes with, on infinity
@pytest.mark.parametrize(("channels", "count"), [(3, 50), (16, 200), (100, 400), (200, 300)])
@pytest.mark.slow
def test_the_triton_kernel_agrees(channels, count):
    pytest.importorskip("triton")
    from noesis.kernels.coding._triton import code_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    book = fitted(channels, count).to(device)
    x = torch.from_numpy(sample(channels, 37, seed=1)).float().to(device)
    x[5], x[6], x[7] = 0, x[6] * 1e30, x[7] * 1e-30
    held = Book(*(getattr(book.book(), field.name).detach() for field in fields(Book)))
    found, expected = code_triton(x, held), code_reference(x, held)
    for part in PARTS:
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-3)
    assert torch.equal(found.nearest, expected.nearest)
    x[3], x[4, 0] = torch.nan, -torch.inf
    found = code_triton(x, held)
    assert torch.isinf(found.total[3:5]).all()
    assert found.total[5:].isfinite().all()


def test_gradients_flow_into_vectors_and_codes():
    book = fitted(5, 100, Codebook(size=3, dim=3, learn="gradient"))
    x = torch.from_numpy(sample(5, 9, seed=1)).float().requires_grad_()
    book.loss(x).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in book.parameters())
    assert x.grad is not None
    held = in_float64(book)
    double = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: code_reference(x, held).total, (double,))
    assert isinstance(book, nn.Module)
