"""Finding circuits: on one half of the pairs, and reported on the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from ..errors import BadValue
from ..wrapping import Wrapped, unwrapped
from .anatomy import anatomy_of
from .between import Between, check_precision
from .circuit import Circuit, order_of
from .finding import Parts, acdc_scores, exact_scores, smallest
from .graph import Graph, graph_of
from .metrics import Metric, name_of
from .validating import Held
from .wiring import Ablation, Wiring, values_of

Method = Literal["exact", "acdc"]
Level = Literal["edges", "nodes"]
#: Sizes of the curve, of all parts (Mueller et al. 2025, MIB).
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: Of how far clean and ablated are apart: the circuit of everything may be as far from the model.
MOST_OFF = 0.01
_METHODS = {"exact": exact_scores, "acdc": acdc_scores}
_SAID = {"exact": "exact ablation of each", "acdc": "pruning one after the other (ACDC)"}


def circuit(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    method: Method = "exact",
    size: float | None = None,
    faithfulness: float = 0.8,
    ablation: Ablation = "resample",
    split: float = 0.5,
    seed: int = 0,
    level: Level = "edges",
    batch: int = 32,
) -> Circuit:
    """The part of a model that carries a behaviour, found on some of the pairs and reported on the others.

    A circuit is a set of edges from what writes into the residual stream (`embed`, heads, mlps) to what reads it
    (queries, keys and values of heads, mlps, `logits`). It runs exactly: each reader sees what comes over edges of the
    circuit as it is there, and all else as in the ablated run; norms are computed, not frozen. With all edges it is the
    model. (Wang et al. 2022; Conmy et al. 2023; Hanna et al. 2024.)

    Parts are put in an order by their scores, and the circuit is the fewest of the best that are as faithful as was
    asked for. `"exact"` scores a part by how far the metric moves when it alone is ablated, so of two that stand in for
    each other, both have a score of 0, while `"acdc"`, which takes them out one after the other, keeps one. Of these
    edges, those that lead nowhere or come from nowhere, and so change nothing, are left out.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from noesis import interp
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()
        >>> clean = torch.randint(1, 50, (8, 6))
        >>> corrupted = clean.clone()
        >>> corrupted[:, 3:] = 7
        >>> found = interp.circuit(model, clean, corrupted, interp.logit_difference(right=1, wrong=2), level="nodes")
        >>> len(found.parts), round(float(found.faithfulness_curve[-1]), 3)
        (10, 1.0)

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        clean: inputs, as those of `interp.patch`; at least two pairs.
        corrupted: likewise.
        metric: likewise.
        method: how parts are scored: `"exact"`, or `"acdc"` for small graphs.
        size: how many of the best parts, or which share of them below 1; by default, what is faithful enough.
        faithfulness: what is faithful enough, on the pairs on which it is found.
        ablation: what is outside: `"resample"` is the corrupted run, `"mean"` the mean over corrupted prompts of what
            each part writes at each position, for which a forward has all of them, `"zero"` nothing.
        split: the share of pairs on which it is found.
        seed: of the split.
        level: `"edges"`, or `"nodes"` with all edges between them, the embedding and the logits.
        batch: rows of a forward, at most.

    Raises:
        NoesisError: (a ValueError) as for `interp.patch` and `interp.paths`; for other methods, ablations and sizes;
            for a model whose circuit of everything is not the model, as in half precision.
    """
    _check(method, size, faithfulness, ablation, split, level)
    between = Between.of(model, clean, corrupted, metric, "denoise", batch)
    seen = between.base.seen()
    if ablation == "mean" and seen is not None and not bool(seen.all()):
        raise BadValue(
            "ablation is 'mean', and prompts are padded",
            "prompts of one length",
            "Use ablation='resample', or pad none",
        )
    finding, reporting = _halves(between.base.count, split, seed)
    with unwrapped(model) if isinstance(model, Wrapped) else nullcontext(model) as bare:
        few = between.few()
        anatomy = anatomy_of(bare, few.args, few.kwargs)
        graph = graph_of(bare, anatomy, few)
        parts = Parts(graph, level)
        found_on, held = (_held(bare, graph, parts, between, rows, ablation) for rows in (finding, reporting))
        scores = _METHODS[method](parts, found_on.wirings)
        order = order_of(scores)
        count = _count(size, faithfulness, order, found_on)
        chosen = np.zeros(len(parts.all), bool)
        members = parts.alive(order[:count], ablation == "resample")
        chosen[members] = True
        shares = np.array(SHARES)
        sizes = [max(1, round(share * len(parts.all))) for share in SHARES]
        circuits = [parts.circuit(members), *(parts.circuit(order[:each]) for each in sizes)]
        of_circuit, *curve = values_of(held.wirings, torch.stack(circuits))
        found = float(found_on.faithfulness(circuits[0][None])[0])
    result = Circuit(
        parts=list(parts.all),
        scores=scores,
        chosen=chosen,
        level=level,
        method=_SAID[method],
        ablation=ablation,
        metric=name_of(metric),
        shares=shares,
        curve=np.stack(curve),
        of_circuit=of_circuit,
        clean=held.full,
        ablated=held.ablated,
        found=found,
        meta={
            "model": type(between.root).__name__,
            "heads": [[block.heads, block.kv_heads] for block in anatomy.blocks],
            "seed": seed,
        },
        held=held,
    )
    logger.debug("a circuit of {} of {} {}", len(members), len(parts.all), level)
    return result


def _check(method: str, size: float | None, faithfulness: float, ablation: str, split: float, level: str) -> None:
    choices = {
        "method": (method, get_args(Method)),
        "ablation": (ablation, get_args(Ablation)),
        "level": (level, get_args(Level)),
    }
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise BadValue(f"{name} is {given!r}", f"one of {', '.join(map(repr, allowed))}", "Pass one of them")
    if size is not None and (isinstance(size, bool) or not size > 0 or (size >= 1 and size != int(size))):
        raise BadValue(f"size is {size!r}", "a whole number of parts, or a share below 1", "Pass size=20 or size=0.01")
    if not 0 < faithfulness <= 1:
        raise BadValue(f"faithfulness is {faithfulness!r}", "a number above 0, at most 1", "Pass faithfulness=0.8")
    if not 0 < split < 1:
        raise BadValue(f"split is {split!r}", "a share of pairs between 0 and 1", "Pass split=0.5")


def _halves(count: int, split: float, seed: int) -> tuple[Tensor, Tensor]:
    """The pairs on which a circuit is found, and those it is reported on."""
    if count < 2:
        raise BadValue(f"{count} pair", "at least two: one to find a circuit on, one to report on", "Pass more pairs")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = min(max(round(split * count), 1), count - 1)
    return order[:first].sort().values, order[first:].sort().values


def _held(model: Any, graph: Graph, parts: Parts, between: Between, rows: Tensor, ablation: Ablation) -> Held:
    """Some of the pairs, on which circuits can be run, verified."""
    if between.looking.whole:  # the metric is a function of all
        wirings = [Wiring(model, graph, between, ablation, rows)]
    else:
        some = between.taken(rows)
        together = [some] if ablation == "mean" else some.parts()  # a mean is of all
        wirings = [Wiring(model, graph, part, ablation) for part in together]
    held = Held(parts, wirings)
    clean, rounding = (np.concatenate([getattr(each, name) for each in wirings]) for name in ("clean", "rounding"))
    apart = np.abs(clean - held.ablated)
    if not np.isfinite(clean).all() or not np.isfinite(held.ablated).all():
        raise BadValue(
            f"the metric is not finite, of the model or with everything ablated ({ablation})",
            "a finite metric of each pair",
            "Use ablation='resample'",
        )
    check_precision(rounding, apart)
    lost, usual = float(np.abs(held.full - clean).mean()), abs(float(clean.mean() - held.ablated.mean()))
    if usual <= float(np.abs(clean).mean()) * 2.0**-20:
        raise BadValue(
            "the model's mean metric is the same with everything ablated",
            "pairs that the metric tells apart",
            "Corrupt what the answer depends on, or use another ablation",
        )
    if lost > MOST_OFF * usual:
        raise BadValue(
            f"the circuit of everything is {lost:.2g} off the model's metric, and clean and ablated differ by "
            f"{usual:.2g}",
            f"a model that is the sum of its parts within {MOST_OFF:.0%}",
            "Give it in float32: model.float(); something else than the stream may go from part to part",
        )
    return held


def _count(size: float | None, target: float, order: Any, found_on: Held) -> int:
    """How many of the best parts are the circuit."""
    total = len(order)
    if size is not None:
        if size > total:
            raise BadValue(f"size is {size!r}", f"at most the {total} there are", "Pass fewer")
        return int(size) if size >= 1 else max(1, round(size * total))

    def passes(sizes: list[int]) -> list[bool]:
        circuits = torch.stack([found_on.parts.circuit(order[:each]) for each in sizes])
        return [bool(each >= target) for each in found_on.faithfulness(circuits)]

    return smallest(passes, total, max(wiring.copies for wiring in found_on.wirings))
