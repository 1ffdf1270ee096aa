"""compare: what changed between two runs, how much, and whether that is more than noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import files
from ..errors import BadType, BadValue
from ..numerics import Floats, layer_tests
from ..text import plain, table
from .common_steps import Lengths, narrowed
from .divergence import TOLERANCE, Divergence, allowed, first_divergence, pooled_std
from .runs import Answering, Averaged, Recorded
from .saved import Saved
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Effects are cut off here, where one run is constant or not finite and the other is not.
LARGEST_EFFECT = 20.0


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

    Example:
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
        )

    def plot(self, top: int = 25, path: files.PathLike | None = None) -> Figure:
        """Bars of the effects of the most changed layers; needs the extra `viz`."""
        from ..plots import effects

        return effects(self.rows[:top], path=path)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self, top: int = 10) -> str:
        """The comparison as text, with the most changed layers in a table."""
        head = f"Comparison of {len(self.rows)} layers: distance {self.distance:.4g}, cosine {self.cosine:.5f}"
        parts = [head]
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


def compare(
    a: Recorded | Averaged | Answering,
    b: Recorded | Averaged | Answering | Sequence[Recorded | Averaged | Answering],
    *,
    baseline: Sequence[Recorded | Averaged | Answering] | None = None,
    tolerance: float | None = None,
    alpha: float = 0.05,
) -> Comparison:
    """Where, how much, and how surely run `b` differs from run `a`.

    Layers are matched by name. Two traces also give the first divergence; where one has steps that the other
    has not, those are compared that both have, and `lengths` says so. With a baseline, each
    layer's mean and log std in `b` are tested against the baseline's by Student's t, with variances
    that borrow strength from each other; see `noesis.numerics.significance`.

    Args:
        a: a trace, a soulprint, or a wrapped model.
        b: likewise; with a baseline, also several runs of what is to be judged, which show smaller
            changes than one can (the rows then hold their averages).
        baseline: runs that should count as equal (other prompts, other seeds), at least 2 and
            better 8; `b` is compared with their spread.
        tolerance: differences up to this many standard deviations are no divergence, and no baseline is
            taken to be narrower. By default 1e-5; between runs of which one computed in float16 or
            bfloat16 no divergence is what these round, see `first_divergence`. 0 finds any bit.
        alpha: the false discovery rate at which a layer counts as changed.

    Raises:
        NoesisError: when the runs have no layer in common, or the baseline is too small.

    Sources: Cohen 1988 (effect size); Benjamini & Hochberg 1995 (false discovery rate).

    Example:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> wrapped = noesis.wrap(model, layers="all")
        >>> x = torch.randn(16, 4)
        >>> with wrapped.run():
        ...     _ = wrapped(x)
        >>> before = wrapped.trace()
        >>> _ = model[2].weight.data.mul_(1.01)
        >>> with wrapped.run():
        ...     _ = wrapped(x)
        >>> noesis.compare(before, wrapped.trace()).first_divergence[:2]
        (0, '2')
    """
    if not 0 < alpha < 1:
        raise BadValue(f"alpha={alpha!r}", "a rate between 0 and 1", "0.05 is common")
    if tolerance is not None and not tolerance >= 0:
        raise BadValue(f"tolerance={tolerance!r}", "a number from 0", "0 means bitwise equal")
    left, right = _result(a), [_result(run) for run in (b if isinstance(b, (list, tuple)) else [b])]
    if len(right) != 1 and (baseline is None or not right):
        raise BadValue(
            f"b is {len(right)} runs", "one run, or several together with baseline=[...]", "Pass one, or a baseline"
        )
    divergence = lengths = within = None
    if len(right) == 1 and isinstance(left, Recorded) and isinstance(right[0], Recorded):
        divergence, within = first_divergence(left, right[0], tolerance), max(allowed(left, right[0], tolerance))
        one, other, lengths = narrowed(left, right[0])
        if baseline is None:
            left, right = one, [other]
    first, others = _soulprint(left), [_soulprint(run) for run in right]
    names = _common(first, others)
    mean_a, std_a = _columns([first], names)[:, 0]
    new = _columns(others, names)  # [means and stds, runs, layers]
    mean_b, std_b = new.mean(1)
    values = _changes(mean_a, std_a, mean_b, std_b)
    effect, rank = values["effect"], -values["effect"]
    if baseline is not None:
        base = _baseline([_soulprint(_result(run)) for run in baseline], names)
        narrowest = TOLERANCE if tolerance is None else tolerance
        judgement = layer_tests(base[0], base[1], new[0], new[1], narrowest)
        values |= vars(judgement) | {"changed": judgement.q_value <= alpha}
        rank = judgement.p_value
    order = np.lexsort((-effect, rank))
    second, known = others[0], set(names)
    return Comparison(
        rows=[Row(names[index], **{key: column[index].item() for key, column in values.items()}) for index in order],
        cosine=_cosine(np.concatenate([mean_a, std_a]), np.concatenate([mean_b, std_b])),
        distance=float(np.sqrt(np.mean(effect**2))),
        only_in_a=[name for name in first.layers if name not in known],
        only_in_b=[name for name in second.layers if name not in known],
        first_divergence=divergence,
        tolerance=within,
        lengths=lengths,
        alpha=alpha,
        baseline=0 if baseline is None else len(baseline),
        meta={"a": first.meta, "b": second.meta},
    )


def _common(first: Averaged, others: list[Averaged]) -> list[str]:
    """The layers that all runs have, in the order of the first."""
    common = set(first.layers).intersection(*(run.layers for run in others))
    names = [name for name in first.layers if name in common]
    if not names:
        raise BadValue(
            f"The runs have no layer in common: {first.layers[:3]} and {others[0].layers[:3]}",
            "runs of the same model with overlapping layers",
            "Wrap both with the same layers=",
        )
    return names


# ---------------------------------------------------------------- effects


def _changes(mean_a: Floats, std_a: Floats, mean_b: Floats, std_b: Floats) -> dict[str, Any]:
    """How layers differ, float64 [layers], by the names that `Row` has for it."""
    mean_effect, std_effect = _effects(mean_a, std_a, mean_b, std_b)
    return {
        "mean_a": mean_a,
        "mean_b": mean_b,
        "std_a": std_a,
        "std_b": std_b,
        "delta_mean": mean_b - mean_a,
        "delta_std": std_b - std_a,
        "salience": np.abs(mean_b - mean_a) + np.abs(std_b - std_a),
        "mean_effect": mean_effect,
        "std_effect": std_effect,
        "effect": np.hypot(mean_effect, std_effect),
    }


def _effects(mean_a: Floats, std_a: Floats, mean_b: Floats, std_b: Floats) -> tuple[Floats, Floats]:
    """Difference of means in pooled standard deviations, and log ratio of standard deviations."""
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = pooled_std(std_a, std_b)
        size = np.maximum(np.abs(mean_a), np.abs(mean_b))
        unit = np.where(spread > 0, spread, np.where(size > 0, size, 1.0))  # constant in both runs: relative
        shift = (mean_b - mean_a) / unit
        ratio = np.where(std_a == std_b, 0.0, np.log(std_b) - np.log(std_a))
    same = (np.isnan(mean_a) & np.isnan(mean_b)) | (mean_a == mean_b)
    shift = np.where(same, 0.0, np.nan_to_num(shift, nan=LARGEST_EFFECT))
    ratio = np.where(np.isnan(std_a) & np.isnan(std_b), 0.0, np.nan_to_num(ratio, nan=LARGEST_EFFECT))
    return np.clip(shift, -LARGEST_EFFECT, LARGEST_EFFECT), np.clip(ratio, -LARGEST_EFFECT, LARGEST_EFFECT)


def _cosine(a: Floats, b: Floats) -> float:
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else float(np.array_equal(a, b))


# ---------------------------------------------------------------- inputs


def _result(run: Any) -> Recorded | Averaged:
    if not isinstance(run, (Recorded, Averaged)) and callable(getattr(run, "trace", None)):
        run = run.trace()
    if isinstance(run, (Recorded, Averaged)):
        return run
    raise BadType(
        f"compare was given a {type(run).__name__}",
        "a Trace, a Soulprint or a wrapped model",
        "Load files with Trace.load or Soulprint.load",
    )


def _soulprint(run: Recorded | Averaged) -> Averaged:
    return run if isinstance(run, Averaged) else run.soulprint()


def _columns(runs: list[Averaged], names: list[str]) -> Floats:
    """Means and stds, float64 [2, runs, layers]."""
    columns = []
    for run in runs:
        place = {name: index for index, name in enumerate(run.layers)}
        chosen = [place[name] for name in names]
        columns.append((run.means[chosen], run.stds[chosen]))
    stacked: Floats = np.array(columns, dtype=np.float64).transpose(1, 0, 2)
    return stacked


def _baseline(runs: list[Averaged], names: list[str]) -> Floats:
    if len(runs) < 2:
        raise BadValue(
            f"The baseline has {len(runs)} run{'' if len(runs) == 1 else 's'}",
            "at least 2 equal runs, so that their spread can be known",
            "Record more runs, with other prompts or seeds",
        )
    common = set(names).intersection(*(run.layers for run in runs))
    missing = [name for name in names if name not in common]
    if missing:
        raise BadValue(
            f"The baseline lacks {len(missing)} of the layers, first {missing[0]!r}",
            "runs with the layers that are compared",
            "Record the baseline with the same layers=",
        )
    return _columns(runs, names)


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
