"""One call of attention: its heads, and the pattern that follows from its queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import hidden_state
from .checks import Check, check_equal

PATTERN = "p v = z"


class Attention(NamedTuple):
    """What one call of attention was given, and what came out of it before the output projection."""

    q: Tensor  # [batch, heads, queries, width], after rotary embeddings and norms of queries
    k: Tensor  # [batch, kv heads, keys, width]
    v: Tensor  # [batch, kv heads, keys, value width]
    z: Tensor  # [batch, queries, heads, value width]
    implementation: str
    causal: bool
    scaling: float | None
    softcap: float | None
    mask: Any
    bias: Tensor | None
    sinks: Tensor | None

    def component(self, name: str) -> Tensor:
        """`q`, `k`, `v` or `z` as it is kept: `[batch, tokens, heads, width]`."""
        tensor: Tensor = getattr(self, name)
        return tensor if name == "z" else tensor.transpose(1, 2)


def attention_of(module: Any, given: dict[str, Any], implementation: str, result: Any) -> Attention | str:
    """Read a call of transformers' attention interface; or why its shapes say nothing of heads."""
    tensors = [given.get("query"), given.get("key"), given.get("value"), hidden_state(result)]
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() == 4]
    if len(found) < len(tensors):
        return "its queries, keys, values and output are not all of four dimensions"
    q, k, v, z = found
    fits = (
        q.shape[1] % k.shape[1] == 0
        and k.shape[:3] == v.shape[:3]
        and q.shape[3] == k.shape[3]
        and z.shape == (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    )
    if not fits:
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in (q, k, v, z))
        return f"its queries, keys, values and output of shapes {shapes} are not those of heads"
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
    )


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

    Sinks are one more key, which is dropped after the softmax.
    """
    if call.implementation not in ("sdpa", "eager"):
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
    elif call.implementation == "sdpa" and call.causal and queries > 1:  # as torch does it: from the upper left
        scores = scores + _causal(queries, length, scores.device)
    if call.sinks is not None:
        sinks = call.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    pattern = scores.softmax(-1)[..., :length]
    if call.mask is not None and call.mask.dtype == torch.bool:  # where a query may see nothing, sdpa gives zeros
        pattern = pattern.nan_to_num(0.0)
    return pattern


def _values(call: Attention) -> Tensor:
    """The values in float32, one for each head of the queries."""
    return _each_head(call.v, call.q.shape[1] // call.k.shape[1])


def _each_head(tensor: Tensor, group: int) -> Tensor:
    return tensor.float() if group == 1 else tensor.float().repeat_interleave(group, dim=1)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """What keys that are later than a query are added."""
    return torch.full((queries, keys), -torch.inf, device=device).triu(1)


def with_pattern(call: Attention, old: Tensor, new: Tensor) -> Tensor:
    """The z of a call with another pattern; bit for bit its own where the pattern stays."""
    change = ((new - old) @ _values(call)).transpose(1, 2)
    return (call.z.float() + change).to(call.z.dtype)
