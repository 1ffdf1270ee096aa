"""Token by token comparison of two captured runs of a language model.

Tokens are aligned by content, so an inserted word does not shift everything after it out of place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import BadValue
from ..numerics import Floats, Token, align, cosine_delta, with_substitutions
from ..text import first_few
from .tokens import NOISE, TokenDeltas, as_threshold, as_tokens

if TYPE_CHECKING:
    from .activations import Activations


def token_deltas(
    a: Activations,
    b: Activations,
    tokens_a: Sequence[Token],
    tokens_b: Sequence[Token],
    *,
    threshold: float | None = None,
    sample: int = 0,
    by_position: bool = False,
) -> TokenDeltas:
    """How far two runs are apart, token by token and layer by layer.

    Tokens are aligned by their longest common subsequence, and between two tokens in common, or before the first or
    after the last, those that differ by their places, if there are as many in both runs: these are substituted, and
    marked as such. Layers are aligned by name. A delta is
    `1 - cos(x, y) = |x/|x| - y/|y||^2 / 2` in float64, a form that is exactly 0 for equal vectors and does not
    cancel for near ones. A zero vector has delta 0 to another and 1 to anything else.

    A token is divergent when its mean delta over layers is larger than the threshold. The default is
    `max(noise, min(median + 3 * 1.4826 * MAD, max / 2))` of the finite means: an outlier by the robust
    standard deviation (Hampel 1974), or, where the change is too broad for outliers to exist, at least half as
    far as the farthest. So it finds something whenever anything exceeds the noise, which is 1e-6 or the
    squared machine epsilon of the coarser dtype (6.1e-5 for bfloat16).

    Examples:
        >>> import torch
        >>> from noesis import Activations
        >>> from noesis import token_deltas
        >>> a = Activations({"block": [torch.eye(4)[None, :3]]})
        >>> b = Activations({"block": [torch.eye(4)[None, [0, 3, 1, 1]]]})
        >>> token_deltas(a, b, ["a", "cat", "sat"], ["a", "big", "cat", "sat"])
        TokenDeltas of 3 aligned tokens x 1 layer
        tokens only in b: 'big' at 1
        1 divergent token (mean 1 - cosine above 1e-06)
        token  a  b  delta  most at
        'sat'  2  3      1    block

    Args:
        a: activations of run a; each layer's calls join to `[batch, tokens, width]`.
        b: activations of run b.
        tokens_a: the tokens run a was fed, as strings or ids; after `generate`, that is all but the last one.
        tokens_b: the tokens run b was fed, of the same kind.
        threshold: a fixed bound for the mean delta of a token instead of the default.
        sample: which batch element to compare.
        by_position: align the n-th token of a with the n-th of b throughout, whatever they are; what the longer run has
            beyond the shorter is left out.

    Returns:
        The deltas, `[aligned tokens, layers]`.

    Raises:
        NoesisError: (a ValueError) when the runs share no layer or no token, or tokens do not fit the activations.
    """
    ids_a, ids_b = as_tokens(tokens_a, "tokens_a"), as_tokens(tokens_b, "tokens_b")
    fixed = None if threshold is None else as_threshold(threshold)
    ran_a, ran_b = ([name for name in acts.layers if acts[name]] for acts in (a, b))
    layers = [name for name in ran_a if name in set(ran_b)]
    if not layers:
        raise BadValue(
            f"the captures share no layer: a has {first_few(ran_a)}, b has {first_few(ran_b)}",
            "two captures with at least one layer of the same name",
            "Capture both runs with the same layers",
        )
    if by_position:
        positions_a = positions_b = list(range(min(len(ids_a), len(ids_b))))
    else:
        positions_a, positions_b = align(ids_a, ids_b)
        if positions_a or {type(token) for token in ids_a} == {type(token) for token in ids_b}:
            positions_a, positions_b = with_substitutions(positions_a, positions_b, len(ids_a), len(ids_b))
    if not positions_a:
        raise BadValue(
            f"the runs share no token: a begins with {ids_a[:4]}, b with {ids_b[:4]}",
            "two token sequences with at least one token in common",
            "Pass both as strings or both as ids, from the same tokenizer, or by_position=True",
        )
    columns, noise = [], NOISE
    for name in layers:
        x, x_eps = _hidden(a, name, "a", ids_a, sample, positions_a)
        y, y_eps = _hidden(b, name, "b", ids_b, sample, positions_b)
        if x.shape != y.shape:
            raise BadValue(
                f"layer {name!r} is {x.shape[1]} wide in a and {y.shape[1]} in b",
                "hidden states of the same width",
                "Compare runs of the same architecture, or capture only layers of equal width",
            )
        columns.append(cosine_delta(x, y))
        noise = max(noise, x_eps**2, y_eps**2)
    values = np.stack(columns, axis=1)
    bound = _default_threshold(values.mean(axis=1), noise) if fixed is None else fixed
    return TokenDeltas(
        values,
        layers,
        ids_a,
        ids_b,
        positions_a,
        positions_b,
        bound,
        only_in_a=[name for name in ran_a if name not in layers],
        only_in_b=[name for name in ran_b if name not in layers],
    )


def _default_threshold(scores: Floats, noise: float) -> float:
    finite = scores[np.isfinite(scores)]
    if not finite.size:
        return noise
    median = float(np.median(finite))
    deviation = 1.4826 * float(np.median(np.abs(finite - median)))
    return max(noise, min(median + 3 * deviation, float(finite.max()) / 2))


def _hidden(
    acts: Activations, name: str, run: str, tokens: list[Token], sample: int, positions: list[int]
) -> tuple[Floats, float]:
    """Hidden states at the positions, float64 `[positions, width]`, and their dtype's machine epsilon."""
    stacked = acts.stacked(name)
    if stacked.shape[1] != len(tokens):
        raise BadValue(
            f"tokens_{run} has {len(tokens)} tokens and layer {name!r} of {run} saw {stacked.shape[1]}",
            "one token per position the model was fed",
            "Include special tokens; the last generated token is never fed; capture a single run",
        )
    if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < stacked.shape[0]:
        raise BadValue(
            f"sample is {sample!r} and the batch of {run} has {stacked.shape[0]}",
            f"a batch element from 0 to {stacked.shape[0] - 1}",
            "Change sample",
        )
    rows = stacked[sample].to(torch.float64)[positions]
    return rows.numpy(), torch.finfo(stacked.dtype).eps
