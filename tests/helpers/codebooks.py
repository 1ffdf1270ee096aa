"""Codebooks of a layer whose vectors have channels of unequal spread."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from noesis.kernels.coding import Book
from noesis.surprise import Codebook, LayerCodebook


def fitted(channels: int, count: int, settings: Codebook | None = None, seed: int = 0) -> LayerCodebook:
    generator = np.random.default_rng(seed)
    book = LayerCodebook(settings or Codebook(), torch.device("cpu"))
    book.fit(sample(channels, count, seed), generator)
    return book


def sample(channels: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, channels)) * np.linspace(0.1, 2, channels) + 0.3


def in_float64(book: LayerCodebook) -> Book:
    held = book.book()
    return Book(*(getattr(held, field.name).detach().double() for field in fields(held)))
