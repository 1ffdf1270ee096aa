"""Path patching: what a metric becomes when what one part writes reaches one other part alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from ..errors import BadValue
from ..numerics import Floats
from ..wrapping import Wrapped, unwrapped
from .anatomy import Anatomy, anatomy_of
from .attending import Look
from .between import Between, check_precision
from .blockwise import Blockwise
from .cells import at_positions, by_row
from .effects import Direction, Effects
from .graph import Graph, ends_of, graph_of
from .metrics import Metric, name_of
from .pairs import Inputs
from .places import part_of, place_of
from .running import run
from .sites import MODULE, Edge, Site
from .sweeping import FORWARD, NO_LIMIT, cells_at_once


def paths(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    senders: str | Site | Iterable[str | Site],
    receivers: str | Site | Iterable[str | Site],
    positions: Literal["each", "all"] | int | Sequence[int] = "all",
    direction: Direction = "denoise",
    anatomy: Anatomy | None = None,
    batch: int = 32,
) -> Effects:
    """What goes from one part of a model directly to another, by path patching.

    A cell is an `Edge`, from a sender to a receiver. What the sender writes is that of the other run, and the receiver
    alone sees it: its queries, keys or values, or its mlp, are computed from the residual stream with the sender's
    change added. All other parts are as in the run that is changed, until the receiver's own change reaches them: from
    there on the model computes, norms included. (Wang et al. 2022, "Interpretability in the wild", section 3.1;
    Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching".)

    Nothing is estimated or frozen. To `logits` it is the direct effect. What heads write goes through a norm that comes
    before the sum, where the model has one. `"embed"` is what the first block is given.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from noesis import interp
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()
        >>> clean = torch.randint(1, 50, (8, 6))
        >>> corrupted = clean.clone()
        >>> corrupted[:, 3] = 7
        >>> metric = interp.logit_difference(right=1, wrong=2)
        >>> effects = interp.paths(model, clean, corrupted, metric, senders="z.0", receivers=["q.1", "k.1", "v.1"])
        >>> len(effects), str(effects.sites[0])
        (48, 'z.0.0->q.1.0')

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        clean: inputs, as those of `interp.patch`.
        corrupted: likewise.
        metric: likewise.
        senders: sites among `embed`, `z` (or `result`, which is the same here) and `mlp`; each head is one.
        receivers: sites among `q`, `k`, `v` (of kv heads), `mlp` and `logits`; with a position, that one alone changes.
        positions: of what is sent, a cell for `"each"`, one for `"all"` of them together, or for those that are given.
        direction: `"denoise"` sends what is clean into the corrupted run, `"noise"` the other way about.
        anatomy: of the model, from `interp.anatomy`.
        batch: rows of a forward, at most.

    Returns:
        Effects of each sender on each receiver that comes after it.

    Raises:
        NoesisError: (a ValueError) as for `interp.patch`; for a model whose stream is not the sum of what its parts
            write, as where blocks normalise the sum or attend twice; for senders of which none comes before a receiver.
    """
    between = Between.of(model, clean, corrupted, metric, direction, batch)
    with unwrapped(model) if isinstance(model, Wrapped) else nullcontext(model) as bare:
        few = between.few()
        anatomy = anatomy_of(bare, few.args, few.kwargs) if anatomy is None else anatomy
        graph = graph_of(bare, anatomy, few)
        ends = (ends_of(senders, graph, between.root, "senders"), ends_of(receivers, graph, between.root, "receivers"))
        edges = graph.between(*ends)
        if not edges:
            raise BadValue("no sender writes before a receiver reads", "a sender in an earlier layer", "Pass others")
        effects = effects_of(bare, graph, between, edges, positions, direction, name_of(metric))
    logger.debug("patched {} paths of {} pairs", len(effects), between.base.count)
    return effects


def effects_of(
    model: Any,
    graph: Graph,
    between: Between,
    edges: Sequence[Edge],
    positions: Literal["each", "all"] | int | Sequence[int],
    direction: Direction,
    metric: str,
) -> Effects:
    """The effects of edges, of a model without wrappers."""
    found = []
    for part in between.parts():
        sent = _Sent(model, graph, part)
        cells = [Edge(sender, edge.receiver) for edge in edges for sender in sent.cells(edge.sender, positions)]
        found.append((sent.source_values, sent.rounding, *_run(model, graph, part, sent, cells)))
    values, rounding, of_base, patched = (np.concatenate(each, axis=-1) for each in zip(*found, strict=True))
    check_precision(rounding, np.abs(values - of_base))
    of_clean, of_corrupted = (values, of_base) if direction == "denoise" else (of_base, values)
    meta = {"model": type(between.root).__name__}
    return Effects(list(cells), of_clean, of_corrupted, patched, direction, metric, meta=meta)


class _Sent:
    """What is different in what senders write, in one run and the other."""

    def __init__(self, model: Any, graph: Graph, part: Between) -> None:
        self.graph, self.part = graph, part
        asking = part.looking.asking()
        layers = range(len(graph.anatomy.blocks))
        keep = ["resid_pre.0", *(f"result.{n}" for n in layers)]
        keep += [f"mlp.{n}" for n in layers if graph.anatomy.blocks[n].mlp]
        keep += [f"{MODULE}:{graph.anatomy.blocks[n].out}" for n in layers if graph.posts[n]]
        runs = [
            run(model, each.with_arguments(asking).given(), keep=keep, anatomy=graph.anatomy, max_bytes=NO_LIMIT)
            for each in (part.base, part.source)
        ]
        self.base, self.source = runs
        self.rounding: Floats = part.looking.rounding(runs[0].output)
        self.source_values: Floats = part.looking.values(runs[1].output)[0]

    def cells(self, sender: Site, positions: Literal["each", "all"] | int | Sequence[int]) -> list[Site]:
        """A sender at the positions that are asked for."""
        return at_positions(sender, self.base["resid_pre", 0], positions)

    def of(self, sender: Site, streams: Blockwise, device: torch.device) -> Tensor:
        """What a sender changes in the stream, `[pairs, tokens, width]`."""
        whole = sender._replace(position=None)
        base, source = (self._written(each, whole).to(device) for each in (self.base, self.source))
        change = source - base
        if sender.position is not None:
            there = torch.zeros_like(change)
            there[:, sender.position] = change[:, sender.position]
            change = there
        if sender.component in ("z", "result") and sender.layer is not None and self.graph.posts[sender.layer]:
            out = self.base[f"{MODULE}:{self.graph.anatomy.blocks[sender.layer].out}"].to(device)
            change = streams.through(sender.layer, out.reshape(change.shape), change)
        return change

    def _written(self, kept: Any, sender: Site) -> Tensor:
        if sender.component == "embed":
            found: Tensor = kept["resid_pre", 0]
            return found
        stream = kept["resid_pre", 0].shape
        if sender.component == "mlp":
            return kept["mlp", sender.layer].reshape(stream)  # type: ignore[no-any-return]
        return kept["result", sender.layer][:, :, sender.head].reshape(stream)  # type: ignore[no-any-return]


def _run(model: Any, graph: Graph, part: Between, sent: _Sent, cells: Sequence[Edge]) -> tuple[Floats, Floats]:
    """The metric of the base run `[pairs]`, and of each cell `[cells, pairs]`."""
    count = part.looking.count
    groups: dict[tuple[int, bool], list[int]] = {}
    layers = len(graph.anatomy.blocks)
    for at, cell in enumerate(cells):
        layer = layers if cell.receiver.layer is None else cell.receiver.layer
        groups.setdefault((layer, cell.receiver.component == "mlp"), []).append(at)
    times = cells_at_once([len(group) for group in groups.values()], max(1, part.size // count), FORWARD)
    inputs = part.base.taken(torch.arange(count).repeat(times)).with_arguments(part.looking.asking())
    streams = Blockwise(model, graph, inputs)
    base = part.looking.values(streams.replay.output)
    patched = np.tile(base[0], (len(cells), 1))
    changes: dict[Site, Tensor] = {}
    missing = _padding(part.base, cells)
    for (layer, _), group in groups.items():
        changed = []
        for at in group:
            sender = cells[at].sender
            if sender not in changes:
                changes[sender] = sent.of(sender, streams, streams.given(0).device)
            changed += [at] if bool(changes[sender].any()) else []  # others change nothing
        for begin in range(0, len(changed), times):
            chosen = changed[begin : begin + times]
            with torch.no_grad():
                output = _forward(streams, layer, [(cells[at], changes[cells[at].sender]) for at in chosen], count)
            found = part.looking.values(output)
            for copy, at in enumerate(chosen):
                patched[at] = np.where(found[copy] == base[copy], base[0], found[copy])
    patched[missing] = np.nan
    return base[0], patched


def _forward(streams: Blockwise, layer: int, cells: Sequence[tuple[Edge, Tensor]], count: int) -> Any:
    """What the model returns of copies of the pairs, in each of which a receiver sees a sender's change."""
    component, stream = cells[0][0].receiver.component, streams.given(layer)
    change = torch.zeros_like(stream)
    for copy, (edge, sent) in enumerate(cells):
        # Of the other receivers, what is at one position is taken from what they make of all.
        at = edge.receiver.position if component == "logits" else None
        seen_at = slice(None) if at is None else [at]
        change[copy * count : (copy + 1) * count, seen_at] = sent[:, seen_at]
    if component == "logits":
        return streams.replay.from_block(layer, stream + change)
    sites = [Site("mlp", layer)] if component == "mlp" else [Site(name, layer) for name in ("q", "k", "v")]
    if component == "mlp":
        seen = {sites[0]: streams.beside(layer, stream, change)}
    else:
        seen = streams.read(layer, stream + change, sites)

    def writer(site: Site) -> Look:
        chosen = [(copy, edge.receiver) for copy, (edge, _) in enumerate(cells) if edge.receiver.component == site[0]]

        def write(whole: Tensor) -> Tensor:
            new = whole.clone()
            into, from_ = (by_row(each, streams.replay.rows, site) for each in (new, seen[site]))
            for copy, receiver in chosen:
                rows = slice(copy * count, (copy + 1) * count)
                part_of(receiver, into[rows]).copy_(part_of(receiver, from_[rows]))
            return new

        return Look(site, write)

    looks = [writer(site) for site in sites]
    return streams.replay.from_block(
        layer, stream, [(look, place_of(look.site, streams.graph.anatomy)) for look in looks]
    )


def _padding(inputs: Inputs, cells: Sequence[Edge]) -> Any:
    """Which cells are sent from padding, bool `[cells, pairs]`."""
    seen = inputs.seen()
    found = np.zeros((len(cells), inputs.count), bool)
    for at, cell in enumerate(cells):
        if seen is not None and cell.sender.position is not None:
            found[at] = ~seen[:, cell.sender.position].cpu().numpy()
    return found
