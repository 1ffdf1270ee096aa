"""A circuit: the edges or nodes of a model that carry a behaviour, and how much of it, on pairs it was not found on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import files
from ..errors import BadValue, WrongState
from ..numerics import Floats
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, first_few, plain, table
from .graph import nodes_of
from .sites import Cell, Edge, Site, cell_of
from .validating import Completeness, Held, Minimality, faithfulness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 20
ABLATIONS = {
    "resample": "resampled from the corrupted prompts",
    "mean": "the mean of the corrupted prompts, by position",
    "zero": "zero",
}


class CircuitComparison(NamedTuple):
    """What two circuits share.

    Attributes:
        shared: edges, or nodes, of both.
        only_a: those of the first alone.
        only_b: those of the second alone.
    """

    shared: list[Any]
    only_a: list[Any]
    only_b: list[Any]

    @property
    def jaccard(self) -> float:
        """How many are shared, of all there are in either; 1 for two without any."""
        union = sum(map(len, self))
        return len(self.shared) / union if union else 1.0

    def __repr__(self) -> str:
        lines = [f"CircuitComparison: Jaccard {self.jaccard:.3f}"]
        for name, each in zip(("shared", "only in a", "only in b"), self, strict=True):
            lines.append(f"{name}: {first_few([str(part) for part in each]) or 'none'}")
        return "\n".join(lines)


@dataclass(eq=False, repr=False)
class Circuit(Saved, Tabular):
    """The edges or nodes of a model by which a metric is restored.

    Faithfulness is f(C) = (m(C) - m(0)) / (m(M) - m(0)), of mean metrics of the circuit C, the whole model M, and of
    the model with everything ablated (Wang et al. 2022; Hanna et al. 2024, "Have faith in faithfulness"). It depends on
    the ablation and on whether edges or nodes are ablated (Miller et al. 2024, "Transformer circuit faithfulness
    metrics are not robust"), so both are named. Its numbers are of pairs on which the circuit was not found.

    As a table it has a row per part, those of the circuit and the others.

    Attributes:
        parts: all edges, or nodes, of the model.
        scores: how much each matters, by the method, float64 [parts].
        chosen: which are the circuit, bool [parts].
        level: `"edges"` or `"nodes"`.
        method: how parts were scored; an estimate is named as one.
        ablation: what is outside the circuit.
        metric: what it measures.
        shares: sizes of the curve, of all parts, float64 [sizes].
        curve: the metric of the best parts, so many, float64 [sizes, pairs].
        of_circuit: the metric of this circuit, float64 [pairs].
        clean: that of the model, float64 [pairs].
        ablated: that of the model with everything ablated, float64 [pairs].
        found: faithfulness on the pairs on which it was found.
        meta: of the runs.
    """

    kind: ClassVar[str] = "circuit"
    ARRAYS: ClassVar[tuple[str, ...]] = ("scores", "chosen", "shares", "curve", "of_circuit", "clean", "ablated")

    parts: list[Any]
    scores: Floats
    chosen: Any
    level: str
    method: str
    ablation: str
    metric: str
    shares: Floats
    curve: Floats
    of_circuit: Floats
    clean: Floats
    ablated: Floats
    found: float
    meta: dict[str, Any] = field(default_factory=dict)
    held: Held | None = field(default=None, repr=False)  # the pairs to validate on; not in files

    def __post_init__(self) -> None:
        for name in self.ARRAYS:
            kind = np.bool_ if name == "chosen" else np.float64
            setattr(self, name, np.asarray(getattr(self, name), kind))
        self.curve = self.curve.reshape(len(self.shares), len(self.clean))
        parts, pairs = (len(self.parts),), self.clean.shape
        if self.scores.shape != parts or self.chosen.shape != parts:
            raise BadValue(f"scores {self.scores.shape} of {parts[0]} parts", "one of each", "Pass as many")
        if self.of_circuit.shape != pairs or self.ablated.shape != pairs:
            raise BadValue("metrics of other numbers of pairs", "one of each pair", "Pass as many")

    # ------------------------------------------------------------ what it is

    @functools.cached_property
    def edges(self) -> list[Edge]:
        """Its edges; of a circuit of nodes, none are told apart."""
        return [part for part in self._members() if isinstance(part, Edge)]

    @functools.cached_property
    def nodes(self) -> list[Site]:
        """The heads (`z`) and mlps in it, and of a circuit of edges, `embed` and `logits` where it has them."""
        found: dict[Site, None] = {}
        for part in self._members():
            if isinstance(part, Edge):
                found.update(dict.fromkeys([part.sender, *self._nodes_of(part.receiver)]))
            else:
                found[part] = None
        return sorted(found, key=_in_order)

    def _members(self) -> list[Cell]:
        return [self.parts[at] for at in np.flatnonzero(self.chosen)]

    def _nodes_of(self, receiver: Site) -> list[Site]:
        """The nodes that a receiver is a part of, those that send something on where there are several."""
        if receiver.layer is None:
            return [receiver]
        found = nodes_of(receiver, *self.meta["heads"][receiver.layer])
        active = {part.sender for part in self._members() if isinstance(part, Edge)}
        return [node for node in found if node in active] or found

    # ------------------------------------------------------------ how good it is

    @property
    def faithfulness(self) -> float:
        """How much of the metric it restores, on pairs it was not found on: 1 is the model, 0 the ablated run."""
        return float(faithfulness(self.of_circuit[None], self.clean, self.ablated)[0])

    @property
    def standard_error(self) -> float:
        """The standard error of faithfulness over pairs, by the jackknife; NaN of one pair."""
        pairs = len(self.clean)
        if pairs < 2:
            return float("nan")
        left = [np.delete(np.arange(pairs), at) for at in range(pairs)]
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.array(
                [faithfulness(self.of_circuit[rows][None], self.clean[rows], self.ablated[rows])[0] for rows in left]
            )
        return float(np.sqrt((pairs - 1) / pairs * ((each - each.mean()) ** 2).sum()))

    @property
    def faithfulness_curve(self) -> Floats:
        """Faithfulness of the best parts at each of `shares`, float64 [sizes]."""
        return faithfulness(self.curve, self.clean, self.ablated)

    @property
    def cpr(self) -> float:
        """The area under f over shares, by trapezoids: how soon the metric is there (Mueller et al. 2025, MIB)."""
        return _area(self.faithfulness_curve, self.shares)

    @property
    def cmd(self) -> float:
        """The area of |1 - f| over shares: how far circuits are from what the model does (Mueller et al. 2025, MIB)."""
        return _area(np.abs(1 - self.faithfulness_curve), self.shares)

    def completeness(self, seed: int = 0) -> Completeness:
        """Take the same nodes from the circuit and the model: 20 random sets, the heads of a layer, the mlps, all.

        Where the difference is large, the model does by other ways what the circuit does (Wang et al. 2022, 4.1).

        Raises:
            NoesisError: (a RuntimeError) for a circuit from a file, which has no model.
        """
        held, nodes = self._held(), self._removable()
        return held.completeness(self._circuit(held), nodes, seed)

    def minimality(self) -> Minimality:
        """Of each node, how much of the metric goes with it, when the nodes by which it matters most are away.

        Those are found greedily. A node with a ratio of 0 is not needed (Wang et al. 2022, section 4.2).

        Raises:
            NoesisError: (a RuntimeError) for a circuit from a file, which has no model.
        """
        held = self._held()
        return held.minimality(self._circuit(held), self._removable())

    def _removable(self) -> list[Site]:
        return [node for node in self.nodes if node.layer is not None]

    def _circuit(self, held: Held) -> Any:
        return held.parts.circuit(np.flatnonzero(self.chosen).tolist())

    def _held(self) -> Held:
        if self.held is None:
            raise WrongState(
                "this circuit was read from a file, and has no model to run",
                "a circuit from interp.circuit",
                "Find it again with the same seed",
            )
        return self.held

    def compare(self, other: Circuit) -> CircuitComparison:
        """What it shares with another circuit, by edges, or nodes where both are of nodes.

        Raises:
            NoesisError: (a ValueError) for circuits of which one is of edges, and one of nodes.
        """
        if self.level != other.level:
            raise BadValue(f"a circuit of {self.level} and one of {other.level}", "two of one kind", "Find both alike")
        a, b = self._members(), other._members()
        one, two = set(a), set(b)
        return CircuitComparison(
            [part for part in a if part in two],
            [part for part in a if part not in two],
            [part for part in b if part not in one],
        )

    # ------------------------------------------------------------ shown

    def __repr__(self) -> str:
        size = f"{int(self.chosen.sum())} of {counted(len(self.parts), self.level[:-1])}"
        held_out, off = counted(len(self.clean), "pair"), f"off the model (CMD) {self.cmd:.3f}"
        means = ((name, each.mean()) for name, each in self._ends())
        lines = [
            f"Circuit of {size}, {counted(len(self.nodes), 'node')}, by {plain(self.method)}",
            f"outside it: {ABLATIONS.get(self.ablation, plain(self.ablation))}; {plain(self.metric)}",
            f"faithfulness {self.faithfulness:.3f} ± {self.standard_error:.3f} on {held_out} not used to find it",
            f"on those used to find it {self.found:.3f}",
            f"mean metric: {', '.join(f'{name} {mean:.4g}' for name, mean in means)}",
            f"area under the curve (CPR) {self.cpr:.3f}, {off}",
        ]
        order = [at for at in np.argsort(-self.scores, kind="stable").tolist() if self.chosen[at]]
        rows = [[str(self.parts[at]), f"{self.scores[at]:.3g}"] for at in order[:_SHOWN]]
        lines.append(table([self.level[:-1], "score"], rows))
        if len(order) > _SHOWN:
            lines.append(f"and {len(order) - _SHOWN} more")
        return "\n".join(lines)

    def _ends(self) -> list[tuple[str, Floats]]:
        return [("model", self.clean), ("circuit", self.of_circuit), ("ablated", self.ablated)]

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """Layers from bottom to top, with the curve of faithfulness beside it; needs `viz`.

        Args:
            path: where to write it too, as `.png`, `.svg` or `.pdf`.

        Returns:
            The figure, which needs no display.
        """
        from ..plots import circuit_figure

        scores = dict(zip(self.parts, self.scores.tolist(), strict=True))
        if self.level == "nodes":
            edges: list[tuple[str, str, str, float]] = []
        else:
            edges = [
                (str(edge.sender), str(node), edge.receiver.component, scores[edge])
                for edge in self.edges
                for node in self._nodes_of(edge.receiver)
            ]
        return circuit_figure(
            [(str(node), _label(node), _row(node), -1 if node.head is None else node.head) for node in self.nodes],
            edges,
            self.shares,
            self.faithfulness_curve,
            size=float(self.chosen.mean()),
            faithfulness=self.faithfulness,
            title=f"{int(self.chosen.sum())} of {counted(len(self.parts), self.level[:-1])}: "
            f"faithfulness {self.faithfulness:.2f}",
            note=f"{self.metric}; outside: {ABLATIONS.get(self.ablation, self.ablation)}",
            level=self.level,
            path=path,
        )

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        names = ("level", "method", "ablation", "metric", "found", "meta")
        parts = [[*map(list, part)] if isinstance(part, Edge) else list(part) for part in self.parts]
        return {"parts": parts, **{name: getattr(self, name) for name in names}}

    def _arrays(self) -> files.Arrays:
        return {name: np.asarray(getattr(self, name), np.float64) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(each) for name, each in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Circuit:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Circuit:
        made: dict[str, Any] = {name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS}
        names = ("level", "method", "ablation", "metric")
        made.update(zip(names, list_of(str, [header[name] for name in names]), strict=True))
        parts = [cell_of(given) for given in list(header["parts"])]
        return cls(parts=parts, **made, found=float(header["found"]), meta=dict(header["meta"]))

    def _columns(self) -> dict[str, Cells]:
        return {
            self.level[:-1]: [str(part) for part in self.parts],
            "score": self.scores,
            "in_circuit": self.chosen,
        }


def order_of(scores: Floats) -> Sequence[int]:
    """Parts by their scores, the best first."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def _area(heights: Floats, at: Floats) -> float:
    """By trapezoids."""
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(at)).sum())


def _in_order(node: Site) -> tuple[int, int, int]:
    return (_row(node), 0 if node.head is None else node.head, 0)


def _row(node: Site) -> int:
    """How high a node stands: the embedding, then attention and the mlp of each layer, and the logits."""
    if node.layer is None:
        return 0 if node.component == "embed" else 1 << 30
    return 1 + 2 * node.layer + (node.component == "mlp")


def _label(node: Site) -> str:
    if node.layer is None:
        return node.component
    return f"mlp {node.layer}" if node.component == "mlp" else f"head {node.layer}.{node.head}"
