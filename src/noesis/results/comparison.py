"""Comparison: where two runs differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import files
from ..errors import BadValue
from ..text import plain, table
from .common_steps import Lengths
from .divergence import Divergence
from .meta_differences import Differences, as_text, from_json
from .saved import Saved
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """How one layer differs.

    Attributes:
        layer: its dotted name.
        mean_a, mean_b, std_a, std_b: averages over the steps of each run.
        delta_mean, delta_std: b - a.
        salience: |delta_mean| + |delta_std|, as in noesis v0.1; in the layer's own units.
        mean_effect: delta_mean in pooled standard deviations (Cohen's d).
        std_effect: log(std_b / std_a).
        effect: hypot(mean_effect, std_effect); free of scale.
        z_mean, z_std: Student's t of b's mean and log std against the baseline's.
        p_value: how often an equal run would be as far from the baseline; None without a baseline.
        q_value: the p-value adjusted for the number of layers (Benjamini-Hochberg).
        changed: whether `q_value` is at most alpha; None without a baseline.
    """

    layer: str
    mean_a: float
    mean_b: float
    std_a: float
    std_b: float
    delta_mean: float
    delta_std: float
    salience: float
    mean_effect: float
    std_effect: float
    effect: float
    z_mean: float | None = None
    z_std: float | None = None
    p_value: float | None = None
    q_value: float | None = None
    changed: bool | None = None


@dataclass(eq=False, repr=False)
class Comparison(Saved, Tabular):
    """Where two runs differ.

    As a table (`to_csv`, `to_dataframe`) it has its rows, one per layer.

    Attributes:
        rows: one per common layer, the most changed first: by p-value with a baseline, else by effect.
        cosine: of the two vectors over the common layers; nearly blind, kept from v0.1.
        distance: root mean square of the effects; 0 for equal runs, free of scale.
        only_in_a, only_in_b: layers that only one of the runs has.
        first_divergence: where two traces part, None if they do not in any step that both have, or if these are
            soulprints.
        tolerance: up to which differences of traces are no divergence; None if these are soulprints.
        lengths: how many steps the runs have; None if these are soulprints. Of traces with different steps, rows and
            first divergence are of those that both have, rows only without a baseline.
        alpha: the false discovery rate at which a layer counts as changed.
        baseline: number of runs in the baseline.
        meta: of both runs; of several b, the first one's.
        meta_differences: by name, what a and b were asked for differently (seed, scheduler, dtype, ...): `(a's, b's)`,
            of mappings by entry (`"scheduler_config.beta_start"`), of traces the `"timesteps"` they had too.

    Examples:
        >>> import noesis
        >>> a = noesis.Soulprint([0.0, 1.0], [1.0, 1.0], ["conv", "head"])
        >>> b = noesis.Soulprint([0.0, 1.5], [1.0, 1.0], ["conv", "head"])
        >>> result = noesis.compare(a, b)
        >>> result.rows[0].layer, result.rows[0].effect, round(result.distance, 3)
        ('head', 0.5, 0.354)
    """

    kind: ClassVar[str] = "comparison"
    suffixes: ClassVar[str] = ".json, .json.gz or .csv"

    rows: list[Row]
    cosine: float
    distance: float
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    first_divergence: Divergence | None = None
    tolerance: float | None = None
    lengths: Lengths | None = None
    alpha: float = 0.05
    baseline: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    meta_differences: Differences = field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        """Layers that differ by more than the baseline's own variation; needs a baseline."""
        if not self.baseline:
            raise BadValue("This comparison has no baseline", "baseline=[...]", "Compare with soulprints of equal runs")
        return [row.layer for row in self.rows if row.changed]

    def row(self, layer: str) -> Row:
        """The row of one layer."""
        for row in self.rows:
            if row.layer == layer:
                return row
        raise BadValue(
            f"layer {layer!r} is not among the common layers", f"one of the {len(self.rows)} in .rows", "Check the name"
        )

    def save(self, path: files.PathLike) -> Path:
        """Write to `.json` or `.json.gz`, or the rows alone to `.csv`; whole or not at all."""
        path = Path(path)
        return self.to_csv(path) if path.suffix == ".csv" else super().save(path)

    def _columns(self) -> dict[str, Cells]:
        return {each.name: [getattr(row, each.name) for row in self.rows] for each in dataclasses.fields(Row)}

    def _payload(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Comparison:
        baseline, where = payload["baseline"], payload["first_divergence"]
        if type(baseline) is not int or baseline < 0:
            raise ValueError(f"baseline is {baseline!r}")
        return cls(
            rows=[_row(row, judged=baseline > 0) for row in payload["rows"]],
            cosine=_number(payload["cosine"]),
            distance=_number(payload["distance"]),
            only_in_a=[str(name) for name in list(payload["only_in_a"])],
            only_in_b=[str(name) for name in list(payload["only_in_b"])],
            first_divergence=None
            if where is None
            else Divergence(int(where[0]), str(where[1]), str(where[2]), _number(where[3]), _number(where[4])),
            tolerance=None if payload.get("tolerance") is None else float(payload["tolerance"]),
            lengths=_lengths(payload.get("lengths")),
            alpha=float(payload["alpha"]),
            baseline=baseline,
            meta=dict(payload["meta"]),
            meta_differences=from_json(payload.get("meta_differences", {})),
        )

    def plot(self, top: int = 25, path: files.PathLike | None = None) -> Figure:
        """Bars of the effects of the most changed layers, of runs named by what differs; needs the extra `viz`."""
        from ..plots import effects, run_names

        a, b = run_names([self.meta.get(run) or {} for run in "ab"])
        return effects(self.rows[:top], path, layers=len(self.rows), note=f"from {a} to {b}")

    def __repr__(self) -> str:
        return self.summary()

    def summary(self, top: int = 10) -> str:
        """The comparison as text, with the most changed layers in a table."""
        head = f"Comparison of {len(self.rows)} layers: distance {self.distance:.4g}, cosine {self.cosine:.5f}"
        parts = [head]
        if self.meta_differences:
            parts.append(as_text(self.meta_differences))
        if self.lengths is not None and len(set(self.lengths)) > 1:
            parts.append(_about(self.lengths, whole=self.baseline > 0))
        if self.first_divergence is not None:
            where = self.first_divergence
            what = f"{where.stat} {where.a:.6g} -> {where.b:.6g}"
            parts.append(f"first divergence: step {where.step}, layer {plain(where.layer)} ({what})")
        elif self.tolerance and self.distance > 0:
            parts.append(f"first divergence: none of more than {self.tolerance:.2g} standard deviations")
        columns = ["layer", "effect", "mean_a", "mean_b", "std_a", "std_b"]
        lines = [[row.layer, *(f"{getattr(row, name):.4g}" for name in columns[1:])] for row in self.rows[:top]]
        if self.baseline:
            changed = self.changed
            parts.append(
                f"{len(changed)} of {len(self.rows)} layers changed by more than the noise of {self.baseline} runs "
                f"(false discovery rate {self.alpha:g})"
            )
            columns += ["z_mean", "z_std", "q"]
            for line, row in zip(lines, self.rows, strict=False):
                line += [f"{row.z_mean:.2f}", f"{row.z_std:.2f}", f"{row.q_value:.2g}"]
        parts.append(table(columns, lines))
        for label, names in (("only in a", self.only_in_a), ("only in b", self.only_in_b)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{label}: {', '.join(map(plain, names[:5]))}{more}")
        return "\n".join(parts)


def _number(value: Any) -> float:
    """JSON has no NaN; `files.dump_json` wrote it as null."""
    return float("nan") if value is None else float(value)


def _about(lengths: Lengths, whole: bool) -> str:
    """What is compared of runs with other steps than each other."""
    what = f"different steps: a has {lengths.a}, b has {lengths.b}"
    if not lengths.common:
        return f"{what}, the traces have none in common; rows are of the whole runs"
    if whole:
        return f"{what}; they part, if so, in the {lengths.common} that both have, and rows are of the whole runs"
    return f"{what}; compared {'are' if lengths.common > 1 else 'is'} the {lengths.common} that both have"


def _lengths(value: Any) -> Lengths | None:
    return None if value is None else Lengths(*(int(number) for number in value))


def _row(row: Any, judged: bool) -> Row:
    tests = ("z_mean", "z_std", "p_value", "q_value")
    numbers: dict[str, Any] = {
        each.name: _number(row[each.name]) if judged or each.name not in tests else None
        for each in dataclasses.fields(Row)
        if each.name not in ("layer", "changed")
    }
    return Row(layer=str(row["layer"]), changed=bool(row["changed"]) if judged else None, **numbers)
