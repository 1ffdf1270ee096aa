"""First-order estimates of what patching does: differences of two runs times gradients, at a point or along a path."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import BadValue
from ..numerics import Floats
from .anatomy import Anatomy, called_and_root
from .cells import AtPositions, Cells, by_row, wholes_of
from .gradients import Gradients
from .pairs import Inputs
from .places import change_of
from .recording import spare
from .running import Run, run
from .sites import Site
from .sweeping import NO_LIMIT, Looking
from .visiting import Visiting


class Ends(NamedTuple):
    """Pairs as an estimate needs them: a model, the run that is changed, and the other one."""

    model: Any
    anatomy: Anatomy
    base: Inputs  # of the run that is changed
    source: Inputs  # of that from which parts are put into it
    looking: Looking  # what the metric says of these pairs

    def run(self, inputs: Inputs, keep: Sequence[Site], *, grad: bool = False) -> Run:
        """One run of all pairs."""
        return run(
            self.model,
            inputs.with_arguments(self.looking.asking()).given(),
            keep=keep,
            grad_of=(lambda output: self.looking.scores(output)[0]) if grad else None,
            anatomy=self.anatomy,
            max_bytes=NO_LIMIT,
        )

    def taken(self, rows: Tensor) -> Ends:
        """Some of the pairs."""
        return self._replace(base=self.base.taken(rows), source=self.source.taken(rows), looking=self.looking.of(rows))


class Estimates(NamedTuple):
    """What became of cells, by estimate."""

    sites: list[Any]
    changed: Tensor  # which cells hold something else in the other run, bool [cells, pairs]
    source: Floats  # the metric of the other run, [pairs]
    base: Floats  # and of the run that is changed
    scores: Floats  # what putting a cell in adds to it, [cells, pairs]; NaN at padding


class Path:
    """The straight path of the embeddings from those of the run that is changed to those of the other.

    Where the model's embedding is not known, it is the path of what the first block is given.
    """

    def __init__(self, ends: Ends, held: Tensor, put: Tensor) -> None:
        self._ends, self._site = ends, self.site(ends.anatomy)
        self._held, self._change = held, put - held

    @staticmethod
    def site(anatomy: Anatomy) -> Site:
        """Where inputs are varied.

        Raises:
            NoesisError: (a ValueError) where there is no such place.
        """
        if anatomy.embed is not None:
            return Site("embed")
        if "resid_pre" in anatomy.blocks[0].refused:
            raise BadValue(
                f"{anatomy.model} has no embedding that is known ({anatomy.refused['embed']}), and its first block is "
                f"refused ({anatomy.blocks[0].refused['resid_pre']})",
                "a place at which inputs can be varied",
                "Pass steps=0",
            )
        return Site("resid_pre", 0)

    def visiting(self, share: float) -> Visiting:
        """For a forward at a point of the path, to which visitors can be added.

        Args:
            share: how far along it is: 0 for the run that is changed, 1 for the other.
        """
        anatomy = self._ends.anatomy
        visiting = Visiting(called_and_root(self._ends.model)[1], anatomy, own_thread=True)
        visiting.add(_Embeds(self._site, self._held + share * self._change), change_of(self._site, anatomy))
        return visiting

    def forward(self, visiting: Visiting) -> Tensor:
        """The metric of each pair, float64 `[pairs]`, to be differentiated."""
        ends = self._ends
        inputs = ends.base.with_arguments(ends.looking.asking())
        args, kwargs = spare(inputs.args, inputs.kwargs)
        with torch.enable_grad(), ExitStack() as leaving:
            visiting.attach(leaving)
            return ends.looking.scores(called_and_root(ends.model)[0](*args, **kwargs))[0]

    def gradients(self, sites: Sequence[Site], steps: int) -> dict[Site, Tensor]:
        """The mean gradient of the metric at sites, at the middles of so many equal steps (the midpoint rule)."""
        mean: dict[Site, Tensor] = {}
        for share in middles(steps):
            visiting = self.visiting(share)
            seen = Gradients(list(sites), self._ends.anatomy, visiting)
            values = self.forward(visiting)
            found = seen.of(lambda output: output, values, NO_LIMIT)  # which is the metric already
            for site in sites:
                gradient = found[str(site)][0] / steps
                mean[site] = mean[site] + gradient if site in mean else gradient
        return mean


class _Embeds:
    """Puts embeddings in place of the model's."""

    def __init__(self, site: Site, embeddings: Tensor) -> None:
        self.site, self._embeddings = site, embeddings

    def visit(self, whole: Tensor) -> Tensor:
        """Whatever comes, these, with a gradient."""
        with torch.inference_mode(False):
            return self._embeddings.to(whole).clone().requires_grad_()


def middles(steps: int) -> list[float]:
    """Where along the path gradients are taken: at the middles of equal steps, or at its begin where there are none."""
    return [(step + 0.5) / steps for step in range(steps)] if steps else [0.0]


def estimate(ends: Ends, sites: Sequence[Site], positions: AtPositions, steps: int) -> Estimates:
    """The difference of both runs at each cell times the gradient there.

    Args:
        ends: the pairs.
        sites: of cells.
        positions: of cells of sites without one.
        steps: along the path of the embeddings at which the gradient is taken; 0 for that of the run that is changed.
    """
    wholes = wholes_of(sites)
    kept = list(dict.fromkeys([*wholes, Path.site(ends.anatomy)])) if steps else wholes
    source = ends.run(ends.source, kept)
    base = ends.run(ends.base, kept, grad=not steps)
    cells = Cells(
        sites, positions, {site: base[site] for site in wholes}, {site: source[site] for site in wholes}, ends.base
    )
    if steps:
        path = Path(ends, *(each[Path.site(ends.anatomy)] for each in (base, source)))
        gradients = path.gradients(wholes, steps)
    else:
        assert base.grad is not None
        gradients = {site: base.grad[site] for site in wholes}
    count = ends.base.count
    scores = cells.summed(
        {site: (cells.put[site] - cells.held[site]).double() * by_row(gradients[site], count, site) for site in wholes}
    )
    scores[cells.missing().numpy()] = np.nan
    source_values, base_values = (ends.looking.values(each.output)[0] for each in (source, base))
    return Estimates(cells.sites, cells.changed, source_values, base_values, scores)
