"""The linear layers that make queries, keys and values, and which of their outputs are which head's: by gradients.

A gradient at one head's queries concerns the few outputs of the layer that are this head's, so that it is brought back
through these alone, at the cost of one head. Where a layer's outputs are not of one head each, as where a norm is over
all of them, it is brought back through the whole layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .aside import aside
from .checks import check_equal


class Passed(NamedTuple):
    """A linear layer that ran, in a graph: what it was given and returned."""

    name: str
    module: nn.Module
    given: Tensor  # [batch, tokens, inputs]
    output: Tensor


class Projection(NamedTuple):
    """The layer of one component, by heads."""

    name: str
    places: Tensor  # of each head's outputs, int64 [heads, several]
    matrix: Tensor  # from these to the inputs, [heads, several, inputs]

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient at the layer's input through each head, `[heads, batch, tokens, inputs]`.

        Args:
            gradient: at the layer's output, `[batch, tokens, outputs]`, of all heads.
        """
        found: Tensor = torch.einsum("bths,hsi->hbti", gradient[..., self.places], self.matrix.to(gradient.dtype))
        return found


def matrix_of(linear: nn.Module, inputs: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer's matrix `[inputs, outputs]` and bias, whatever kind of layer it is (LoRA, quantised, Conv1D)."""
    with aside(), torch.no_grad():
        rows = torch.eye(inputs, dtype=like.dtype, device=like.device)[None]
        bias: Any = linear.forward(torch.zeros_like(rows[:, :1]))
        made: Any = linear.forward(rows)
    return (made - bias)[0], bias[0, 0]


def one_head_each(gradient: Tensor) -> Tensor:
    """Gradients `[heads, batch, tokens, heads, width]`, each of one head alone, of one of all."""
    heads = gradient.shape[2]
    alone = gradient.new_zeros(heads, *gradient.shape)
    at = torch.arange(heads, device=gradient.device)
    alone[at, :, :, at] = gradient.movedim(2, 0)
    return alone


def find_projection(heads: Tensor, passed: list[Passed], known: dict[str, tuple[Tensor, Tensor]]) -> Projection | None:
    """The layer that heads come from, if one alone does and each of its outputs is of one head.

    Args:
        heads: `[batch, tokens, heads, width]`, in the graph.
        passed: layers that may be it.
        known: matrices and biases of those that were asked for them, which are added to.
    """
    layers = [
        each
        for each in passed
        if each.output.requires_grad and each.output.dim() == 3 and each.output.shape[:2] == heads.shape[:2]
    ]
    if not layers or not heads.requires_grad:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(heads.shape, generator=generator).to(heads)
    outputs = [each.output for each in layers]
    found = torch.autograd.grad(
        heads, outputs, one_head_each(drawn), retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    feeding = [(layer, each) for layer, each in zip(layers, found, strict=True) if each is not None]
    if len(feeding) != 1:
        return None
    layer, gradients = feeding[0]
    concerned = (gradients != 0).flatten(1, 2).any(1)  # [heads, outputs]
    counts = concerned.sum(1)
    if int(concerned.sum(0).max()) > 1 or int(counts.min()) != int(counts.max()) or not int(counts[0]):
        return None
    if layer.name not in known:
        known[layer.name] = matrix_of(layer.module, layer.given.shape[-1], layer.given)
    matrix, bias = known[layer.name]
    if not check_equal("", layer.output.detach(), layer.given.detach() @ matrix + bias).holds:
        return None
    places = concerned.nonzero()[:, 1].reshape(len(concerned), -1)
    return Projection(layer.name, places, matrix.T[places])
