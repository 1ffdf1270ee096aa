"""The logit lens, by the end of the model itself: what it would say if it ended after each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import BadValue
from ..numerics import Floats
from .anatomy import Anatomy, no_step
from .ends import End, Piece
from .lens import Lens
from .metrics import kl_divergence
from .tuned_lens import TunedLens


def logit_lens(
    model: Any,
    inputs: Any,
    *,
    tokens: int | Sequence[int] | None = None,
    next_tokens: Tensor | None = None,
    k: int = 5,
    lens: TunedLens | None = None,
    anatomy: Anatomy | None = None,
    max_bytes: int = 1 << 28,
) -> Lens:
    """What the model would say if it ended after each layer (nostalgebraist 2020, "interpreting GPT: the logit lens").

    The residual stream goes through the real end of the model, all that comes after its last block, whatever that is:
    final norm, unembedding, softcap, scale, a head of several layers. No part of it is known by name. The last layer is
    bit for bit what the model returns.

    Its control: what the same layer says at other positions. A layer that knows nothing of its own position agrees no
    more with the final distribution than that.

    Examples:
        >>> import torch
        >>> from noesis import interp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32,
        ...     hidden_size=16,
        ...     intermediate_size=24,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ...     bos_token_id=1,
        ...     eos_token_id=2,
        ...     pad_token_id=0,
        ... )
        >>> _ = torch.manual_seed(0)
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> found = interp.logit_lens(LlamaForCausalLM(config).eval(), ids, next_tokens=ids[:, 1:])
        >>> found.layers, found.kl.shape
        (['resid_pre.0', 'resid_pre.1', 'resid_post.1'], (3, 1, 4))
        >>> float(found.kl[-1].max()), float(found.agreement[-1].min())
        (0.0, 1.0)

    Args:
        model: an `nn.Module` in eval mode that returns logits, or the result of `noesis.wrap`.
        inputs: a mapping of arguments, a tuple of them, or one.
        tokens: ids of tokens whose rank and probability to give.
        next_tokens: int64 `[batch, tokens]` or one shorter, which token follows each; negative where that is not known.
        k: how many of the most likely tokens to give, if there are as many.
        lens: a `TunedLens` of this model, through which the stream goes first.
        anatomy: of this model; without it, it is found by one more forward.
        max_bytes: of float32 logits at a time, beside the model's own. Where all would be more, positions are taken in
            pieces; of a model that can be asked for some (`logits_to_keep`), no more are computed, and their last bits
            may differ. To look at the last n positions alone, give `logits_to_keep=n` among the inputs.

    Raises:
        NoesisError: (a ValueError) for a model without logits, one whose blocks cannot be skipped, tokens that are not
            there, or a lens of another model; (a RuntimeError) for a model in training mode.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise BadValue(f"k is {k!r}", "a number of tokens, at least 1", "Pass 5")
    with no_step(model), torch.no_grad():
        end = End(model, inputs, anatomy, max_bytes)
        followed, following = end.followed(tokens), end.following(next_tokens)
        if lens is not None:
            lens.check(end.layers, next(iter(end.stream.values())).shape[-1])
        readings = []
        for name, resid in zip(end.layers, end.stream.values(), strict=True):
            through = resid if lens is None else lens.apply(name, resid)
            readings.append(_joined([_read(piece, followed, following, k) for piece in end.pieces(through)]))
    return Lens(
        end.layers,
        end.positions,
        **{name: np.stack([each.values[name] for each in readings]) for name in readings[0].values},
        control_kl=np.array([each.control_kl for each in readings]),
        control_agreement=np.array([each.control_agreement for each in readings]),
        tokens=followed,
        by="logit lens" if lens is None else "tuned lens",
        meta={"model": end.replay.anatomy.model},
    )


class _Reading(NamedTuple):
    """What one layer says: statistics by name `[batch, positions, ...]`, and the control as means over rows."""

    values: dict[str, Any]
    control_kl: float
    control_agreement: float
    rows: int


def _read(piece: Piece, followed: list[int], following: Tensor, k: int) -> _Reading:
    logits, final, counted, at = piece
    layer, model = logits.float().log_softmax(-1), final.float().log_softmax(-1)
    best, best_final = logits.argmax(-1), final.argmax(-1)
    top = layer.topk(min(k, layer.shape[-1]))
    probability = layer[..., followed].exp()
    ranks = [(logits > logits[..., token, None]).sum(-1) for token in followed]
    known = following[:, at]
    nll = -layer.gather(-1, known.clamp_min(0)[..., None])[..., 0].masked_fill(known < 0, torch.nan)
    # The control: of what is no padding, what the layer says half of all positions further on.
    here = counted.flatten().nonzero()[:, 0]
    there = here.roll(len(here) // 2)
    elsewhere = kl_divergence(model.flatten(0, 1)[here], layer.flatten(0, 1)[there])
    agrees = (best.flatten()[there] == best_final.flatten()[here]).double()
    rows = len(here) if len(here) > 1 else 0

    def kept(values: Tensor) -> Floats:
        padding = ~counted.reshape(*counted.shape, *[1] * (values.dim() - 2))
        numbers: Floats = values.double().masked_fill(padding, torch.nan).cpu().numpy()
        return numbers

    values = {
        "top_tokens": top.indices.masked_fill(~counted[..., None], -1).cpu().numpy(),
        "top_probabilities": kept(top.values.exp()),
        "kl": kept(kl_divergence(model, layer)),
        "agreement": kept(best == best_final),
        "nll": kept(nll),
        "rank": kept(torch.stack(ranks, -1) if ranks else probability),
        "probability": kept(probability),
    }
    return _Reading(values, _mean(elsewhere, rows), _mean(agrees, rows), rows)


def _mean(values: Tensor, rows: int) -> float:
    return float(values.mean()) if rows else np.nan


def _joined(pieces: Sequence[_Reading]) -> _Reading:
    """Pieces along the positions."""
    rows = sum(each.rows for each in pieces)

    def mean(values: list[float]) -> float:
        told = [value * each.rows for value, each in zip(values, pieces, strict=True) if each.rows]
        return sum(told) / rows if rows else np.nan

    return _Reading(
        {name: np.concatenate([each.values[name] for each in pieces], axis=1) for name in pieces[0].values},
        mean([each.control_kl for each in pieces]),
        mean([each.control_agreement for each in pieces]),
        rows,
    )
