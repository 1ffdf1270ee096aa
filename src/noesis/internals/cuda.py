"""The current stream and device of CUDA, by the way that costs least; asked for first when there is a device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .lookup import look_up


@functools.cache
def _stream() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = look_up(
        "torch._C:_cuda_getCurrentRawStream",
        fits=lambda ask: ask(torch.cuda.current_device()) == torch.cuda.current_stream().cuda_stream,
        instead="torch.cuda.current_stream is asked",
    )
    return found


@functools.cache
def _device() -> Callable[[], int]:
    found: Callable[[], int] | None = look_up(
        "torch._C:_cuda_getDevice",
        fits=lambda ask: ask() == torch.cuda.current_device(),
        instead="torch.cuda.current_device is asked",
    )
    return found or torch.cuda.current_device


def raw_stream(index: int) -> int:
    """The handle of a device's current stream."""
    ask = _stream()
    return torch.cuda.current_stream(index).cuda_stream if ask is None else ask(index)


def current_device() -> int:
    """The number of the current device."""
    return _device()()
