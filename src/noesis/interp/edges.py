"""Edges: how much of an effect goes from what writes into the residual stream to what reads it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..numerics import Floats
from ..results import Cells
from .attribution import Attribution
from .sites import Edge, Site, site_of


@dataclass(eq=False, repr=False)
class Edges(Attribution):
    """The effects of edges, estimated to first order.

    What the edges of one sender add up to is the estimate of patching the sender, which goes all its ways: that is what
    was checked by exact patching, of senders; the edges themselves were not.

    `edges["z.0.1->k.1.2"]` is one of them. As a table it has a row per edge. For all else see `Attribution` and
    `Effects`.

    Attributes:
        sites: the edges, as `Edge`, in the order of rows.
        checked: the senders that were patched exactly.

    Examples:
        >>> import numpy as np
        >>> from noesis.interp import Edge, Edges, Site
        >>> made = [Edge(Site("embed"), Site("q", 0, 0)), Edge(Site("embed"), Site("logits"))]
        >>> one, zero = np.ones(3), np.zeros(3)
        >>> found = Edges(made, one, zero, np.stack([0.75 * one, 0.25 * one]), "denoise", "logit difference", "EAP")
        >>> str(found.top(1)[0].site), found.candidates()[1].tolist()
        ('embed->q.0.0', [[1.0, 1.0, 1.0]])
    """

    kind: ClassVar[str] = "edges"

    sites: list[Edge]

    def candidates(self) -> tuple[list[Site], Floats]:
        """The senders, and the estimated effects of patching each, `[senders, pairs]`: what its edges add up to."""
        return self._senders

    @functools.cached_property
    def _senders(self) -> tuple[list[Site], Floats]:
        numbers: dict[Site, int] = {}
        rows = np.array([numbers.setdefault(edge.sender, len(numbers)) for edge in self.sites], int)
        found = np.zeros((len(numbers), self.values.shape[1]))
        np.add.at(found, rows, self.values)
        return list(numbers), found

    def _verdict(self) -> str:
        return f"{super()._verdict()} (senders were, and edges were not)" if self.checked else super()._verdict()

    def _place(self, site: Any) -> tuple[str, str | int, str]:
        return str(site.sender), str(site.receiver), "reader"

    # ------------------------------------------------------------ files

    @classmethod
    def _cell(cls, given: Any) -> Edge:
        sender, receiver = given
        return Edge(site_of(sender), site_of(receiver))

    def _columns(self) -> dict[str, Cells]:
        names = ("mean", "standard_error", "p_value", "q_value", "magnitude")
        return {
            "edge": [str(edge) for edge in self.sites],
            "sender": [str(edge.sender) for edge in self.sites],
            "receiver": [str(edge.receiver) for edge in self.sites],
            **{name: getattr(self, name) for name in names},
            "pairs": self.counts,
        }
