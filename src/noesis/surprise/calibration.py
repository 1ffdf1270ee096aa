"""What is normal: ranks of calibration scores, their combination, and p-values with a guarantee.

The calibration set is split in three. Codes are fitted to the first part. The second ranks the code
lengths of each layer, so that layers can be added up. The third ranks the sum: whatever the sum is,
and however the layers depend on each other, a new input of the same kind is as likely to take one
rank among them as another (split conformal prediction: Vovk, Gammerman, Shafer 2005; Bates et al.
2021, 2104.08279), so its p-value is at most alpha with probability at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import BadValue
from ..numerics import Floats, Ints, as_floats, no_nan
from ..text import counted, first_few

#: Shares of the calibration set that fit the codes and rank the layers; the rest ranks their sum.
FIT, RANK = 2 / 3, 1 / 6
#: Fewer samples leave less than 20 for the p-values, of which none could be below 0.05.
LEAST = 120
#: Past the 95th percentile a rank no longer tells how far: the tail goes on exponentially, from ten points at least.
TAIL, TAIL_POINTS = 0.05, 10
#: Scores closer than this, of their size, are the same: two batch sizes round differently.
LEAST_SCALE = 1e-3
#: More confident than all but this share of the calibration samples is strange too.
OVERCONFIDENT = 0.01
#: The classes that have not, together. Ranked among all samples, they would be given what the others have spent.
OTHERS = -1
#: What padding does to a layer's figures: nothing under the mask of its sequence; nothing, though no mask is of its
#: positions; or it changes them.
MASKED, UNTOUCHED, DEPENDS = "masked", "untouched", "depends"
#: A class needs as many samples of its own for p-values of its own.
LEAST_OF_CLASS = 20


@dataclass(frozen=True)
class ReferenceScores:
    """The scores of one layer on calibration samples."""

    scores: Floats  # sorted
    start: float  # of the tail
    share: float  # of the samples in it
    scale: float  # mean excess over its start
    usual: tuple[float, float, float] = (0.0, 0.0, 0.0)  # medians of the parts of a code length

    @classmethod
    def of(cls, scores: Floats, usual: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ReferenceScores:
        """Of scores [n], in any order."""
        ordered = np.sort(no_nan(scores))
        share = max(TAIL, min(0.5, TAIL_POINTS / len(ordered)))
        finite = ordered[np.isfinite(ordered)]
        start = float(np.quantile(finite, 1 - share)) if len(finite) else 0.0
        excess = finite[finite > start] - start
        scale = float(excess.mean()) if len(excess) else 0.0
        return cls(ordered, start, share, max(scale, LEAST_SCALE * (1 + abs(start))), usual)

    def p_value(self, scores: Floats) -> Floats:
        """Share of the calibration scores, and of the new one itself, that are at least as large."""
        return p_values(self.scores, scores)

    def surprisal(self, scores: Floats) -> Floats:
        """-log p in nats, continued past the last ranks so that extreme scores keep their order."""
        scores = no_nan(scores)
        within = -np.log(np.maximum(self.p_value(scores), self.share))
        with np.errstate(over="ignore"):
            beyond = -math.log(self.share) + (scores - self.start) / self.scale
        return as_floats(np.where(scores > self.start, beyond, within))


def p_values(ordered: Floats, scores: Floats) -> Floats:
    """Conformal p-values of scores [N] against sorted calibration scores [n]: (1 + number >= score) / (n + 1)."""
    scores = no_nan(scores)
    larger = len(ordered) - np.searchsorted(ordered, scores, "left")
    return as_floats((larger + 1.0) / (len(ordered) + 1.0))


@dataclass(frozen=True)
class Doubt:
    """How unsure the logits of the calibration samples are, and how sure.

    Being unsure is strange. So is being surer than all but a hundredth of the calibration samples: inputs brighter
    or louder than usual inflate logits.
    """

    unsure: ReferenceScores
    sure: ReferenceScores

    @classmethod
    def of(cls, doubt: Floats) -> Doubt:
        """Of minus the energies [n]."""
        return cls(ReferenceScores.of(doubt), ReferenceScores.of(-doubt))

    def surprisal(self, doubt: Floats, slack: Floats | float = 0.0) -> Floats:
        """In nats; as of a layer, and for confidence what exceeds -log 0.01; less what may be rounding, the slack."""
        sure = self.sure.surprisal(-doubt - slack) + math.log(OVERCONFIDENT)
        both: Floats = self.unsure.surprisal(doubt - slack) + np.maximum(sure, 0.0)
        return both


def combine(layers: Floats, doubt: Floats | None) -> Floats:
    """One score from the surprisals of the layers, in the order they run, and of the logits.

    Args:
        layers: [N, L] in nats; the last is what the head reads.
        doubt: [N] in nats, of the logits, or None.

    Returns:
        [N]: the density's surprisal plus the logits'. The density's is the mean of the last layer's and of all
        earlier layers' together. Those depend on each other, so their evidence is averaged as e-values
        e = p ** -0.5 / 2 (Vovk and Wang 2021, 1912.06116), since a plain sum lets many weak layers drown a strong
        one. Where the logits see nothing, the density counts for a quarter more.
    """
    last, earlier = layers[:, -1], layers[:, :-1]
    density = last
    if earlier.shape[1]:
        top = np.max(np.where(np.isfinite(earlier), earlier, 0.0), 1, keepdims=True) / 2
        with np.errstate(over="ignore", invalid="ignore"):
            together = 2 * (np.log(np.exp(earlier / 2 - top).mean(1)) + top[:, 0])
        density = (last + together) / 2
    density = np.where(np.isfinite(layers).all(1), density, np.inf)
    return density if doubt is None else density + np.maximum(doubt, density / 4)


@dataclass
class Calibration:
    """What normal inputs look like: made by `wrapped.calibrate(loader)`.

    Attributes:
        layers: names of the calibrated layers, in the order they run.
        counted: those whose surprisals make the score; without the block that the head reads, if its input is there.
        samples: how many there were to fit the codes, to rank the layers, and for the p-values.
        scores: float64, sorted: the combined scores behind the p-values.
        classes: with `by_class=True`, the sorted scores of each predicted class that has enough; the others together
            are class -1.
        padding: what padding does to each layer, and to `"logits"`, as far as that could be tried: `"masked"`, nothing
            where the mask is used; `"untouched"`, nothing, and no mask is used; `"depends"`, it changes their figures,
            so that they are left out of batches with padding. Layers that are not here were not tried.
    """

    layers: list[str]
    references: dict[str, ReferenceScores]
    doubt: Doubt | None
    samples: tuple[int, int, int]
    scores: Floats = field(default_factory=lambda: np.zeros(0))
    classes: dict[int, Floats] | None = None
    counted: list[str] = field(default_factory=list)
    padding: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counted = self.counted or list(self.layers)

    def surprisals(self, nats: Mapping[str, Floats]) -> dict[str, Floats]:
        """-log p of the code lengths [N] of each layer that ran."""
        return {name: self.references[name].surprisal(nats[name]) for name in self.layers if name in nats}

    def score(self, surprisals: Mapping[str, Floats], doubt: Floats | None) -> Floats:
        """The combined score [N] of the layers' surprisals and the logits' own measure."""
        return self.combined(surprisals, None if self.doubt is None or doubt is None else self.doubt.surprisal(doubt))

    def combined(self, surprisals: Mapping[str, Floats], doubt: Floats | None) -> Floats:
        """The same where the logits' measure is a surprisal already."""
        return combine(np.stack([surprisals[name] for name in self.counted if name in surprisals], 1), doubt)

    def p_value(self, scores: Floats, predicted: Ints | None = None) -> Floats:
        """Conformal p-values [N] of combined scores; with classes, among those predicted alike."""
        if self.classes is None or predicted is None:
            return p_values(self.scores, scores)
        p = p_values(self.classes[OTHERS], scores)
        for label, own in self.classes.items():
            p = np.where(predicted == label, p_values(own, scores), p)
        return p

    def settle(self, scores: Floats, predicted: Ints | None) -> None:
        """Take the combined scores of the last part, [n], and the classes predicted for it.

        Raises:
            NoesisError: when no class has enough of them.
        """
        self.scores = np.sort(no_nan(scores))
        if predicted is not None:
            found, counts = np.unique(predicted, return_counts=True)
            enough = found[counts >= LEAST_OF_CLASS]
            if not len(enough):
                raise BadValue(
                    f"by_class=True, and {len(scores)} samples for p-values, at most {counts.max()} of a class",
                    f"a class with at least {LEAST_OF_CLASS}",
                    f"Pass more normal inputs, about {6 * LEAST_OF_CLASS} for each class",
                )
            self.classes = {int(label): np.sort(no_nan(scores[predicted == label])) for label in enough}
            self.classes[OTHERS] = np.sort(no_nan(scores[~np.isin(predicted, enough)]))

    def __repr__(self) -> str:
        fit, rank, last = self.samples
        logits = " and the logits" if self.doubt is not None else ""
        classes = ""
        if self.classes is not None:
            number = len(self.classes) - 1
            classes = f", {number} {'class' if number == 1 else 'classes'} with p-values of their own"
        depend = [name for name, found in self.padding.items() if found == DEPENDS]
        padding = f"; padding changes {first_few(depend)}" if depend else ""
        layers = counted(len(self.layers), "layer")
        return (
            f"Calibration({sum(self.samples)} samples: {fit} fitted the codes, {rank} rank the layers, {last} give the "
            f"p-values, which start at {1 / (last + 1):.2g}; {layers}{logits}{classes}{padding})"
        )


def split(samples: int, generator: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """The three parts of a calibration set, at random.

    Raises:
        NoesisError: when there are too few.
    """
    if samples < LEAST:
        raise BadValue(
            f"The loader gave {samples} samples",
            f"at least {LEAST}: two thirds fit the codes, and the last sixth has to tell p-values below 0.05",
            "Pass more normal inputs",
        )
    order = generator.permutation(samples)
    fit, rank = round(samples * FIT), round(samples * (FIT + RANK))
    return order[:fit], order[fit:rank], order[rank:]
