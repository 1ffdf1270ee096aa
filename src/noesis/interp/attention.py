"""One call of attention: its heads, and the pattern that follows from its queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..internals import SOFTMAX, TORCH_SDPA
from ..layers import hidden_state
from .checks import Check, check_equal

PATTERN = "p v = z"


class Attention(NamedTuple):
    """What one call of attention was given, and what came out of it before the output projection."""

    q: Tensor | None  # [batch, heads, queries, width], after rotary embeddings and norms of queries
    k: Tensor | None  # [batch, kv heads, keys, width]; None where it is not told what went into a softmax
    v: Tensor  # [batch, kv heads, keys, value width]
    z: Tensor  # [batch, queries, heads, value width]
    implementation: str
    causal: bool = False
    scaling: float | None = None
    softcap: float | None = None
    mask: Any = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    pattern: Tensor | None = None  # [batch, heads, queries, keys], where the model itself made it
    by_shapes: bool = False  # batch and heads were one dimension, and only shapes tell them apart


def attention_of(module: Any, given: dict[str, Any], implementation: str, result: Any) -> Attention | str:
    """Read a call of attention by the names of transformers' interface; or why its shapes say nothing of heads."""
    names = ("pattern", "value") if implementation == SOFTMAX else ("query", "key", "value")
    tensors = [*(given.get(name) for name in names), hidden_state(result)]
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() == 4]
    if len(found) < len(tensors):
        what = "pattern" if implementation == SOFTMAX else "queries, keys"
        return f"its {what}, values and output are not all of four dimensions"
    by_shapes = bool(given.get("by_shapes", False))
    if implementation == SOFTMAX:
        p, v, z = found
        fits = p.shape[1] % v.shape[1] == 0 and p.shape[3] == v.shape[2]
        if not fits or z.shape != (p.shape[0], p.shape[2], p.shape[1], v.shape[3]):
            return f"its pattern, values and output of shapes {_shapes(p, v, z)} are not those of heads"
        q, k = given.get("query"), given.get("key")
        return Attention(q, k, v, z, implementation, pattern=p, by_shapes=by_shapes)
    q, k, v, z = found
    fits = (
        q.shape[1] % k.shape[1] == 0
        and k.shape[:3] == v.shape[:3]
        and q.shape[3] == k.shape[3]
        and z.shape == (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    )
    if not fits:
        return f"its queries, keys, values and output of shapes {_shapes(q, k, v, z)} are not those of heads"
    causal = given.get("is_causal")
    return Attention(
        q=q,
        k=k,
        v=v,
        z=z,
        implementation=implementation,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        scaling=given.get("scaling"),
        softcap=given.get("softcap"),
        mask=given.get("attention_mask"),
        bias=given.get("position_bias"),
        sinks=given.get("s_aux"),
        by_shapes=by_shapes,
    )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors)


class Pattern(NamedTuple):
    """An attention pattern `[batch, heads, queries, keys]` in float32, and how well it gives z."""

    tensor: Tensor
    check: Check


def pattern_of(call: Attention) -> Pattern | str:
    """The attention pattern of a call; or why it cannot be recomputed.

    A pattern is given only if it says what the model computed: p v must be z.
    """
    pattern = unverified_pattern(call)
    if isinstance(pattern, str):
        return pattern
    with torch.no_grad():
        check = check_equal(PATTERN, call.z.transpose(1, 2), pattern @ _values(call))
    if not check.holds:
        return "the pattern that follows from q and k is not what the model used: p v differs from z"
    return Pattern(pattern, check)


def unverified_pattern(call: Attention) -> Tensor | str:
    """The same without the check, which compiled code cannot decide by: softmax(cap(scale q k^T) + bias + mask).

    Sinks are one more key, which is dropped after the softmax. Where the model itself made the pattern, it is that one.
    """
    if call.pattern is not None:
        return call.pattern.float()
    assert call.q is not None
    assert call.k is not None
    if call.implementation not in ("sdpa", "eager", TORCH_SDPA):
        return f"the masks of attention by {call.implementation!r} are its own (sdpa and eager are known)"
    if call.mask is not None and not (isinstance(call.mask, Tensor) and call.mask.dim() == 4):
        return "its mask is no tensor of four dimensions"
    group = call.q.shape[1] // call.k.shape[1]
    keys = _each_head(call.k, group)
    scale = call.q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = call.q.float() @ keys.transpose(2, 3) * scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.bias is not None:
        scores = scores + call.bias.float()
    queries, length = scores.shape[2:]
    if call.mask is not None:
        mask = call.mask[..., :length]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    elif _is_causal(call, queries):  # as torch does it: from the upper left
        scores = scores + _causal(queries, length, scores.device)
    if call.sinks is not None:
        sinks = call.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    pattern = scores.softmax(-1)[..., :length]
    if call.mask is not None and call.mask.dtype == torch.bool:  # where a query may see nothing, sdpa gives zeros
        pattern = pattern.nan_to_num(0.0)
    return pattern


def _is_causal(call: Attention, queries: int) -> bool:
    if call.implementation == "sdpa":  # with one query, transformers says nothing to torch
        return call.causal and queries > 1
    return call.implementation == TORCH_SDPA and call.causal


def _values(call: Attention) -> Tensor:
    """The values in float32, one for each head of the queries."""
    return _each_head(call.v, call.z.shape[2] // call.v.shape[1])


def _each_head(tensor: Tensor, group: int) -> Tensor:
    return tensor.float() if group == 1 else tensor.float().repeat_interleave(group, dim=1)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """What keys that are later than a query are added."""
    return torch.full((queries, keys), -torch.inf, device=device).triu(1)


def with_pattern(call: Attention, old: Tensor, new: Tensor) -> Tensor:
    """The z of a call with another pattern; bit for bit its own where the pattern stays."""
    change = ((new - old) @ _values(call)).transpose(1, 2)
    return (call.z.float() + change).to(call.z.dtype)
