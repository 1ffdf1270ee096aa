"""What padding does to each layer, tried while calibrating: a batch with padding, and the same batch without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..layers import MaskArgument, counting, mask_arguments, parameters_of
from ..observing import Channels, Trial, Tried
from ..surprise import DEPENDS, MASKED, UNTOUCHED

Arguments = dict[str, Any]

#: Vectors with padding and without differ by no more than this share of how much samples differ, and of their length:
#: what rounding may do.
LEAST_DIFFERENCE = 1e-3
ROUNDING, ROUNDING_OF_HALF = 1e-4, 2e-2
#: Share of the positions that are made padding, and the fewest positions that leave something to compare.
SHARE, FEWEST = 0.25, 4
#: Arguments that remember.
CACHES = ("past_key_values", "past_key_value", "cache_params")


class PaddingCheck:
    """What padding does to the layers of a model, as far as the calls that were looked at tell.

    A layer may be used with the mask of its sequence, or without any. Which of the two gives the vectors that the batch
    has without its last positions, when these are masked instead of left out, is tried for each mask that the model
    takes, and on the side on which the batch is padded. Where neither does, padding changes the layer's figures.
    """

    def __init__(self, root: nn.Module, channels: Channels) -> None:
        self.root, self.channels = root, channels
        self.masks = mask_arguments(root.forward, channels.settings.mask)
        self.names = parameters_of(root.forward)
        self.tried: set[tuple[str, bool]] = set()
        self.alike: dict[str, set[str]] = {}  # of MASKED and UNTOUCHED, how a layer may be used
        self.covered: set[str] = set()  # layers that had a mask

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Try what this call shows and none before; whether a layer was used with a mask and should not have been."""
        if not self.masks or len(args) > len(self.names):
            return False
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        wrong = False
        for mask in self.masks:
            left = _padded_on_the_left(mask, given.get(mask.name))
            if (mask.name, left) not in self.tried and self._try(mask, given, left):
                wrong = True
        return wrong

    def _try(self, mask: MaskArgument, given: Arguments, left: bool) -> bool:
        pad = getattr(getattr(self.root, "config", None), "pad_token_id", None)
        failed = False
        for padded, cut in _pairs(self.names, mask, given, left, pad if isinstance(pad, int) else None):
            self.tried.add((mask.name, left))
            with_padding, without = self._vectors(padded), self._vectors(cut)
            if with_padding is not None and without is not None:
                return self._conclude(with_padding, without)
            failed = True
        if failed:
            logger.info("what padding does could not be tried: the model takes none other than it was given")
        return False

    def _vectors(self, arguments: Arguments) -> Trial | None:
        """What the layers leave; None where the model does not take such arguments."""
        try:
            with self.channels.padding.trying() as trial:
                self.root(**arguments)
        except Exception as error:  # whatever a model may demand of its inputs
            logger.debug("not tried: {}: {}", type(error).__name__, error)
            return None
        return trial

    def _conclude(self, padded: Trial, cut: Trial) -> bool:
        wrong = False
        for name in {**padded, **cut}:
            one, other = padded.get(name, []), cut.get(name, [])
            if any(call.covered for call in one):
                self.covered.add(name)
            ways = {way for way, field in ((MASKED, "masked"), (UNTOUCHED, "whole")) if _alike(one, other, field)}
            ways &= self.alike.setdefault(name, {MASKED, UNTOUCHED})
            self.alike[name] = ways
            found = MASKED if MASKED in ways and name in self.covered else UNTOUCHED if UNTOUCHED in ways else DEPENDS
            wrong = wrong or (found == UNTOUCHED and name in self.covered)
            self.channels.padding.found[name] = found
        return wrong


def _alike(one: list[Tried], other: list[Tried], field: str) -> bool:
    """Whether the calls of a layer left the same vectors, but for rounding."""
    if len(one) != len(other) or not one:
        return False
    a, b = (torch.stack([getattr(call, field) for call in calls]).mean(0).double() for calls in (one, other))
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):  # of samples that are padding alone
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    spread = (b - b.mean(0)).square().sum(1).mean().sqrt()
    rounding = ROUNDING_OF_HALF if one[0].half else ROUNDING
    allowed = LEAST_DIFFERENCE * spread + rounding * b.norm(dim=1)
    return bool(((a - b).norm(dim=1) <= allowed).all())


# ---------------------------------------------------------------- a batch with padding, and without


def _padded_on_the_left(mask: MaskArgument, value: Any) -> bool:
    """Whether a mask begins with padding in any sample."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return bool((counting(value, mask.marks_padding)[:, 0] == 0).any())


def _pairs(
    names: Sequence[str], mask: MaskArgument, given: Arguments, left: bool, pad: int | None
) -> Iterator[tuple[Arguments, Arguments]]:
    """Arguments of which some positions are masked, and the same without these positions, in the ways that may do.

    Some models cannot lose many positions (their text has one for each part of an image); some demand that all
    arguments of the sequence are cut, and in others that would cut a sequence that happens to be as long.
    """
    if any(given.get(name) is not None for name in CACHES):  # which every forward would add to
        return
    own = {
        name: value
        for name in names
        if isinstance(value := given.get(name), Tensor)
        and name != mask.name
        and _of_decoder(name) == _of_decoder(mask.name)
    }
    sequences = {
        name: x for name, x in own.items() if "mask" not in name and x.dim() in (2, 3) and name.startswith(mask.of)
    }
    value = given.get(mask.name)
    if not isinstance(value, Tensor):
        if mask.of:
            return
        first = next(iter(sequences.values()), None)
        if first is None:
            return
        empty = torch.zeros if mask.marks_padding else torch.ones
        value = empty(first.shape[:2], dtype=torch.bool if mask.marks_padding else torch.int64, device=first.device)
    samples, length = value.shape[0], value.shape[-1]
    sequence = next((name for name, x in sequences.items() if x.shape[:2] == (samples, length)), None)
    if sequence is None or length < FEWEST:
        return
    same = [name for name, x in own.items() if "mask" in name and x.shape == value.shape and torch.equal(x, value)]
    for removed in dict.fromkeys((round(SHARE * length), 1)):
        start = 0 if left else length - removed
        kept = {"start": removed if left else 0, "length": length - removed}
        padded, cut = dict(given), dict(given)
        for name in (mask.name, *same):  # a decoder is given its encoder's mask by another name
            padded[name] = _blocked(value, mask.marks_padding, start, removed)
            cut[name] = value.narrow(-1, **kept)
            if value.dim() > 2 and value.shape[-2] == length:
                cut[name] = cut[name].narrow(-2, **kept)
        counts = counting(value, mask.marks_padding)
        padded[sequence] = _filled(given[sequence], counts, start, removed, pad)
        cut[sequence] = given[sequence].narrow(1, **kept)
        yield padded, cut
        others = {name: x for name, x in given.items() if isinstance(x, Tensor) and cut[name] is x}
        along = {name: x for name, x in others.items() if _is_along(x, samples, length)}
        if along:
            yield padded, {**cut, **{name: _shortened(x, samples, length, kept) for name, x in along.items()}}


def _of_decoder(name: str) -> bool:
    return name.startswith(("decoder_", "tgt"))


def _blocked(mask: Tensor, marks_padding: bool, start: int, removed: int) -> Tensor:
    """A mask by which these positions do not count either."""
    blocked: float = int(marks_padding)
    if mask.is_floating_point():
        shares = bool((mask >= 0).all() and (mask <= 1).all() and (mask > 0).any())
        blocked = 0.0 if shares and not marks_padding else torch.finfo(mask.dtype).min
    mask = mask.clone()
    mask.narrow(-1, start, removed).fill_(blocked)
    return mask


def _filled(x: Tensor, counts: Tensor, start: int, removed: int, pad: int | None) -> Tensor:
    """A sequence with what stands for padding at these positions, if that is known; else with what is there."""
    if x.dim() != 2 or counts.shape != x.shape:
        return x
    padding = x[counts == 0]
    if len(padding):
        fill = padding[0]
    elif pad is not None and not x.is_floating_point():
        fill = torch.full_like(x[0, 0], pad)
    else:
        return x
    x = x.clone()
    x.narrow(1, start, removed).fill_(fill)
    return x


def _is_along(x: Tensor, samples: int, length: int) -> bool:
    """Whether an argument goes along the sequence: [N, L, ...], [..., N, L], or [L, L]."""
    if x.dim() < 2:
        return False
    return (samples, length) in (x.shape[:2], x.shape[1:]) or x.shape == (length, length)


def _shortened(x: Tensor, samples: int, length: int, kept: dict[str, int]) -> Tensor:
    """What goes along the sequence, without some of its positions."""
    if x.shape[:2] == (samples, length):
        return x.narrow(1, **kept)
    x = x.narrow(-1, **kept)
    return x.narrow(-2, **kept) if x.shape[-2] == length else x
