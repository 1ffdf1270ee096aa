"""Edits: changes to what passes a site, as data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadType, BadValue
from .sites import Asked, Site, read

#: Which forwards of a generation: `"prefill"` (the first), `"decode"` (the others), or their numbers, from 0.
Steps = str | int | Sequence[int]
PREFILL, DECODE = "prefill", "decode"


class When(NamedTuple):
    """A condition on what passes a site, at each position: its `norm`, `mean`, `min` or `max` over the last dimension.

    Examples:
        >>> import torch
        >>> from noesis.interp import When
        >>> When("norm", ">", 3.0).holds(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[False],
                [ True]])
    """

    statistic: str
    relation: str  # "<" or ">"
    bound: float

    def holds(self, part: Tensor) -> Tensor:
        """Where it holds, `[..., 1]`."""
        value = _STATISTICS[self.statistic](part)
        return value > self.bound if self.relation == ">" else value < self.bound


_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda part: part.norm(dim=-1, keepdim=True),
    "mean": lambda part: part.mean(dim=-1, keepdim=True),
    "min": lambda part: part.amin(dim=-1, keepdim=True),
    "max": lambda part: part.amax(dim=-1, keepdim=True),
}


class Call(NamedTuple):
    """Which call of a site an edit changes."""

    site: Site
    number: int  # of the calls of this site since the block was entered, from 0


@dataclass(frozen=True)
class Edit:
    """A change to what passes a site.

    Args:
        site: as in `interp.run`, or several by ranges: `"z.3.2"`, `"z.*"`, a module's dotted name.
        positions: the tokens to change, of those that a call has; negative ones count from the end. None for all. After
            the first forward of a generation with a cache, a call has one token.
        rows: of the batch; None for all.
        steps: `"prefill"`, `"decode"`, a number or several: which forwards of a generation; None for all.
        when: a condition on the value, a `When`, or a function from the site's tensor to booleans that broadcast to it.
        name: to speak of it.
        after: names of edits which have to come first.
    """

    site: str
    positions: int | Sequence[int] | None = field(default=None, kw_only=True)
    rows: int | Sequence[int] | None = field(default=None, kw_only=True)
    steps: Steps | None = field(default=None, kw_only=True)
    when: When | Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    after: Sequence[str] = field(default=(), kw_only=True)

    #: Whether compiled code can have it: nothing in it is drawn or counted in Python.
    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.site, (str, Site)):
            raise BadType(
                f"{self.kind} is given the site {self.site!r}", "a site as a string", "Pass 'z.3', for example"
            )
        object.__setattr__(self, "site", str(self.site))
        for name in ("positions", "rows"):
            object.__setattr__(self, name, _numbers(self.kind, name, getattr(self, name)))
        object.__setattr__(self, "steps", _steps(self.kind, self.steps))
        if isinstance(self.after, str):
            object.__setattr__(self, "after", (self.after,))
        _check_when(self.kind, self.when)

    @property
    def kind(self) -> str:
        """What it is called."""
        return type(self).__name__

    def asked(self, root: nn.Module) -> list[Asked]:
        """Its sites, as they are written.

        Raises:
            NoesisError: (a ValueError) for one that is not there.
        """
        return read(self.site, root, f"{self.kind} {self.name!r}" if self.name else self.kind)

    def change(self, part: Tensor, call: Call) -> Tensor:
        """What stands in the place of the site's tensor; a new one, or one that broadcasts to it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Zero(Edit):
    """Zeros instead.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with interp.editing(model, interp.Zero("0")):
        ...     model(torch.ones(1, 2))
        tensor([[0., 0.]], grad_fn=<ReluBackward0>)
    """

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        return torch.zeros_like(part)


@dataclass(frozen=True)
class Scale(Edit):
    """A multiple of what is there."""

    factor: float

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        return part * self.factor


@dataclass(frozen=True)
class Add(Edit):
    """A direction is added: x + scale * direction.

    Args:
        direction: `[width]`, or whatever broadcasts to the site.
        scale: how much of it.
    """

    direction: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _tensor(self, "direction")

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        _check_width(self, self.direction, part)
        return part + self.scale * self.direction.to(part)


@dataclass(frozen=True)
class Project(Edit):
    """A direction, or several, are taken away: x - R R^T x with R their orthonormal basis (directional ablation).

    Args:
        direction: `[width]` or `[directions, width]`.
    """

    direction: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        direction = torch.atleast_2d(_tensor(self, "direction").double())
        if not bool((direction.norm(dim=-1) > 0).all()):
            raise BadValue("Project is given a direction of length 0", "directions that point somewhere", "Look at it")
        object.__setattr__(self, "direction", torch.linalg.qr(direction.T).Q.T)

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        _check_width(self, self.direction[:1], part)
        basis = self.direction.to(part.device, torch.promote_types(part.dtype, torch.float32))
        x = part.to(basis.dtype)
        return (x - (x @ basis.T) @ basis).to(part.dtype)


@dataclass(frozen=True)
class Noise(Edit):
    """Gaussian noise is added, the same for the same seed and call; torch's own generators are not used.

    Args:
        std: its standard deviation, in the units of the site.
        seed: of the noise.
    """

    std: float
    seed: int = 0
    traceable: ClassVar[bool] = False

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        draws = torch.Generator().manual_seed(seed_of(self.seed, call))
        return part + self.std * torch.randn(part.shape, generator=draws).to(part)


@dataclass(frozen=True)
class Custom(Edit):
    """What a function makes of it: it is given the site's tensor, and returns another of the shape.

    Such an edit cannot be saved.
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise BadType(f"Custom is given {self.function!r}", "a function from tensor to tensor", "Pass one")

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        changed: Any = self.function(part)
        if not isinstance(changed, Tensor):
            raise BadType(
                f"the function of Custom({self.site!r}) returned a {type(changed).__name__}",
                "a tensor of the site's shape",
                "Return one",
            )
        return changed


# ---------------------------------------------------------------- what is given


def _numbers(kind: str, name: str, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    numbers = (given,) if isinstance(given, int) else given
    if not isinstance(numbers, Sequence) or not all(type(number) is int for number in numbers) or not numbers:
        raise BadType(f"{kind} is given {name}={given!r}", "a whole number, or a list of them", f"Pass {name}=[-1]")
    return tuple(numbers)


def _steps(kind: str, given: Any) -> str | tuple[int, ...] | None:
    if given is None or given in (PREFILL, DECODE):
        return given  # type: ignore[no-any-return]
    steps = (given,) if type(given) is int else given
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not all(type(n) is int and n >= 0 for n in steps):
        raise BadValue(
            f"{kind} is given steps={given!r}", f"'{PREFILL}', '{DECODE}', or numbers from 0", "Pass steps=[0, 1]"
        )
    return tuple(steps)


def _check_when(kind: str, given: Any) -> None:
    if isinstance(given, When):
        if given.statistic not in _STATISTICS or given.relation not in ("<", ">"):
            raise BadValue(
                f"{kind} is given when={given!r}",
                f"one of {', '.join(_STATISTICS)}, '<' or '>', and a number",
                "Pass When('norm', '>', 3.0)",
            )
    elif given is not None and not callable(given):
        raise BadType(f"{kind} is given when={given!r}", "a When, or a function of the tensor", "Pass one of them")


def _tensor(edit: Edit, name: str) -> Tensor:
    given = getattr(edit, name)
    if not isinstance(given, Tensor) or not given.is_floating_point() or not bool(given.isfinite().all()):
        raise BadType(
            f"{edit.kind}({edit.site!r}) is given a {name} that is {type(given).__name__}",
            "a floating tensor of finite numbers",
            "Pass a tensor",
        )
    object.__setattr__(edit, name, given.detach())
    return given.detach()


def _check_width(edit: Edit, direction: Tensor, part: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(direction.shape, part.shape) == part.shape
    except RuntimeError:
        fits = False
    if not fits:
        shapes = ["x".join(map(str, tensor.shape)) for tensor in (direction, part)]
        raise BadValue(
            f"{edit.kind} at {edit.site!r} has a direction of shape {shapes[0]} for a tensor of {shapes[1]}",
            f"a direction of {part.shape[-1]} numbers",
            "Take it from the same site",
        )


def seed_of(seed: int, call: Call) -> int:
    """A seed of its own for each site and call, the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{call.site}/{call.number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
