"""What a lens shows: how far each layer's residual stream already says what the model will say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import files
from ..errors import BadValue
from ..numerics import Floats, Ints
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, plain, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Statistics that `plot` draws, and what they are.
STATS = {
    "kl": "KL to the final distribution, nats",
    "agreement": "the most likely token is the final one",
    "nll": "negative log-likelihood of the next token, nats",
    "rank": "rank of the token, 0 for the most likely",
    "probability": "probability of the token",
}


class Prediction(NamedTuple):
    """A token, and how likely it is."""

    token: int
    probability: float


@dataclass(eq=False, repr=False)
class Lens(Saved, Tabular):
    """What the model would say if it ended after each layer: per layer, example and position.

    Early layers need not speak the language of the last: where the KL to the final distribution is large, or no less
    than that of the control, their tokens say little (Belrose et al. 2023, "Eliciting Latent Predictions from
    Transformers with the Tuned Lens"). Positions of padding are NaN, and their tokens -1.

    As a table (`to_csv`, `to_dataframe`) it has a row per layer, example and position.

    Attributes:
        layers: `resid_pre.0` and so on, and last what the model says itself.
        positions: that were looked at, counted from the first token.
        top_tokens: int64 [layers, examples, positions, k], the most likely first.
        top_probabilities: float64, likewise.
        kl: float64 [layers, examples, positions], KL(final || layer) in nats.
        agreement: float64, likewise; 1 where the most likely token is the final one.
        nll: float64, likewise, of the next tokens that were given, in nats; NaN for others.
        tokens: that were asked for.
        rank: float64 [layers, examples, positions, tokens], how many tokens are more likely.
        probability: float64, likewise.
        control_kl: float64 [layers], the mean KL of the layer's distributions for other positions, half of all further
            on: what would be seen if the layer knew nothing of its own.
        control_agreement: float64 [layers], likewise.
        by: "logit lens" or "tuned lens".
        meta: of the model.
    """

    kind: ClassVar[str] = "lens"
    numbers: ClassVar[tuple[str, ...]] = ()
    ARRAYS: ClassVar[tuple[str, ...]] = (
        *("top_tokens", "top_probabilities", "kl", "agreement", "nll", "rank", "probability"),
        *("control_kl", "control_agreement"),
    )

    layers: list[str]
    positions: list[int]
    top_tokens: Ints
    top_probabilities: Floats
    kl: Floats
    agreement: Floats
    nll: Floats
    rank: Floats
    probability: Floats
    control_kl: Floats
    control_agreement: Floats
    tokens: list[int] = field(default_factory=list)
    by: str = "logit lens"
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.layers), self.kl.shape[1] if self.kl.ndim == 3 else -1, len(self.positions))
        expected = {
            **dict.fromkeys(("kl", "agreement", "nll"), shape),
            **dict.fromkeys(("rank", "probability"), (*shape, len(self.tokens))),
            **dict.fromkeys(("control_kl", "control_agreement"), shape[:1]),
            **dict.fromkeys(("top_tokens", "top_probabilities"), (*shape, self.top_tokens.shape[-1])),
        }
        for name, wanted in expected.items():
            if getattr(self, name).shape != wanted:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {wanted}")

    def top(self, *, example: int = 0, position: int = -1) -> list[list[Prediction]]:
        """The most likely tokens by layer, at one position.

        Args:
            example: which row.
            position: which of `positions`.
        """
        ids, shares = self.top_tokens[:, example, position], self.top_probabilities[:, example, position]
        return [
            [Prediction(token, share) for token, share in zip(*layer, strict=True)]
            for layer in zip(ids.tolist(), shares.tolist(), strict=True)
        ]

    def plot(
        self,
        path: files.PathLike | None = None,
        *,
        stat: str = "kl",
        example: int = 0,
        token: int | None = None,
        labels: Sequence[str] | None = None,
    ) -> Figure:
        """A heat map of a statistic, layers down and positions across; needs the extra `viz`.

        Args:
            path: where to write it too, as `.png`, `.svg` or `.pdf`.
            stat: "kl", "agreement", "nll", "rank" or "probability".
            example: which row.
            token: of which token, for ranks and probabilities; the first that was asked for, without.
            labels: the tokens at the positions, as texts.

        Returns:
            The figure, which needs no display.

        Raises:
            NoesisError: (a ValueError) for another statistic, or a token that was not asked for.
        """
        from ..plots import heat_map

        if stat not in STATS:
            raise BadValue(f"stat is {stat!r}", f"one of {', '.join(map(repr, STATS))}", 'Pass stat="kl"')
        values = getattr(self, stat)[:, example]
        title = f"{self.by}: {stat}"
        if stat in ("rank", "probability"):
            which = token if token is not None else next(iter(self.tokens), None)
            if which not in self.tokens:
                raise BadValue(
                    f"token is {which}", f"one of those asked for, {self.tokens}", "Call logit_lens(..., tokens=[...])"
                )
            values, title = values[..., self.tokens.index(which)], f"{title} of token {which}"
        return heat_map(
            values[::-1],
            self.layers[::-1],
            self.positions if labels is None else labels,
            title=title,
            row_axis="layer",
            column_axis="position",
            colour_bar=STATS[stat],
            path=path,
        )

    # ------------------------------------------------------------ files and text

    def _header(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layers", "positions", "tokens", "by", "meta")}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        shape = list(self.top_tokens.shape)
        return {**self._header(), "shape": shape, **{name: files.number_lists(x) for name, x in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Lens:
        shape = list_of(int, payload["shape"])[:3]
        # Lists of nothing do not say how many they are.
        arrays = {name: np.asarray(payload[name], np.float64) for name in cls.ARRAYS}
        for name in ("rank", "probability"):
            arrays[name] = arrays[name].reshape(*shape, len(payload["tokens"]))
        return cls._from_arrays(arrays, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Lens:
        found = {name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS}
        top = found.pop("top_tokens").astype(np.int64)
        return cls(
            list_of(str, header["layers"]),
            list_of(int, header["positions"]),
            top,
            **found,
            tokens=list_of(int, header["tokens"]),
            by=str(header["by"]),
            meta=dict(header["meta"]),
        )

    def _columns(self) -> dict[str, Cells]:
        layers, examples, positions = self.kl.shape
        each = {
            "kl": self.kl,
            "agreement": self.agreement,
            "nll": self.nll,
            **{f"rank_{token}": self.rank[..., at] for at, token in enumerate(self.tokens)},
            **{f"probability_{token}": self.probability[..., at] for at, token in enumerate(self.tokens)},
        }
        return {
            "layer": [name for name in self.layers for _ in range(examples * positions)],
            "example": np.tile(np.repeat(np.arange(examples), positions), layers),
            "position": np.tile(self.positions, layers * examples),
            "top_token": self.top_tokens[..., 0].ravel(),
            **{name: values.ravel() for name, values in each.items()},
        }

    def __repr__(self) -> str:
        _, examples, positions = self.kl.shape
        followed = [f"rank of {token}" for token in self.tokens]
        known = not np.isnan(self.nll).all()
        header = ["layer", *(["NLL"] if known else []), "KL", "KL elsewhere", "agrees", "agrees elsewhere", *followed]
        columns = [
            [plain(name) for name in self.layers],
            *([_means(self.nll, ".2f")] if known else []),
            _means(self.kl, ".3f"),
            [f"{value:.3f}" for value in self.control_kl],
            _means(self.agreement, ".2f"),
            [f"{value:.2f}" for value in self.control_agreement],
            *(_means(self.rank[..., at], ".1f") for at in range(len(self.tokens))),
        ]
        size = (counted(len(self.layers), "layer"), counted(examples, "example"), counted(positions, "position"))
        lines = [
            f"Lens of {', '.join(size)}: {self.by}, means",
            table(header, list(zip(*columns, strict=True))),
            "KL to the final distribution in nats; elsewhere: of what the same layer says at other positions",
        ]
        return "\n".join(lines)


def _means(values: Floats, form: str) -> list[str]:
    """Over examples and positions, of each layer."""
    flat = values.reshape(len(values), -1)
    count = (~np.isnan(flat)).sum(1)
    means = np.nansum(flat, axis=1) / np.where(count, count, np.nan)
    return [format(value, form) for value in means]
