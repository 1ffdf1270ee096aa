"""nervecode's measures of the same vectors and codes, under its names, for those who come from it.

They ask which code a vector belongs to, not how far it is from all of them: a vector far away may have an
unambiguous nearest code. `surprise` is the score to trust; see the guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import BadValue
from ..kernels.coding import code_reference, directions
from ..numerics import Floats
from .layer_codebook import LayerCodebook


@dataclass(frozen=True)
class SoftCode:
    """One layer's soft assignment; float64.

    Attributes:
        assignment: [N, codes], softmax of minus the squared distances over the temperature.
        code_length: [N], -log of the largest assignment, in nats.
        entropy: [N], of the assignment, in nats.
        distance: [N], log1p of the squared distance to the nearest code.
        surprise: [N], their weighted sum.
    """

    assignment: Floats
    code_length: Floats
    entropy: Floats
    distance: Floats
    surprise: Floats


@dataclass(frozen=True)
class Ambiguity:
    """nervecode's surprise of the samples of a forward.

    Attributes:
        score: float64 [N], mean or max of the layers' surprise.
        layers: by name.

    Source: nervecode 0.1.1, `core/assignment.py` (weights and names) and `scoring/aggregator.py` (mean or max).

    Examples:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> wrapped = noesis.wrap(model, layers="all_linear", codebook=noesis.Codebook(size=4, dim=2))
        >>> _ = wrapped.calibrate([torch.randn(200, 4)])
        >>> _ = wrapped(torch.randn(3, 4))
        >>> ambiguity = wrapped.ambiguity(temperature=0.5, reduce="max")
        >>> ambiguity.score.shape, ambiguity.layers["0"].assignment.shape
        ((3,), (3, 4))
    """

    score: Floats
    layers: dict[str, SoftCode]

    @classmethod
    def of(
        cls,
        layers: dict[str, tuple[LayerCodebook, Tensor]],
        *,
        temperature: float = 1.0,
        beta_length: float = 1.0,
        beta_entropy: float = 1.0,
        beta_distance: float = 0.0,
        reduce: Literal["mean", "max"] = "mean",
    ) -> Ambiguity:
        """Of vectors [N, channels] and the codebooks of their layers.

        Args:
            layers: by name.
            temperature: above 0; higher is softer.
            beta_length: weight of the code length.
            beta_entropy: weight of the entropy.
            beta_distance: weight of the log1p squared distance.
            reduce: how layers become one score.

        Raises:
            NoesisError: for a temperature that is not positive, or an unknown `reduce`.
        """
        if not temperature > 0:
            raise BadValue(f"ambiguity(temperature={temperature})", "above 0", "Pass temperature=1.0")
        if reduce not in ("mean", "max"):
            raise BadValue(f"ambiguity(reduce={reduce!r})", '"mean" or "max"', 'Pass reduce="mean"')
        found = {
            name: _soft(book, vectors, temperature, beta_length, beta_entropy, beta_distance)
            for name, (book, vectors) in layers.items()
        }
        stacked = np.stack([soft.surprise for soft in found.values()])
        return cls(stacked.mean(0) if reduce == "mean" else stacked.max(0), found)


@torch.no_grad()
def _soft(
    book: LayerCodebook, vectors: Tensor, temperature: float, length: float, entropy: float, distance: float
) -> SoftCode:
    vectors = vectors.to(book.centre.device)
    with torch.autocast(vectors.device.type, enabled=False):
        return _soft_in_float32(book, vectors, temperature, length, entropy, distance)


def _soft_in_float32(
    book: LayerCodebook, vectors: Tensor, temperature: float, length: float, entropy: float, distance: float
) -> SoftCode:
    unit, _ = directions(vectors)
    points = (unit - book.centre) @ book.projection @ book.whiten
    squared = torch.cdist(points, book.codes @ book.whiten).square()
    log_q = torch.log_softmax(-squared / temperature, 1)
    best = -log_q.amax(1)
    spread = -(log_q.exp() * log_q).nan_to_num(nan=0.0).sum(1)
    nearest = torch.log1p(code_reference(vectors, book.book()).distance)
    whole = length * best + entropy * spread + distance * nearest
    return SoftCode(*(part.double().cpu().numpy() for part in (log_q.exp(), best, spread, nearest, whole)))
