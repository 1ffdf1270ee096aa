"""Mixture-of-Experts routing: which experts the tokens of a run were sent to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import files
from ..kernels.routing import ENTROPY, FIELDS, MEASURED, NEIGHBOURS, SWITCHES, TOKENS, UNIT
from ..numerics import Floats, Ints
from ..text import counted, plain, table
from .saved import Saved
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: What every file holds, all int64.
ARRAYS = ("sums", "experts", "steps", "whole", "coactivation")
#: Experts named in a line of `repr`.
SHOWN = 3


# ---------------------------------------------------------------- what was counted


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """Where routers sent tokens, over one or several steps.

    Attributes:
        sums: int64 [..., layers, experts + 5]: tokens of each expert, and further sums.
        experts: int64 [layers], experts of each layer; arrays are as wide as the largest.
    """

    sums: Ints
    experts: Ints

    @property
    def tokens(self) -> Ints:
        """Tokens that were routed, int64 [..., layers]."""
        return self._sum(TOKENS)

    @property
    def counts(self) -> Ints:
        """Tokens sent to each expert, int64 [..., layers, experts]; 0 past a layer's experts."""
        return self.sums[..., : self.sums.shape[-1] - FIELDS]

    @property
    def expert_load(self) -> Floats:
        """Each expert's share of what its layer sent out, float64 [..., layers, experts].

        NaN where no token came, and past a layer's experts.
        """
        there = np.arange(self.counts.shape[-1]) < self.experts[:, None]
        return np.where(there, _ratio(self.counts, self.counts.sum(-1, keepdims=True)), np.nan)

    @property
    def entropy(self) -> Floats:
        """Mean over tokens of the entropy of softmax(router logits), in nats, float64 [..., layers].

        From 0 (sure of one expert) to log(experts). Tokens whose logits are NaN are left out.
        """
        return _ratio(self._sum(ENTROPY) / UNIT, self._sum(MEASURED))

    @property
    def cv(self) -> Floats:
        """Standard deviation of the load over its mean, float64 [..., layers]; 0 is perfect balance.

        Source: Shazeer et al. 2017, "Outrageously large neural networks", the square root of its
        load-balancing loss without the factor; the deviation is the population's.
        """
        there = np.arange(self.counts.shape[-1]) < self.experts[:, None]
        mean = _ratio(self.counts.sum(-1), self.experts)
        deviation = np.where(there, self.counts - mean[..., None], 0.0)
        return _ratio(np.sqrt(_ratio((deviation**2).sum(-1), self.experts)), mean)

    @property
    def idle(self) -> Floats:
        """Share of experts to which no token came, float64 [..., layers]; NaN without tokens."""
        busy = (self.counts > 0).sum(-1)
        return np.where(self.tokens > 0, _ratio(self.experts - busy, self.experts), np.nan)

    @property
    def switching(self) -> Floats:
        """Share of neighbouring tokens of a sequence whose first choices differ, float64 [..., layers].

        A forward with one token per row of the batch goes on with the rows of the forward before, if
        there were as many; a forward with more starts new sequences. NaN without neighbours.
        """
        return _ratio(self._sum(SWITCHES), self._sum(NEIGHBOURS))

    def _sum(self, name: int) -> Ints:
        return self.sums[..., self.sums.shape[-1] - FIELDS + name]


@dataclass(frozen=True, eq=False, repr=False)
class Routes(Routing, Saved, Tabular):
    """How the routers of a Mixture-of-Experts model sent the tokens of a run to experts.

    `expert_load`, `entropy`, `cv`, `idle`, `switching`, `tokens` and `counts` are per step and layer, and
    those of `totals` per layer over the whole run. Padding is counted like any token, since routers
    route it.

    As a table (`to_csv`, `to_dataframe`) it has a row per step and router, with the tokens of each expert.

    Attributes:
        sums: int64 [steps, layers, experts + 5], from which the others follow.
        experts: int64 [layers], experts of each layer; arrays are as wide as the largest.
        layers: dotted names of the routers.
        steps: int64 [steps], the number of the forward each step was, from 0.
        whole: int64 [layers, experts + 5], the sums over the whole run, also over steps the ring dropped.
        coactivation: int64 [layers, experts, experts], how many tokens of the whole run were sent to
            both of two experts; symmetric, 0 on the diagonal.
        step_coactivation: int64 [latest, layers, experts, experts], the same for each of the latest
            steps, as many as fit into 64 MiB; not in JSON files.
        dropped_steps: how many steps at the start of the run are only in `totals` and `coactivation`.
        unmeasured: routers whose output could not be read, and why.
        meta: what is known of the run.

    Examples:
        >>> import torch, noesis
        >>> class TopKRouter(torch.nn.Linear):
        ...     num_experts, top_k = 4, 2
        >>> model = torch.nn.Sequential(TopKRouter(3, 4), torch.nn.Softmax(-1))
        >>> _ = model.requires_grad_(False)[0].weight.copy_(torch.eye(4, 3))
        >>> wrapped = noesis.wrap(model, layers="routers")
        >>> _ = wrapped(torch.tensor([[[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 2.0, 1.0]]]))
        >>> routes = wrapped.routes()
        >>> routes.totals.expert_load.round(2)
        array([[0.33, 0.5 , 0.17, 0.  ]])
        >>> float(routes.totals.switching[0]), int(routes.coactivation[0, 0, 1])
        (0.5, 2)
    """

    kind: ClassVar[str] = "routes"
    numbers: ClassVar[tuple[str, ...]] = ("arrays",)
    whole_numbers: ClassVar[bool] = True

    layers: list[str]
    steps: Ints
    whole: Ints
    coactivation: Ints
    step_coactivation: Ints
    dropped_steps: int = 0
    unmeasured: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def totals(self) -> Routing:
        """The whole run, per layer."""
        return Routing(self.whole, self.experts)

    def __len__(self) -> int:
        return len(self.steps)

    # ------------------------------------------------------------ files

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Routes:
        return cls._from_arrays(payload["arrays"], payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Routes:
        kept = {name: _integers(arrays[name]) for name in ARRAYS}
        layers = [str(name) for name in header["layers"]]
        width = kept["coactivation"].shape[-1] if kept["coactivation"].ndim else 0
        latest = _integers(arrays.get("step_coactivation", np.zeros((0, len(layers), width, width), dtype=np.int64)))
        kept["step_coactivation"] = latest
        if kept["coactivation"].ndim != 3 or kept["steps"].ndim != 1 or latest.ndim != 4:
            raise ValueError("coactivation or steps have the wrong shape")
        steps = len(kept["steps"])
        shapes = {
            "sums": (steps, len(layers), width + FIELDS),
            "whole": (len(layers), width + FIELDS),
            "coactivation": (len(layers), width, width),
            "step_coactivation": (min(len(latest), steps), len(layers), width, width),
            "experts": (len(layers),),
            "steps": (steps,),
        }
        for name, shape in shapes.items():
            if kept[name].shape != shape:
                raise ValueError(f"{name} has shape {kept[name].shape}, expected {shape}")
        if any((array < 0).any() for array in kept.values()) or (kept["experts"] > width).any():
            raise ValueError("numbers are out of range")
        return cls(
            layers=layers,
            dropped_steps=int(header["dropped_steps"]),
            unmeasured={str(name): str(why) for name, why in header["unmeasured"].items()},
            meta=dict(header["meta"]),
            **kept,
        )

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in (*ARRAYS, "step_coactivation")}

    def _header(self) -> dict[str, Any]:
        names = ("layers", "dropped_steps", "unmeasured", "meta")
        return {name: getattr(self, name) for name in names}

    def _payload(self) -> dict[str, Any]:
        totals = self.totals
        shown = ("tokens", "entropy", "cv", "idle", "switching", "expert_load")
        columns = {name: getattr(totals, name).tolist() for name in shown}
        return {
            **self._header(),
            "totals": [
                {"layer": layer, **{name: column[index] for name, column in columns.items()}}
                for index, layer in enumerate(self.layers)
            ],
            "arrays": {name: getattr(self, name).tolist() for name in ARRAYS},
        }

    # ------------------------------------------------------------ showing

    def _columns(self) -> dict[str, Cells]:
        steps, experts = len(self), np.tile(self.experts, len(self))
        found: dict[str, Cells] = {
            "step": self.steps.repeat(len(self.layers)),
            "layer": self.layers * steps,
            "experts": experts,
        }
        found |= {name: getattr(self, name).ravel() for name in ("tokens", "entropy", "cv", "idle", "switching")}
        for expert in range(self.counts.shape[-1]):
            sent = self.counts[..., expert].ravel().tolist()
            there = expert < experts
            found[f"expert_{expert}"] = [number if yes else None for number, yes in zip(sent, there, strict=True)]
        return found

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map of the experts' load over the whole run, layers down; needs the extra `viz`."""
        from ..plots import heat_map

        load = self.totals.expert_load
        return heat_map(
            load,
            self.layers,
            range(load.shape[1]),
            title="load by layer and expert",
            row_axis="router",
            column_axis="expert",
            colour_bar="share of the router's choices",
            path=path,
        )

    def __repr__(self) -> str:
        totals, load = self.totals, self.totals.expert_load
        experts = " to ".join(str(number) for number in sorted({int(self.experts.min()), int(self.experts.max())}))
        head = f"Routes of {counted(len(self), 'step')} x {counted(len(self.layers), 'router')}, {experts} experts each"
        if self.dropped_steps:
            head += f" ({self.dropped_steps} earlier steps are in the totals only)"
        lines = []
        for index, name in enumerate(self.layers):
            if totals.tokens[index]:
                columns = (totals.entropy, totals.cv, totals.idle, totals.switching)
                numbers = [f"{column[index]:.3g}" for column in columns]
                # Stable, so that of equal ones the first is named.
                top = np.argsort(-totals.counts[index], kind="stable")[:SHOWN]
                busiest = ", ".join(f"{expert}: {load[index, expert]:.0%}" for expert in top if load[index, expert])
                lines.append([name, str(totals.tokens[index]), *numbers, busiest])
        parts = [head]
        if lines:
            parts.append(table(["layer", "tokens", "entropy", "cv", "idle", "switching", "top experts"], lines))
        still = [
            name
            for name, tokens in zip(self.layers, totals.tokens, strict=True)
            if not tokens and name not in self.unmeasured
        ]
        if still:
            parts.append(f"never ran: {', '.join(map(plain, still))}")
        parts += [f"not measured: {plain(name)} ({plain(why)})" for name, why in self.unmeasured.items()]
        return "\n".join(parts)


def _ratio(part: Any, whole: Any) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _integers(values: Any) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"numbers of type {array.dtype}, expected whole ones")
    return array.astype(np.int64)
