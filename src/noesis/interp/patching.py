"""Activation patching: what a metric becomes when one part of a run is put in from another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
from loguru import logger
from torch import Tensor, nn

from ..errors import BadValue, NoesisWarning
from ..wrapping import Wrapped, unwrapped
from .anatomy import Anatomy, anatomy_of
from .between import Between, check_precision
from .cells import AtPositions
from .effects import Direction, Effects
from .metrics import Metric, name_of
from .places import change_of, expanded
from .sites import HEADED, Site, read
from .sweeping import Resuming, Sweep


def patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    sites: str | Site | Iterable[str | Site] = "resid_post",
    positions: AtPositions = "each",
    direction: Direction = "denoise",
    anatomy: Anatomy | None = None,
    batch: int = 32,
) -> Effects:
    """What each part of a model has to do with a behaviour, by activation patching.

    A cell is a site, with a head and a position where it has them. For `"denoise"`, the corrupted prompts run with what
    the site held in the run of the clean ones: a part that brings back the clean answer is sufficient. For `"noise"`,
    it is the other way about: a part without which the answer is lost is necessary. (Vig et al. 2020; Meng et al. 2022;
    Heimersheim and Nanda 2024, "How to use and interpret activation patching".)

    Nothing is estimated: each cell is what a whole forward with that change gives, bit for bit that of a batch of the
    same shape. It is taken up at the block in which the change is, with what was kept of the blocks before. Positions
    and heads of one layer run as one batch, logits are computed only where the metric looks if the model knows
    `logits_to_keep`, and cells that hold the same in both runs are not run.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from noesis import interp
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()
        >>> clean = torch.randint(1, 50, (8, 6))
        >>> corrupted = clean.clone()
        >>> corrupted[:, 3] = 7
        >>> effects = interp.patch(
        ...     model, clean, corrupted, interp.logit_difference(right=1, wrong=2), sites="resid_pre"
        ... )
        >>> len(effects), effects["resid_pre.0@0"].mean, round(effects["resid_pre.0@3"].mean, 3)
        (12, 0.0, 1.0)

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        clean: inputs, a mapping of arguments, a tuple of them, or one: `[pairs, tokens]`.
        corrupted: the same, row by row and token by token, with what the answer depends on replaced.
        metric: such as `interp.logit_difference(right, wrong)`; or a function of the logits of all pairs that gives one
            number per pair, for which a batch has all pairs.
        sites: where to patch, as in `interp.run`; of `q, k, v, z, pattern, result`, each head is a cell.
        positions: a cell for `"each"` position, one for `"all"` of them together, or for those that are given.
        direction: `"denoise"` or `"noise"`.
        anatomy: of the model, from `interp.anatomy`.
        batch: rows of a forward, at most: as many cells times pairs as fit.

    Raises:
        NoesisError: (a ValueError) for pairs that do not match token by token, with the positions; for a metric that
            gives a mean, sites that are not there or are refused, pairs that all coincide, or half precision too coarse
            for the difference; (a RuntimeError) for a model in training mode.
    """
    between = Between.of(model, clean, corrupted, metric, direction, batch)
    root, looking, few = between.root, between.looking, between.few()
    found = []
    # Forwards of a sweep are no steps of the user's.
    with unwrapped(model) if isinstance(model, Wrapped) else nullcontext(model) as bare:
        if anatomy is None:
            anatomy = anatomy_of(bare, few.args, few.kwargs)
        cells = cells_of(sites, root, anatomy)
        resuming = Resuming(bare, few.with_arguments(looking.asking()), anatomy)
        if resuming.why_not:
            warnings.warn(f"each cell takes a whole forward: {resuming.why_not}", NoesisWarning, stacklevel=2)
        for part in between.parts():
            sweep = Sweep(bare, anatomy, part.base, part.source, part.looking, cells, positions)
            found.append((sweep.source_values, sweep.rounding, *sweep.run(part.size, resuming)))
    values, rounding, of_base, patched = (np.concatenate(each, axis=-1) for each in zip(*found, strict=True))
    check_precision(rounding, np.abs(values - of_base))
    of_clean, of_corrupted = (values, of_base) if direction == "denoise" else (of_base, values)
    meta = {"model": type(root).__name__, "resumed": not resuming.why_not}
    effects = Effects(sweep.cells.sites, of_clean, of_corrupted, patched, direction, name_of(metric), meta=meta)
    logger.debug("patched {} cells of {} pairs", len(effects), between.base.count)
    return effects


def cells_of(sites: str | Site | Iterable[str | Site], root: nn.Module, anatomy: Anatomy) -> list[Site]:
    """Where to patch: each head by itself."""
    asked = read(sites, root, "sites")
    found = expanded(
        [each._replace(heads=each.heads or "*") if each.component in HEADED else each for each in asked], anatomy
    )
    if not found:
        raise BadValue("sites is empty", "at least one site", "Pass 'resid_post', for example")
    for site in found:
        if site.component == "logits":
            raise BadValue("sites has 'logits'", "sites of which the logits are made", "Leave it out")
        change_of(site, anatomy)  # said now, and not in the middle
    return found
