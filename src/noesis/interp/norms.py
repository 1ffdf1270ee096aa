"""Norms as the affine maps they are at a point: measured, not known by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import Check, check_equal

IDENTITY = "norm = scale * (x - mean) + bias"


class AffineNorm(NamedTuple):
    """What a norm does at given vectors: `scale * (x - mean of x, where it centres) + bias`, with the scale frozen.

    With the scale frozen it is linear in x but for the bias, so that what was added up before it can be told apart
    behind it (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", on freezing LayerNorm).
    """

    scale: Tensor  # [..., width], float64 on the CPU
    bias: Tensor  # [width], likewise
    centred: bool  # whether the mean over the width is taken off first
    check: Check

    def linear(self, part: Tensor) -> Tensor:
        """What becomes of a part of x, `[..., width]`; the bias is no part's."""
        return self.scale * self._less_mean(part)

    def __call__(self, x: Tensor) -> Tensor:
        """What becomes of all of x, `[..., width]`."""
        return self.linear(x) + self.bias

    def back(self, directions: Tensor) -> Tensor:
        """Directions before the norm for those behind it: a part along them is what becomes of it along the given ones.

        Args:
            directions: `[..., width]`, with as many dimensions in front as the scale, or broadcast to it.
        """
        return self._less_mean(self.scale * directions)

    def _less_mean(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def measure_norm(norm: nn.Module, x: Tensor) -> AffineNorm | str:
    """The affine map that a norm is at each of some vectors; or why it is none.

    LayerNorm, RMSNorm, Gemma's (1 + w) and whatever else divides a vector by one number of its own are
    `s(x) W (x - m) + b`: a number s for each vector, weights W and a bias b for all of them, and m the mean of x or 0.
    W, b and whether there is an m come from three probes whose elements are +1 and -1, by which nothing is divided that
    may be 0; s(x) by least squares over the width, and whether one s is enough is checked on what the norm returns.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis.interp.norms import measure_norm
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
        >>> norm = measure_norm(nn.LayerNorm(4), x)
        >>> norm.centred, norm(x).round(decimals=2).tolist()
        (True, [[-1.07, -0.53, 0.0, 1.6]])
        >>> measure_norm(nn.Tanh(), x)
        'Tanh is no norm: norm = scale * (x - mean) + bias fails by 5e-01'

    Args:
        norm: the module; its `forward` is called, which is no call of the model's own.
        x: `[..., width]`, in the dtype and on the device that the norm is given in the model.
    """
    x = x.detach()
    probe = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    probe[1::2] = -1
    try:
        with torch.no_grad():
            up, down, shifted = norm.forward(torch.stack([probe, -probe, probe + 1]))
            y = norm.forward(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"{type(norm).__name__} cannot be called with vectors alone ({type(error).__name__}: {error})"
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return f"{type(norm).__name__} does not return what it is given in the same shape"
    centred = check_equal("", up, shifted).holds
    ones, up, down, given = (tensor.cpu().double() for tensor in (probe, up, down, x))
    y, bias = y.cpu(), (up + down) / 2
    weight = (up - down) / 2 / (ones - ones.mean() if centred else ones)
    base = weight * (given - given.mean(-1, keepdim=True) if centred else given)
    tiny = torch.finfo(torch.float64).tiny
    size = ((y.cpu().double() - bias) * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp_min(
        tiny
    )
    affine = AffineNorm(size * weight, bias, centred, Check(IDENTITY, 0.0, 0.0))
    check = check_equal(IDENTITY, y, affine(given))
    if not check.holds:
        return f"{type(norm).__name__} is no norm: {IDENTITY} fails by {check.error:.0e}"
    return affine._replace(check=check)
