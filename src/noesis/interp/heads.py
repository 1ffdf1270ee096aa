"""What attention heads look at: previous tokens, copies, what followed copies; each beside its controls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import BadValue
from ..numerics import Floats, paired_tests
from ..wrapping import unwrapped
from .anatomy import Anatomy, anatomy_of, called_and_root
from .copying import Copying, copying
from .edits import Zero
from .head_scores import KINDS, SHARPER, HeadScores
from .recording import arguments
from .repeats import beginning, repeated, room, spoken, text_of, vocabulary
from .running import run
from .scoring import Scored, score_patterns
from .untrained import untrained

#: Bytes of patterns that are held at a time.
MOST_BYTES = 1 << 28
#: A spread over rows that is smaller is taken to be this.
LEAST_SPREAD = 1e-3


def heads(model: nn.Module, inputs: Any = None, *, seed: int = 0) -> HeadScores:
    """Score every attention head for what it looks at, beside what would be seen if it meant nothing.

    | kind | score, a mean over queries | source |
    |---|---|---|
    | `previous` | attention to the token before | Olsson et al. 2022 |
    | `duplicate` | to earlier copies of the token, all together, but for the first token of a row | Wang et al. 2022 |
    | `induction` | to what followed earlier copies, all together ("prefix matching") | Olsson et al. 2022 |
    | `first` | to the first token, where many heads rest | |
    | `entropy` | of the attention pattern, in nats | |
    | `copying` | sum of eigenvalues / sum of magnitudes of W_U W_O W_V W_E, by weights alone | Elhage et al. 2021 |

    Controls: what uniform attention over the same keys scores (for copying, tokens that are shuffled); what the best
    head of an untrained copy scores on the same rows; for copies, what the head scores by position alone, that is with
    its attention in the other rows, whose periods differ. A head that looks a fixed way back is no induction head.
    p-values are one-sided, of Student's paired t over rows against the largest control, adjusted over all heads.

    Without inputs, 16 rows of random, distinct tokens are read, each said again with a period of its own, after the
    token that rows begin with (`bos_token_id`) where the configuration has one. Left out are tokens that it calls
    special, and those that the model never expects.

    Examples:
        >>> from noesis import interp
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = dict(vocab_size=50, n_positions=40, n_embd=16, n_layer=2, n_head=2)
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
        >>> scores = interp.heads(model)
        >>> scores["induction"].shape, scores.found("induction")
        ((2, 2), [])

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        inputs: what to read instead, as in `interp.run`; two rows or more for p-values. Needed for a model that reads
            no tokens alone, such as a vision transformer.
        seed: of random tokens and of the untrained copy.

    Raises:
        NoesisError: (a ValueError) where no head's pattern can be given, or no random tokens; (a RuntimeError) for a
            model in training mode.
    """
    _, root = called_and_root(model)
    with unwrapped(root):  # they are no steps of the user's
        return _heads(root, inputs, seed)


def _heads(root: nn.Module, inputs: Any, seed: int) -> HeadScores:
    given, tokens = inputs is not None, vocabulary(root)
    if not given:
        if tokens is None:
            raise BadValue(
                f"{type(root).__name__} has no get_input_embeddings() with a weight, so there are no tokens to draw",
                "a language model, or inputs",
                "Pass inputs=, what the model is called with",
            )
        device = next(root.parameters()).device
        length = room(root)
        tokens = spoken(root, tokens, length, seed)
        inputs = {"input_ids": repeated(tokens, length, seed, beginning(root)).to(device)}
    args, kwargs = arguments(inputs)
    found = anatomy_of(root, args, kwargs)
    plain = untrained(root, seed=seed)
    text, read = text_of(inputs), {}
    left_out = {f"layer {n}": b.refused["pattern"] for n, b in enumerate(found.blocks) if "pattern" in b.refused}
    for layer, ours, theirs, even in _patterns(root, plain, inputs, found):
        scored = score_patterns(ours, theirs, even, text)
        if isinstance(scored, str):
            left_out[f"layer {layer}"] = scored
        else:
            read[layer] = scored
    if not read:
        raise BadValue(
            f"no attention pattern of {found.model} can be scored: {next(iter(left_out.values()))}",
            "a model with self-attention that can be read",
            "print(interp.anatomy(model, ...)) says what works",
        )
    copies, others = _copying(root, found, tokens, seed), _copying(plain, found, tokens, seed, null=False)
    rows = max(len(scored["entropy"].score) for scored in read.values())
    shape = (rows, *copies.scores.shape)
    none = np.full(shape[1:], np.nan)
    judged = {"copying": [copies.scores, copies.shuffled, none, others.scores, copies.shuffled, copies.p_values]}
    for kind in KINDS:
        if kind not in judged:
            judged[kind] = _judged(_stacked({n: each[kind] for n, each in read.items() if kind in each}, shape), kind)
            if np.isnan(judged[kind][0]).all():
                left_out[kind] = "no token is said again" if text.ids is not None else "what is read has no tokens"
                continue
            silent = [layer for layer in read if np.isnan(judged[kind][0][layer]).all()]
            left_out |= {f"{kind} of layer {layer}": "of what it sees, no token is said again" for layer in silent}
    arrays = {name: np.stack([judged[kind][n] for kind in KINDS]) for n, name in enumerate(HeadScores.ARRAYS)}
    if rows < 2:
        left_out["p-values"] = "one row alone says nothing of how they vary; give two or more"
    meta = {"model": found.model, "seed": seed, "read": "inputs" if given else f"{room(root)} random tokens"}
    return HeadScores(**arrays, rows=rows, left_out=left_out | copies.left_out, meta=meta)


def _patterns(
    root: nn.Module, plain: nn.Module, inputs: Any, found: Anatomy
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Layer by layer the patterns of a model, of its untrained copy, and of even attention.

    Runs are of so many layers at a time as memory allows.
    """
    layers = [layer for layer, block in enumerate(found.blocks) if "pattern" not in block.refused]
    some = 1
    while layers:
        group, layers = layers[:some], layers[some:]
        keep, even = [f"pattern.{layer}" for layer in group], [Zero(f"q.{layer}") for layer in group]
        runs = [
            run(model, inputs, keep=keep, edits=edits, anatomy=found, max_bytes=1 << 62)
            for model, edits in ((root, []), (plain, []), (root, even))
        ]
        for layer, site in zip(group, keep, strict=True):
            ours, theirs, evenly = (each[site] for each in runs)
            yield layer, ours, theirs, evenly
        largest = max(each.numel() * each.element_size() for site in keep for each in runs[0].activations[site])
        some = max(1, MOST_BYTES // (len(runs) * largest))


def _stacked(layers: dict[int, Scored], shape: tuple[int, ...]) -> Floats:
    """What layers score, `[4, rows, layers, heads]`, NaN where there is nothing."""
    stacked = np.full((4, *shape), np.nan)
    for layer, scored in layers.items():
        for array, values in zip(stacked, scored, strict=True):
            array[: len(values), layer, : values.shape[1]] = values.numpy()
    return stacked


def _judged(stacked: Floats, kind: str) -> list[Floats]:
    """Means over rows of the score and of its controls, the largest control, and p."""
    sign = -1.0 if kind in SHARPER else 1.0
    with warnings.catch_warnings():  # all NaN gives NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        score, uniform, by_position, untrained_ = (np.nanmean(each, axis=0) for each in stacked)
        best = np.argmax(np.nan_to_num(sign * untrained_, nan=-np.inf))
        rows = stacked[3].reshape(len(stacked[3]), -1)[:, best, None, None]
        control = sign * np.fmax(np.fmax(sign * stacked[1], sign * stacked[2]), sign * rows)
        control[np.isnan(stacked[0])] = np.nan
        past = sign * (stacked[0] - control)
        mean_control = np.nanmean(control, axis=0)
    p_values = np.full(score.shape, np.nan)
    past = past[np.isfinite(past).any((1, 2))]
    known = np.isfinite(past).all(0) & (len(past) >= 2)
    if known.any():
        p_values[known] = paired_tests(past[:, known], LEAST_SPREAD, larger=True)
    return [score, uniform, by_position, untrained_, mean_control, p_values]


def _copying(root: nn.Module, found: Anatomy, tokens: Tensor | None, seed: int, *, null: bool = True) -> Copying:
    if tokens is None:
        none = np.full((len(found.blocks), max(block.heads for block in found.blocks)), np.nan)
        return Copying(none, none, none, {"copying": "the model has no embedding of tokens"})
    return copying(root, found, tokens, room(root), seed, null=null)
