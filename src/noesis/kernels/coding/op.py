"""The code length of a vector: how many nats its layer's codebook needs to say what it is.

Source: a Gaussian mixture with one covariance for all codes in the subspace the codebook knows, an isotropic
Gaussian outside of it, and a Gaussian for the logarithm of the vector's length. With one code this is Mahalanobis'
distance (Lee et al. 2018, 1807.03888), with a code per class and vectors of length one Mahalanobis++ (Mueller and
Hein 2025, 2505.18032), with as many codes as vectors it approaches the distance to the nearest neighbour
(Sun et al. 2022, 2204.06507).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import has_triton
from .reference import Book, Coded, code_reference


def code(vectors: Tensor, book: Book) -> Coded:
    """The code lengths of vectors [N, D] on the device of the book, without a host sync."""
    if not torch.is_grad_enabled() and has_triton(vectors.device):
        return _triton()(vectors, book)
    return code_reference(vectors, book)


@functools.cache
def _triton() -> Callable[[Tensor, Book], Coded]:
    from ._triton import code_triton

    return code_triton
