"""When steps began, by the host's clock: nothing of it is on the device, which the host never waits for."""

from __future__ import annotations

import os
import weakref
from collections import deque
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Clock:
    """When the forwards of a run began, for as many of the observed ones as the ring holds.

    The host counts the forwards that it begins, in eager code and in the operation of compiled code. Of those that
    a CUDA graph replays only the device knows. So each time that the device's count is read it is compared: where it
    is the same, none was missed; where it is not, nobody knows which of the forwards since the last time were ours.
    """

    def __init__(self, capacity: int, every: int) -> None:
        self.every = every
        self.paused = False
        self.times: deque[tuple[int, float]] = deque(maxlen=capacity)  # forward, and seconds since the run began
        self.restart()

    def restart(self) -> None:
        """A run begins."""
        self.times.clear()
        self.begun = 0  # forwards of the run, as far as is known
        self.sure = 0  # the first of them, whose numbers are certain
        self.process, self.start = os.getpid(), perf_counter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.process != os.getpid():  # another process, maybe of another machine, has another clock
            self.start = np.nan

    def follow(self, control: Tensor) -> None:
        """Be told of the forwards that compiled code begins, by the control block that it counts them in."""
        try:
            _CLOCKS[control.data_ptr()] = self
        except RuntimeError:  # a fake tensor: Dynamo copies modules without their data
            return

    def tick(self, now: float, captured: bool) -> None:
        """A forward began at this time; one that a CUDA graph captures does so only when it is replayed."""
        if captured or self.paused:
            return
        if self.begun % self.every == 0:
            self.times.append((self.begun, now - self.start))
        self.begun += 1

    def settle(self, forwards: int) -> None:
        """So many forwards have begun: forget the times of those whose number is not certain."""
        while forwards != self.begun and self.times and self.times[-1][0] >= self.sure:
            self.times.pop()
        self.begun = self.sure = forwards

    def seconds(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """When the forwards of these numbers began, in seconds since the run did; NaN where that is not known."""
        known = dict(self.times)
        return np.array([known.get(int(number), np.nan) for number in numbers])


#: By the address of the control block, which stays where it is. A name in the graph instead would differ from process
#: to process, and with it what compilers cache.
_CLOCKS: weakref.WeakValueDictionary[int, Clock] = weakref.WeakValueDictionary()


def begun_compiled(control: Tensor, now: float) -> None:
    """Compiled code began a forward at this time."""
    clock = _CLOCKS.get(control.data_ptr())
    if clock is not None:
        clock.tick(now, control.is_cuda and torch.cuda.is_current_stream_capturing())
