"""Blocks of a model, each run by itself, so that each of its parts can be given a residual stream of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .anatomy import called_and_root
from .attending import Look
from .graph import Graph
from .pairs import Inputs
from .places import place_of
from .replaying import Replay
from .sites import Site

#: What heads are made of, of which nothing else of the block is needed.
READ_FIRST = frozenset({"q", "k", "v"})


class Blockwise:
    """One run of some rows, and what parts of its blocks make of other streams.

    Args:
        model: what to run.
        graph: of it.
        inputs: as many rows as each of the streams has.
    """

    def __init__(self, model: Any, graph: Graph, inputs: Inputs) -> None:
        self.graph, self.root = graph, called_and_root(model)[1]
        self.replay = Replay(model, inputs.given(), anatomy=graph.anatomy)
        self.layers = len(graph.anatomy.blocks)
        self.stream = self.replay.stream()

    def given(self, layer: int) -> Tensor:
        """What a block was given, or what comes after the last, `[rows, tokens, width]`."""
        return self.stream[layer]

    def read(
        self, layer: int, stream: Tensor, sites: Sequence[Site], put: Mapping[Site, Tensor] | None = None
    ) -> dict[Site, Tensor]:
        """What the sites of a block hold when it is given a stream, with others replaced."""
        found: dict[Site, Tensor] = {}
        enough = len(sites) if {site.component for site in sites} <= READ_FIRST else -1

        def keep(site: Site) -> Look:
            def kept(whole: Tensor) -> None:
                found[site] = whole.clone()
                if len(found) == enough:
                    raise _Enough

            return Look(site, kept)

        looks = [_replacing(site, new) for site, new in (put or {}).items()] + [keep(site) for site in sites]
        with contextlib.suppress(_Enough):
            self.replay.block(layer, stream, [(look, place_of(look.site, self.graph.anatomy)) for look in looks])
        return found

    def beside(self, layer: int, stream: Tensor, change: Tensor, added: Tensor | None = None) -> Tensor:
        """What an mlp writes when it alone sees a change, of the stream that the block is given.

        Args:
            layer: of the mlp.
            stream: what the block is given.
            change: of what the mlp sees.
            added: what attention adds before it; by default, what it makes of the stream.
        """
        mlp, attn = Site("mlp", layer), Site("attn", layer)
        if layer in self.graph.parallel:
            return self.read(layer, stream + change, [mlp])[mlp]
        if added is None:
            added = self.read(layer, stream, [attn])[attn]
        return self.read(layer, stream, [mlp], {attn: added + change.reshape(added.shape)})[mlp]

    def through(self, layer: int, out: Tensor, change: Tensor) -> Tensor:
        """What a change of what heads write changes in the stream: norms are passed, not frozen.

        Args:
            layer: of the heads.
            out: the output projection's output, to which the change is added.
            change: `[rows, tokens, width]`.
        """
        if self.graph.posts[layer] is None:
            return change
        return self.after_norm(layer, out + change) - self.after_norm(layer, out)

    def after_norm(self, layer: int, out: Tensor) -> Tensor:
        """What attention adds to the stream, of its output projection's output."""
        name = self.graph.posts[layer]
        if name is None:
            return out
        with torch.no_grad():
            added: Tensor = self.root.get_submodule(name)(out)
        return added


class _Enough(Exception):
    """The rest of the block is not needed."""


def _replacing(site: Site, new: Tensor) -> Look:
    return Look(site, lambda whole: new.reshape(whole.shape).to(whole.dtype))
