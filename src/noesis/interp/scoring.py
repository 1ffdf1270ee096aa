"""Attention patterns of one layer, scored for what heads look at, row by row, beside the controls of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .repeats import Text, targets

#: Kinds of which a head that looks a fixed way back, whatever is there, would be taken for one.
BY_CONTENT = ("duplicate", "induction")


class Scored(NamedTuple):
    """Of one kind and layer, by row; NaN of rows in which there is nothing to look at."""

    score: Tensor  # [rows, heads]
    uniform: Tensor  # [rows, heads]
    by_position: Tensor  # [rows, heads]
    untrained: Tensor  # [rows, heads]


def score_patterns(pattern: Tensor, untrained: Tensor, even: Tensor, text: Text) -> dict[str, Scored] | str:
    """Score the heads of one layer; or why they cannot be.

    Args:
        pattern: `[rows, heads, queries, keys]`.
        untrained: of an untrained copy, on the same inputs.
        even: of the model with queries of zero, which look at all keys that they see alike.
        text: what was read.
    """
    ids, counts = text
    rows, _, queries, keys = pattern.shape
    if queries != keys:
        return "its queries are not its keys, as in cross-attention"
    if ids is not None and ids.shape != (rows, keys):
        ids = counts = None  # another tower's, such as that of images
    visible = (even > 0).any(1)
    seen = visible.sum(2)
    real = seen > 1 if counts is None else (seen > 1) & counts
    found = {}
    for kind, where in targets(ids, visible).items():
        asked = where.any(2) & real
        weights = (where & real[:, :, None]) / asked.sum(1)[:, None, None]
        weights[~asked.any(1)] = torch.nan
        found[kind] = Scored(
            _weighed(weights, pattern),
            _weighed(weights, even),
            _by_position(weights, pattern, visible) if kind in BY_CONTENT else torch.full(pattern.shape[:2], torch.nan),
            _weighed(weights, untrained),
        )
    share = real / real.sum(1, keepdim=True)
    found["entropy"] = Scored(
        _entropy(share, pattern),
        _entropy(share, even),
        torch.full(pattern.shape[:2], torch.nan),
        _entropy(share, untrained),
    )
    return found


def _weighed(weights: Tensor, pattern: Tensor) -> Tensor:
    return torch.einsum("rqk,rhqk->rh", weights, pattern)


def _by_position(weights: Tensor, pattern: Tensor, visible: Tensor) -> Tensor:
    """What a head's attention in the other rows scores in each row: all of it, if tokens do not matter.

    NaN where rows see different keys, as with padding, or where there is one alone.
    """
    rows = len(pattern)
    if rows < 2 or not torch.equal(visible, visible[:1].expand_as(visible)):
        return torch.full(pattern.shape[:2], torch.nan)
    every = torch.einsum("rqk,hqk->rh", weights, pattern.sum(0))
    return (every - _weighed(weights, pattern)) / (rows - 1)


def _entropy(share: Tensor, pattern: Tensor) -> Tensor:
    """In nats `[rows, heads]`, weighed over queries; a sink takes no part in it."""
    return torch.einsum("rq,rhq->rh", share, torch.special.entr(pattern).sum(3))
