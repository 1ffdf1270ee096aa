"""Token by layer deltas between two captured runs of a language model.

Tokens are aligned by content, so an inserted word does not shift everything after it out of place, and one put in the
place of another is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import files
from ..errors import BadType, BadValue
from ..numerics import Floats, Token
from ..text import counted, first_few, plain, table
from .saved import Saved, list_of
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_ROWS_SHOWN = 12
#: Mean deltas below this are rounding, whatever the dtype.
NOISE = 1e-6


class TokenDelta(NamedTuple):
    """One aligned token: where it stands in both runs, its mean delta over layers, and where it changed most."""

    token: Token
    position_a: int
    position_b: int
    delta: float
    layer: str


@dataclass(frozen=True, eq=False, repr=False)
class TokenDeltas(Saved, Tabular):
    """How far two runs are apart at each aligned token and layer, as 1 - cosine of the hidden states.

    0 is the same direction, 1 orthogonal, 2 opposite; NaN where a hidden state is not finite.

    As a table (`to_csv`, `to_dataframe`) it has a row per aligned token and layer.

    Attributes:
        values: deltas, float64 `[aligned tokens, layers]`.
        layers: names of the layers both runs have, in the order of run a.
        tokens_a: all tokens of run a.
        tokens_b: all tokens of run b.
        positions_a: for each aligned token its position in run a, ascending.
        positions_b: for each aligned token its position in run b, ascending; another token may stand there.
        threshold: a token is divergent when its mean delta over layers is larger.
        only_in_a: layers that ran only in run a.
        only_in_b: layers that ran only in run b.
    """

    kind: ClassVar[str] = "token_deltas"
    numbers: ClassVar[tuple[str, ...]] = ("values",)
    suffixes: ClassVar[str] = ".json or .json.gz"

    values: Floats
    layers: list[str]
    tokens_a: list[Token]
    tokens_b: list[Token]
    positions_a: list[int]
    positions_b: list[int]
    threshold: float
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> list[Token]:
        """The aligned tokens, in order, as run a has them."""
        return [self.tokens_a[position] for position in self.positions_a]

    @property
    def substituted(self) -> list[bool]:
        """For each aligned token whether run b has another one in its place."""
        pairs = zip(self.positions_a, self.positions_b, strict=True)
        return [self.tokens_a[i] != self.tokens_b[j] for i, j in pairs]

    @property
    def tokens_only_in_a(self) -> list[tuple[int, Token]]:
        """(position, token) of the tokens of run a without a partner."""
        return _unpaired(self.tokens_a, self.positions_a)

    @property
    def tokens_only_in_b(self) -> list[tuple[int, Token]]:
        """(position, token) of the tokens of run b without a partner."""
        return _unpaired(self.tokens_b, self.positions_b)

    @property
    def scores(self) -> Floats:
        """The mean delta over layers, float64 `[aligned tokens]`; NaN when any layer's is."""
        return np.asarray(self.values.mean(axis=1), dtype=np.float64)

    @property
    def nonfinite(self) -> list[tuple[int, int, str]]:
        """(position in a, position in b, layer) of every delta that is NaN."""
        rows, columns = np.nonzero(np.isnan(self.values))
        return [
            (self.positions_a[row], self.positions_b[row], self.layers[column])
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]

    @property
    def divergent(self) -> list[TokenDelta]:
        """The aligned tokens above the threshold, most divergent first; those with NaN lead."""
        scores = self.scores
        ranked = np.where(np.isnan(scores), np.inf, scores)
        order = np.argsort(-ranked, kind="stable")
        tokens = self.tokens
        return [
            TokenDelta(
                tokens[row],
                self.positions_a[row],
                self.positions_b[row],
                float(scores[row]),
                self.layers[int(np.argmax(self.values[row]))],  # argmax takes the first NaN as the largest
            )
            for row in order.tolist()
            if ranked[row] > self.threshold
        ]

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map, layers by aligned tokens; needs the extra `viz`.

        Labels of divergent tokens are bold, those of substituted ones name both (`'dog' -> 'cat'`); a dashed line marks
        where tokens without a partner were left out.
        Values that are not finite are red.

        Args:
            path: where to write it too, as `.png`, `.svg` or `.pdf`.

        Returns:
            The figure, which needs no display.
        """
        from ..plots import token_map

        divergent = {one.position_a for one in self.divergent}
        others = self.substituted
        left_out = (np.diff(self.positions_a) > 1) | (np.diff(self.positions_b) > 1)
        return token_map(
            self.values,
            [
                self._label(at) if other else token
                for at, (other, token) in enumerate(zip(others, self.tokens, strict=True))
            ],
            self.layers,
            loud=[position in divergent for position in self.positions_a],
            breaks=(1 + np.flatnonzero(left_out)).tolist(),
            least=NOISE,
            title=f"{len(divergent)} of {counted(len(self.positions_a), 'token')} above {self.threshold:.3g}"
            + (f", {sum(others)} substituted" if any(others) else ""),
            path=path,
        )

    def __repr__(self) -> str:
        lines = [
            f"TokenDeltas of {counted(len(self.positions_a), 'aligned token')} x {counted(len(self.layers), 'layer')}"
        ]
        if places := [at for at, other in enumerate(self.substituted) if other]:
            shown = [f"{self._label(at)} at {self.positions_a[at]}" for at in places]
            lines.append(f"substituted: {first_few(shown)}")
        for run, unpaired in (("a", self.tokens_only_in_a), ("b", self.tokens_only_in_b)):
            if unpaired:
                shown = [f"{token!r} at {position}" for position, token in unpaired]
                lines.append(f"tokens only in {run}: {first_few(shown)}")
        for run, names in (("a", self.only_in_a), ("b", self.only_in_b)):
            if names:
                lines.append(f"layers only in {run}: {first_few([plain(name) for name in names])}")
        if nonfinite := self.nonfinite:
            where = plain("at {} in a, {} in b, layer {}".format(*nonfinite[0]))
            lines.append(f"not finite: {len(nonfinite)} of {self.values.size} deltas, first {where}")
        divergent = self.divergent
        lines.append(f"{counted(len(divergent), 'divergent token')} (mean 1 - cosine above {self.threshold:.3g})")
        if divergent:
            rows = [
                [
                    self._label(self.positions_a.index(one.position_a)),
                    str(one.position_a),
                    str(one.position_b),
                    f"{one.delta:.3g}",
                    one.layer,
                ]
                for one in divergent[:_ROWS_SHOWN]
            ]
            lines.append(table(["token", "a", "b", "delta", "most at"], rows))
            if len(divergent) > len(rows):
                lines.append(f"... {len(divergent) - len(rows)} more")
        return "\n".join(lines)

    def _label(self, at: int) -> str:
        """An aligned token as text, and what stands in its place if run b has another."""
        token, other = self.tokens_a[self.positions_a[at]], self.tokens_b[self.positions_b[at]]
        return repr(token) if token == other else f"{token!r} -> {other!r}"

    def _columns(self) -> dict[str, Cells]:
        layers = len(self.layers)
        return {
            "token": [token for token in self.tokens for _ in self.layers],
            "token_b": [self.tokens_b[position] for position in self.positions_b for _ in self.layers],
            "position_a": np.repeat(self.positions_a, layers),
            "position_b": np.repeat(self.positions_b, layers),
            "layer": self.layers * len(self.positions_a),
            "delta": self.values.ravel(),
        }

    def _payload(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "tokens_a": self.tokens_a,
            "tokens_b": self.tokens_b,
            "positions_a": self.positions_a,
            "positions_b": self.positions_b,
            "substituted": self.substituted,
            "threshold": self.threshold,
            "values": self.values.tolist(),
        }

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> TokenDeltas:
        layers, only_in_a, only_in_b = (list_of(str, payload[key]) for key in ("layers", "only_in_a", "only_in_b"))
        tokens_a, tokens_b = as_tokens(payload["tokens_a"], "tokens_a"), as_tokens(payload["tokens_b"], "tokens_b")
        positions_a = _positions(payload["positions_a"], len(tokens_a))
        positions_b = _positions(payload["positions_b"], len(tokens_b))
        values = np.array(payload["values"], dtype=np.float64)  # None becomes NaN
        if not len(positions_a) == len(positions_b) > 0 or values.shape != (len(positions_a), len(layers)):
            raise ValueError(f"values of shape {values.shape}, {len(positions_a)} and {len(positions_b)} positions")
        if not (np.isnan(values) | ((values >= 0) & (values <= 2 + NOISE))).all():
            raise ValueError("deltas outside 0 to 2")
        threshold = as_threshold(payload["threshold"])
        deltas = cls(values, layers, tokens_a, tokens_b, positions_a, positions_b, threshold, only_in_a, only_in_b)
        if payload.get("substituted", [False] * len(positions_a)) != deltas.substituted:  # older files know none
            raise ValueError("aligned tokens that are not equal, and not said to be substituted")
        return deltas


def as_tokens(tokens: Any, name: str) -> list[Token]:
    """Tokens as a list; `name` is what errors call them.

    Raises:
        NoesisError: (a TypeError) for anything else than a flat sequence of strings or ids.
    """
    listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    flat = isinstance(listed, Sequence) and not isinstance(listed, (str, bytes))
    if not flat or not all(isinstance(token, (str, int, np.integer)) for token in listed):
        raise BadType(
            f"{name} is {type(tokens).__name__} {str(tokens)[:60]!r}",
            "a flat sequence of tokens, each a str or an int",
            "Pass for example tokenizer.convert_ids_to_tokens(ids)",
        )
    return [token if isinstance(token, str) else int(token) for token in listed]


def as_threshold(threshold: Any) -> float:
    """A threshold as a number.

    Raises:
        NoesisError: when it is none from 0 to 2.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise BadType(f"threshold is {threshold!r}", "a number from 0 to 2, or None", "Leave it out for the default")
    if not 0 <= threshold <= 2:  # NaN too
        raise BadValue(f"threshold is {threshold!r}", "a number from 0 to 2", "Leave it out for the default")
    return float(threshold)


def _positions(values: Any, length: int) -> list[int]:
    ascending = isinstance(values, list) and all(type(value) is int for value in values)
    if not ascending or any(j <= i for i, j in zip([-1, *values], [*values, length], strict=True)):
        raise ValueError(f"expected ascending positions below {length}")
    return list(values)


def _unpaired(tokens: list[Token], positions: list[int]) -> list[tuple[int, Token]]:
    paired = set(positions)
    return [(position, token) for position, token in enumerate(tokens) if position not in paired]
