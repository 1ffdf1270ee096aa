"""Directions: the difference between two kinds of inputs at one site, as something to add or to take away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadValue
from ..numerics import Floats, roc_auc
from ..wrapping import moved_to, unwrapped
from .anatomy import called_and_root
from .direction_found import Direction
from .recording import listed
from .repeats import text_of
from .running import run
from .sites import HEADED, Site, canonical

#: Shuffles of the labels, and the fewest examples of a kind: two to learn from, two to be tried on.
SHUFFLES, FEWEST = 199, 4


def direction(
    model: nn.Module,
    positive: Any,
    negative: Any,
    *,
    site: str | Site,
    position: int = -1,
    seed: int = 0,
) -> Direction:
    """Find the direction in which two kinds of inputs differ at a site, and whether it tells apart others of them.

    The direction is the difference of means over one half of the examples, of unit length (Rimsky et al. 2023,
    "Steering Llama 2 via contrastive activation addition"). On the other half it is tried: `auc` is the probability
    that a positive example lies further along it than a negative one. The control are 199 shuffles of the labels, each
    with a direction of its own, and p is how many of them do as well.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
        >>> x = torch.randn(40, 4)
        >>> found = interp.direction(model, x + torch.tensor([3.0, 0, 0, 0]), x, site="0")
        >>> found.auc > 0.8, found.p_value < 0.05
        (True, True)

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        positive: inputs of one kind: what the model is called with, as in `interp.run`, or a list of such, as where
            prompts are of different lengths.
        negative: of the other kind.
        site: one site of `interp.run`, such as `"resid_post.3"` or `"z.2.1"`, or a module's dotted name.
        position: which token, of those that `attention_mask` does not mark as padding; -1 is the last.
        seed: of the halves and the shuffles.

    Raises:
        NoesisError: (a ValueError) for fewer than four examples of a kind, a site that is none or several, or two kinds
            that do not differ.
    """
    _, root = called_and_root(model)
    with unwrapped(root):
        given = {"positive": positive, "negative": negative}
        kinds = [_vectors(root, inputs, site, position, name) for name, inputs in given.items()]
    generator = np.random.default_rng(seed)
    halves = [_halved(x, generator) for x in kinds]
    learned, tried = ([half[place] for half in halves] for place in (0, 1))
    difference = learned[0].mean(0) - learned[1].mean(0)
    length = float(np.linalg.norm(difference))
    if not length > 0:
        raise BadValue(
            "positive and negative are the same at this site", "inputs that differ there", "Try another site"
        )
    other = tried[0].mean(0) - tried[1].mean(0)
    every = np.concatenate(kinds)
    return Direction(
        site=canonical(str(site)) or str(site),
        vector=difference / length,
        auc=roc_auc(*(x @ difference for x in tried)),
        shuffled=_shuffles(learned, tried, generator),
        cosine=float(difference @ other / max(length * np.linalg.norm(other), np.finfo(np.float64).tiny)),
        length=length,
        mean_norm=float(np.linalg.norm(every, axis=1).mean()),
        examples=(len(kinds[0]), len(kinds[1])),
        position=position,
        meta={"model": type(root).__name__, "seed": seed},
    )


def _halved(x: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    order = generator.permutation(len(x))
    return x[order[: len(x) // 2]], x[order[len(x) // 2 :]]


def _shuffles(learned: Sequence[Floats], tried: Sequence[Floats], generator: np.random.Generator) -> Floats:
    """What directions of shuffled labels separate, on the other half with its labels shuffled too."""
    sizes = [len(learned[0]), len(tried[0])]
    both = [np.concatenate(learned), np.concatenate(tried)]
    found = np.empty(SHUFFLES)
    for place in range(SHUFFLES):
        (a, b), (c, d) = (
            np.split(x[generator.permutation(len(x))], [size]) for x, size in zip(both, sizes, strict=True)
        )
        along = a.mean(0) - b.mean(0)
        found[place] = roc_auc(c @ along, d @ along)
    return found


def _vectors(root: nn.Module, given: Any, site: str | Site, position: int, name: str) -> Floats:
    """What the site has at the position, `[examples, width]`."""
    device = next((tensor.device for tensor in root.parameters()), torch.device("cpu"))
    anatomy, found = None, []
    for inputs in listed(given, name):
        kept = run(root, moved_to(inputs, device), keep=[site], anatomy=anatomy)
        anatomy = kept.anatomy
        if len(kept.activations) != 1:
            raise BadValue(f"site {str(site)!r} means {len(kept.activations)}", "one site", "Name layer and head")
        (place,) = kept.activations
        component = place.partition(".")[0]
        headless = component in HEADED and place.partition("@")[0].count(".") < 2
        x = kept[place].double()
        if component == "pattern" or headless or x.dim() not in (2, 3):
            raise BadValue(
                f"{place} is of shape {list(x.shape)}",
                "a vector for each token, or each example",
                "Name a head, as in 'z.3.2'" if headless else "Choose another site",
            )
        found.append(x if x.dim() == 2 else _at(x, text_of(inputs).counts, position, place))
    vectors = torch.cat(found).numpy()
    if not np.isfinite(vectors).all():
        raise BadValue(
            f"{name} gives numbers that are not finite at {site}", "finite activations", "Look at the inputs"
        )
    if len(vectors) < FEWEST:
        raise BadValue(
            f"{name} has {len(vectors)} examples", f"at least {FEWEST}, half of which are held out", "Give more"
        )
    return vectors


def _at(x: Tensor, counts: Tensor | None, position: int, place: str) -> Tensor:
    """One token of each row, of those that are no padding."""
    counts = torch.ones(x.shape[:2], dtype=torch.bool) if counts is None or counts.shape != x.shape[:2] else counts
    rows = []
    for row, real in zip(x, counts, strict=True):
        tokens = row[real]
        if not -len(tokens) <= position < len(tokens):
            raise BadValue(
                f"position {position} of a row of {len(tokens)} tokens at {place}",
                "one that is there",
                "Pass -1 for the last",
            )
        rows.append(tokens[position])
    return torch.stack(rows)
