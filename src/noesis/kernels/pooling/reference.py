"""A vector per sample in plain torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BadValue
from ..layout import ACTIVE, FORWARDS

FORWARD, SAMPLES, CALLS = range(3)
STAMP = 3
#: Variances are at least this: at zero the root has no gradient.
LEAST_SQUARE = 1e-24


def width(x: Tensor, samples: int, channel: int, spread: bool) -> int:
    """The length of the vectors of an output; a text of one token has as much as a longer one."""
    channels = x.shape[channel] if x.dim() > 1 else 1
    return 2 * channels if spread and (x.dim() > 2 or x.shape[0] > samples) else channels


def pooled(x: Tensor, samples: int, channel: int, spread: bool, mask: Tensor | None = None) -> Tensor:
    """The mean over positions, and their standard deviation, in float32.

    Args:
        x: floating [samples * n, ...]; what follows a sample along the first dimension is its own too (windows of
            an image, say).
        samples: how many samples there are.
        channel: the dimension of `x` that is not averaged; all others but the first are positions.
        spread: whether the population's standard deviation is wanted, where there are positions.
        mask: [samples, positions], true or non-zero for those that count, where the positions are one dimension.

    Returns:
        [samples, channels], or [samples, 2 channels] with the means first; a sample without a position that counts
        is NaN.
    """
    both = width(x, samples, channel, spread) > (x.shape[channel] if x.dim() > 1 else 1)
    x = by_position(x, samples, channel).float()
    if mask is None:
        mean = x.mean(1)
        squares = (x - mean[:, None]).square().mean(1) if both else mean
    else:
        counts = mask.reshape(samples, -1, 1) != 0
        number = counts.sum(1)
        mean = torch.where(counts, x, 0.0).sum(1) / number
        squares = torch.where(counts, (x - mean[:, None]).square(), 0.0).sum(1) / number if both else mean
    return torch.cat([mean, squares.clamp(min=LEAST_SQUARE).sqrt()], 1) if both else mean


def by_position(x: Tensor, samples: int, channel: int) -> Tensor:
    """An output as [samples, positions, channels], without a copy where strides allow."""
    x = x[:, None] if x.dim() == 1 else x.movedim(channel, -1)
    return x.reshape(samples, -1, x.shape[-1])


def pool_reference(
    x: Tensor,
    samples: int,
    channel: int,
    spread: bool,
    mask: Tensor | None,
    buffer: Tensor,
    stamp: Tensor,
    control: Tensor,
) -> None:
    """Keep the vectors of `x`; further calls in the same forward are averaged. Decided on the device alone."""
    check_room(samples, buffer)
    new = pooled(x.detach(), samples, channel, spread, mask)
    held = buffer[:samples]
    active = control[ACTIVE] > 0
    forward = control[FORWARDS]
    again = (stamp[FORWARD] == forward) & (stamp[SAMPLES] == samples)
    calls = torch.where(again, stamp[CALLS], 0) + 1
    averaged = torch.where(calls > 1, held + (new - held) / calls, new)
    held.copy_(torch.where(active, averaged, held))
    fresh = torch.stack([forward, torch.full_like(forward, samples), calls])
    stamp.copy_(torch.where(active, fresh, stamp))


def check_room(samples: int, buffer: Tensor) -> None:
    """Refuse more samples than there are rows for."""
    if samples > buffer.shape[0]:
        raise BadValue(
            f"There is a batch of {samples}, and room for {buffer.shape[0]} vectors",
            "room for every batch, since compiled code and CUDA graphs cannot make more",
            "Run one forward with the largest batch before compiling or capturing",
        )
