"""Metrics: one number per example, from what a model returned, and where in the logits they look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import BadType, BadValue
from .anatomy import logits_of

#: Token ids: one for all examples, one each, or several each.
Tokens: TypeAlias = "int | Sequence[int] | Sequence[Sequence[int]] | Tensor"
#: A position for all examples, or one each.
Positions: TypeAlias = "int | Sequence[int] | Tensor"


class Metric(ABC):
    """One number per example, never a mean, from the logits at one position of each.

    Called with what a model returned for all examples, it gives a float64 tensor `[batch]`. Class logits
    `[batch, classes]` have no positions. Whoever runs the model for a metric can ask it where it looks, and have
    logits there alone.

    Examples:
        >>> import torch
        >>> from noesis import interp
        >>> metric = interp.logit_difference(right=[1, 0], wrong=[0, 2])
        >>> metric(torch.tensor([[[0.0, 0.0, 9.0], [0.5, 2.0, 0.0]], [[0.0, 0.0, 0.0], [3.0, 0.0, 1.0]]]))
        tensor([1.5000, 2.0000], dtype=torch.float64)

    Attributes:
        name: what it measures, for tables and pictures.
        positions: int64 `[batch]` or one for all, counted from the end where negative; None for the last token, which
            in a padded batch is the last that is no padding, once `bound` to the inputs.
        tokens: int64 `[batch, several]` or `[1, several]`, those whose logits it needs; None for all.
    """

    name: str

    def __init__(self, positions: Positions | None) -> None:
        self.positions = None if positions is None else _whole(positions, "positions")
        if self.positions is not None and self.positions.dim() > 1:
            raise BadValue(
                f"positions has shape {tuple(self.positions.shape)}", "one position, or one per example", "Pass [batch]"
            )
        self.tokens: Tensor | None = None

    def __call__(self, output: Any) -> Tensor:
        """One number per example, float64 `[batch]`.

        Raises:
            NoesisError: (a ValueError) when there are no logits, or positions, tokens and examples do not fit.
        """
        logits = logits_of(output)
        if logits is None or logits.dim() not in (2, 3):
            what = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise BadValue(
                f"{self.name} was given {what}",
                "logits [batch, tokens, vocabulary] or [batch, classes]",
                "Pass what the model returned",
            )
        if logits.dim() == 3:
            rows = torch.arange(len(logits), device=logits.device)
            logits = logits[rows, self.places(len(logits), logits.shape[1]).to(logits.device)]
        elif self.positions is not None:
            raise BadValue(f"{self.name} has positions, and logits have none", "logits by position", "Leave them out")
        return self.score(logits)

    def places(self, batch: int, length: int) -> Tensor:
        """Where it looks in each example of a batch with so many positions: int64 `[batch]`, from 0.

        Raises:
            NoesisError: (a ValueError) for positions that are not there, or of another number of examples.
        """
        given = torch.tensor(-1) if self.positions is None else self.positions
        if given.dim() and len(given) not in (1, batch):
            raise BadValue(
                f"{self.name} has positions of {len(given)} examples, and there are {batch}",
                "one position, or one per example",
                "Pass as many",
            )
        if bool(((given < -length) | (given >= length)).any()):
            raise BadValue(
                f"{self.name} looks at position {given.tolist()}",
                f"positions from {-length} to {length - 1}",
                "Check it",
            )
        return (given % length).expand(batch)

    @abstractmethod
    def score(self, logits: Tensor) -> Tensor:
        """The metric of logits `[batch, vocabulary]` that were taken at its places: float64 `[batch]`."""

    @property
    def examples(self) -> int:
        """Of how many examples it knows something; 1 where all are alike to it."""
        return max(len(value) if isinstance(value, Tensor) and value.dim() else 1 for value in vars(self).values())

    def of(self, rows: Sequence[int] | Tensor) -> Metric:
        """The same metric of some of the examples, in their order, which may be repeated."""
        taken = torch.as_tensor(rows)
        part: Metric = object.__new__(type(self))
        part.__dict__ = {
            name: value[taken] if isinstance(value, Tensor) and value.dim() and len(value) > 1 else value
            for name, value in vars(self).items()
        }
        return part

    def bound(self, inputs: Mapping[str, Any]) -> Metric:
        """The same metric, whose last token is the last of each row that `attention_mask` does not call padding.

        Of an encoder and decoder, the logits are the decoder's, and so is the mask: `decoder_attention_mask`.

        Examples:
            >>> import torch
            >>> from noesis import interp
            >>> metric = interp.answer_probability(5)
            >>> metric.bound({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}).positions
            tensor([1, 2])
        """
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
        if self.positions is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return self
        same: Metric = object.__new__(type(self))
        same.__dict__ = {**vars(self), "positions": last_positions(mask).cpu()}
        return same

    def __repr__(self) -> str:
        return self.name

    def _of_batch(self, tensor: Tensor, logits: Tensor, what: str) -> Tensor:
        """What it has of each example, beside the logits of a batch."""
        if len(tensor) not in (1, len(logits)):
            raise BadValue(
                f"{self.name} has {what} of {len(tensor)} examples, and logits are of {len(logits)}",
                "as many, or one for all",
                "Give the metric one per example, in their order",
            )
        return tensor.to(logits.device)

    def _gathered(self, logits: Tensor, tokens: Tensor, what: str) -> Tensor:
        """`[batch, several]` of `[batch, vocabulary]`."""
        if bool(((tokens < 0) | (tokens >= logits.shape[1])).any()):
            raise BadValue(
                f"{self.name} has {what} {tokens.flatten().tolist()[:8]}",
                f"tokens below {logits.shape[1]}",
                "Check them",
            )
        there = self._of_batch(tokens, logits, what)
        return logits.gather(1, there.expand(len(logits), -1))


class _LogitDifference(Metric):
    def __init__(self, right: Tokens, wrong: Tokens, positions: Positions | None) -> None:
        super().__init__(positions)
        self.name = "logit difference"
        self.right, self.wrong = _tokens(right, "right"), _tokens(wrong, "wrong")
        several = max(len(self.right), len(self.wrong))
        if any(len(tokens) not in (1, several) for tokens in (self.right, self.wrong)):
            raise BadValue(
                f"right has {len(self.right)} examples and wrong has {len(self.wrong)}",
                "as many",
                "Pass one per example",
            )
        self.tokens = torch.cat([tokens.expand(several, -1) for tokens in (self.right, self.wrong)], dim=1)

    def score(self, logits: Tensor) -> Tensor:
        right, wrong = (
            self._gathered(logits, tokens, what).double().mean(1)
            for tokens, what in ((self.right, "right"), (self.wrong, "wrong"))
        )
        return right - wrong


class _AnswerProbability(Metric):
    def __init__(self, answer: Tokens, positions: Positions | None) -> None:
        super().__init__(positions)
        self.name, self.answer = "answer probability", _tokens(answer, "answer")

    def score(self, logits: Tensor) -> Tensor:
        return self._gathered(logits.double().softmax(-1), self.answer, "answer").sum(1)


def kl_divergence(true: Tensor, other: Tensor) -> Tensor:
    """KL(true || other) in nats, of log-probabilities `[..., vocabulary]`."""
    terms = true.exp() * (true - other)
    return torch.where(true == -torch.inf, 0.0, terms).sum(-1).clamp_min(0.0)


class _KL(Metric):
    def __init__(self, reference: Any, positions: Positions | None) -> None:
        super().__init__(positions)
        self.name = "KL to the reference"
        logits = logits_of(getattr(reference, "output", reference))
        if logits is None or logits.dim() not in (2, 3):
            raise BadValue(
                f"reference is a {type(reference).__name__} without logits by example",
                "logits [batch, tokens, vocabulary] or [batch, classes], a run, or what a model returned",
                "Pass the output of the run to compare with",
            )
        self.reference = logits.detach()

    def score(self, logits: Tensor) -> Tensor:
        reference = self._of_batch(self.reference, logits, "a reference")
        if reference.dim() == 3:
            places = self.places(len(reference), reference.shape[1]).to(reference.device)
            reference = reference[torch.arange(len(reference), device=reference.device), places]
        return kl_divergence(reference.double().log_softmax(-1), logits.double().log_softmax(-1))


def logit_difference(right: Tokens, wrong: Tokens, *, positions: Positions | None = None) -> Metric:
    """The logit of the right token less that of the wrong one: the metric whose zero means something.

    Examples:
        >>> import torch
        >>> from noesis import interp
        >>> interp.logit_difference(right=1, wrong=[0, 2])(torch.tensor([[0.0, 2.0, 5.0], [0.0, 2.0, 5.0]]))
        tensor([ 2., -3.], dtype=torch.float64)

    Args:
        right: one token, one per example, or several each `[batch, several]`, of which the mean logit counts.
        wrong: likewise.
        positions: where to look, one or one per example; the last token by default.

    Raises:
        NoesisError: (a TypeError or ValueError) for what is no token.
    """
    return _LogitDifference(right, wrong, positions)


def answer_probability(answer: Tokens, *, positions: Positions | None = None) -> Metric:
    """The probability of the answer.

    It cannot see what lowers a probability that is near zero already: beside it, look at the logit difference
    (Zhang and Nanda 2023, "Towards best practices of activation patching in language models").

    Examples:
        >>> import torch
        >>> from noesis import interp
        >>> interp.answer_probability([0, 1])(torch.zeros(2, 3, 4))
        tensor([0.2500, 0.2500], dtype=torch.float64)

    Args:
        answer: one token, one per example, or several each `[batch, several]`, whose probabilities add up.
        positions: where to look, one or one per example; the last token by default.

    Raises:
        NoesisError: (a TypeError or ValueError) for what is no token.
    """
    return _AnswerProbability(answer, positions)


def kl(reference: Any, *, positions: Positions | None = None) -> Metric:
    """The divergence KL(reference || model) of the next token's distribution, in nats; 0 where they are equal.

    Examples:
        >>> import torch
        >>> from noesis import interp
        >>> interp.kl(torch.zeros(1, 3, 2))(torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1.0, -1.0]]]))
        tensor([0.4338], dtype=torch.float64)

    Args:
        reference: logits `[batch, tokens, vocabulary]` or `[batch, classes]`, a `Run`, or what a model returned.
        positions: where to look, one or one per example; the last token by default.

    Raises:
        NoesisError: (a ValueError) for a reference without logits.
    """
    return _KL(reference, positions)


def last_positions(mask: Tensor) -> Tensor:
    """The last position of each row of an attention mask `[batch, tokens]` that is no padding: int64 `[batch]`.

    Raises:
        NoesisError: (a ValueError) for a row of padding alone.
    """
    real = mask.bool()
    if not bool(real.any(1).all()):
        raise BadValue("attention_mask has rows of padding alone", "at least one token in each", "Leave them out")
    return mask.shape[1] - 1 - real.flip(1).int().argmax(1)


def one_each(metric: Callable[[Any], Tensor], output: Any, batch: int) -> Tensor:
    """What a metric says of each example, float64 `[batch]`.

    Raises:
        NoesisError: (a TypeError) for a metric that is none; (a ValueError) for one that gives a mean, or anything but
            one number per example.
    """
    if not callable(metric):
        raise BadType(
            f"metric is {metric!r}", "a function of the model's output", "Pass interp.logit_difference(right, wrong)"
        )
    value = metric(output)
    if not isinstance(value, Tensor):
        raise BadValue(
            f"the metric {name_of(metric)} gave {value!r} for a batch of {batch}",
            f"a tensor of shape [{batch}], one number per example",
            "Return a tensor, without .item() or .mean()",
        )
    if value.shape != (batch,):
        what = "a single number, such as a mean," if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
        raise BadValue(
            f"the metric {name_of(metric)} gave {what} for a batch of {batch}",
            f"one number per example, shape [{batch}]",
            "Leave out .mean() or .sum() over examples: effects are of each pair, with their spread",
        )
    return value.double()


def name_of(metric: Any) -> str:
    """What a metric is called."""
    return metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", type(metric).__name__)


def _tokens(given: Tokens, what: str) -> Tensor:
    """Token ids as `[batch or 1, several]`."""
    tokens = _whole(given, what)
    if tokens.dim() > 2 or not tokens.numel():
        raise BadValue(f"{what} has shape {tuple(tokens.shape)}", "a token, [batch], or [batch, several]", "Reshape it")
    return tokens.reshape(-1, 1) if tokens.dim() < 2 else tokens


def _whole(given: Any, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(0.5)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise BadType(f"{what} is {given!r}", "whole numbers: one, or one per example", "Pass token ids or positions")
    return tensor.detach().long().cpu()
