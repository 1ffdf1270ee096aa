"""Which steps two traces have in common."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .runs import Recorded, Stepwise


class Lengths(NamedTuple):
    """How many steps two runs have.

    Attributes:
        a, b: of each run, those that its ring no longer holds included.
        common: that are compared: those that both traces hold, or all where the runs have the same.
    """

    a: int
    b: int
    common: int


def common_steps(a: Stepwise, b: Stepwise) -> list[tuple[int, int]]:
    """The places in both traces of the steps that they have in common, in order.

    Steps are matched by number. Parts of runs that have no number in common are matched by their order.
    """
    places = {number: place for place, number in enumerate(b.steps.tolist())}
    pairs = [(place, places[number]) for place, number in enumerate(a.steps.tolist()) if number in places]
    if not pairs and not a.dropped_steps and not b.dropped_steps:
        pairs = [(place, place) for place in range(min(len(a), len(b)))]
    return pairs


def narrowed(a: Recorded, b: Recorded) -> tuple[Recorded, Recorded, Lengths]:
    """Two traces of the steps that both have, where there are any; the traces themselves where these are all steps."""
    pairs, (all_a, all_b) = common_steps(a, b), (len(trace) + trace.dropped_steps for trace in (a, b))
    if not pairs:
        return a, b, Lengths(all_a, all_b, 0)
    if len(pairs) == len(a) == len(b) and all_a == all_b:
        return a, b, Lengths(all_a, all_b, all_a)
    lengths = Lengths(all_a, all_b, len(pairs))
    return _at(a, [place for place, _ in pairs]), _at(b, [place for _, place in pairs]), lengths


def _at(trace: Recorded, places: list[int]) -> Recorded:
    return trace.at(np.isin(np.arange(len(trace)), places))
