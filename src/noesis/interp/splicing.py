"""A sparse autoencoder in the place of a site: edits of its units, and what the model loses by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadType, BadValue
from ..results import Saved
from .anatomy import Anatomy, anatomy_of
from .coders import SparseCoder
from .edits import Call, Edit, Zero
from .recording import arguments
from .replacements import Mean
from .running import Run, run

#: In nats per token: where a control costs less, the loss does not tell whether a site is there.
LEAST = 0.01


@dataclass(frozen=True)
class Splice(Edit):
    """What a sparse autoencoder says instead, with some of its units changed.

    With its error kept, x + (decode(changed codes) - decode(codes)) stands there, so that nothing changes but what the
    units do (Marks et al. 2024, "Sparse Feature Circuits"); without, the reconstruction alone.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> coder = interp.SparseCoder(torch.eye(2), torch.eye(2))
        >>> model = nn.Sequential(nn.Identity())
        >>> interp.run(model, torch.tensor([[3.0, -1.0]]), edits=[interp.Splice("0", coder, units=0, scale=0.0)]).output
        tensor([[ 0., -1.]])

    Args:
        coder: a `SparseCoder` of the site.
        units: those to change; None for none.
        scale: their codes are multiplied by it; 0 takes them away.
        value: or, instead, what their codes are set to at every position.
        error: whether what the autoencoder misses is kept.
    """

    coder: SparseCoder
    units: int | Sequence[int] | None = None
    scale: float = 1.0
    value: float | None = None
    error: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.coder, SparseCoder):
            raise BadType(f"Splice is given a {type(self.coder).__name__}", "a SparseCoder", "Load one")
        units = (self.units,) if isinstance(self.units, int) else tuple(self.units or ())
        strange = [unit for unit in units if type(unit) is not int or not 0 <= unit < self.coder.units]
        if strange:
            raise BadValue(
                f"Splice is given unit {strange[0]!r}", f"units from 0 to {self.coder.units - 1}", "Check it"
            )
        if not units and self.error:
            raise BadValue(
                "Splice is given no units, and keeps the error, which changes nothing",
                "units to change, or error=False",
                "Give one of them",
            )
        object.__setattr__(self, "units", units)

    def change(self, part: Tensor, call: Call) -> Tensor:
        """See `Edit.change`."""
        changed = self.coder.reconstruct(part, self._changed)
        if self.error:
            changed = part + (changed - self.coder.reconstruct(part))
        return changed.to(part.dtype)

    def _changed(self, codes: Tensor) -> Tensor:
        units = list(self.units or ())  # type: ignore[arg-type]
        codes = codes.clone()
        codes[..., units] = codes[..., units] * self.scale if self.value is None else self.value
        return codes


@dataclass
class CoderQuality(Saved):
    """How well a sparse autoencoder stands for a site, on some texts.

    Attributes:
        site: where.
        tokens: how many were looked at.
        l0: codes that are not zero, per token.
        explained_variance: 1 - |x - x'|^2 / |x - mean|^2, over all tokens.
        dead: share of the units that no token had.
        clean, spliced, zeroed, averaged: the model's loss in nats per token: as it is, with the reconstruction in the
            place of the site, with zeros there, and with the mean of the site there.
    """

    kind: ClassVar[str] = "coder_quality"
    suffixes: ClassVar[str] = ".json or .json.gz"

    site: str
    tokens: int
    l0: float
    explained_variance: float
    dead: float
    clean: float
    spliced: float
    zeroed: float
    averaged: float

    @property
    def loss_recovered(self) -> float:
        """(zeroed - spliced) / (zeroed - clean): 1 where the reconstruction is as good as the site.

        NaN where zeros cost less than `LEAST`: then the loss says nothing of the site.
        """
        return self._recovered(self.zeroed)

    @property
    def loss_recovered_of_mean(self) -> float:
        """The same beside the mean, which is the harder control: zeros are far from what a model knows."""
        return self._recovered(self.averaged)

    def _recovered(self, control: float) -> float:
        return (control - self.spliced) / (control - self.clean) if control - self.clean >= LEAST else float("nan")

    def __repr__(self) -> str:
        variance = f"explained variance {self.explained_variance:.3f}"
        lines = [
            f"Sparse autoencoder at {self.site}, {self.tokens} tokens",
            f"L0 {self.l0:.1f}, {variance}, dead units {self.dead:.1%}",
            f"loss {self.clean:.3f} as it is, {self.spliced:.3f} spliced",
        ]
        for what, loss, share in (
            ("zeros", self.zeroed, self.loss_recovered),
            ("the mean", self.averaged, self.loss_recovered_of_mean),
        ):
            said = (
                f"{share:.1%} recovered"
                if not math.isnan(share)
                else f"less than {LEAST} more: nothing can be recovered"
            )
            lines.append(f"loss {loss:.3f} with {what} instead, {said}")
        return "\n".join(lines)

    def _payload(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> CoderQuality:
        return cls(**{each.name: payload[each.name] for each in dataclasses.fields(cls)})


def coder_quality(
    model: Any,
    loader: Iterable[Any],
    coder: SparseCoder,
    *,
    site: str | None = None,
    anatomy: Anatomy | None = None,
) -> CoderQuality:
    """Measure how well a sparse autoencoder stands for its site in a language model.

    Args:
        model: a language model in eval mode.
        loader: batches of inputs with `input_ids` and, where there is padding, `attention_mask`.
        coder: the autoencoder.
        site: where it belongs; by default where it was trained.
        anatomy: of the model.

    Raises:
        NoesisError: (a ValueError) when the site is not known, or there are no tokens.
    """
    where = site or coder.site
    if where is None:
        raise BadValue(f"{coder!r} does not say where it belongs", "a site", "Pass site='resid_post.3', for example")
    batches = [dict(arguments(batch)[1]) or {"input_ids": arguments(batch)[0][0]} for batch in loader]
    if not batches:
        raise BadValue("loader is empty", "batches of input_ids", "Give some text")
    if anatomy is None:
        anatomy = anatomy_of(model, (), batches[0])
    kept = [run(model, batch, keep=where, anatomy=anatomy) for batch in batches]
    seen = _Seen(coder)
    for batch, each in zip(batches, kept, strict=True):
        seen.add(each[where], _counts(batch))
    edits = {
        "spliced": Splice(where, coder, error=False),
        "zeroed": Zero(where),
        "averaged": Mean(where, {where: [seen.mean.reshape(1, 1, *kept[0][where].shape[2:])]}),
    }
    losses = {"clean": _loss(batches, kept)}
    for name, edit in edits.items():
        losses[name] = _loss(batches, [run(model, batch, edits=[edit], anatomy=anatomy) for batch in batches])
    return CoderQuality(where, seen.tokens, *seen.figures(), **losses)


def _counts(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens count."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _loss(batches: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> float:
    """The mean loss of the next tokens, in nats."""
    total, count = 0.0, 0
    for batch, each in zip(batches, runs, strict=True):
        counts = _counts(batch)
        targets = batch["input_ids"][:, 1:].masked_fill(~(counts[:, 1:] & counts[:, :-1]), -100)
        logits = each.logits[:, :-1].float().transpose(1, 2)
        total += float(F.cross_entropy(logits, targets.to(logits.device), reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


class _Seen:
    """Sums over tokens."""

    def __init__(self, coder: SparseCoder) -> None:
        self.coder = coder
        self.tokens = self.codes = 0
        self.error = 0.0
        self.alive = torch.zeros(coder.units, dtype=torch.bool)
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, x: Tensor, counts: Tensor) -> None:
        x = x[counts.to(x.device)]
        codes = self.coder.encode(x)
        self.tokens += len(x)
        self.codes += int((codes != 0).sum())
        self.alive |= (codes != 0).any(0).cpu()
        self.error += float((x - self.coder.reconstruct(x)).double().square().sum())
        self._sum = self._sum + x.double().sum(0)
        self._squares = self._squares + x.double().square().sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean over tokens."""
        return torch.as_tensor(self._sum) / self.tokens

    def figures(self) -> tuple[float, float, float]:
        """L0, explained variance, share of dead units."""
        spread = float((torch.as_tensor(self._squares) - self.tokens * self.mean.square()).sum())
        return self.codes / self.tokens, 1 - self.error / spread, float(1 - self.alive.double().mean())
