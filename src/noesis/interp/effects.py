"""Effects of edits on a metric: cells by pairs of examples, with what chance alone would do."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np

from .. import files
from ..errors import BadValue, NoesisWarning
from ..numerics import Floats, Ints, benjamini_hochberg, pairs_needed, sign_flip_test
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, plain, table
from .sites import Cell, Edge, cell_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Direction = Literal["denoise", "noise"]
#: Of the metric's size: a difference that is smaller is rounding.
ROUNDING = 2.0**-20
#: Of the median difference between clean and corrupted: in pairs that differ by less, effects explode.
LEAST_SHARE = 1e-3
LEVEL = 0.05
_SHOWN = 12


class Effect(NamedTuple):
    """The effect of one cell: its mean over pairs, the standard error of that, and how often chance gives as much."""

    site: Any  # a `Site`, or the `Edge` that a path is
    mean: float
    standard_error: float
    p_value: float
    q_value: float  # adjusted for the number of cells (Benjamini-Hochberg)


@dataclass(eq=False, repr=False)
class Effects(Saved, Tabular):
    """What a change at each cell does to a metric, pair by pair of a clean and a corrupted example.

    The effect of a cell on a pair is

        e = (m_patched - m_corrupted) / (m_clean - m_corrupted)    for "denoise": clean put into the corrupted run,
        e = (m_patched - m_clean) / (m_corrupted - m_clean)        for "noise": corrupted put into the clean run,

    so 0 changes nothing and 1 all there is to change; below 0 and above 1 are real (Zhang and Nanda 2023, "Towards best
    practices of activation patching in language models"; Heimersheim and Nanda 2024, "How to use and interpret
    activation patching"). Pairs whose clean and corrupted metric coincide are left out and counted: within rounding, or
    a thousandth of the median difference.

    p-values are those of a sign-flip test over pairs; q-values are adjusted for all cells. A change within rounding
    counts as none.

    As a table (`to_csv`, `to_dataframe`) it has a row per cell.

    Attributes:
        sites: one per cell, in the order of rows; of `interp.paths`, an `Edge` each.
        clean: the metric of each clean example, float64 [pairs].
        corrupted: likewise.
        patched: the metric after each change, float64 [cells, pairs]; NaN where there is none, as at padding.
        direction: `"denoise"` or `"noise"`.
        metric: what it measures.
        estimate: how the patched metric was estimated; "" where it was computed exactly.
        meta: of the runs.

    Raises:
        NoesisError: (a ValueError) when arrays do not fit together, or the metric coincides in all pairs.

    Examples:
        >>> import numpy as np
        >>> from noesis.interp import Effects, Site
        >>> clean, corrupted = np.array([2.0, 3.0, 1.0]), np.array([0.0, -1.0, 1.0])
        >>> patched = np.array([[2.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
        >>> effects = Effects(
        ...     [Site("z", 1, 0), Site("z", 1, 1)], clean, corrupted, patched, "denoise", "logit difference"
        ... )
        >>> effects.mean, effects.dropped
        (array([0.75, 0.  ]), [2])
        >>> str(effects.top(1)[0].site)
        'z.1.0'
    """

    kind: ClassVar[str] = "effects"
    ARRAYS: ClassVar[tuple[str, ...]] = ("clean", "corrupted", "patched")

    sites: list[Any]
    clean: Floats
    corrupted: Floats
    patched: Floats
    direction: Direction
    metric: str
    estimate: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.ARRAYS:
            setattr(self, name, np.asarray(getattr(self, name), np.float64))
        shape = (len(self.sites), len(self.clean))
        if self.clean.ndim != 1 or self.corrupted.shape != self.clean.shape or self.patched.shape != shape:
            raise BadValue(
                f"clean {self.clean.shape}, corrupted {self.corrupted.shape} and patched {self.patched.shape} "
                f"of {counted(len(self.sites), 'cell')}",
                "clean and corrupted [pairs], patched [cells, pairs]",
                "Pass a metric for each pair",
            )
        if self.direction not in ("denoise", "noise"):
            raise BadValue(f"direction is {self.direction!r}", "'denoise' or 'noise'", "Pass one of them")
        bad = np.flatnonzero(~np.isfinite(self.clean + self.corrupted))
        if len(bad):
            raise BadValue(
                f"the metric of pairs {bad.tolist()[:8]} is not finite, clean or corrupted",
                "a finite metric of each example",
                "Look at what the model returns for them",
            )
        if not self.kept.any():
            raise BadValue(
                f"clean and corrupted have the same metric in all {counted(len(self.clean), 'pair')}",
                "pairs that the metric tells apart",
                "Corrupt what the answer depends on, and check that right and wrong are those of the clean example",
            )

    # ------------------------------------------------------------ numbers

    @functools.cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Which pairs count, bool [pairs]: those whose clean and corrupted metric do not coincide."""
        apart = np.abs(self.clean - self.corrupted)
        real = apart > ROUNDING * np.maximum(np.abs(self.clean), np.abs(self.corrupted))
        found: NDArray[np.bool_] = real & (apart >= LEAST_SHARE * np.median(apart[real])) if real.any() else real
        return found

    @property
    def dropped(self) -> list[int]:
        """Numbers of the pairs that do not count."""
        return [int(pair) for pair in np.flatnonzero(~self.kept)]

    @property
    def base(self) -> Floats:
        """The metric of the run that was changed, float64 [pairs]."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @functools.cached_property
    def values(self) -> Floats:
        """The effects, float64 [cells, pairs]; NaN in pairs that do not count."""
        return self.effects_of(self.patched)

    def effects_of(self, metric: Floats) -> Floats:
        """The effects of other changes of the same run, by what the metric became, both float64 `[changes, pairs]`."""
        other = self.clean if self.direction == "denoise" else self.corrupted
        found = np.full(metric.shape, np.nan)
        found[:, self.kept] = ((metric - self.base) / np.where(self.kept, other - self.base, 1.0))[:, self.kept]
        return found

    @property
    def counts(self) -> Ints:
        """How many pairs each cell's effect is of, int64 [cells]."""
        found: Ints = np.isfinite(self.values).sum(1)
        return found

    @functools.cached_property
    def mean(self) -> Floats:
        """The mean effect of each cell over its pairs, float64 [cells]; NaN without one."""
        with np.errstate(invalid="ignore"):
            found: Floats = np.where(np.isfinite(self.values), self.values, 0.0).sum(1) / self.counts
        return found

    @functools.cached_property
    def magnitude(self) -> Floats:
        """The mean size of each cell's effect, float64 [cells]: effects that cancel over pairs do not cancel in it."""
        with np.errstate(invalid="ignore"):
            found: Floats = np.where(np.isfinite(self.values), np.abs(self.values), 0.0).sum(1) / self.counts
        return found

    @functools.cached_property
    def standard_error(self) -> Floats:
        """The standard error of the mean, float64 [cells]; NaN of fewer than two pairs."""
        counts = self.counts
        squares = np.where(np.isfinite(self.values), self.values - self.mean[:, None], 0.0) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = np.sqrt(squares.sum(1) / (counts - 1) / counts)
        return found

    @functools.cached_property
    def p_value(self) -> Floats:
        """How often a mean as far from 0 arises if the sign of each pair's effect is chance, float64 [cells]."""
        with np.errstate(invalid="ignore"):
            size = np.maximum(np.abs(self.patched), np.abs(self.base))
            changed = np.isfinite(self.values) & (np.abs(self.patched - self.base) > ROUNDING * size)
        return sign_flip_test(np.where(changed, self.values, 0.0)[:, self.kept].T)

    @functools.cached_property
    def q_value(self) -> Floats:
        """p-values adjusted for the number of cells (Benjamini-Hochberg), float64 [cells]."""
        return benjamini_hochberg(self.p_value)

    # ------------------------------------------------------------ cells

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, site: str | Cell | tuple[str | int, ...]) -> Effect:
        text = ".".join(map(str, site)) if type(site) is tuple else str(site)
        if text not in self._places:
            near = difflib.get_close_matches(text, self._places, n=3) or list(self._places)[:6]
            raise BadValue(f"{text!r} is no cell", f"one of the cells, such as {', '.join(near)}", "See .sites")
        return self._row(self._places[text])

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {str(site): at for at, site in enumerate(self.sites)}

    def _row(self, at: int) -> Effect:
        numbers = (self.mean, self.standard_error, self.p_value, self.q_value)
        return Effect(self.sites[at], *(float(each[at]) for each in numbers))

    def top(self, k: int = 10) -> list[Effect]:
        """The k cells with the largest effects, of either sign, the largest first."""
        order = np.argsort(-np.nan_to_num(np.abs(self.mean), nan=-1.0), kind="stable")
        return [self._row(at) for at in order[:k].tolist()]

    def significant(self, q: float = LEVEL) -> list[Effect]:
        """Cells whose effect is not chance at a false discovery rate, the largest first; warns where none could be.

        Args:
            q: of the cells that are returned, the share that may be there by chance.

        Raises:
            NoesisError: (a ValueError) for a q that is not between 0 and 1.
        """
        if not 0 < q < 1:
            raise BadValue(f"q is {q!r}", "a false discovery rate between 0 and 1", "Pass q=0.05")
        if short := self._shortage(q):
            warnings.warn(short, NoesisWarning, stacklevel=2)
        return [each for each in self.top(len(self)) if each.q_value <= q]

    def _shortage(self, q: float) -> str:
        """What so few pairs cannot show."""
        pairs, alone = int(self.kept.sum()), pairs_needed(q, len(self))
        if pairs >= alone:
            return ""
        least = pairs_needed(q)
        what = (
            f"none can be significant at {q:g}, which takes {least}"
            if pairs < least
            else f"one cell alone among {len(self)} cannot be significant at {q:g}, which takes {alone}"
        )
        return f"{counted(pairs, 'pair')}: the smallest p is {min(1.0, 2 / 2**pairs):.2g}, so {what}"

    # ------------------------------------------------------------ shown

    def __repr__(self) -> str:
        pairs = counted(int(self.kept.sum()), "pair")
        made = f"estimated by {plain(self.estimate)}, " if self.estimate else ""
        what = f"{type(self).__name__} of {counted(len(self), 'cell')}"
        lines = [
            f"{what} on {plain(self.metric)}, {made}{self.direction}, {pairs}",
            f"mean metric: clean {self.clean[self.kept].mean():.4g}, corrupted {self.corrupted[self.kept].mean():.4g}",
        ]
        if self.dropped:
            lines.append(f"left out: {counted(len(self.dropped), 'pair')} whose clean and corrupted metric coincide")
        if lacking := int((~np.isfinite(self.values[:, self.kept])).sum()):
            lines.append(f"no value: {lacking} of {self.values[:, self.kept].size} effects, at padding or not finite")
        passing = int((self.q_value <= LEVEL).sum())
        lines.append(f"{passing} of {counted(len(self), 'cell')} differ from 0 (false discovery rate {LEVEL:g})")
        if short := self._shortage(LEVEL):
            lines.append(short)
        rows = [[str(each.site), *(f"{number:.3g}" for number in each[1:])] for each in self.top(_SHOWN)]
        lines.append(table(["cell", "effect", "error", "p", "q"], rows))
        if len(self) > _SHOWN:
            lines.append(f"and {len(self) - _SHOWN} with smaller effects")
        return "\n".join(lines)

    def plot(self, path: files.PathLike | None = None, *, tokens: Sequence[str] | None = None) -> Figure:
        """A heat map of mean effects: sites by positions, layers by heads, or layers by components; needs `viz`.

        Args:
            path: where to write it too, as `.png`, `.svg` or `.pdf`.
            tokens: what positions are called, one for each position of the prompts.

        Returns:
            The figure, which needs no display.
        """
        from ..plots import heat_map

        rows, columns, what = zip(*map(self._place, self.sites), strict=True)
        row_names, column_names = list(dict.fromkeys(rows)), sorted(dict.fromkeys(columns), key=_by_number)
        values = np.full((len(row_names), len(column_names)), np.nan)
        for at, (row, column) in enumerate(zip(rows, columns, strict=True)):
            values[row_names.index(row), column_names.index(column)] = self.mean[at]
        labels = [
            f"{tokens[name]} {name}" if tokens and what[0] == "position" and isinstance(name, int) else name
            for name in column_names
        ]
        passing = int((self.q_value <= LEVEL).sum())
        return heat_map(
            values,
            row_names,
            labels,
            title=f"{passing} of {counted(len(self), 'cell')} differ from 0 (FDR {LEVEL:g})",
            row_axis="sender" if what[0] == "receiver" else "site",
            column_axis=what[0],
            scale="linear",
            colour_bar=f"mean effect on {self.metric}" + (", estimated" if self.estimate else ""),
            path=path,
        )

    def _place(self, site: Cell) -> tuple[str, str | int, str]:
        """Row and column of a cell in a picture, and what columns are."""
        if isinstance(site, Edge):
            return str(site.sender), str(site.receiver), "receiver"
        if any(each.position is not None for each in self.sites):
            whole = "all" if site.position is None else site.position
            return str(site._replace(position=None)), whole, "position"
        if any(each.head is not None for each in self.sites):
            return str(site._replace(head=None)), "all" if site.head is None else site.head, "head"
        if site.layer is None:
            return str(site), site.component, "component"
        return str(site.layer), site.component, "component"

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        return {
            "sites": [list(site) for site in self.sites],
            "direction": self.direction,
            "metric": self.metric,
            "estimate": self.estimate,
            "meta": self.meta,
        }

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(getattr(self, name)) for name in self.ARRAYS}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Effects:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Effects:
        return cls(**cls._fields(arrays, header))

    @classmethod
    def _fields(cls, arrays: files.Arrays, header: dict[str, Any]) -> dict[str, Any]:
        """What it is made of."""
        sites = [cls._cell(given) for given in list(header["sites"])]
        found = {name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS}
        direction, metric, estimate = list_of(str, [header[name] for name in ("direction", "metric", "estimate")])
        return {
            **found,
            "sites": sites,
            "patched": found["patched"].reshape(len(sites), len(found["clean"])),
            "direction": cast(Direction, direction),
            "metric": metric,
            "estimate": estimate,
            "meta": dict(header["meta"]),
        }

    @classmethod
    def _cell(cls, given: Any) -> Any:
        """A cell from a file."""
        return cell_of(given)

    def _of_sites(self) -> dict[str, Cells]:
        if any(isinstance(site, Edge) for site in self.sites):
            return {name: [str(getattr(site, name)) for site in self.sites] for name in Edge._fields}
        names = ("component", "layer", "head", "position")
        return {name: [getattr(site, name) for site in self.sites] for name in names}

    def _columns(self) -> dict[str, Cells]:
        return {
            "site": [str(site) for site in self.sites],
            **self._of_sites(),
            "mean": self.mean,
            "standard_error": self.standard_error,
            "p_value": self.p_value,
            "q_value": self.q_value,
            "pairs": self.counts,
        }


def _by_number(name: str | int) -> tuple[int, int | str]:
    """Numbers first, in their order."""
    return (0, name) if isinstance(name, int) else (1, name)
