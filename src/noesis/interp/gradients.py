"""Gradients of a metric with respect to what passes sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BadType, BadValue, WrongState
from ..results import Activations
from ..wrapping import Keeping
from .anatomy import Anatomy
from .places import change_of, part_of
from .sites import Site
from .visiting import Visiting


class Gradients:
    """Sees what passes sites, and what a metric's gradients there are.

    To each site, zeros are added, by which the metric is differentiated: so a site has its gradient whether it is a
    tensor of the model or, as a pattern, recomputed beside it.
    """

    def __init__(self, sites: list[Site], anatomy: Anatomy | None, visiting: Visiting) -> None:
        self._sites = sites
        self._zeros: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for site in sites:
            visiting.add(_Zeros(site, self._zeros[site]), change_of(site, anatomy))

    def of(self, metric: Callable[[Any], Tensor], output: Any, max_bytes: int) -> Activations:
        """The gradients, summed over examples, each of which has only its own.

        Raises:
            NoesisError: (a TypeError or ValueError) for a metric that does not give one number per example;
                (a RuntimeError) where nothing can be differentiated.
        """
        values: Any = metric(output)
        if not isinstance(values, Tensor):
            raise BadType(
                f"grad_of returned a {type(values).__name__}", "a tensor with one number per example", "Return one"
            )
        if values.dim() != 1:
            raise BadValue(
                f"grad_of returned a tensor of shape {tuple(values.shape)}",
                "one number per example, never a mean",
                "Give a metric such as interp.logit_difference",
            )
        if not values.requires_grad:
            raise WrongState(
                "what grad_of returned has no gradient", "a metric of the logits, differentiable", "Look at it"
            )
        zeros = [(site, each) for site in self._sites for each in self._zeros[site]]
        found = torch.autograd.grad(values.sum(), [each for _, each in zeros], allow_unused=True)
        keeping = Keeping(Activations({str(site): [] for site in self._sites}), max(max_bytes, 1))
        for (site, each), gradient in zip(zeros, found, strict=True):
            whole = torch.zeros_like(each) if gradient is None else gradient  # what the metric does not depend on
            keeping.keep(str(site), part_of(site, whole))
        return keeping.acts


class _Zeros:
    def __init__(self, site: Site, zeros: list[Tensor]) -> None:
        self.site, self._zeros = site, zeros

    def visit(self, whole: Tensor) -> Tensor:
        """The same numbers, and zeros."""
        with torch.inference_mode(False):
            zeros = torch.zeros_like(whole, requires_grad=True)
        self._zeros.append(zeros)
        return whole + zeros
