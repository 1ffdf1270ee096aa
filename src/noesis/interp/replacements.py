"""Edits that put there what was there in another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadType, BadValue
from ..results import Activations
from .edits import Call, Edit, seed_of
from .places import narrowed, token_axis
from .running import Run
from .sites import MODULE, Site, canonical

#: Where values come from: what a run kept, a mapping of sites, or one tensor for whatever site it is.
Reference = Run | Activations | Mapping[str, Any] | Tensor


@dataclass(frozen=True)
class Replacement(Edit):
    """An edit whose values come from another run, in which the site was kept.

    Args:
        reference: a `Run`, `Activations`, a mapping from sites to tensors or lists of them, or a tensor. A site is
            found as it is, or as a part of what was kept: `z.3.2@-1` in `z.3`.
    """

    reference: Reference

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reference", _by_site(self.reference, self.kind))

    def values(self, site: Site) -> list[Tensor]:
        """What the reference has of a site: a tensor per call.

        Raises:
            NoesisError: (a ValueError) when it has nothing of it.
        """
        assert isinstance(self.reference, dict)
        kept: dict[str, list[Tensor]] = self.reference
        if ANY in kept:
            return kept[ANY]
        for wider in _wider(site):
            if str(wider) in kept:
                return [narrowed(value, wider, site) for value in kept[str(wider)]]
        have = ", ".join(list(kept)[:6]) or "nothing"
        raise BadValue(
            f"{self.kind} of {site} is given a reference that has {have}",
            f"one that kept {site}, or {site.component if site.component != MODULE else str(site)} as a whole",
            f"Make it by interp.run(model, inputs, keep=[{str(site)!r}])",
        )


#: Of a tensor that is for whatever site there is.
ANY = ""


def _wider(site: Site) -> list[Site]:
    return [site, site._replace(position=None), site._replace(head=None), site._replace(head=None, position=None)]


def _by_site(reference: Any, kind: str) -> dict[str, list[Tensor]]:
    if isinstance(reference, Run):
        reference = reference.activations
    if isinstance(reference, Tensor):
        reference = {ANY: reference}
    if not isinstance(reference, Mapping):
        raise BadType(
            f"{kind} is given a reference of type {type(reference).__name__}",
            "a Run, Activations, a mapping of sites, or a tensor",
            "Pass what interp.run returned",
        )
    found: dict[str, list[Tensor]] = {}
    for name, value in reference.items():
        tensors = [value] if isinstance(value, Tensor) else list(value)
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise BadType(f"{kind} is given a reference whose {name!r} is no tensor", "tensors by site", "Pass tensors")
        found[(canonical(str(name)) or str(name)) if name != ANY else ANY] = [tensor.detach() for tensor in tensors]
    return found


def _fitting(edit: Edit, value: Tensor, part: Tensor, call: Call) -> Tensor:
    try:
        return value.to(part).expand(part.shape)
    except RuntimeError:
        shapes = ["x".join(map(str, tensor.shape)) for tensor in (value, part)]
        raise BadValue(
            f"{edit.kind} of {call.site} has values of shape {shapes[0]} for one of {shapes[1]}",
            "a reference with inputs of the same shape",
            "Give prompts with as many tokens, or sites at positions, such as 'z.3@-1'",
        ) from None


@dataclass(frozen=True)
class Patch(Replacement):
    """What was there in another run (activation patching, interchange).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
        >>> clean, corrupted = torch.ones(1, 2), torch.zeros(1, 2)
        >>> kept = interp.run(model, clean, keep="0")
        >>> patched = interp.run(model, corrupted, edits=[interp.Patch("0", kept)])
        >>> torch.equal(patched.output, kept.output)
        True
    """

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        values = self.values(call.site)
        if len(values) != 1:
            raise BadValue(
                f"Patch of {call.site} has a reference that kept {len(values)} calls",
                "one call",
                "Use Freeze, which goes call by call",
            )
        return _fitting(self, values[0], part, call)


@dataclass(frozen=True)
class Freeze(Replacement):
    """What was there in another run, call by call: the site does as it did then, whatever else is changed."""

    traceable: ClassVar[bool] = False

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        values = self.values(call.site)
        if call.number >= len(values):
            raise BadValue(
                f"Freeze of {call.site} is at call {call.number}, and its reference kept {len(values)}",
                "a reference with as many calls",
                "Keep a run that is as long, or limit the edit by steps",
            )
        return _fitting(self, values[call.number], part, call)


@dataclass(frozen=True)
class Mean(Replacement):
    """The mean of a reference set (mean ablation).

    Args:
        reference: as for all; its examples are the rows of all its calls.
        by_position: whether each token has a mean of its own, for inputs that are aligned; patterns always have.
    """

    by_position: bool = False

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        values = [value.double() for value in self.values(call.site)]
        tokens = call.site.position is None and token_axis(call.site) == 1 and part.dim() > 2
        if tokens and not self.by_position:
            mean = torch.cat([value.flatten(0, 1) for value in values]).nanmean(0)[None, None]
        else:
            mean = _examples(self, values, call).nanmean(0, keepdim=True)
        return _fitting(self, mean, part, call)


@dataclass(frozen=True)
class Resample(Replacement):
    """What was there in another example of a reference set, drawn for each row (resample ablation).

    Args:
        reference: as for all; its examples are the rows of all its calls, aligned token by token.
        seed: of the draw, which is the same for all sites: what is put in belongs together.
    """

    seed: int = 0
    traceable: ClassVar[bool] = False

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        examples = _examples(self, self.values(call.site), call)
        draws = torch.Generator().manual_seed(seed_of(self.seed, Call(Site(""), call.number)))
        rows = torch.randint(len(examples), (part.shape[0],), generator=draws)
        return _fitting(self, examples[rows], part, call)


def _examples(edit: Edit, values: Sequence[Tensor], call: Call) -> Tensor:
    try:
        return torch.cat(list(values))
    except RuntimeError:
        shapes = ", ".join("x".join(map(str, value.shape)) for value in values[:4])
        raise BadValue(
            f"{edit.kind} of {call.site} has a reference of shapes {shapes}",
            "examples that are aligned token by token",
            "Give inputs with as many tokens, or Mean(..., by_position=False)",
        ) from None
