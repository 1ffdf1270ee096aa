"""compare: what changed between two runs, how much, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from ..errors import BadType, BadValue
from ..numerics import Floats, layer_tests
from .activations import Activations
from .common_steps import narrowed
from .comparison import Comparison, Row
from .divergence import TOLERANCE, allowed, first_divergence, pooled_std
from .fidelity import Fidelity, fidelity
from .meta_differences import meta_differences, timestep_differences
from .runs import Answering, Averaged, Recorded

#: Effects are cut off here, where one run is constant or not finite and the other is not.
LARGEST_EFFECT = 20.0


Run = Recorded | Averaged | Answering


@overload
def compare(a: Activations, b: Activations) -> Fidelity: ...


@overload
def compare(
    a: Run,
    b: Run | Sequence[Run],
    *,
    baseline: Sequence[Run] | None = None,
    tolerance: float | None = None,
    alpha: float = 0.05,
) -> Comparison: ...


def compare(
    a: Run | Activations,
    b: Run | Activations | Sequence[Run],
    *,
    baseline: Sequence[Run] | None = None,
    tolerance: float | None = None,
    alpha: float = 0.05,
) -> Comparison | Fidelity:
    """Where, how much, and how surely run `b` differs from run `a`.

    Of two `Activations` it tells how faithful `b` is to `a`, see `Fidelity`. What follows is of traces and soulprints.

    Layers are matched by name. Two traces also give the first divergence; where one has steps that the other
    has not, those are compared that both have, and `lengths` says so. What the runs were asked for differently is in
    `meta_differences`. With a baseline, each
    layer's mean and log std in `b` are tested against the baseline's by Student's t, with variances
    that borrow strength from each other; see `noesis.numerics.significance`.

    Args:
        a: a trace, a soulprint, or a wrapped model; or activations.
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

    Examples:
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
    if isinstance(a, Activations) or isinstance(b, Activations):
        if baseline is not None or tolerance is not None:
            raise BadValue(
                "activations with baseline or tolerance", "two captures alone", "Compare traces for what these are of"
            )
        return fidelity(a, b)
    if not 0 < alpha < 1:
        raise BadValue(f"alpha={alpha!r}", "a rate between 0 and 1", "0.05 is common")
    if tolerance is not None and not tolerance >= 0:
        raise BadValue(f"tolerance={tolerance!r}", "a number from 0", "0 means bitwise equal")
    left, right = _result(a), [_result(run) for run in (b if isinstance(b, (list, tuple)) else [b])]
    if len(right) != 1 and (baseline is None or not right):
        raise BadValue(
            f"b is {len(right)} runs", "one run, or several together with baseline=[...]", "Pass one, or a baseline"
        )
    different = meta_differences(left.meta, [run.meta for run in right])
    divergence = lengths = within = None
    if len(right) == 1 and isinstance(left, Recorded) and isinstance(right[0], Recorded):
        divergence, within = first_divergence(left, right[0], tolerance), max(allowed(left, right[0], tolerance))
        different |= timestep_differences(left.timesteps, right[0].timesteps)
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
        meta_differences=different,
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
    mean_effect, std_effect = effect_sizes(mean_a, std_a, mean_b, std_b)
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


def effect_sizes(mean_a: Floats, std_a: Floats, mean_b: Floats, std_b: Floats) -> tuple[Floats, Floats]:
    """Difference of means in pooled standard deviations, and log ratio of standard deviations, both of one shape."""
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
        "a Trace, a Soulprint, a wrapped model, or two Activations",
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
