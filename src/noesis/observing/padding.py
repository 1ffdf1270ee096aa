"""Padding: whose mask is around the module that is running, and what calibration found that padding does to layers."""

from __future__ import annotations

import uuid
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor

from ..errors import NoesisWarning, WrongState
from ..internals import disturbed, drop_kept, inlined, keep, kept, undisturbed
from ..layers import MaskArgument, counting, is_flat, mask_within
from ..surprise import DEPENDS, MASKED, UNTOUCHED


class Tried(NamedTuple):
    """What one call of a layer left in a trial."""

    covered: bool  # whether there was a mask of its positions
    half: bool  # whether the output has the precision of 16 bits
    masked: Tensor  # the vectors with that mask
    whole: Tensor  # and without


Trial = dict[str, list[Tried]]


class Padding:
    """What is known of the padding in a model's sequences.

    Args:
        name: of the argument that says which positions count, for messages.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._own()
        self.given: list[tuple[MaskArgument, Tensor]] = []  # the masks of the latest forward
        self.found: dict[str, str] = {}  # what calibration found that padding does to each layer
        self.unmatched: set[str] = set()  # layers with other positions than the mask around them, not checked yet
        self.warned: set[str] = set()
        self.calibrates = False
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = (), {}  # the latest forward's arguments, in a calibration
        self.trial: Trial | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own()  # a copy has forwards of its own

    def _own(self) -> None:
        self.key = uuid.uuid4().hex  # a string, which compiled code takes for a constant
        keep(self.key, None)  # rather than nothing, which compiled code would tell from it
        weakref.finalize(self, drop_kept, self.key)

    @property
    @inlined
    def mask(self) -> Tensor | None:
        """That of the sequence of the module that is running, [N, positions]."""
        mask: Tensor | None = kept(self.key)
        return mask

    @mask.setter
    @inlined
    def mask(self, mask: Tensor | None) -> None:
        keep(self.key, mask)

    # ------------------------------------------------------------ hot path

    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], masks: tuple[MaskArgument, ...], begins: bool
    ) -> None:
        """A forward starts: remember its masks, beside those of the latest where it belongs to the same step."""
        found = [(mask, mask.given(args, kwargs)) for mask in masks]
        given = [(mask, value) for mask, value in found if isinstance(value, Tensor)]
        self.given = given if begins else [*self.given, *given]
        if begins and not torch.compiler.is_compiling():
            self.unmatched.clear()
            if self.calibrates:
                self.call = args, kwargs

    @inlined
    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], masks: tuple[MaskArgument, ...], outermost: bool
    ) -> Tensor | None:
        """A module is called: find its sequence's mask; returns that of the module around it, to be put back."""
        around, own = self.mask, masks[0] if masks and not masks[0].of else None
        if own is None and (around is None or outermost):
            self.mask = None
            return around
        outside = None if outermost else around
        if torch.compiler.is_compiling():
            self.mask = mask_within(outside, args, kwargs, own, outermost)
            return around
        try:
            if disturbed():
                with undisturbed():
                    self.mask = mask_within(outside, args, kwargs, own, outermost)
            else:
                self.mask = mask_within(outside, args, kwargs, own, outermost)
        except Exception as error:  # whatever an argument may be, the model goes on
            logger.debug("no mask: {}: {}", type(error).__name__, error)
            self.mask = None
        return around

    def mask_of(self, x: Tensor, channel: int) -> Tensor | None:
        """The mask around the module that is running, where the output has its positions."""
        mask = self.mask
        if mask is None:
            return None
        of_tokens = x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[2 if channel == 1 else 1] == mask.shape[1]
        return mask.to(x.device) if of_tokens or is_flat(x, mask) else None

    def used(self, name: str, x: Tensor, samples: int, mask: Tensor | None) -> Tensor | None:
        """The mask of a layer's positions, if the layer is to use it, by what calibration found.

        Raises:
            NoesisError: where calibration used one, and the output has other positions than the mask around it.
        """
        found = self.found.get(name)
        if found == UNTOUCHED:
            return None
        if self.mask is not None and self.strays(x, samples, mask):
            if found == MASKED:
                raise WrongState(
                    f"an output of shape {tuple(x.shape)} under a mask of shape {tuple(self.mask.shape)}",
                    "the positions of the mask, as in the calibration",
                    "Calibrate with forwards of this kind",
                )
            if found is None:
                self.unmatched.add(name)
        return mask

    def strays(self, x: Tensor, samples: int, mask: Tensor | None) -> bool:
        """Whether an output has positions, and others than the mask around it."""
        return mask is None and self.mask is not None and (x.dim() > 2 or x.shape[0] > samples)

    # ------------------------------------------------------------ calibration and reading

    def present(self) -> bool:
        """Whether the latest forward had positions that do not count; waits for the device."""
        counted = [counting(value, mask.marks_padding) for mask, value in self.given if value.dim() > 1]
        return any(bool((each == 0).any()) for each in counted)

    @contextmanager
    def calibrating(self) -> Iterator[Padding]:
        """What padding does is found anew inside, for a calibration to keep; other threads go by what is known."""
        known, self.found, self.calibrates = self.found, {}, True
        try:
            yield self
        finally:
            self.found, self.calibrates, self.call = known, False, ((), {})

    @contextmanager
    def trying(self) -> Iterator[Trial]:
        """Forwards inside leave their vectors in a trial, with a mask and without, and nothing else."""
        before = self.given, self.call
        self.trial = {}
        try:
            yield self.trial
        finally:
            self.trial = None
            self.given, self.call = before

    def changes(self, ran: Iterable[str]) -> list[str]:
        """Those of the layers whose figures the latest forward's padding changed.

        They are named by a warning, once, as are those of which nobody knows.
        """
        depend = [name for name in ran if self.found.get(name) == DEPENDS]
        unknown = [name for name in ran if name in self.unmatched]
        if not (depend or unknown) or not self.present():
            return []
        told = {
            f"{{}} cannot be judged in batches with padding, which changes {{}} figures ({self.name} or its "
            "like is not of these positions, or the model lets padding through); pass inputs of one length": depend,
            "{} has other positions than the mask around it, so that padding counts in {} figures; calibrate finds out "
            "whether it matters": unknown,
        }
        for text, names in told.items():
            fresh = [name for name in names if name not in self.warned]
            if fresh:
                self.warned.update(fresh)
                warnings.warn(text.format(", ".join(fresh), "its" if len(fresh) == 1 else "their"), NoesisWarning, 5)
        return depend
