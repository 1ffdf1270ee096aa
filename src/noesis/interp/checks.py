"""Identities of a model, checked on the numbers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Check(NamedTuple):
    """An identity, and how far the numbers of a run are from it.

    Examples:
        >>> from noesis.interp import Check
        >>> Check("c = a + b", error=6e-8, bound=2.4e-7).holds
        True
    """

    identity: str
    error: float
    bound: float  # what rounding explains

    @property
    def holds(self) -> bool:
        """Whether rounding explains the error; NaN is not explained."""
        return self.error <= self.bound


def check_sum(identity: str, total: Tensor, parts: Sequence[Tensor]) -> Check:
    """Check that a tensor is the sum of others, element by element.

    The error is |total - sum| over the sum of the magnitudes, which rounding keeps below half a unit of the least
    precise dtype per addition, whatever the size of the residual stream (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 4.2); twice that is allowed.

    Examples:
        >>> import torch
        >>> from noesis.interp.checks import check_sum
        >>> check_sum("c = a + b", torch.ones(3), [torch.ones(3), torch.zeros(3)]).holds
        True
    """
    terms = [part.reshape(total.shape).double() for part in parts]
    whole = total.double()
    magnitude = whole.abs() + sum(term.abs() for term in terms)
    error = (whole - sum(terms)).abs() / magnitude.clamp_min(torch.finfo(torch.float32).tiny)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (total, *parts))
    return Check(identity, _largest(error), eps * max(1, len(parts) - 1))


def check_equal(identity: str, a: Tensor, b: Tensor) -> Check:
    """Check that two ways to compute a tensor agree: the largest difference, relative to the largest number."""
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (a, b))
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.detach().to(dtype), b.detach().reshape(a.shape).to(a.device, dtype)
    error = _largest(a - b) / max(_largest(a), torch.finfo(torch.float32).tiny)
    return Check(identity, error, max(1e-5, 8 * eps))


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN of nothing, on which nothing can be verified."""
    return float(tensor.abs().amax()) if tensor.numel() else float("nan")


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same numbers in the same order, whatever their shapes."""
    if a is None or b is None or a.numel() != b.numel() or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a.reshape(-1), b.reshape(-1))
