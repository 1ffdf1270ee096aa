"""One edit at one site: where and when it applies, how far it may go, and what it has done."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import BadValue
from ..internals import recomputing
from .clock import Clock
from .edits import Call, Edit, When
from .places import part_of, token_axis, with_part
from .sites import Site

FIRED, LARGEST, LIMITED, NOT_FINITE = range(4)  # of what is counted, on the device


class Switch(Protocol):
    """Says whether edits are on."""

    def on(self, name: str) -> bool:
        """Whether an edit is."""


class Editor:
    """Applies an edit at one of its sites.

    Args:
        name: of the edit.
        edit: what to change.
        site: where.
        clock: which forward runs.
        switch: whether it is on.
        bound: the largest change of a vector, as a multiple of its norm; None for any.
    """

    def __init__(self, name: str, edit: Edit, site: Site, *, clock: Clock, switch: Switch, bound: float | None) -> None:
        self.name, self.edit, self.site = name, edit, site
        self.clock, self.switch, self.bound = clock, switch, bound
        self.calls = 0  # of the site, compiled ones left out
        self.seconds = 0.0  # likewise, on the host
        self.tally = torch.zeros(4, dtype=torch.float32)

    def visit(self, whole: Tensor) -> Tensor | None:
        """The component's tensor with the site changed, if it is the edit's turn."""
        compiling = is_dynamo_compiling()
        again = not compiling and recomputing()  # activation checkpointing: the same call once more
        call = Call(self.site, self.calls - again)
        if not compiling:
            self.calls += not again
        if not self.switch.on(self.name):
            return None
        reached = self.clock.reached(self.edit.steps)
        if reached is False:
            return None
        began = 0.0 if compiling else time.perf_counter()
        part = part_of(self.site, whole)
        mask = self._mask(part, reached)
        changed = self._fitting(self.edit.change(part, call), part)
        if mask is not None:
            changed = torch.where(mask, changed, part)
        changed = self._counted(part, changed, mask, count=not again)
        if not compiling:
            self.seconds += time.perf_counter() - began
        return with_part(self.site, whole, changed)

    def _fitting(self, changed: Tensor, part: Tensor) -> Tensor:
        if changed.shape != part.shape:
            shapes = ["x".join(map(str, tensor.shape)) for tensor in (changed, part)]
            try:
                changed = changed.expand(part.shape)
            except RuntimeError:
                raise BadValue(
                    f"{self.name} makes a tensor of shape {shapes[0]} of one of {shapes[1]} at {self.site}",
                    "one of the same shape",
                    "Look at its direction, reference or function",
                ) from None
        return changed.to(part.dtype)

    def _mask(self, part: Tensor, reached: bool | Tensor) -> Tensor | None:
        """Where the edit applies, as what broadcasts to the part; None for everywhere."""
        masks = [] if isinstance(reached, bool) else [reached]
        edit, axis = self.edit, token_axis(self.site)
        if self.site.head is not None and axis == 2:
            axis = 1
        if edit.rows is not None:
            masks.append(_among(edit.rows, part, 0))
        if edit.positions is not None:
            if self.site.position is not None or part.dim() <= axis:
                raise BadValue(
                    f"{self.name} has positions, and {self.site} has no tokens",
                    "a site with tokens",
                    "Leave out one of them",
                )
            masks.append(_among(edit.positions, part, axis))
        if edit.when is not None:
            masks.append(edit.when.holds(part) if isinstance(edit.when, When) else edit.when(part))
        mask: Tensor | None = None
        for each in masks:
            mask = each if mask is None else mask & each
        return mask

    @torch.no_grad()
    def _noted(self, part: Tensor, changed: Tensor, mask: Tensor | None, limited: Tensor | None, bad: Tensor) -> None:
        if self.tally.device != part.device:
            self.tally = self.tally.to(part.device)
        x, delta = part.detach().float(), changed.detach().float() - part.detach().float()
        relative = (delta.norm(dim=-1) / x.norm(dim=-1)).nan_to_num(0.0, posinf=torch.inf)
        self.tally[FIRED] += 1 if mask is None else mask.any()
        self.tally[LARGEST] = torch.maximum(self.tally[LARGEST], relative.amax())
        self.tally[NOT_FINITE] += bad.sum()
        if limited is not None:
            self.tally[LIMITED] += limited.sum()

    def _counted(self, part: Tensor, changed: Tensor, mask: Tensor | None, count: bool) -> Tensor:
        """The change within the bound and without new NaN or Inf, noted."""
        bad = part.isfinite() & ~changed.isfinite()
        changed = torch.where(bad, part, changed)
        limited = None
        if self.bound is not None:
            x, delta = part.float(), changed.float() - part.float()
            most, length = self.bound * x.norm(dim=-1, keepdim=True), delta.norm(dim=-1, keepdim=True)
            limited = length > most
            changed = torch.where(limited, (x + delta * (most / length)).to(part.dtype), changed)
        if count:
            self._noted(part, changed, mask, limited, bad)
        return changed

    # ------------------------------------------------------------ what it has done

    @property
    def fired(self) -> int:
        """In how many calls of the site it applied somewhere."""
        return int(self.tally[FIRED])

    @property
    def largest(self) -> float:
        """The largest change of a vector, relative to its norm."""
        return float(self.tally[LARGEST])

    @property
    def limited(self) -> int:
        """How many vectors would have been changed by more than the bound."""
        return int(self.tally[LIMITED])

    @property
    def not_finite(self) -> int:
        """How many numbers would have become NaN or Inf; they stay as they were."""
        return int(self.tally[NOT_FINITE])


def _among(numbers: Any, part: Tensor, axis: int) -> Tensor:
    """Which places along an axis are among some numbers, of which some may not be there; it broadcasts to the part."""
    size = part.shape[axis]
    places = torch.arange(size, device=part.device)
    found = torch.zeros(size, dtype=torch.bool, device=part.device)
    for number in numbers:
        found = found | (places == (number if number >= 0 else number + size))
    return found.reshape(size, *[1] * (part.dim() - axis - 1))
