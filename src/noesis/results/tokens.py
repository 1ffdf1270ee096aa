"""Token by layer deltas between two captured runs of a language model.

Tokens are aligned by content, so an inserted word does not shift everything after it out of place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from .. import files
from ..errors import BadFile, BadType, BadValue
from ..numerics import Floats, Token, align
from ..text import counted, plain, table
from .saved import Saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .activations import Activations

KIND = "token_deltas"
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
class TokenDeltas(Saved):
    """How far two runs are apart at each aligned token and layer, as 1 - cosine of the hidden states.

    0 is the same direction, 1 orthogonal, 2 opposite; NaN where a hidden state is not finite.

    Attributes:
        values: deltas, float64 `[aligned tokens, layers]`.
        layers: names of the layers both runs have, in the order of run a.
        tokens_a: all tokens of run a.
        tokens_b: all tokens of run b.
        positions_a: for each aligned token its position in run a, ascending.
        positions_b: for each aligned token its position in run b, ascending.
        threshold: a token is divergent when its mean delta over layers is larger.
        only_in_a: layers that ran only in run a.
        only_in_b: layers that ran only in run b.
    """

    kind: ClassVar[str] = KIND
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
        """The aligned tokens, in order."""
        return [self.tokens_a[position] for position in self.positions_a]

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

    @classmethod
    def load(cls, path: files.PathLike) -> TokenDeltas:
        """Read back what `save` wrote.

        Raises:
            NoesisError: (a ValueError) for a broken file, another format or version; (a FileNotFoundError) for none.
        """
        payload = files.check_header(files.read_json(path, numbers=("values",)), KIND, path)
        try:
            return cls._from_payload(payload)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadFile(
                f"{path} does not hold consistent token deltas ({type(error).__name__}: {error})",
                "values, layers, tokens and positions that fit together",
                "Write it again with TokenDeltas.save",
            ) from None

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map, layers by aligned tokens; needs the extra `viz`.

        Labels of divergent tokens are bold; a dashed line marks where tokens without a partner were left out.
        Values that are not finite are red.

        Args:
            path: where to write it too, as `.png`, `.svg` or `.pdf`.

        Returns:
            The figure, which needs no display.
        """
        from ..plots import write_figure

        figure = _heat_map(self)
        if path is not None:
            write_figure(figure, path)
        return figure

    def __repr__(self) -> str:
        lines = [
            f"TokenDeltas of {counted(len(self.positions_a), 'aligned token')} x {counted(len(self.layers), 'layer')}"
        ]
        for run, unpaired in (("a", self.tokens_only_in_a), ("b", self.tokens_only_in_b)):
            if unpaired:
                lines.append(f"tokens only in {run}: {_some([f'{token!r} at {where}' for where, token in unpaired])}")
        for run, names in (("a", self.only_in_a), ("b", self.only_in_b)):
            if names:
                lines.append(f"layers only in {run}: {_some([plain(name) for name in names])}")
        if nonfinite := self.nonfinite:
            where = plain("at {} in a, {} in b, layer {}".format(*nonfinite[0]))
            lines.append(f"not finite: {len(nonfinite)} of {self.values.size} deltas, first {where}")
        divergent = self.divergent
        lines.append(f"{counted(len(divergent), 'divergent token')} (mean 1 - cosine above {self.threshold:.3g})")
        if divergent:
            rows = [
                [repr(one.token), str(one.position_a), str(one.position_b), f"{one.delta:.3g}", one.layer]
                for one in divergent[:_ROWS_SHOWN]
            ]
            lines.append(table(["token", "a", "b", "delta", "most at"], rows))
            if len(divergent) > len(rows):
                lines.append(f"... {len(divergent) - len(rows)} more")
        return "\n".join(lines)

    def _payload(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "tokens_a": self.tokens_a,
            "tokens_b": self.tokens_b,
            "positions_a": self.positions_a,
            "positions_b": self.positions_b,
            "threshold": self.threshold,
            "values": self.values.tolist(),
        }

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> TokenDeltas:
        layers, only_in_a, only_in_b = (_strings(payload[key]) for key in ("layers", "only_in_a", "only_in_b"))
        tokens_a, tokens_b = _tokens(payload["tokens_a"], "tokens_a"), _tokens(payload["tokens_b"], "tokens_b")
        positions_a = _positions(payload["positions_a"], len(tokens_a))
        positions_b = _positions(payload["positions_b"], len(tokens_b))
        values = np.array(payload["values"], dtype=np.float64)  # None becomes NaN
        if not len(positions_a) == len(positions_b) > 0 or values.shape != (len(positions_a), len(layers)):
            raise ValueError(f"values of shape {values.shape}, {len(positions_a)} and {len(positions_b)} positions")
        if not (np.isnan(values) | ((values >= 0) & (values <= 2 + NOISE))).all():
            raise ValueError("deltas outside 0 to 2")
        if [tokens_a[i] for i in positions_a] != [tokens_b[j] for j in positions_b]:
            raise ValueError("aligned tokens that are not equal")
        threshold = _checked(payload["threshold"])
        return cls(values, layers, tokens_a, tokens_b, positions_a, positions_b, threshold, only_in_a, only_in_b)


def token_deltas(
    a: Activations,
    b: Activations,
    tokens_a: Sequence[Token],
    tokens_b: Sequence[Token],
    *,
    threshold: float | None = None,
    sample: int = 0,
) -> TokenDeltas:
    """How far two runs are apart, token by token and layer by layer.

    Tokens are aligned by their longest common subsequence, layers by name. A delta is
    `1 - cos(x, y) = |x/|x| - y/|y||^2 / 2` in float64, a form that is exactly 0 for equal vectors and does not
    cancel for near ones. A zero vector has delta 0 to another and 1 to anything else.

    A token is divergent when its mean delta over layers is larger than the threshold. The default is
    `max(noise, min(median + 3 * 1.4826 * MAD, max / 2))` of the finite means: an outlier by the robust
    standard deviation (Hampel 1974), or, where the change is too broad for outliers to exist, at least half as
    far as the farthest. So it finds something whenever anything exceeds the noise, which is 1e-6 or the
    squared machine epsilon of the coarser dtype (6.1e-5 for bfloat16).

    Example:
        >>> import torch
        >>> from noesis import Activations
        >>> from noesis import token_deltas
        >>> a = Activations({"block": [torch.eye(4)[None, :3]]})
        >>> b = Activations({"block": [torch.eye(4)[None, [0, 3, 1, 1]]]})
        >>> token_deltas(a, b, ["a", "cat", "sat"], ["a", "big", "cat", "sat"])
        TokenDeltas of 3 aligned tokens x 1 layer
        tokens only in b: 'big' at 1
        1 divergent token (mean 1 - cosine above 1e-06)
        token  a  b  delta  most at
        'sat'  2  3      1    block

    Args:
        a: activations of run a; each layer's calls join to `[batch, tokens, width]`.
        b: activations of run b.
        tokens_a: the tokens run a was fed, as strings or ids; after `generate`, that is all but the last one.
        tokens_b: the tokens run b was fed, of the same kind.
        threshold: a fixed bound for the mean delta of a token instead of the default.
        sample: which batch element to compare.

    Returns:
        The deltas, `[aligned tokens, layers]`.

    Raises:
        NoesisError: (a ValueError) when the runs share no layer or no token, or tokens do not fit the activations.
    """
    ids_a, ids_b = _tokens(tokens_a, "tokens_a"), _tokens(tokens_b, "tokens_b")
    fixed = None if threshold is None else _checked(threshold)
    ran_a, ran_b = ([name for name in acts.layers if acts[name]] for acts in (a, b))
    layers = [name for name in ran_a if name in set(ran_b)]
    if not layers:
        raise BadValue(
            f"the captures share no layer: a has {_some(ran_a)}, b has {_some(ran_b)}",
            "two captures with at least one layer of the same name",
            "Capture both runs with the same layers",
        )
    positions_a, positions_b = align(ids_a, ids_b)
    if not positions_a:
        raise BadValue(
            f"the runs share no token: a begins with {ids_a[:4]}, b with {ids_b[:4]}",
            "two token sequences with at least one token in common",
            "Pass both as strings or both as ids, from the same tokenizer",
        )
    columns, noise = [], NOISE
    for name in layers:
        x, x_eps = _hidden(a, name, "a", ids_a, sample, positions_a)
        y, y_eps = _hidden(b, name, "b", ids_b, sample, positions_b)
        if x.shape != y.shape:
            raise BadValue(
                f"layer {name!r} is {x.shape[1]} wide in a and {y.shape[1]} in b",
                "hidden states of the same width",
                "Compare runs of the same architecture, or capture only layers of equal width",
            )
        columns.append(cosine_delta(x, y))
        noise = max(noise, x_eps**2, y_eps**2)
    values = np.stack(columns, axis=1)
    bound = _default_threshold(values.mean(axis=1), noise) if fixed is None else fixed
    return TokenDeltas(
        values,
        layers,
        ids_a,
        ids_b,
        positions_a,
        positions_b,
        bound,
        only_in_a=[name for name in ran_a if name not in layers],
        only_in_b=[name for name in ran_b if name not in layers],
    )


def cosine_delta(x: Floats, y: Floats) -> Floats:
    """1 - cosine of the rows of two float64 arrays `[n, width]`, in [0, 2]; NaN where one is not finite.

    Example:
        >>> import numpy as np
        >>> from noesis.results.tokens import cosine_delta
        >>> cosine_delta(np.array([[3.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 0.0]]))
        array([1., 0.])
    """
    finite = np.asarray(np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1))
    u, v = (_unit(np.where(finite[:, None], rows, 0.0)) for rows in (x, y))
    delta = 0.5 * np.square(u - v).sum(axis=1)
    delta[u.any(axis=1) != v.any(axis=1)] = 1.0
    delta[~finite] = np.nan
    return np.asarray(delta, dtype=np.float64)


def _unit(rows: Floats) -> Floats:
    # By the largest element first: squares of 1e200 overflow, of 1e-200 vanish.
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    norm = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    unit: Floats = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit


def _default_threshold(scores: Floats, noise: float) -> float:
    finite = scores[np.isfinite(scores)]
    if not finite.size:
        return noise
    median = float(np.median(finite))
    deviation = 1.4826 * float(np.median(np.abs(finite - median)))
    return max(noise, min(median + 3 * deviation, float(finite.max()) / 2))


def _hidden(
    acts: Activations, name: str, run: str, tokens: list[Token], sample: int, positions: list[int]
) -> tuple[Floats, float]:
    """Hidden states at the positions, float64 `[positions, width]`, and their dtype's machine epsilon."""
    stacked = acts.stacked(name)
    if stacked.shape[1] != len(tokens):
        raise BadValue(
            f"tokens_{run} has {len(tokens)} tokens and layer {name!r} of {run} saw {stacked.shape[1]}",
            "one token per position the model was fed",
            "Include special tokens; the last generated token is never fed; capture a single run",
        )
    if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < stacked.shape[0]:
        raise BadValue(
            f"sample is {sample!r} and the batch of {run} has {stacked.shape[0]}",
            f"a batch element from 0 to {stacked.shape[0] - 1}",
            "Change sample",
        )
    rows = stacked[sample].to(torch.float64)[positions]
    return rows.numpy(), torch.finfo(stacked.dtype).eps


def _tokens(tokens: Any, name: str) -> list[Token]:
    listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    flat = isinstance(listed, Sequence) and not isinstance(listed, (str, bytes))
    if not flat or not all(isinstance(token, (str, int, np.integer)) for token in listed):
        raise BadType(
            f"{name} is {type(tokens).__name__} {str(tokens)[:60]!r}",
            "a flat sequence of tokens, each a str or an int",
            "Pass for example tokenizer.convert_ids_to_tokens(ids)",
        )
    return [token if isinstance(token, str) else int(token) for token in listed]


def _checked(threshold: Any) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise BadType(f"threshold is {threshold!r}", "a number from 0 to 2, or None", "Leave it out for the default")
    if not 0 <= threshold <= 2:  # NaN too
        raise BadValue(f"threshold is {threshold!r}", "a number from 0 to 2", "Leave it out for the default")
    return float(threshold)


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("expected a list of strings")
    return values


def _positions(values: Any, length: int) -> list[int]:
    ascending = isinstance(values, list) and all(type(value) is int for value in values)
    if not ascending or any(j <= i for i, j in zip([-1, *values], [*values, length], strict=True)):
        raise ValueError(f"expected ascending positions below {length}")
    return list(values)


def _unpaired(tokens: list[Token], positions: list[int]) -> list[tuple[int, Token]]:
    paired = set(positions)
    return [(position, token) for position, token in enumerate(tokens) if position not in paired]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "") if names else "none"


def _heat_map(deltas: TokenDeltas) -> Figure:
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    from ..plots import LOUD, MISSING, new_figure, shortened, thinned

    count, depth = len(deltas.positions_a), len(deltas.layers)
    figure = new_figure(min(max(6.4, 2.5 + 0.2 * count), 42.0), min(max(2.6, 1.8 + 0.21 * depth), 15.0))
    axes = figure.add_subplot()
    largest = float(np.max(deltas.values, initial=NOISE, where=np.isfinite(deltas.values)))
    # 1 - cosine is half the squared angle: by square roots, colours go by the angle and small ones show.
    image = axes.imshow(
        deltas.values.T,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad=LOUD),
        norm=PowerNorm(0.5, 0.0, largest),
    )
    figure.colorbar(image, ax=axes, label="1 - cosine", pad=0.01)
    for axis, names, room in ((axes.xaxis, deltas.tokens, 200), (axes.yaxis, deltas.layers, 70)):
        shown = thinned(len(names), room)
        axis.set_ticks(shown)
        # A dollar sign in a token is no formula.
        axis.set_ticklabels([shortened(names[at]) for at in shown], parse_math=False, usetex=False, fontsize=8)
    axes.tick_params(axis="x", labelrotation=90)
    divergent = {one.position_a for one in deltas.divergent}
    for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if deltas.positions_a[int(at)] in divergent else "normal")
    gaps = (np.diff(deltas.positions_a) > 1) | (np.diff(deltas.positions_b) > 1)
    for row in np.flatnonzero(gaps).tolist():
        axes.axvline(row + 0.5, color=MISSING, linestyle="--", linewidth=1)
    axes.set_title(
        f"{len(divergent)} of {counted(count, 'token')} above {deltas.threshold:.3g}", loc="left", fontsize=10
    )
    if deltas.nonfinite:
        axes.set_title("red: not finite", loc="right", fontsize=8)
    return figure
