"""Copying heads: whether a head that looks at a token makes that token likelier."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..numerics import Floats
from .anatomy import Anatomy
from .identifying import Block, results
from .recording import hidden_input
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
    try:
        values, left_out = _values(root, anatomy, drawn, length)
    except Exception as error:  # whatever the model raises
        return Copying(none, none.copy(), none.copy(), {"copying": f"the model does not run on tokens alone: {error}"})
    circuits = {layer: (_centred(v), _written(root, anatomy, layer, drawn)) for layer, v in values.items()}
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


def _values(root: nn.Module, anatomy: Anatomy, drawn: Tensor, length: int) -> tuple[dict[int, Tensor], dict[str, str]]:
    """What attention takes from each token `[heads, tokens, width]`, by layer, were the stream its embedding alone."""
    left_out = {}
    for layer, block in enumerate(anatomy.blocks):
        why = next((block.refused[part] for part in ("v", "result") if part in block.refused), None)
        if why is not None:
            left_out[f"copying of layer {layer}"] = why
    layers = [layer for layer in range(len(anatomy.blocks)) if f"copying of layer {layer}" not in left_out]
    embedding = root.get_submodule(str(anatomy.embed))
    embedded: list[Tensor] = []

    def embeds(_module: nn.Module, _args: Any, output: Tensor) -> None:
        embedded[:] = [output.detach()]

    swapped: set[nn.Module] = set()

    def begins(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = hidden_input(args, kwargs)
        if given is None or not embedded or embedded[0].shape != given.shape:
            return None
        swapped.add(module)
        swap = {id(given): embedded[0]}
        return tuple(swap.get(id(arg), arg) for arg in args), {key: swap.get(id(a), a) for key, a in kwargs.items()}

    rows = -(-len(drawn) // length)
    ids = drawn.repeat(2)[: rows * length].reshape(rows, -1) if rows > 1 else drawn[None]
    device = next(root.parameters()).device
    with ExitStack() as leaving:
        leaving.callback(embedding.register_forward_hook(embeds).remove)
        for layer in layers:
            module = root.get_submodule(anatomy.blocks[layer].name)
            leaving.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
        kept = run(root, {"input_ids": ids.to(device)}, keep=[f"v.{layer}" for layer in layers], anatomy=anatomy)
    found = {}
    for layer in layers:
        block = anatomy.blocks[layer]
        if root.get_submodule(block.name) not in swapped:
            left_out[f"copying of layer {layer}"] = "the block is given nothing of the shape of the embedding"
            continue
        v = kept["v", layer].flatten(0, 1)[: len(drawn)].float().transpose(0, 1)
        found[layer] = v.repeat_interleave(block.heads // block.kv_heads, dim=0)
    return found, left_out


def _written(root: nn.Module, anatomy: Anatomy, layer: int, drawn: Tensor) -> Tensor:
    """What each direction of a head's values adds to the logits of tokens `[heads, width, tokens]`, but for a scale."""
    block: Block = anatomy.blocks[layer]
    projection, unembed = (root.get_submodule(str(name)) for name in (block.out, anatomy.unembed))
    weight = next(projection.parameters())
    each = torch.eye(block.value_width, dtype=weight.dtype, device=weight.device)
    z = each[None, :, None].expand(1, -1, block.heads, -1).contiguous()
    with torch.no_grad():
        written = results(projection, z, (*z.shape[:2], block.heads * block.value_width))[0][0]  # [width, heads, model]
        norms: Sequence[str | None] = [block.attn if block.attn in block.post_norms else None, anatomy.norm]
        for name in filter(None, norms):
            written = _through(root.get_submodule(name), written)
        logits = unembed.forward(written) - unembed.forward(torch.zeros_like(written))
    return _centred(logits[..., drawn.to(logits.device)].float().permute(1, 0, 2).cpu(), dim=2)


def _through(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm's linear part, its centring and gains, measured at one point; its scale there is left in."""
    point = torch.where(torch.arange(x.shape[-1], device=x.device) % 2 == 0, 1.5, -0.5).to(x.dtype)  # none is the mean
    at, moved, opposite = (norm.forward(given).float() for given in (point, point + 1, -point))
    centres = torch.allclose(at, moved, atol=1e-3)
    gains = (at - opposite) / (2 * (point - point.mean() * centres))  # without the bias
    through: Tensor = (x.float() - x.float().mean(-1, keepdim=True) * centres) * gains
    return through.to(x.dtype)


def _centred(x: Tensor, dim: int = 1) -> Tensor:
    return x - x.mean(dim, keepdim=True)
