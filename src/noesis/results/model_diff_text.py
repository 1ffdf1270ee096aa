"""A `ModelDiff` as text: what changed at one look, and the control of each claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..text import counted, plain, table
from .meta_differences import as_text
from .model_changes import ModelChanges, Parting

#: Characters of the longest bar.
BAR = 24
#: Reasons for what was not compared that are shown.
REASONS = 4


def one_line(diff: ModelChanges) -> str:
    """What a `ModelDiff` is, on one line."""
    text = f"ModelDiff of {counted(len(diff.layers), 'layer')} over {counted(len(diff.labels), 'input')}: "
    if diff.identical:
        return text + "no difference"
    text += f"relative error up to {diff.distance:.4g}"
    if diff.predictions:
        text += f", {len(diff.flips)} of {counted(diff.predictions, 'prediction')} flipped"
    if diff.weights_compared:  # captures have none
        text += f", {counted(len(diff.weights), 'weight')} changed"
    return text


def summary(diff: ModelChanges, top: int) -> str:
    """All of it, with at most `top` layers, and a third of that flips and weights."""
    few = max(1, top // 3)
    parts = [_equal(diff) if diff.identical else one_line(diff)]
    if different := diff.meta_differences:
        parts.append(as_text(different))
    if diff.first_difference:
        parts += _partings(diff)
    parts.append(_control(diff))
    if not diff.equal.all():
        parts += [_significance(diff), _layers(diff, top)]
        if same := [name for name, equal in zip(diff.layers, diff.equal.T, strict=True) if equal.all()]:
            parts.append(f"equal bit by bit: {_listed(same)}")
    if not diff.identical:
        parts += _predictions(diff, few)
        parts += _weights(diff, few)
    for what, names in (
        ("layers only in a", diff.only_in_a),
        ("layers only in b", diff.only_in_b),
        ("weights only in a", diff.weights_only_in_a),
        ("weights only in b", diff.weights_only_in_b),
    ):
        if names:
            parts.append(f"{what}: {_listed(names)}")
    if diff.renamed:
        pairs = [f"{a} = {b}" for a, b in diff.renamed.items()]
        parts.append(f"taken for the same by shape and order: {_listed(pairs)}")
    parts += _reasons("not compared", diff.left_out)
    parts += _reasons("weights not compared", diff.weights_left_out)
    return "\n".join(parts)


def _equal(diff: ModelChanges) -> str:
    parts = [f"{counted(len(diff.layers), 'layer')} over {counted(len(diff.labels), 'input')}"]
    if diff.weights_compared:
        parts.append(counted(diff.weights_compared, "weight"))
    if diff.predictions:
        parts.append(counted(diff.predictions, "prediction"))
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return f"no difference: {listed} are equal, bit by bit"


def _partings(diff: ModelChanges) -> list[str]:
    first, beyond = diff.first_difference, diff.first_divergence
    assert first is not None
    if beyond is None:
        lines = [f"first divergence: none beyond rounding (relative error {diff.tolerance:.2g}) and control"]
    else:
        lines = [f"first divergence: {_where(diff, beyond)}"]
    if beyond is None or first[:2] != beyond[:2]:
        lines.append(f"first bit that differs: {_where(diff, first)}")
    return lines


def _where(diff: ModelChanges, where: Parting) -> str:
    call = f", call {where.call}" if where.call else ""
    inputs = f"in {where.inputs} of {counted(len(diff.labels), 'input')}"
    return f"{plain(where.layer)}{call} (relative error {where.relative_error:.4g}, {inputs})"


def _control(diff: ModelChanges) -> str:
    if not diff.repeats:
        return "control: none, a did not run twice; what differs may be what a model differs from itself"
    training = "a is in training mode; " if diff.meta.get("a", {}).get("training") else ""
    times = "twice" if diff.repeats == 1 else f"{diff.repeats + 1} times"
    if not np.nan_to_num(diff.control).any() and not diff.control_flips:
        return f"control: {training}a ran {times}, and equals itself bit by bit"
    largest = float(np.fmax.reduce(diff.control, axis=None))
    flips = f" and {counted(diff.control_flips, 'flip')}" if diff.predictions else ""
    apart = f"differs from itself by a relative error of up to {largest:.4g}{flips}"
    return f"control: {training}a ran {times}, and {apart}"


def _significance(diff: ModelChanges) -> str:
    if len(diff.labels) < 2:
        return "one input: nothing is said of how surely layers differ over inputs; give several"
    return (
        f"{len(diff.changed)} of {counted(len(diff.layers), 'layer')} changed by more than rounding "
        f"(relative error {diff.tolerance:.2g}){' and control' if diff.repeats else ''} "
        f"over {counted(len(diff.labels), 'input')} (false discovery rate {diff.alpha:g})"
    )


def _layers(diff: ModelChanges, top: int) -> str:
    several = len(diff.labels) > 1
    header = ["layer", "differs in", "relative error", "SQNR (dB)", "q", "effect", "q of effect"]
    if not several:
        header = [name for name in header if not name.startswith("q")]
    errors, finite = diff.relative_error, diff.relative_error[np.isfinite(diff.relative_error)]
    largest = float(finite.max(initial=0.0))
    q_values, effect_q_values, effects = diff.q_value, diff.effect_q_value, diff.effect
    bad = diff.nonfinite.any()
    if bad:
        header += ["not finite a", "b"]
    lines = []
    for at, name in enumerate(diff.layers):
        if diff.equal[:, at].all():
            continue
        line = [name, f"{int((~diff.equal[:, at]).sum())} of {len(diff.labels)}"]
        line += [_number(errors[at]), "-" if np.isnan(errors[at]) else f"{diff.sqnr[at]:.1f}"]
        line += [_number(q_values[at], 2)] * several + [f"{effects[at]:.4g}"]
        line += [_number(effect_q_values[at], 2)] * several
        line += [str(count) for count in diff.nonfinite[:, at]] * bool(bad)
        lines.append([*line, _bar(errors[at], largest)])
    width = max(len(line[-1]) for line in lines)
    return table([*header, ""], [[*line[:-1], line[-1].ljust(width)] for line in lines], most=top)


def _bar(error: float, largest: float) -> str:
    if np.isnan(error) or error == 0:
        return ""
    return "+" * (max(1, round(BAR * error / largest)) if np.isfinite(error) else BAR)


def _number(value: float, digits: int = 4) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}g}"


def _predictions(diff: ModelChanges, few: int) -> list[str]:
    if not diff.predictions:
        return []
    control = f" (a against itself: {diff.control_flips})" if diff.repeats else ""
    lines = [f"predictions: {len(diff.flips)} of {diff.predictions} flipped{control}"]
    for flip in diff.flips[:few]:
        likely = f"{flip.probability_a:.3f} -> {flip.probability_b:.3f}"
        where = plain(diff.labels[flip.input])
        where += f" at {flip.position}" if diff.predictions > len(diff.labels) else ""
        lines.append(f"  {where}: {plain(flip.a)!r} -> {plain(flip.b)!r}, probability {likely}")
    return lines + _more(diff.flips, few)


def _weights(diff: ModelChanges, few: int) -> list[str]:
    if not diff.weights_compared:
        return []
    lines = [f"weights: {len(diff.weights)} of {diff.weights_compared} changed"]
    if diff.weights:
        rows = [
            [f"  {change.name}", f"{change.norm:.4g}{'~' if change.estimated else ''}", f"{change.relative:.4g}"]
            for change in diff.weights[:few]
        ]
        lines.append(table(["  weight", "|b - a|", "over |a|"], rows))
    lines += _more(diff.weights, few)
    if any(change.estimated for change in diff.weights[:few]):
        lines.append("  ~ estimated to some 2 %, since a was freed before b was there")
    return lines


def _more(listed: Sequence[object], few: int) -> list[str]:
    return [f"  ... {len(listed) - few} more"] if len(listed) > few else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(plain, names[:3]))}{more}"


def _reasons(what: str, given: dict[str, str]) -> Iterable[str]:
    reasons = list(dict.fromkeys(given.values()))
    for why in reasons[:REASONS]:
        names = [name for name, reason in given.items() if reason == why]
        yield f"{what}: {_listed(names)} ({plain(why)})"
    if len(reasons) > REASONS:
        yield f"{what}: {sum(given[name] in reasons[REASONS:] for name in given)} more"
