"""Forwards off the record: they are no steps, and what they leave belongs to whoever runs them.

A calibration runs a model for its vectors alone, and so does a call that is judged. Threads may do so at the same time,
beside others that run the same model as usual: what is theirs is found by the thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import CONTROL, FORWARDS
from ..layers import Batch, MaskArgument
from .channels import Channel, Channels


class OffRecord:
    """What the forwards of one thread leave: the vectors of the latest of them."""

    def __init__(self, channels: Channels) -> None:
        self.forwards = 0
        self.batch: Batch | None = None  # of the forward that is running
        self.channels, self._own = channels.afresh()
        self._controls: dict[torch.device, Tensor] = {}

    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], masks: tuple[MaskArgument, ...], batch: Batch
    ) -> None:
        """A forward of the root starts."""
        self.forwards += 1
        self.batch = batch
        self.channels.begin(args, kwargs, masks, True)

    def end(self) -> None:
        """It is over."""
        self.batch = None

    def clear(self) -> None:
        """Somebody else begins: what is there is of none of the forwards to come."""
        self.forwards += 1
        self.batch = None
        for channel in self._own.values():
            channel.each = channel.mixed = None

    def own(self, channel: Channel) -> Channel:
        """What stands for a channel of the wrap."""
        return self._own[channel]

    def control(self, device: torch.device) -> Tensor:
        """A control block that says which forward this is."""
        control = self._controls.get(device)
        if control is None:
            with torch.inference_mode(False):  # it is used again, in whatever mode
                control = self._controls[device] = torch.ones(CONTROL, dtype=torch.int64, device=device)
        control[FORWARDS] = self.forwards
        return control


@contextmanager
def off_the_record(running: dict[int, OffRecord], spare: list[OffRecord], channels: Channels) -> Iterator[OffRecord]:
    """Have what this thread runs inside be off the record: `running` says so, by thread."""
    thread, found = get_ident(), _one_of(spare, channels)
    before = running.get(thread)
    running[thread] = found
    try:
        yield found
    finally:
        if before is None:
            del running[thread]
        else:
            running[thread] = before
    found.clear()
    spare.append(found)  # not after an exception: its last kernels may still be to come


def _one_of(spare: list[OffRecord], channels: Channels) -> OffRecord:
    """One that nobody uses, or a new one."""
    try:
        return spare.pop()
    except IndexError:  # asking first, two threads might both be told of the last one
        return OffRecord(channels)
