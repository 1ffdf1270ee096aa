"""The vectors of a calibration set, on the host and within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BadValue, WrongState
from ..numerics import Reservoir
from .calibration import Calibration
from .scorer import Scorer
from .vectors import Collected, Kept

#: Calibration keeps at most so many samples, and at most so many bytes of vectors; of more, a random choice.
MOST_SAMPLES = 20_000
MOST_BYTES = 1 << 30


class Store:
    """Rows of one kind, at the places the reservoir gave them; grows by doubling."""

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None
        self.length = 0

    def put(self, places: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write rows [N, ...] to their places; rows of several positions may differ in their number."""
        places, rows = places[places >= 0], rows[places >= 0]
        if not len(places):
            return
        self.length = max(self.length, int(places.max()) + 1)
        held = np.zeros((0, *rows.shape[1:]), rows.dtype) if self.array is None else self.array
        if rows.ndim == 2 and rows.shape[1] != held.shape[1]:
            raise BadValue(
                f"Vectors of {held.shape[1]} and of {rows.shape[1]} numbers in one layer",
                "outputs of one width",
                "Leave the layer out, or pass inputs of one size",
            )
        if rows.ndim > 2:
            longest = max(held.shape[1], rows.shape[1])
            held, rows = _longer(held, longest), _longer(rows, longest)
        if self.length > len(held):
            room = max(self.length, 2 * len(held))
            held = np.concatenate([held, np.zeros((room - len(held), *held.shape[1:]), held.dtype)])
        held[places] = rows  # of two rows for one place the later one stays
        self.array = held

    def rows(self) -> NDArray[Any]:
        """All of them."""
        assert self.array is not None
        return self.array[: self.length]


class Collection:
    """The vectors of all layers over a calibration set, on the host and within bounds."""

    def __init__(self, scorer: Scorer, uncoded: Mapping[str, str]) -> None:
        self.scorer = scorer
        self.uncoded = uncoded  # why a layer leaves no vectors
        self.reservoir: Reservoir | None = None
        self.values: dict[str, Store] = {}
        self.counts: dict[str, Store] = {}
        self.ran: dict[str, int] = {}
        self.logits: Store | None = None
        self.judged = 0  # samples with logits
        self.labels: Store | None = None
        self.padding: dict[str, str] = {}  # what it does to each layer

    @property
    def seen(self) -> int:
        """Samples so far, those that are not kept included."""
        return 0 if self.reservoir is None else self.reservoir.seen

    def add(self, kept: dict[str, Kept], logits: Tensor | None, labels: NDArray[np.int64] | None) -> None:
        """Take what a forward left."""
        batch = max(len(found.vectors) for found in kept.values())
        if labels is not None and len(labels) != batch:
            raise BadValue(f"{len(labels)} labels for {batch} samples", "a label per sample", "Check the loader")
        if self.reservoir is None:
            each = sum(self.scorer.settings.most_positions if found.each is not None else 1 for found in kept.values())
            size = 4 * sum(found.vectors[0].numel() for found in kept.values()) * each // len(kept)
            room = max(1, min(MOST_SAMPLES, MOST_BYTES // max(size, 1)))
            self.reservoir = Reservoir(room, np.random.default_rng(self.scorer.settings.seed))
        places = self.reservoir.places(batch)
        for name, found in kept.items():
            self.ran[name] = self.ran.get(name, 0) + len(found.vectors)
            if len(found.vectors) != batch:
                continue
            values = found.vectors if found.each is None else found.each
            self.values.setdefault(name, Store()).put(places, values.cpu().numpy())
            if found.each is not None:
                counts = torch.ones(found.each.shape[:2]) if found.counts is None else found.counts
                self.counts.setdefault(name, Store()).put(places, counts[..., None].bool().cpu().numpy())
        if logits is not None and len(logits) == batch:
            self.judged += batch
            self.logits = self.logits or Store()
            self.logits.put(places, logits.double().cpu().numpy())
        if labels is not None:
            self.labels = self.labels or Store()
            self.labels.put(places, labels)

    def vectors(self) -> dict[str, Collected]:
        """By layer in the order they run; layers that did not run for every sample are left out, by name.

        Raises:
            NoesisError: when there are no samples, or no layer is left.
        """
        if not self.seen:
            raise BadValue(
                "The loader is empty", "batches of normal inputs", "Check the loader; a generator runs only once"
            )
        whole = [name for name, samples in self.ran.items() if samples == self.seen]
        reasons = {name: "not every forward ran it with every sample" for name in self.ran if name not in whole}
        reasons.update({name: "it never ran" for name in self.scorer.books if name not in self.ran})
        reasons.update({name: why for name, why in self.uncoded.items() if name in reasons})
        for name, reason in reasons.items():
            logger.warning("{} is left out of the calibration: {}", name, reason)
        if not whole:
            raise WrongState(
                "No layer can be calibrated: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()),
                "layers that run in every forward, with the samples along the first dimension of their outputs",
                "Choose others with layers=",
            )
        return {name: self._collected(name) for name in whole}

    def fit(self, by_class: bool) -> Calibration:
        """Calibrate on what was collected.

        Raises:
            NoesisError: when there are too few samples, or logits are to be seen and did not come with each.
        """
        vectors = self.vectors()
        if self.scorer.logits and self.judged != self.seen:
            why = self.uncoded.get("logits", "the module that gives them did not run")
            raise WrongState(
                f"There are logits of {self.judged} of {self.seen} samples: {why}",
                "logits in every forward",
                "Correct logits=, or leave it out",
            )
        return self.scorer.calibrate(
            vectors,
            None if self.logits is None else self.logits.rows(),
            None if self.labels is None else self.labels.rows(),
            by_class,
            self.padding,
        )

    def _collected(self, name: str) -> Collected:
        counts = self.counts.get(name)
        return Collected(self.values[name].rows(), None if counts is None else counts.rows()[..., 0])


def _longer(rows: NDArray[Any], positions: int) -> NDArray[Any]:
    missing = positions - rows.shape[1]
    return np.pad(rows, [(0, 0), (0, missing), *[(0, 0)] * (rows.ndim - 2)]) if missing else rows
