"""Sampling from streams."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Reservoir:
    """A uniform choice of samples from a stream of unknown length (Vitter 1985, algorithm R).

    Examples:
        >>> import numpy as np
        >>> from noesis.numerics import Reservoir
        >>> reservoir = Reservoir(3, np.random.default_rng(0))
        >>> [len(reservoir.places(4)), reservoir.seen, reservoir.held]
        [4, 4, 3]
    """

    def __init__(self, room: int, generator: np.random.Generator) -> None:
        self.room = room
        self.generator = generator
        self.seen = 0

    @property
    def held(self) -> int:
        """Samples that are kept."""
        return min(self.seen, self.room)

    def places(self, samples: int) -> NDArray[np.int64]:
        """Where the next samples go; -1 for those that are not kept."""
        number = np.arange(self.seen, self.seen + samples)
        drawn = self.generator.integers(0, number + 1)
        self.seen += samples
        return np.where(number < self.room, number, np.where(drawn < self.room, drawn, -1))
