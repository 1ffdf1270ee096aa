"""Two runs of the same inputs, layer by layer and call by call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..numerics import Floats, align
from ..results import Flip, Parting, WeightChange, effect_sizes
from .kept import Kept, Run
from .weights import Weight, change

#: Layer or weight of a, and its name in b.
Pairs = dict[str, str]


@dataclass
class LayerDifferences:
    """How layers differ, [inputs, layers], and each call of them, for the order in which they part."""

    errors: Floats
    equal: NDArray[np.bool_]
    mean_effects: Floats
    std_effects: Floats
    calls: list[list[tuple[str, int, float, bool]]]
    left_out: dict[str, str]


def pairs(a: Sequence[str], b: Sequence[str], shape_a: Any, shape_b: Any, by_order: bool) -> Pairs:
    """What is the same in both: by name, and if asked, of the rest what has the same shape, in order.

    Args:
        a: names of one model, in order.
        b: of the other.
        shape_a: of a name, what has to be equal, as text.
        shape_b: likewise.
        by_order: whether those are paired that have no name in common.
    """
    known = set(b)
    found = {name: name for name in a if name in known}
    if by_order:
        rest_a, rest_b = ([name for name in names if name not in found] for names in (a, b))
        places = align([str(shape_a(name)) for name in rest_a], [str(shape_b(name)) for name in rest_b])
        found |= {rest_a[i]: rest_b[j] for i, j in zip(*places, strict=True)}
    return found


def shapes_of(run: Run) -> Callable[[str], list[tuple[int, ...]]]:
    """Of a layer, the shapes of its calls in the first input in which it ran."""
    return lambda name: [kept.shape for kept in next(calls[name] for calls in run.calls if name in calls)]


def layers_of(a: Run, b: Run, matched: Pairs) -> LayerDifferences:
    """How the layers that were matched differ, those of a in order of execution."""
    names = [name for name in a.layers if name in matched]
    shape = (len(a.calls), len(names))
    errors, equal = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)
    sizes = np.full((4, *shape), np.nan)
    left_out: dict[str, str] = {}
    apart: list[list[tuple[str, int, float, bool]]] = []
    for i, (calls_a, calls_b) in enumerate(zip(a.calls, b.calls, strict=True)):
        by_call: dict[tuple[str, int], tuple[float, bool]] = {}
        for j, name in enumerate(names):
            both = calls_a.get(name, []), calls_b.get(matched[name], [])
            sizes[:2, i, j], sizes[2:, i, j] = _mean_and_std(both[0]), _mean_and_std(both[1])
            each = [_apart(x, y) for x, y in zip(*both, strict=False)]
            if len(both[0]) != len(both[1]):
                left_out.setdefault(name, f"{len(both[0])} calls in a and {len(both[1])} in b, in input {i}")
            unlike = next(((x, y) for x, y in zip(*both, strict=False) if x.shape != y.shape), None)
            if unlike is not None:
                x, y = ("x".join(map(str, kept.shape)) or "scalar" for kept in unlike)
                left_out.setdefault(name, f"activations are {x} in a and {y} in b in input {i}; effects are compared")
                continue
            noise, signal = (sum(kept[at] for kept in each) for at in (0, 1))
            errors[i, j] = _error(noise, signal) if each else np.nan
            equal[i, j] = all(kept[2] for kept in each) and len(both[0]) == len(both[1])
            by_call |= {(name, at): (_error(*kept[:2]), kept[2]) for at, kept in enumerate(each)}
        apart.append([(*where, *by_call[where]) for where in a.order[i] if where in by_call])
    mean_effects, std_effects = effect_sizes(*sizes)
    return LayerDifferences(errors, equal, mean_effects, std_effects, apart, left_out)


def _apart(a: Kept, b: Kept) -> tuple[float, float, bool]:
    """Squares of noise and signal over all elements, from those that were kept, and whether all bits are equal."""
    if a.shape != b.shape:
        return np.nan, np.nan, False
    x, y = (kept.elements.to(torch.float64) for kept in (a, b))
    finite_x, finite_y = torch.isfinite(x), torch.isfinite(y)
    finite = finite_x & finite_y
    share = a.numel / max(len(x), 1)
    signal = float(torch.where(finite, x, 0.0).square().sum()) * share
    if a.digest == b.digest and a.dtype == b.dtype:
        return 0.0, signal, True
    if a.nonfinite != b.nonfinite or bool((finite_x != finite_y).any()):
        return np.inf, signal, False
    return float(torch.where(finite, y - x, 0.0).square().sum()) * share, signal, False


def _error(noise: float, signal: float) -> float:
    return 0.0 if noise == 0 else float("inf") if signal == 0 else float(np.sqrt(noise / signal))


def _mean_and_std(calls: Sequence[Kept]) -> tuple[float, float]:
    """Over all calls of a layer."""
    parts = np.array([(kept.finite, kept.mean, kept.std) for kept in calls if kept.finite], np.float64).reshape(-1, 3)
    count, mean, std = parts.T
    if not len(count):
        return np.nan, np.nan
    whole = float(np.average(mean, weights=count))
    return whole, float(np.sqrt(np.average(std**2 + (mean - whole) ** 2, weights=count)))


def first(found: LayerDifferences, names: Sequence[str], over: Floats | None) -> Parting | None:
    """Where models part first: at any bit, or where the error is over what is allowed, float64 [inputs, layers]."""
    place = {name: at for at, name in enumerate(names)}
    partings = []
    for i, calls in enumerate(found.calls):
        for at, (name, call, error, equal) in enumerate(calls):
            if not equal and (over is None or not error <= over[i, place[name]]):
                partings.append((at, i, name, call, error))
                break
    if not partings:
        return None
    _, i, name, call, error = min(partings)
    return Parting(name, call, i, error, sum(each[2:4] == (name, call) for each in partings))


def flips_of(a: Run, b: Run) -> tuple[int, list[Flip], str]:
    """How many predictions were compared, which of them are others, and why some were not compared."""
    count, flips, why = 0, [], ""
    for i, (x, y) in enumerate(zip(a.predictions, b.predictions, strict=True)):
        if x is None or y is None:
            why = why or ("" if x is None and y is None else f"only one model makes predictions for input {i}")
            continue
        if len(x.classes) != len(y.classes) or a.tokens[i] != b.tokens[i]:
            why = why or f"input {i} has {len(x.classes)} tokens or samples in a and {len(y.classes)}, other ones, in b"
            continue
        count += len(x.classes)
        for at in (x.classes != y.classes).nonzero().flatten().tolist():
            before, after = a.class_name(int(x.classes[at])), b.class_name(int(y.classes[at]))
            flips.append(Flip(i, at, before, after, float(x.probabilities[at]), float(y.probabilities[at])))
    return count, flips, why


def weight_changes(
    a: Mapping[str, Weight], b: Mapping[str, Weight], matched: Pairs
) -> tuple[list[WeightChange], int, dict[str, str]]:
    """Weights that differ, how many were compared, and which could not be, and why."""
    changes, count, left_out = [], 0, {}
    seen: set[tuple[int, int]] = set()
    for name, other in matched.items():
        both = a[name], b[other]
        if (ids := (id(both[0]), id(both[1]))) in seen:  # tied in both
            continue
        seen.add(ids)
        found = change(name, *both)
        if isinstance(found, str):
            left_out[name] = found
            continue
        count += 1
        if found is not None:
            changes.append(found)
    return sorted(changes, key=lambda each: -np.nan_to_num(each.relative, nan=np.inf)), count, left_out
