"""Attribution patching: the effects of all cells at once, to first order, and exact patching of some of them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from ..errors import BadValue, NoesisWarning
from ..numerics import Floats
from ..text import counted
from ..wrapping import Wrapped, unwrapped
from .anatomy import Anatomy, anatomy_of, called_and_root, check_eval
from .attribution import TOLERANCE, Attribution, mean_of_pairs
from .cells import AtPositions
from .edge_scores import EdgeScores
from .edges import Edges
from .effects import Direction, Effects
from .estimating import Ends, Estimates, estimate
from .metrics import Metric, name_of
from .pairs import paired
from .patching import cells_of, patch
from .sites import Site
from .sweeping import Looking

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Pairs on which twice the steps are tried.
TRIED = 8


@overload
def attribute(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    sites: str | Site | Iterable[str | Site] = ...,
    steps: int = ...,
    positions: AtPositions = ...,
    direction: Direction = ...,
    edges: Literal[False] = ...,
    check: int = ...,
    anatomy: Anatomy | None = ...,
    batch: int = ...,
) -> Attribution: ...


@overload
def attribute(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    steps: int = ...,
    direction: Direction = ...,
    edges: Literal[True],
    check: int = ...,
    anatomy: Anatomy | None = ...,
    batch: int = ...,
) -> Edges: ...


def attribute(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    sites: str | Site | Iterable[str | Site] | None = None,
    steps: int = 5,
    positions: AtPositions | None = None,
    direction: Direction = "denoise",
    edges: bool = False,
    check: int = 20,
    anatomy: Anatomy | None = None,
    batch: int = 32,
) -> Attribution:
    """Estimate what patching each part of a model would do, all at once, and check some of it exactly.

    The estimate is `(a' - a) . g`: what a cell holds in the one run less what it holds in the other, times the gradient
    of the metric there. With `steps=0`, the gradient is that of the run which is changed (attribution patching: two
    forwards and one backward for all cells; Nanda 2023). With steps, it is the mean over a straight path of the
    embeddings from that run to the other, at the middles of so many equal steps (integrated gradients; Sundararajan et
    al. 2017; Hanna et al. 2024), which sees more of what is saturated at one end.

    An estimate can be wrong by any amount. So the `check` cells of the largest estimates, and as many at random of
    those near zero, are patched exactly, and on the first pairs twice the steps are tried. Where the estimate is not to
    be trusted, a warning says so, and so does the result.

    With `edges=True`, cells are edges from what writes into the residual stream to what reads it: `(u' - u) . g`, with
    g the gradient with respect to what the reader is given, before its norm, through this reader alone (edge
    attribution patching, Syed et al. 2023; with steps, EAP-IG, Hanna et al. 2024). Writers are the embedding, heads and
    mlps, readers the q, k and v of each head, mlps, and the logits; positions are added up. Norms, grouped queries and
    norms after attention are differentiated as they are.

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
        >>> found = interp.attribute(model, clean, corrupted, metric, sites="resid_pre")
        >>> round(found["resid_pre.0@3"].mean, 2), found.trusted
        (1.0, True)
        >>> len(interp.attribute(model, clean, corrupted, metric, edges=True))
        110

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        clean: inputs, a mapping of arguments, a tuple of them, or one: `[pairs, tokens]`.
        corrupted: the same, row by row and token by token, with what the answer depends on replaced.
        metric: as in `patch`; it has to be differentiable.
        sites: of cells, as in `patch`; `"resid_post"` where nothing is said. Not with edges.
        steps: along the path of the embeddings; 0 for the gradient of the run that is changed.
        positions: as in `patch`; `"each"` where nothing is said. Not with edges.
        direction: `"denoise"` or `"noise"`.
        edges: whether cells are edges.
        check: how many of the largest, and of those near zero, are patched exactly, the writers in the case of edges; 0
            for neither these, nor twice the steps.
        anatomy: of the model, from `interp.anatomy`.
        batch: rows of a forward, at most.

    Raises:
        NoesisError: (a ValueError) for pairs that do not match, a metric that gives a mean, sites that are not there or
            are refused, and for edges, a model whose blocks were not verified to be sums; (a RuntimeError) for a model
            in training mode, or a metric without gradients.
    """
    if direction not in ("denoise", "noise"):
        raise BadValue(f"direction is {direction!r}", "'denoise' or 'noise'", "Pass one of them")
    for name, given, least in (("steps", steps, 0), ("check", check, 0), ("batch", batch, 1)):
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            raise BadValue(f"{name} is {given!r}", f"a whole number from {least}", f"Pass {name}={max(least, 5)}")
    if edges and (sites is not None or positions is not None):
        raise BadValue("sites or positions are given with edges=True", "edges of all writers and readers", "Leave out")
    _, root = called_and_root(model)
    one, other = paired(clean, corrupted, root)
    base, source = (other, one) if direction == "denoise" else (one, other)
    looking = Looking(metric, base, root)
    size = max(batch, one.count) if looking.whole else batch
    # What runs here is no step of the user's.
    with unwrapped(model) if isinstance(model, Wrapped) else nullcontext(model) as bare:
        if anatomy is None:
            few = one.taken(torch.arange(min(2, one.count)))
            anatomy = anatomy_of(bare, few.args, few.kwargs)
        check_eval(root)
        ends = Ends(bare, anatomy, base, source, looking)
        if edges:
            of = EdgeScores(
                anatomy, ends.taken(torch.arange(one.count if looking.whole else min(2, one.count)))
            ).estimate
        else:
            cells = cells_of("resid_post" if sites is None else sites, root, anatomy)
            at: AtPositions = "each" if positions is None else positions

            def of(ends: Ends, steps: int) -> Estimates:
                return estimate(ends, cells, at, steps)

        pieces = [of(ends.taken(rows), steps) for rows in torch.arange(one.count).split(size)]
        found = _joined(pieces)
        meta = {"model": type(root).__name__}
        of_clean, of_corrupted = (found.source, found.base) if direction == "denoise" else (found.base, found.source)
        kind = Edges if edges else Attribution
        result = kind(
            found.sites,
            of_clean,
            of_corrupted,
            found.base + found.scores,
            direction,
            name_of(metric),
            _how(steps, edges),
            meta,
            steps,
        )
        if check:
            changed = found.changed.any(1).numpy()
            result = _checked(
                result,
                changed,
                check,
                lambda chosen: patch(
                    bare,
                    clean,
                    corrupted,
                    metric,
                    sites=chosen,
                    positions="all",
                    direction=direction,
                    anatomy=anatomy,
                    batch=batch,
                ),
            )
            if steps:
                tried = torch.arange(one.count if looking.whole else min(TRIED, one.count))
                twice = of(ends.taken(tried), 2 * steps)
                result.convergence = _change(found.scores[:, : len(tried)], twice.scores)
    logger.debug("attributed to {} cells of {} pairs", len(result), one.count)
    if doubts := result.doubts:
        warnings.warn(f"the attribution is not to be trusted: {'; '.join(doubts)}", NoesisWarning, stacklevel=2)
    return result


def _how(steps: int, edges: bool) -> str:
    """What an estimate is called."""
    what = "edge attribution patching" if edges else "attribution patching"
    return f"{what} with integrated gradients of {counted(steps, 'step')}" if steps else what


def _joined(pieces: Sequence[Estimates]) -> Estimates:
    """Estimates of all pairs."""
    source, base, scores = (
        np.concatenate([getattr(piece, name) for piece in pieces], axis=-1) for name in ("source", "base", "scores")
    )
    changed = torch.cat([piece.changed for piece in pieces], dim=1)
    return Estimates(pieces[0].sites, changed, source, base, scores)


def _checked(
    result: Attribution, changed: NDArray[np.bool_], check: int, patched: Callable[[list[Site]], Effects]
) -> Attribution:
    """The same, with cells that were patched exactly: the largest, and some near zero.

    Args:
        result: with estimates alone.
        changed: which candidates hold something else in the other run; the others have no effect, and say nothing.
        check: how many of each.
        patched: patches cells exactly.
    """
    sites, values = result.candidates()
    size = np.nan_to_num(mean_of_pairs(np.abs(values)))
    order = [row for row in np.argsort(-size, kind="stable").tolist() if changed[row]]
    tops, rest = order[:check], order[check:]
    near_zero = [row for row in rest if size[row] <= TOLERANCE * size[order[0]]]
    drawn = np.random.default_rng(0).permutation(np.array(near_zero, int))[:check].tolist()
    chosen = [sites[row] for row in (*tops, *drawn)]
    if not chosen:
        return result
    exact = patched(chosen)
    rows = {str(site): row for row, site in enumerate(exact.sites)}
    metric = exact.patched[[rows[str(site)] for site in chosen]]
    return dataclasses.replace(result, checked=chosen, tops=len(tops), exact=metric)


def _change(once: Floats, twice: Floats) -> float:
    """The most that an estimate changes, of the largest one: both as means over pairs of their sizes."""
    largest = float(np.max(mean_of_pairs(np.abs(twice)), initial=0.0, where=np.isfinite(twice).any(1)))
    change = float(np.max(mean_of_pairs(np.abs(twice - once)), initial=0.0, where=np.isfinite(twice).any(1)))
    return change / largest if largest else 0.0
