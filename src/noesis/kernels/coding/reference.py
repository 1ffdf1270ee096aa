"""Code lengths of vectors in plain torch ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Vectors shorter than this have no direction.
SHORTEST = 1e-37


@dataclass(frozen=True)
class Book:
    """What the code length is made of, all float32 on one device; D channels, d dimensions, K codes."""

    centre: Tensor  # [D], of the directions
    projection: Tensor  # [D, d], orthonormal where it was fitted
    whiten: Tensor  # [d, d], so that the covariance about the codes becomes the identity
    codes: Tensor  # [K, d], projected, not whitened
    log_weights: Tensor  # [K]
    constant: Tensor  # scalar: log of the Gaussian's normaliser
    residual: Tensor  # scalar: variance of a dimension outside the projection; infinite where there is none
    norm: Tensor  # [2]: mean and std of the logarithm of the length


@dataclass(frozen=True)
class Coded:
    """The code lengths of N vectors, in nats, and where they come from; [N] each."""

    mixture: Tensor
    residual: Tensor
    norm: Tensor
    nearest: Tensor  # int64, the nearest code
    distance: Tensor  # squared, to that code, whitened

    @property
    def total(self) -> Tensor:
        """The code length; infinite where the vector has NaN or infinity."""
        return self.mixture + self.residual + self.norm


def directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [N, D] of length one, and the logarithm of their lengths [N], without overflow on the way."""
    largest = vectors.abs().amax(1, keepdim=True).clamp(min=SHORTEST)
    scaled = vectors / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / length.clamp(min=SHORTEST), (length * largest).clamp(min=SHORTEST).log()[:, 0]


def code_reference(vectors: Tensor, book: Book) -> Coded:
    """The code lengths of vectors [N, D] in plain torch ops, which autograd can follow into both."""
    finite = vectors.isfinite().all(1)
    unit, log_length = directions(torch.where(finite[:, None], vectors.to(book.centre.dtype), 1.0))
    centred = unit - book.centre
    z = centred @ book.projection
    w, codes = z @ book.whiten, book.codes @ book.whiten
    squared = w.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * w @ codes.T
    squared = squared.clamp(min=0.0)
    distance, nearest = squared.min(1)
    mixture = book.constant - torch.logsumexp(book.log_weights - squared / 2, dim=1)
    outside = centred - z @ book.projection.T
    residual = outside.square().sum(1) / (2 * book.residual)
    norm = ((log_length - book.norm[0]) / book.norm[1]).square() / 2
    return Coded(torch.where(finite, mixture, torch.inf), residual, norm, nearest, distance)
