"""Cells: the parts of two runs of the same pairs that are told apart, one or all positions of a site each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import BadValue
from ..numerics import Floats
from .pairs import Inputs
from .places import check_position, token_axis
from .sites import HEADED, Site

if TYPE_CHECKING:
    from numpy.typing import NDArray

AtPositions: TypeAlias = "Literal['each', 'all'] | int | Sequence[int]"


class Cells:
    """The cells of some sites, and what they hold in the run that is changed and in that from which they are put in.

    Args:
        sites: each with or without a position.
        positions: of cells of sites without one.
        held: by the tensors of which cells are parts, what the run has that is changed.
        put: likewise, of the other run.
        inputs: of the run that is changed.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        positions: AtPositions,
        held: Mapping[Site, Tensor],
        put: Mapping[Site, Tensor],
        inputs: Inputs,
    ) -> None:
        self.held, self.put = (
            {site: by_row(tensor, inputs.count, site) for site, tensor in each.items()} for each in (held, put)
        )
        self.sites = [cell for site in sites for cell in at_positions(site, self.put[whole_of(site)], positions)]
        differs = {site: (tensor != self.put[site]).any(-1).numpy() for site, tensor in self.held.items()}
        self.changed = torch.from_numpy(np.stack([_part(cell, differs[whole_of(cell)]).any(1) for cell in self.sites]))
        self._inputs = inputs

    def summed(self, products: Mapping[Site, Tensor]) -> Floats:
        """The sums over each cell, float64 `[cells, pairs]`, of tensors of the sites' shapes."""
        sums = {site: tensor.sum(-1).numpy() for site, tensor in products.items()}
        return np.stack([_part(cell, sums[whole_of(cell)]).sum(1) for cell in self.sites])

    def missing(self) -> Tensor:
        """Which cells are at padding, bool `[cells, pairs]`."""
        seen = self._inputs.seen()
        found = torch.zeros_like(self.changed)
        for at, cell in enumerate(self.sites):
            whole = self.put[whole_of(cell)]
            if seen is not None and cell.position is not None and whole.shape[token_axis(cell)] == seen.shape[1]:
                found[at] = ~seen[:, cell.position].cpu()
        return found


def _part(cell: Site, whole: NDArray[Any]) -> NDArray[Any]:
    """What a cell has of an array of its tensor's shape without the last dimension, `[pairs, several]`."""
    every = slice(None)
    position, head = (every if at is None else at for at in (cell.position, cell.head))
    if cell.component not in HEADED:
        part = whole[:, position] if whole.ndim > 1 else whole
    else:
        part = whole[:, head, position] if cell.component == "pattern" else whole[:, position, head]
    return part.reshape(len(whole), -1)


def whole_of(site: Site) -> Site:
    """The tensor that a cell is a part of."""
    return site._replace(head=None, position=None)


def wholes_of(sites: Sequence[Site]) -> list[Site]:
    """The tensors that cells are parts of, each once."""
    return list(dict.fromkeys(map(whole_of, sites)))


def by_row(tensor: Tensor, rows: int, site: Site) -> Tensor:
    """A view `[rows, tokens, ...]`: some modules are given all tokens of all rows in one dimension."""
    if tensor.shape[0] == rows:
        return tensor
    if tensor.dim() == 2 and tensor.shape[0] % rows == 0:
        return tensor.view(rows, -1, tensor.shape[1])
    raise BadValue(
        f"{site} has shape {tuple(tensor.shape)}, and there are {rows} rows", "a row for each example", "Leave it out"
    )


def at_positions(site: Site, whole: Tensor, positions: AtPositions) -> list[Site]:
    """The cells of a site."""
    if site.position is not None:
        check_position(site, whole, site.position)
        return [site]
    if isinstance(positions, str) and positions == "all":
        return [site]
    if isinstance(positions, str) and positions == "each":
        if whole.dim() < 3:
            raise BadValue(f"{site} has shape {tuple(whole.shape)}, without positions", "positions='all'", "Pass that")
        return [site._replace(position=at) for at in range(whole.shape[token_axis(site)])]
    given = [positions] if isinstance(positions, int) else list(positions)
    if not given or any(isinstance(at, bool) or not isinstance(at, int) for at in given):
        raise BadValue(
            f"positions is {positions!r}", "'each', 'all', or positions as whole numbers", "Pass one of these"
        )
    for at in given:
        check_position(site, whole, at)
    return [site._replace(position=at) for at in given]
