"""Circuits that run: each part of a model sees what reaches it over the edges of a circuit, and else an ablated run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..numerics import Floats
from .between import Between
from .blockwise import Blockwise
from .graph import Graph
from .sites import MODULE, Site

Ablation = Literal["resample", "mean", "zero"]


#: What the heads of a layer write beyond the ablated run, and its mlp.
Written: TypeAlias = tuple[Tensor, Tensor | None]


class _Base(NamedTuple):
    """What parts of an ablated run write, and the streams that are the sums of it."""

    streams: list[Tensor]  # what each block is given, and what comes after the last
    outs: list[Tensor]  # output projections
    results: list[Tensor]  # of each head
    mlps: list[Tensor | None]


class Wiring:
    """Some pairs, on which so many circuits run at once.

    A part that reads is given the stream of the ablated run, plus, for each edge that leads to it in the circuit, what
    its sender writes here beyond what it writes there. With all edges, it is the clean run; with none, the ablated one.

    Args:
        model: what to run.
        graph: of it.
        part: the pairs, the corrupted inputs as base.
        ablation: what is outside the circuit: the corrupted run, its mean over pairs by position, or nothing.
        counting: which of the pairs count, where a metric wants to see all; by default all.
    """

    def __init__(
        self, model: Any, graph: Graph, part: Between, ablation: Ablation, counting: Tensor | None = None
    ) -> None:
        self.graph, self.looking = graph, part.looking
        self.counting = slice(None) if counting is None else counting.numpy()
        self.count = part.looking.count
        self.copies = max(1, part.size // self.count)
        rows = torch.arange(self.count).repeat(self.copies)
        asking = part.looking.asking()
        corrupted, clean = (
            Blockwise(model, graph, each.taken(rows).with_arguments(asking)) for each in (part.base, part.source)
        )
        self.streams = corrupted
        self.clean: Floats = self.looking.values(clean.replay.output)[0, self.counting]
        self.rounding: Floats = self.looking.rounding(clean.replay.output)[self.counting]
        self.layers = range(corrupted.layers)
        self.base = self._ablated(ablation)
        self.embed = clean.given(0) - self.base.streams[0]
        self.senders, self.receivers = graph.senders, graph.receivers
        self.column = {sender: at for at, sender in enumerate(self.senders)}
        self.row = {receiver: at for at, receiver in enumerate(self.receivers)}
        self.rows = [[self.row[each] for each in self.receivers if each.layer == layer] for layer in self.layers]
        self.full = graph.mask(graph.edges)
        self.whole: dict[int, Written] = {}  # with all edges
        with torch.no_grad():
            self._forward(self.full.expand(self.copies, -1, -1), self.whole)

    def _ablated(self, ablation: Ablation) -> _Base:
        outs, results, mlps = [], [], []
        for layer in self.layers:
            block = self.graph.anatomy.blocks[layer]
            out, result, mlp = Site(MODULE, module=str(block.out)), Site("result", layer), Site("mlp", layer)
            sites = [out, result, *([mlp] if block.mlp else [])]
            stream = self.streams.given(layer)
            put = None
            if ablation == "zero":  # of heads: what their output projection adds without any
                z = Site("z", layer)
                put = {z: torch.zeros_like(self.streams.read(layer, stream, [z])[z])}
            seen = self.streams.read(layer, stream, sites, put)
            outs.append(self._averaged(seen[out], ablation))
            results.append(self._averaged(seen[result], ablation))
            written = self._averaged(seen[mlp], ablation) if block.mlp else None
            mlps.append(torch.zeros_like(written) if written is not None and ablation == "zero" else written)
        if ablation == "resample":
            return _Base([self.streams.given(n) for n in (*self.layers, len(self.layers))], outs, results, mlps)
        first = self.streams.given(0)
        streams = [torch.zeros_like(first) if ablation == "zero" else self._averaged(first, ablation)]
        for layer in self.layers:
            added = self.streams.after_norm(layer, outs[layer].reshape(first.shape))
            mlp_added = mlps[layer]
            streams.append(streams[-1] + added + (0 if mlp_added is None else mlp_added.reshape(first.shape)))
        return _Base(streams, outs, results, mlps)

    def _averaged(self, written: Tensor, ablation: Ablation) -> Tensor:
        if ablation != "mean":
            return written
        rows = written.reshape(self.copies * self.count, -1)
        return rows.mean(0, keepdim=True).expand_as(rows).reshape(written.shape)

    def carrying(self) -> Tensor:
        """Which senders write something else in the clean run than in the ablated one, bool `[senders]`."""
        found = [self.embed.any()]
        for heads, mlp in self.whole.values():
            found += [heads[:, :, head].any() for head in range(heads.shape[2])]
            found += [] if mlp is None else [mlp.any()]
        return torch.stack(found).cpu()

    # ------------------------------------------------------------ circuits

    def run(self, circuits: Tensor) -> Floats:
        """The metric of circuits, float64 `[circuits, pairs]`.

        Args:
            circuits: bool `[circuits, receivers, senders]`, which edges each has.
        """
        found = []
        for chosen in circuits.split(self.copies):
            idle = chosen.new_zeros(self.copies - len(chosen), *chosen.shape[1:])
            with torch.no_grad():
                output = self._forward(torch.cat([chosen, idle]), self._begun(chosen))
            found.append(self.looking.values(output)[: len(chosen), self.counting])
        return np.concatenate(found)

    def _begun(self, circuits: Tensor) -> dict[int, Written]:
        """What the first layers write in circuits that have all edges there."""
        found: dict[int, Written] = {}
        for layer in self.layers:
            if not torch.equal(
                circuits[:, self.rows[layer]], self.full[self.rows[layer]].expand(len(circuits), -1, -1)
            ):
                break
            found[layer] = self.whole[layer]
        return found

    def _forward(self, edges: Tensor, written: dict[int, Written]) -> Any:
        """What the model returns; `written` is what layers have written so far, and is left with all they write."""
        for layer in self.layers[len(written) :]:
            results = self._attended(layer, edges, written)
            mlp_base = self.base.mlps[layer]
            written[layer] = results, None
            if mlp_base is not None:
                stream, change = self.base.streams[layer], self._reaching(Site("mlp", layer), edges, written)
                mlp = self.streams.beside(layer, stream, change, self._attn(layer))
                written[layer] = results, mlp - mlp_base.reshape(mlp.shape)
        end = self.base.streams[-1] + self._reaching(Site("logits"), edges, written)
        return self.streams.replay.from_block(len(self.layers), end)

    def _attn(self, layer: int) -> Tensor:
        """What attention adds to the stream of the base."""
        shape = self.base.streams[layer].shape
        return self.streams.after_norm(layer, self.base.outs[layer].reshape(shape))

    def _attended(self, layer: int, edges: Tensor, written: dict[int, Written]) -> Tensor:
        """What heads of a layer write beyond the base, when each of their parts is given a stream of its own."""
        groups: dict[bytes, list[Site]] = {}
        for receiver in self.receivers:
            if receiver.layer == layer and receiver.component != "mlp":
                key = edges[:, self.row[receiver]].numpy().tobytes()  # those that see the same are asked at once
                groups.setdefault(key, []).append(receiver)
        put: dict[Site, Tensor] = {}
        sites = [Site(name, layer) for name in ("q", "k", "v")]
        for members in groups.values():
            stream = self.base.streams[layer] + self._reaching(members[0], edges, written)
            seen = self.streams.read(layer, stream, sites)
            for site in sites:
                whole = put.setdefault(site, seen[site].clone())
                for member in members:
                    if member.component == site.component:
                        whole[:, :, member.head] = seen[site][:, :, member.head]
        result = Site("result", layer)
        found = self.streams.read(layer, self.base.streams[layer], [result], put)[result]
        return found - self.base.results[layer]

    def _reaching(self, receiver: Site, edges: Tensor, written: dict[int, Written]) -> Tensor:
        """What reaches a receiver over edges beyond the base, `[rows, tokens, width]`."""
        chosen = edges[:, self.row[receiver]]
        found = self._taken(chosen[:, 0], self.embed)
        for layer, (heads, mlp) in written.items():
            first = self.column[Site("z", layer, 0)]
            over = chosen[:, first : first + heads.shape[2]]
            if bool(over.any()):
                weights = over.to(heads).repeat_interleave(self.count, 0)
                change = torch.einsum("rh,rthd->rtd", weights, heads).reshape(found.shape)
                found = found + self.streams.through(layer, self.base.outs[layer].reshape(found.shape), change)
            if mlp is not None and bool(chosen[:, self.column[Site("mlp", layer)]].any()):
                found = found + self._taken(chosen[:, self.column[Site("mlp", layer)]], mlp.reshape(found.shape))
        return found

    def _taken(self, chosen: Tensor, change: Tensor) -> Tensor:
        """A change in the copies that are chosen."""
        weights = chosen.to(change).repeat_interleave(self.count, 0)
        return weights[:, None, None] * change


def values_of(wirings: Sequence[Wiring], circuits: Tensor) -> Floats:
    """The metric of circuits on all pairs, float64 `[circuits, pairs]`."""
    once: dict[bytes, int] = {}
    places = [once.setdefault(each.numpy().tobytes(), len(once)) for each in circuits]
    unique = circuits[[places.index(place) for place in range(len(once))]]
    found: Floats = np.concatenate([wiring.run(unique) for wiring in wirings], axis=1)[places]
    return found
