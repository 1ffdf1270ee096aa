"""The end of a model, all that comes after its last block, by which a residual stream becomes logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import BadType, BadValue
from ..layers import parameters_of
from .anatomy import Anatomy, called_and_root, logits_of
from .padding import counted_positions
from .recording import LOGITS_TO_KEEP as KEEP
from .recording import arguments
from .replaying import Replay


class Piece(NamedTuple):
    """Logits of some positions, by the lens and by the model, `[batch, positions, vocabulary]`."""

    logits: Tensor
    final: Tensor
    counted: Tensor  # [batch, positions], which are no padding
    at: slice


class End:
    """What comes after a model's last block, with a run whose streams go through it.

    Attributes:
        replay: the run.
        stream: layer -> what its block was given, and last what the last one returned, `[batch, tokens, width]`.
        layers: their sites.
        final: the logits that the model returned, `[batch, positions, vocabulary]`.
        positions: of the logits.
        pooled: whether there is one prediction for all positions.
        counted: bool `[batch, positions]`, which are no padding.
    """

    def __init__(self, model: Any, inputs: Any, anatomy: Anatomy | None, max_bytes: int = 1 << 28) -> None:
        root = called_and_root(model)[1]
        args, kwargs = arguments(inputs)
        self.replay = Replay(model, inputs, anatomy=anatomy)
        self.stream = self.replay.stream()
        *layers, _end = self.stream
        self.layers = [*(f"resid_pre.{layer}" for layer in layers), f"resid_post.{layers[-1]}"]
        logits = logits_of(self.replay.output)
        self.pooled = logits is not None and logits.dim() == 2
        self.final = self._of(self.replay.output)
        hidden = self.stream[len(self.replay.anatomy.blocks)]
        if hidden.dim() != 3 or self.final.shape[0] != hidden.shape[0]:
            raise BadValue(
                f"logits of shape {tuple(self.final.shape)} and a stream of shape {tuple(hidden.shape)}",
                "a stream [batch, tokens, width] and logits of each row",
                "Give inputs of that kind",
            )
        batch, tokens = hidden.shape[:2]
        self.vocabulary = self.final.shape[-1]
        if self.pooled and self.vocabulary == tokens:
            raise BadValue(
                f"logits [{batch}, {tokens}], as many as tokens, which may be one number for each token",
                "logits over classes or a vocabulary",
                "If they are of classes, give an input of another length",
            )
        self.positions = _positions(kwargs.get(KEEP), self.final.shape[1], tokens)
        self.tokens = tokens
        counted = counted_positions(root, args, kwargs, batch, tokens)
        self.counted = torch.ones(self.final.shape[:2], dtype=torch.bool, device=self.final.device)
        if counted is not None and not self.pooled and max(self.positions) < tokens:
            self.counted = counted.to(self.final.device)[:, self.positions]
        size = max(1, max_bytes // max(1, 4 * batch * self.vocabulary))
        self.cuts = [slice(at, at + size) for at in range(0, self.final.shape[1], size)]
        self.by_pieces = len(self.cuts) > 1 and KEEP in parameters_of(root.forward) and KEEP not in kwargs

    @staticmethod
    def _of(output: Any) -> Tensor:
        logits = logits_of(output)
        if logits is None or logits.dim() not in (2, 3):
            raise BadValue(
                f"the model returned {type(output).__name__} without logits [batch, tokens, vocabulary]",
                "a model with a head",
                "Give the model with its head, such as AutoModelForCausalLM's",
            )
        return logits if logits.dim() == 3 else logits[:, None]

    def pieces(self, resid: Tensor) -> Iterator[Piece]:
        """What a stream becomes at the end of the model, some positions at a time."""
        last = len(self.replay.anatomy.blocks)
        whole = None if self.by_pieces else self._of(self.replay.from_block(last, resid))
        for at in self.cuts:
            if whole is None:
                chosen = torch.arange(self.final.shape[1], device=resid.device)[at]
                logits = self._of(self.replay.from_block(last, resid, (), **{KEEP: chosen}))
            else:
                logits = whole[:, at]
            yield Piece(logits, self.final[:, at], self.counted[:, at], at)

    def followed(self, tokens: int | Sequence[int] | None) -> list[int]:
        """The tokens that are asked for.

        Raises:
            NoesisError: (a ValueError) for one that is not there.
        """
        listed: Any = tokens.tolist() if isinstance(tokens, (Tensor, np.ndarray)) else tokens
        listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
        if not all(type(token) is int and 0 <= token < self.vocabulary for token in listed):
            raise BadValue(f"tokens is {tokens!r}", f"ids of tokens from 0 to {self.vocabulary - 1}", "Pass [id, id]")
        return list(listed)

    def following(self, given: Tensor | None) -> Tensor:
        """Which token comes next at each of the positions, `[batch, positions]`; -1 where that is not known.

        Raises:
            NoesisError: (a ValueError or TypeError) for tokens that do not fit.
        """
        batch = self.final.shape[0]
        found = torch.full((batch, max(self.tokens, max(self.positions) + 1)), -1)
        if given is None:
            return found[:, self.positions].to(self.final.device)
        if not isinstance(given, Tensor) or given.is_floating_point():
            raise BadType(f"next_tokens is a {type(given).__name__}", "a tensor of token ids", "Pass ids[:, 1:]")
        fits = given.dim() == 2 and given.shape[0] == batch and given.shape[1] in (self.tokens, self.tokens - 1)
        if not fits or (given >= self.vocabulary).any():
            raise BadValue(
                f"next_tokens of shape {tuple(given.shape)}",
                f"ids below {self.vocabulary} of shape {(batch, self.tokens)}, or one shorter",
                "Pass ids[:, 1:]",
            )
        found[:, : given.shape[1]] = given
        return found[:, self.positions].to(self.final.device)


def _positions(kept: Any, count: int, tokens: int) -> list[int]:
    """Which positions the logits are of, where a model was asked for some of them."""
    if isinstance(kept, Tensor):
        return [int(at) % tokens for at in kept]
    return list(range(tokens - count, tokens)) if isinstance(kept, int) and kept else list(range(count))
