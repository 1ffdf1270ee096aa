"""The vectors that scores are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The vectors of one layer in the latest forward."""

    vectors: Tensor  # [N, channels]
    each: Tensor | None = None  # [N, positions, channels]
    counts: Tensor | None = None  # bool [N, positions], of `each`


@dataclass(frozen=True)
class Collected:
    """The vectors of one layer over many forwards, on the host."""

    values: NDArray[np.float32]  # [N, channels], or [N, positions, channels]
    counts: NDArray[np.bool_] | None = None  # [N, positions], which of them count

    def __getitem__(self, chosen: NDArray[np.int64]) -> Collected:
        return Collected(self.values[chosen], None if self.counts is None else self.counts[chosen])
