"""Copying heads: whether a head that looks at a token makes that token likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..numerics import Floats
from .anatomy import Anatomy
from .identifying import Block, results
from .norms import measure_norm
from .replacements import Patch
from .running import run

#: Tokens over which eigenvalues are taken, when there are more.
MOST_TOKENS = 1024
#: Scores of shuffled tokens that are wanted in all, over heads, and for one head at most.
SHUFFLED, MOST_SHUFFLES = 1000, 100


class Copying(NamedTuple):
    """Copying scores `[layers, heads]`, what shuffled tokens score, and p; NaN of heads that have none."""

    scores: Floats
    shuffled: Floats
    p_values: Floats
    left_out: dict[str, str]


def copying(root: nn.Module, anatomy: Anatomy, tokens: Tensor, length: int, seed: int, *, null: bool = True) -> Copying:
    """How much heads copy: sum of eigenvalues over the sum of their magnitudes, of the full OV circuit W_U W_O W_V W_E.

    One is pure copying, minus one its opposite. Values are those that attention computes of token embeddings, through
    the block's own norm, for which one run suffices in which each block is given the embeddings; outputs go through
    the gains of a post-norm and of the final norm. Both are centred over tokens, so that what is said of all tokens
    alike does not count. The eigenvalues are those of the heads' own width: W_V W_E W_U W_O has the same.

    The null gives each token the embedding of another; its scores are pooled over heads.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits", on copying matrices.

    Args:
        root: the model.
        anatomy: of it.
        tokens: ids among which to draw.
        length: the longest row.
        seed: of the draws.
        null: also score shuffled tokens.
    """
    heads = max((block.heads for block in anatomy.blocks), default=0)
    none = np.full((len(anatomy.blocks), heads), np.nan)
    if anatomy.embed is None or anatomy.unembed is None:
        why = "the anatomy has no embedding of tokens, or none that reads the normed output of the last block"
        return Copying(none, none.copy(), none.copy(), {"copying": why})
    generator = torch.Generator().manual_seed(seed)
    drawn = tokens[torch.randperm(len(tokens), generator=generator)[:MOST_TOKENS]]
    left_out: dict[str, str] = {}
    circuits: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, values in _values(root, anatomy, drawn, length, left_out).items():
        written = _written(root, anatomy, layer, drawn)
        if isinstance(written, str):
            left_out[_of(layer)] = written
        else:
            circuits[layer] = _centred(values), written
    scores, shuffled, p_values = none, none.copy(), none.copy()
    for layer, (v, u) in circuits.items():
        scores[layer, : len(v)] = _score(v, u)
    count = int(np.isfinite(scores).sum())
    if null and count:
        times = int(np.clip(-(-SHUFFLED // count), 2, MOST_SHUFFLES))
        draws = np.full((times, *none.shape), np.nan)
        for draw in draws:
            order = torch.randperm(len(drawn), generator=generator)
            for layer, (v, u) in circuits.items():
                draw[layer, : len(v)] = _score(v[:, order], u)
        pool = np.sort(draws[np.isfinite(draws)])
        for layer in circuits:
            shuffled[layer] = draws[:, layer].mean(0)
            above = len(pool) - np.searchsorted(pool, scores[layer], side="left")
            p_values[layer] = np.where(np.isfinite(scores[layer]), (1 + above) / (1 + len(pool)), np.nan)
    return Copying(scores, shuffled, p_values, left_out)


def _score(values: Tensor, written: Tensor) -> Floats:
    """Of each head, from values `[heads, tokens, width]` and logits by direction `[heads, width, tokens]`."""
    circuit = values.transpose(1, 2) @ written.transpose(1, 2)
    finite = circuit.isfinite().all(2).all(1)
    eigenvalues = torch.linalg.eigvals(torch.where(finite[:, None, None], circuit, 0.0))  # nothing: 0 / 0
    found: Floats = (eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)).double().numpy()
    return found


def _of(layer: int) -> str:
    return f"copying of layer {layer}"


def _values(
    root: nn.Module, anatomy: Anatomy, drawn: Tensor, length: int, left_out: dict[str, str]
) -> dict[int, Tensor]:
    """What attention takes from each token `[heads, tokens, width]`, by layer, were the stream its embedding alone."""
    for layer, block in enumerate(anatomy.blocks):
        why = next((block.refused[part] for part in ("v", "result", "resid_pre") if part in block.refused), None)
        if why is not None:
            left_out[_of(layer)] = why
    layers = [layer for layer in range(len(anatomy.blocks)) if _of(layer) not in left_out]
    rows = -(-len(drawn) // length)
    ids = drawn.repeat(2)[: rows * length].reshape(rows, -1) if rows > 1 else drawn[None]
    given = {"input_ids": ids.to(next(root.parameters()).device)}
    try:
        kept = run(root, given, keep=["embed", *(f"resid_pre.{layer}" for layer in layers)], anatomy=anatomy)
    except Exception as error:  # whatever the model raises
        left_out["copying"] = f"the model does not run on tokens alone: {error}"
        return {}
    embedded = kept["embed"]
    for layer in [layer for layer in layers if kept["resid_pre", layer].shape != embedded.shape]:
        left_out[_of(layer)] = "the block is given nothing of the shape of the embedding"
        layers.remove(layer)
    others = [layer for layer in layers if not torch.equal(kept["resid_pre", layer], embedded)]
    edits = [Patch(f"resid_pre.{layer}", embedded) for layer in others]
    values = run(root, given, keep=[f"v.{layer}" for layer in layers], edits=edits, anatomy=anatomy)
    found = {}
    for layer in layers:
        block = anatomy.blocks[layer]
        v = values["v", layer].flatten(0, 1)[: len(drawn)].float().transpose(0, 1)
        found[layer] = v.repeat_interleave(block.heads // block.kv_heads, dim=0)
    return found


def _written(root: nn.Module, anatomy: Anatomy, layer: int, drawn: Tensor) -> Tensor | str:
    """What each direction of a head's values adds to the logits of tokens `[heads, width, tokens]`, but for a scale.

    Or why a norm on the way says nothing of it.
    """
    block: Block = anatomy.blocks[layer]
    projection, unembed = (root.get_submodule(str(name)) for name in (block.out, anatomy.unembed))
    weight = next(projection.parameters())
    each = torch.eye(block.value_width, dtype=weight.dtype, device=weight.device)
    z = each[None, :, None].expand(1, -1, block.heads, -1).contiguous()
    with torch.no_grad():
        written = results(projection, z, (*z.shape[:2], block.heads * block.value_width))[0][0]  # [width, heads, model]
        norms: Sequence[str | None] = [block.attn if block.attn in block.post_norms else None, anatomy.norm]
        for name in filter(None, norms):
            through = _through(root.get_submodule(name), written)
            if isinstance(through, str):
                return through
            written = through
        logits = unembed.forward(written) - unembed.forward(torch.zeros_like(written))
    return _centred(logits[..., drawn.to(logits.device)].float().permute(1, 0, 2).cpu(), dim=2)


def _through(norm: nn.Module, x: Tensor) -> Tensor | str:
    """A norm's linear part, its centring and gains, at one point; the scale that it has there is left in."""
    point = torch.where(torch.arange(x.shape[-1], device=x.device) % 2 == 0, 1.5, -0.5).to(x.dtype)  # none is the mean
    measured = measure_norm(norm, point)
    return measured if isinstance(measured, str) else measured.linear(x.cpu().double()).to(x)


def _centred(x: Tensor, dim: int = 1) -> Tensor:
    return x - x.mean(dim, keepdim=True)
