"""How much each edge or node matters, exactly: by what the metric becomes without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import BadValue
from ..numerics import Floats
from .graph import Graph, nodes_of
from .sites import Edge, Site
from .wiring import Wiring, values_of

#: Thresholds of a sweep, as shares of how far clean and ablated are apart.
TAUS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
#: More edges than this are not pruned one after the other.
MOST_PRUNED = 5000


class Parts:
    """What a circuit is made of, edges or nodes, and how a choice of them is run.

    Args:
        graph: of the model.
        level: `"edges"` or `"nodes"`; of nodes, all edges between those chosen, the embedding and the logits.
    """

    def __init__(self, graph: Graph, level: str) -> None:
        self.graph, self.level, self.edges = graph, level, graph.edges
        self.all: list[Site] | list[Edge] = graph.edges if level == "edges" else graph.senders[1:]
        self.full = graph.mask(self.edges)
        rows = {receiver: at for at, receiver in enumerate(graph.receivers)}
        columns = {sender: at for at, sender in enumerate(graph.senders)}
        self.columns = columns
        self.places = torch.tensor([(rows[e.receiver], columns[e.sender]) for e in self.edges])

    def circuit(self, chosen: Sequence[int]) -> Tensor:
        """The edges of some parts, bool `[receivers, senders]`."""
        if self.level == "edges":
            found = torch.zeros_like(self.full)
            found[tuple(self.places[list(chosen)].T)] = True
            return found
        kept = torch.zeros(self.full.shape[1], dtype=torch.bool)
        kept[[0, *(1 + at for at in chosen)]] = True
        return self.full & kept

    def without(self, circuit: Tensor, part: int) -> Tensor:
        """A circuit without one part."""
        found = circuit.clone()
        if self.level == "edges":
            found[tuple(self.places[part])] = False
        else:
            found[:, 1 + part] = False
        return found

    def alive(self, chosen: Sequence[int], resampled: bool) -> list[int]:
        """Those of some parts without which the metric may be another.

        An edge to what sends nothing on is none, nor, where the ablation is another run, one from what sees nothing:
        that writes there what it writes in the other run.
        """
        alive = list(chosen)
        while self.level == "edges":
            edges = [self.edges[at] for at in alive]
            sending, seeing = {edge.sender for edge in edges}, {Site("embed")}
            seeing.update(node for edge in edges for node in self._nodes(edge.receiver))
            kept = [
                at
                for at, edge in zip(alive, edges, strict=True)
                if (edge.sender in seeing or not resampled)
                and (edge.receiver.layer is None or not sending.isdisjoint(self._nodes(edge.receiver)))
            ]
            if kept == alive:
                break
            alive = kept
        return alive

    def _nodes(self, receiver: Site) -> list[Site]:
        if receiver.layer is None:
            return [receiver]
        block = self.graph.anatomy.blocks[receiver.layer]
        return nodes_of(receiver, block.heads, block.kv_heads)

    def sender(self, part: int) -> int:
        """The column of what a part sends."""
        return int(self.places[part, 1]) if self.level == "edges" else 1 + part


def exact_scores(parts: Parts, wirings: Sequence[Wiring]) -> Floats:
    """The mean change of the metric when one part alone is ablated, as a share of that when all are, `[parts]`."""
    clean, ablated = values_of(wirings, torch.stack([parts.full, torch.zeros_like(parts.full)]))
    found = np.zeros(len(parts.all))
    carrying = _carrying(parts, wirings)
    at_once = max(wiring.copies for wiring in wirings)
    for begin in range(0, len(carrying), at_once):
        chosen = carrying[begin : begin + at_once]
        changed = values_of(wirings, torch.stack([parts.without(parts.full, part) for part in chosen]))
        found[chosen] = np.abs(changed - clean).mean(1)
    shares: Floats = found / np.abs(clean - ablated).mean()
    return shares


def acdc_scores(parts: Parts, wirings: Sequence[Wiring]) -> Floats:
    """The largest threshold at which a part is kept, `[parts]`; 0 for one that is dropped at all.

    From the logits back, each part is left out for good if the metric then changes by less than the threshold (Conmy et
    al. 2023, "Towards automated circuit discovery for mechanistic interpretability", algorithm 1, with the metric in
    place of the divergence). All thresholds are run together.
    """
    clean, ablated = values_of(wirings, torch.stack([parts.full, torch.zeros_like(parts.full)]))
    carrying = set(_carrying(parts, wirings))  # without the others nothing changes: what writes is still whole then
    if len(carrying) > MOST_PRUNED:
        raise BadValue(
            f"method 'acdc' would prune {len(carrying)} {parts.level} one after the other",
            f"at most {MOST_PRUNED}",
            "Use method='exact', or level='nodes'",
        )
    taus = torch.tensor(TAUS, dtype=torch.float64)
    circuits = parts.full.repeat(len(taus), 1, 1)
    values = np.tile(clean, (len(taus), 1))
    found = np.zeros(len(parts.all))
    for part in sorted(range(len(parts.all)), reverse=True):
        tried = torch.stack([parts.without(circuit, part) for circuit in circuits])
        if part not in carrying:
            circuits = tried
            continue
        new = values_of(wirings, tried)
        change = np.abs(new - values).mean(1) / np.abs(clean - ablated).mean()
        dropped = torch.from_numpy(change) < taus
        circuits = torch.where(dropped[:, None, None], tried, circuits)
        values = np.where(dropped.numpy()[:, None], new, values)
        found[part] = float(taus[~dropped].max()) if not bool(dropped.all()) else 0.0
    return found


def _carrying(parts: Parts, wirings: Sequence[Wiring]) -> list[int]:
    """Parts over which something goes that differs from the ablated run."""
    carrying = torch.stack([wiring.carrying() for wiring in wirings]).any(0)
    return [part for part in range(len(parts.all)) if carrying[parts.sender(part)]]


def smallest(passes: Callable[[list[int]], Sequence[bool]], total: int, at_once: int) -> int:
    """The smallest size that passes, where larger ones do too; several are tried at once.

    Examples:
        >>> from noesis.interp.finding import smallest
        >>> smallest(lambda sizes: [size >= 7 for size in sizes], 100, 3)
        7
    """
    low, high = 0, total  # no part at all does not pass; all of them are the model
    while high - low > 1:
        tried = sorted({int(size) for size in np.linspace(low, high, at_once + 2)[1:-1]} - {low, high} or {low + 1})
        passed = passes(tried)
        first = next((at for at, each in enumerate(passed) if each), len(tried))
        low, high = (tried[first - 1] if first else low), (tried[first] if first < len(tried) else high)
    return high
