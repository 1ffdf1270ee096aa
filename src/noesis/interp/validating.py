"""Whether a circuit is all there is, and whether all of it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..numerics import Floats
from ..text import table
from .finding import Parts
from .sites import Site
from .wiring import Wiring, values_of

RANDOM_SETS = 20
#: Nodes that are taken away beside one, at most.
MOST_BESIDE = 10


class Completeness(NamedTuple):
    """What is left of a circuit and of the model when the same nodes are taken from both.

    Attributes:
        sets: nodes that were taken away.
        names: of these sets.
        circuit: how much of the metric the circuit then restores, float64 [sets]; 1 is the model, 0 the ablated run.
        model: likewise of the model.
    """

    sets: list[list[Site]]
    names: list[str]
    circuit: Floats
    model: Floats

    @property
    def difference(self) -> Floats:
        """|F(C without K) - F(M without K)|, float64 [sets]: 0 where the circuit is complete."""
        found: Floats = np.abs(self.circuit - self.model)
        return found

    def __repr__(self) -> str:
        order = np.argsort(-self.difference, kind="stable")
        rows = [
            [self.names[at], f"{self.circuit[at]:.3f}", f"{self.model[at]:.3f}", f"{self.difference[at]:.3f}"]
            for at in order.tolist()
        ]
        worst, mean = self.difference.max(), self.difference.mean()
        head = f"Completeness on {len(rows)} sets of nodes: difference {mean:.3f} on average, {worst:.3f} at most"
        return f"{head}\n{table(['without', 'circuit', 'model', 'difference'], rows)}"


class Minimality(NamedTuple):
    """What each node adds to a circuit without others.

    Attributes:
        nodes: of the circuit.
        beside: the other nodes that are taken away too, by which a node matters most.
        ratio: how much of the metric goes with the node, float64 [nodes]: 0 for one that is not needed.
    """

    nodes: list[Site]
    beside: list[list[Site]]
    ratio: Floats

    def __repr__(self) -> str:
        rows = [
            [str(self.nodes[at]), f"{self.ratio[at]:.3f}", ", ".join(map(str, self.beside[at])) or "-"]
            for at in np.argsort(-self.ratio, kind="stable").tolist()
        ]
        least = f", the least {self.ratio.min():.3f}" if rows else ""
        return f"Minimality of {len(rows)} nodes{least}\n{table(['node', 'ratio', 'without'], rows)}"


class Held:
    """The pairs that a circuit is validated on.

    Args:
        parts: what circuits are made of.
        wirings: the pairs.
    """

    def __init__(self, parts: Parts, wirings: Sequence[Wiring]) -> None:
        self.parts, self.wirings = parts, wirings
        ends = values_of(wirings, torch.stack([parts.full, torch.zeros_like(parts.full)]))
        self.full, self.ablated = ends

    def faithfulness(self, circuits: Tensor) -> Floats:
        """How much of the metric circuits restore, float64 `[circuits]`."""
        return faithfulness(values_of(self.wirings, circuits), self.full, self.ablated)

    def completeness(self, circuit: Tensor, nodes: Sequence[Site], seed: int) -> Completeness:
        """Of random sets of nodes, of all heads of each layer, and of all mlps."""
        sets: dict[str, list[Site]] = {}
        for layer in sorted({node.layer for node in nodes if node.layer is not None}):
            sets[f"heads of layer {layer}"] = [n for n in nodes if n.layer == layer and n.component == "z"]
        sets["mlps"] = [node for node in nodes if node.component == "mlp"]
        sets["all nodes"] = list(nodes)
        sets = {name: members for name, members in sets.items() if members}
        generator = np.random.default_rng(seed)
        for number in range(RANDOM_SETS if nodes else 0):
            chosen = generator.random(len(nodes)) < 0.5
            chosen[generator.integers(len(nodes))] = True  # at least one
            sets[f"random {number + 1}"] = [node for node, taken in zip(nodes, chosen, strict=True) if taken]
        members = list(sets.values())
        left = torch.stack([self._without(of, each) for each in members for of in (circuit, self.parts.full)])
        found = self.faithfulness(left)
        return Completeness(members, list(sets), found[0::2], found[1::2])

    def minimality(self, circuit: Tensor, nodes: Sequence[Site]) -> Minimality:
        """Of each node, greedily."""
        beside, ratio = [], []
        for node in nodes:
            away: list[Site] = []
            best = self._differences(circuit, node, [[]])[0]
            while len(away) < min(MOST_BESIDE, len(nodes) - 1):
                others = [[*away, other] for other in nodes if other != node and other not in away]
                found = self._differences(circuit, node, others)
                at = int(found.argmax())
                if found[at] <= best + 1e-6:
                    break
                away, best = others[at], found[at]
            beside.append(away)
            ratio.append(best)
        return Minimality(list(nodes), beside, np.array(ratio))

    def _differences(self, circuit: Tensor, node: Site, sets: Sequence[list[Site]]) -> Floats:
        """What a node adds beside each set of others that are away."""
        left = [self._without(circuit, each) for away in sets for each in (away, [*away, node])]
        found = self.faithfulness(torch.stack(left))
        change: Floats = np.abs(found[0::2] - found[1::2])
        return change

    def _without(self, circuit: Tensor, nodes: Sequence[Site]) -> Tensor:
        found = circuit.clone()
        found[:, [self.parts.columns[node] for node in nodes]] = False
        return found


def faithfulness(values: Floats, full: Floats, ablated: Floats) -> Floats:
    """(m(C) - m(0)) / (m(M) - m(0)) of mean metrics, `[circuits]` of `[circuits, pairs]`."""
    found: Floats = (values.mean(-1) - ablated.mean()) / (full.mean() - ablated.mean())
    return found
