"""HeadScores: what attention heads look at, each score beside its controls; as text, table, picture and file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import files
from ..errors import BadValue
from ..numerics import Floats, benjamini_hochberg
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, first_few, plain, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("previous", "duplicate", "induction", "first", "entropy", "copying")
#: Kinds of which less is more.
SHARPER = ("entropy",)
#: How far past its largest control a head's score is at least to be called by its kind.
LEAST = 0.3


class HeadScore(NamedTuple):
    """One score of one head, and what its controls score."""

    kind: str
    layer: int
    head: int
    score: float
    uniform: float
    by_position: float
    untrained: float
    p_value: float
    q_value: float


@dataclass(eq=False, repr=False)
class HeadScores(Saved, Tabular):
    """What attention heads look at, beside what would be seen if it meant nothing; what `interp.heads` returns.

    `scores["induction"]` is an array `[layers, heads]`. NaN where there is no score, with the reason in `left_out`.
    As a table (`to_csv`, `to_dataframe`) it has a row per kind, layer and head.

    Attributes:
        scores: float64 [kinds, layers, heads]; kinds are `previous, duplicate, induction, first, entropy, copying`.
        uniform: what uniform attention scores; of copying, tokens that are shuffled.
        by_position: what the head scores by position alone, of duplicate and induction.
        untrained: what the same head of an untrained copy scores.
        control: what p-values are against: row by row the largest of uniform, position and the copy's best head.
        p_values: one-sided; NaN of fewer than two rows.
        rows: how many rows were read.
        left_out: kind, or kind and layer -> why there is no score.
        meta: of the run.
    """

    kind: ClassVar[str] = "head_scores"
    ARRAYS: ClassVar[tuple[str, ...]] = ("scores", "uniform", "by_position", "untrained", "control", "p_values")
    numbers: ClassVar[tuple[str, ...]] = ARRAYS

    scores: Floats
    uniform: Floats
    by_position: Floats
    untrained: Floats
    control: Floats
    p_values: Floats
    rows: int
    left_out: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.ARRAYS:
            values = getattr(self, name)
            if values.ndim != 3 or len(values) != len(KINDS) or values.shape != self.scores.shape:
                raise ValueError(f"{name} has shape {values.shape}, expected [{len(KINDS)}, layers, heads]")

    def __getitem__(self, kind: str) -> Floats:
        found: Floats = self.scores[_place(kind)]
        return found

    @property
    def q_values(self) -> Floats:
        """p-values adjusted over all heads of a kind (Benjamini & Hochberg 1995), `[kinds, layers, heads]`."""
        adjusted = np.full(self.p_values.shape, np.nan)
        for given, found in zip(self.p_values, adjusted, strict=True):
            known = np.isfinite(given)
            found[known] = benjamini_hochberg(given[known])
        return adjusted

    @property
    def excess(self) -> Floats:
        """How far each score is past its control, `[kinds, layers, heads]`; of entropy, below it."""
        signs = np.array([-1.0 if kind in SHARPER else 1.0 for kind in KINDS])
        return signs[:, None, None] * (self.scores - self.control)

    def found(self, kind: str, *, least: float = LEAST, q: float = 0.05) -> list[tuple[int, int]]:
        """The heads, as (layer, head), that are of a kind: their score is past its control, and by enough.

        Args:
            kind: one of the kinds.
            least: how far past its control a score has to be. On random tokens most trained heads differ from all
                controls significantly and by little, which makes them nothing.
            q: the largest adjusted p-value.

        Returns:
            The most pronounced first.

        Raises:
            NoesisError: (a ValueError) for another kind.
        """
        place = _place(kind)
        past, adjusted = self.excess[place], self.q_values[place]
        with np.errstate(invalid="ignore"):
            where = np.argwhere((past >= least) & (adjusted <= q))
        return sorted(((int(layer), int(head)) for layer, head in where), key=lambda each: -past[each])

    def top(self, kind: str, k: int = 5) -> list[HeadScore]:
        """The `k` heads that score highest of a kind (of entropy, lowest), each with its controls.

        Raises:
            NoesisError: (a ValueError) for another kind.
        """
        place, adjusted = _place(kind), self.q_values
        values = self.scores[place] * (-1 if kind in SHARPER else 1)
        order = np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None, kind="stable")
        best = [divmod(int(each), values.shape[1]) for each in order if np.isfinite(values.flat[each])][:k]
        arrays = (self.scores, self.uniform, self.by_position, self.untrained, self.p_values, adjusted)
        return [HeadScore(kind, *at, *(float(array[place][at]) for array in arrays)) for at in best]

    def plot(self, kind: str = "induction", path: files.PathLike | None = None) -> Figure:
        """A heat map of how far scores of one kind are past their control, heads across and layers down.

        The scale is linear, and the title says how many heads are `found`. Needs the extra `viz`.
        """
        from ..plots import heat_map

        layers, heads = self.scores.shape[1:]
        return heat_map(
            self.excess[_place(kind)],
            [str(layer) for layer in range(layers)],
            list(range(heads)),
            title=f"{kind}: {len(self.found(kind))} of {layers * heads} heads",
            row_axis="layer",
            column_axis="head",
            colour_bar="below control, nats" if kind == "entropy" else "past control",
            scale="linear",
            nonfinite=np.zeros((layers, heads), bool),
            path=path,
        )

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        return {"kinds": list(KINDS), "rows": self.rows, "left_out": self.left_out, "meta": self.meta}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(getattr(self, name)) for name in self.ARRAYS}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> HeadScores:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> HeadScores:
        if list_of(str, header["kinds"]) != list(KINDS):
            raise ValueError(f"kinds are {header['kinds']}")
        values = {name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS}
        left_out = {str(key): str(why) for key, why in dict(header["left_out"]).items()}
        return cls(**values, rows=int(header["rows"]), left_out=left_out, meta=dict(header["meta"]))

    def _columns(self) -> dict[str, Cells]:
        kinds, layers, heads = (axis.ravel() for axis in np.indices(self.scores.shape))
        found: dict[str, Cells] = {"kind": [KINDS[each] for each in kinds], "layer": layers, "head": heads}
        names = {"scores": "score", "p_values": "p_value"}
        found |= {names.get(name, name): getattr(self, name).ravel() for name in self.ARRAYS}
        return found | {"q_value": self.q_values.ravel()}

    def __repr__(self) -> str:
        layers, heads = self.scores.shape[1:]
        what = self.meta.get("read", "inputs")
        lines = [f"HeadScores of {counted(layers, 'layer')} of {counted(heads, 'head')}, {self.rows} rows of {what}"]
        best = [self.top(kind, 1)[0] for kind in KINDS if np.isfinite(self[kind]).any()]
        if best:
            header = ["best of", "head", "score", "uniform", "by position", "untrained", "q"]
            lines.append(table(header, [_row(each) for each in best]))
        for kind in [each.kind for each in best]:
            names = first_few([f"{layer}.{head}" for layer, head in self.found(kind)])
            lines += [f"{kind} heads: {names}"]
        lines.append(f"(past the largest control by {LEAST}, q <= 0.05)")
        return "\n".join(lines + [f"left out: {plain(what)}: {plain(why)}" for what, why in self.left_out.items()])


def _place(kind: str) -> int:
    if kind not in KINDS:
        raise BadValue(f"kind is {kind!r}", f"one of {', '.join(KINDS)}", "Pass one of them")
    return KINDS.index(kind)


def _row(each: HeadScore) -> list[str]:
    numbers = (each.score, each.uniform, each.by_position, each.untrained)
    shown = ["-" if np.isnan(value) else f"{value:.2f}" for value in numbers]
    q = "-" if np.isnan(each.q_value) else "< 1e-9" if each.q_value < 1e-9 else f"{each.q_value:.1g}"
    return [each.kind, f"{each.layer}.{each.head}", *shown, q]
