"""Padding masks: which positions of a sequence count, and which tensors have the positions of that sequence.

A mask is of one sequence, and a model may have several: an encoder's and a decoder's, words and patches, samples of
sound and frames. Whose it is follows from the calls that lead to a layer, see `mask_within`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Arguments that say which positions count of what a module returns; of several in one signature the first: what comes
#: out of an encoder and a decoder is the decoder's.
MASKS = ("decoder_attention_mask", "tgt_key_padding_mask", "attention_mask", "src_key_padding_mask")


class MaskArgument(NamedTuple):
    """Where a forward takes a mask."""

    name: str
    position: int | None  # among positional arguments; None for one by name only
    of: str = ""  # what names of its sequence begin with, if it is of another argument than what the forward returns

    @property
    def marks_padding(self) -> bool:
        """Whether it is true for what does not count, as in `torch.nn`."""
        return self.name.endswith("key_padding_mask")

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The mask of a call; None without one."""
        value = kwargs.get(self.name)
        if value is None and self.position is not None and len(args) > self.position:
            value = args[self.position]
        return value


def mask_arguments(forward: Callable[..., Any], first: str | None) -> tuple[MaskArgument, ...]:
    """The masks that a forward takes, in the order of `MASKS`, after the one of a name that the user gave.

    Last come those of other arguments, told by names: `memory_key_padding_mask` is of `memory`, `query_mask` of
    `query_ids`.
    """
    if first is None:
        return ()
    found, known = _parameters(forward), MASKS if first in MASKS else (first, *MASKS)
    places = {
        name: None if parameter.kind is inspect.Parameter.KEYWORD_ONLY else place
        for place, (name, parameter) in enumerate(found.items())
    }
    own = [MaskArgument(name, places[name]) for name in known if name in found]
    others = [
        MaskArgument(name, places[name], stem)
        for name in found
        if name not in known
        and (stem := _stem(name))
        and any(_stem(other) is None and other.startswith(stem) for other in found)
    ]
    return (*own, *others)


def _stem(name: str) -> str | None:
    """What is before the word mask in a name; None for one that is not of a mask."""
    ending = next(
        (ending for ending in ("_key_padding_mask", "_attention_mask", "_mask") if name.endswith(ending)), None
    )
    return None if ending is None else name.removesuffix(ending)


def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a forward takes, in their order."""
    return tuple(_parameters(forward))


def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(forward).parameters
    except (ValueError, TypeError):  # a builtin put in the place of forward
        return {}


def counting(mask: Tensor, marks_padding: bool) -> Tensor:
    """Which positions count, [N, positions]: those that are not zero (bool where that has to be computed).

    Args:
        mask: of integers or bools, [N, positions], or [N, ..., queries, positions], where a position counts if any
            query sees it. Of floats: shares (1 and 0), or what is added to attention scores (0, and -inf or as good as
            that), which is told by the values, on their device.
        marks_padding: whether it is true for what does not count; floats are then what is added.
    """
    mask = mask.detach()
    if mask.is_floating_point():
        counts = mask >= 0
        if not marks_padding:
            least, most = mask.amin(), mask.amax()
            counts = torch.where((least >= 0) & (most <= 1) & (most > 0), mask > 0, counts)
    elif marks_padding:
        counts = mask == 0
    else:
        counts = mask if mask.dim() == 2 else mask != 0
    return counts if mask.dim() == 2 else counts.flatten(1, -2).any(1)


def has_positions(x: Tensor, mask: Tensor) -> bool:
    """Whether a tensor has the positions of a mask [N, positions]: ids, channels last or first, or flattened."""
    samples, length = mask.shape
    if x.dim() == 2:
        return (x.shape[0] == samples and x.shape[1] == length) or is_flat(x, mask)
    return x.dim() == 3 and x.shape[0] == samples and (x.shape[1] == length or x.shape[2] == length)


def is_flat(x: Tensor, mask: Tensor) -> bool:
    """Whether a tensor has the positions of all samples in one row: [N * positions, channels]."""
    samples, length = mask.shape
    return x.dim() == 2 and length > 1 and x.shape[0] == samples * length


def mask_within(
    around: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    own: MaskArgument | None,
    outermost: bool,
) -> Tensor | None:
    """The mask of the sequence that a module works on, by the call it gets.

    A module that takes a mask has its own: what it is given, or none, as a decoder that is given its encoder's as
    another argument. One that takes none goes on with the mask around it if its first tensor has that sequence's
    positions; an image encoder inside a language model has not. A mask for each query is what became of the mask around
    it, unless another sequence begins here.

    Args:
        around: the mask of the module that calls this one; [N, positions], see `counting`.
        args: of the call, by position.
        kwargs: of the call, by name.
        own: where the module takes a mask.
        outermost: whether it is the model itself.

    Returns:
        [N, positions] for as many positions as the module is given: the newest ones of those that a key-value cache
        holds. None where no mask is known to be of this sequence.
    """
    if own is None:
        return around if around is not None and _follows(around, _sequences(args, kwargs)) else None
    mask = own.given(args, kwargs)
    if mask is None:
        return None
    sequences = _sequences(args, kwargs, own.position)
    follows = around is not None and _follows(around, sequences)
    by_query = isinstance(mask, Tensor) and mask.dim() > 2
    if by_query and (follows or (around is None and not outermost)):
        return around
    if type(mask) not in (Tensor, nn.Parameter) or mask.dim() < 2 or mask.is_nested:
        return around if follows else None
    samples = mask.shape[0]
    if samples == 1 and sequences and all(x.shape[0] != 1 for x in sequences):
        samples = sequences[0].shape[0]  # one mask for all of them
    positions = _length(sequences, samples, mask.shape[-1])
    if by_query and (positions != mask.shape[-1] or mask.shape[-2] not in (1, positions)):
        return None
    counts = counting(mask, own.marks_padding)[:, mask.shape[-1] - positions :]
    return counts if mask.shape[0] == samples else counts.expand(samples, -1)


def _sequences(args: tuple[Any, ...], kwargs: dict[str, Any], leave_out: int | None = None) -> list[Tensor]:
    """The tensors of a call that may be sequences."""
    found = [x for place, x in enumerate(args) if isinstance(x, Tensor) and place != leave_out]
    found += [x for name, x in kwargs.items() if isinstance(x, Tensor) and "mask" not in name]
    return [x for x in found if x.dim() > 1 and not x.is_nested]


def _follows(around: Tensor, sequences: list[Tensor]) -> bool:
    """Whether a call goes on with the sequence of the mask around it."""
    return not sequences or has_positions(sequences[0], around)


def _length(sequences: list[Tensor], samples: int, length: int) -> int:
    """How many of a mask's positions a module is given: all, or the newest ones."""
    found = [x for x in sequences if x.dim() < 4 and x.shape[0] == samples]
    if any(x.shape[1] == length or (x.dim() == 3 and x.shape[2] == length) for x in found):
        return length
    shorter = [x.shape[1] for x in found if 0 < x.shape[1] < length]
    return shorter[0] if shorter else length
