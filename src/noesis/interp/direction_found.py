"""Direction: where two kinds of inputs differ, as edits, with what it separates and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .. import files
from ..errors import BadValue
from ..numerics import Floats
from ..results import Cells, Saved, Tabular
from ..wrapping import moved_to, unwrapped
from .anatomy import called_and_root
from .edits import Add, Edit, Project
from .recording import listed
from .repeats import text_of
from .running import run

#: Random directions that a direction's cost is compared with.
RANDOM = 3


class Cost(NamedTuple):
    """Perplexity of texts without and with an edit, and with the same edit along random directions."""

    before: float
    after: float
    random: float  # the mean of a few
    tokens: int

    @property
    def ratio(self) -> float:
        """How many times the perplexity became."""
        return self.after / self.before


@dataclass(eq=False, repr=False)
class Direction(Saved, Tabular):
    """Where two kinds of inputs differ at a site; what `interp.direction` returns.

    As a table (`to_csv`, `to_dataframe`) it has one row.

    Attributes:
        site: where.
        vector: float64 [width], of unit length, from the half of the examples that it was learned from.
        auc: how well it separates the other half: 0.5 is chance, 1 perfect.
        shuffled: float64 [shuffles], the same of shuffled labels.
        cosine: between the directions of the two halves.
        length: of the difference of means.
        mean_norm: of the examples at this site, which is the unit of `add`.
        examples: how many positive and negative ones.
        position: of the token.
        meta: of the run.
    """

    kind: ClassVar[str] = "direction"
    numbers: ClassVar[tuple[str, ...]] = ("vector", "shuffled")

    site: str
    vector: Floats
    auc: float
    shuffled: Floats
    cosine: float
    length: float
    mean_norm: float
    examples: tuple[int, int]
    position: int
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or self.shuffled.ndim != 1:
            raise ValueError("vector and shuffled have one dimension each")

    @property
    def p_value(self) -> float:
        """How rarely shuffled labels are separated as well."""
        return float((1 + (self.shuffled >= self.auc).sum()) / (1 + len(self.shuffled)))

    def add(self, scale: float = 1.0, **where: Any) -> Add:
        """The edit that moves the site along the direction.

        Args:
            scale: how far, in mean norms of the site; below zero the other way.
            **where: what every edit takes: `positions`, `rows`, `steps`, `when`, `name`, `after`.
        """
        return Add(self.site, torch.tensor(self.vector, dtype=torch.float32), scale * self.mean_norm, **where)

    def ablate(self, **where: Any) -> Project:
        """The edit that takes the direction out of the site.

        Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction".

        Args:
            **where: what every edit takes.
        """
        return Project(self.site, torch.tensor(self.vector, dtype=torch.float32), **where)

    def perplexity_cost(self, model: nn.Module, texts: Any, *, scale: float | None = 1.0, seed: int = 0) -> Cost:
        """What the edit costs a language model on texts that have nothing to do with it.

        Args:
            model: a causal language model.
            texts: tokens as the model is called with, or a list of such.
            scale: as of `add`; None for `ablate`.
            seed: of the random directions.

        Raises:
            NoesisError: (a ValueError) for inputs without tokens, or a model without logits for each.
        """
        given = listed(texts, "texts")
        generator = np.random.default_rng(seed)
        others = [generator.normal(size=self.vector.shape) for _ in range(RANDOM)]
        edits: list[Edit | None] = [None, *(self._edit(vector, scale) for vector in [self.vector, *others])]
        _, root = called_and_root(model)
        with unwrapped(root):
            nats, tokens = zip(*(_nats(root, given, edit) for edit in edits), strict=True)
        before, after, *random = (float(np.exp(each / tokens[0])) for each in nats)
        return Cost(before, after, float(np.mean(random)), tokens[0])

    def _edit(self, vector: Floats, scale: float | None) -> Edit:
        unit = torch.tensor(vector / np.linalg.norm(vector), dtype=torch.float32)
        return Project(self.site, unit) if scale is None else Add(self.site, unit, scale * self.mean_norm)

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        names = ("site", "auc", "cosine", "length", "mean_norm", "position", "meta")
        return {name: getattr(self, name) for name in names} | {"examples": list(self.examples)}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.numbers}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(array) for name, array in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Direction:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Direction:
        positive, negative = map(int, header["examples"])
        return cls(
            site=str(header["site"]),
            vector=np.asarray(arrays["vector"], np.float64),
            auc=float(header["auc"]),
            shuffled=np.asarray(arrays["shuffled"], np.float64),
            cosine=float(header["cosine"]),
            length=float(header["length"]),
            mean_norm=float(header["mean_norm"]),
            examples=(positive, negative),
            position=int(header["position"]),
            meta=dict(header["meta"]),
        )

    def _columns(self) -> dict[str, Cells]:
        facts: dict[str, Any] = {"site": self.site, "auc": self.auc, "shuffled_auc": float(self.shuffled.mean())}
        facts |= {name: getattr(self, name) for name in ("p_value", "cosine", "length", "mean_norm")}
        return {name: [value] for name, value in facts.items()}

    def __repr__(self) -> str:
        positive, negative = self.examples
        chance, most = self.shuffled.mean(), np.quantile(self.shuffled, 0.95)
        part = self.length / self.mean_norm
        return (
            f"Direction at {self.site}, position {self.position}: {positive} positive, {negative} negative examples\n"
            f"held-out AUC {self.auc:.3f}, p {self.p_value:.2g}; shuffled labels {chance:.3f}, 95 % below {most:.3f}\n"
            f"cosine between the halves' directions {self.cosine:.2f}; difference {part:.2f} of the mean norm "
            f"{self.mean_norm:.3g}"
        )


def _nats(root: nn.Module, given: list[Any], edit: Edit | None) -> tuple[float, int]:
    """What the next tokens cost in all, and how many there are."""
    device = next((tensor.device for tensor in root.parameters()), torch.device("cpu"))
    total, tokens, anatomy = 0.0, 0, None
    for inputs in given:
        ids, counts = text_of(inputs)
        done = run(root, moved_to(inputs, device), edits=[] if edit is None else [edit], anatomy=anatomy)
        logits, anatomy = done.logits.cpu(), done.anatomy
        if ids is None or logits.shape[:-1] != ids.shape:
            raise BadValue(
                f"logits of shape {list(logits.shape)} for these texts", "a causal language model, and its tokens", ""
            )
        asked = torch.ones_like(ids, dtype=torch.bool) if counts is None else counts
        asked = asked[:, 1:] & asked[:, :-1]
        total += float(functional.cross_entropy(logits[:, :-1][asked].double(), ids[:, 1:][asked], reduction="sum"))
        tokens += int(asked.sum())
    if not tokens:
        raise BadValue("texts have no token after another", "rows of two tokens or more", "Pass longer texts")
    return total, tokens
