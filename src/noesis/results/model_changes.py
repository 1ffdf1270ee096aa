"""What differs between two models, by layer, prediction and weight: numbers, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BadValue
from ..numerics import Floats, Ints, benjamini_hochberg, paired_tests
from .comparing import LARGEST_EFFECT
from .meta_differences import Differences, meta_differences

#: Log ratios of errors that spread less than this over inputs are taken to spread this much.
LEAST_SPREAD = 1e-3


class Parting(NamedTuple):
    """Where two models part, in order of execution: the layer, which call of it, of which input, and by how much.

    `inputs` counts those that part at this very call of this layer.
    """

    layer: str
    call: int
    input: int
    relative_error: float
    inputs: int


class Flip(NamedTuple):
    """A prediction that is another one: of which input, at which token (or sample), what, and how likely each is."""

    input: int
    position: int
    a: str
    b: str
    probability_a: float
    probability_b: float


class WeightChange(NamedTuple):
    """A weight that differs: |b - a| (Euclidean), that over |a|, and whether it is estimated (to some 2 %)."""

    name: str
    norm: float
    relative: float
    estimated: bool


@dataclass(eq=False, repr=False)
class ModelChanges:
    """What differs between two models that were given the same inputs.

    Attributes:
        layers: that both models have, in order of execution in a; `"(output)"` is what the model returns.
        labels: of the inputs.
        errors: float64 [inputs, layers], |b - a| / |a| of a layer's activations; infinite where one of them is not
            finite and the other is; NaN where shapes do not fit, see `left_out`.
        equal: bool [inputs, layers], whether all bits of the activations are equal.
        mean_effects: float64 [inputs, layers], difference of the means in pooled standard deviations.
        std_effects: float64 [inputs, layers], log ratio of the standard deviations.
        nonfinite: int64 [2, layers], elements that are not finite in a, and in b.
        control: float64 [inputs, layers], the largest relative error of model a against itself; NaN without repeats.
        repeats: how often a ran again as a control.
        first_difference: where bits differ first; None where none do.
        first_divergence: where the relative error is first above `tolerance` and the control.
        predictions: how many were compared: tokens of a language model, samples of a classifier.
        flips: those that are another one.
        control_flips: the most flips of model a against itself.
        weights: those that differ, the most changed (relatively) first.
        weights_compared: how many were.
        weights_left_out: weights that cannot be compared, and why.
        weights_only_in_a, weights_only_in_b: their names.
        only_in_a, only_in_b: layers that ran in one model only.
        renamed: layers and weights of a by another name in b, which were found by shape and order.
        left_out: by layer, or `"predictions"`, what was not compared, and why.
        tolerance: the relative error that is no more than rounding.
        alpha: the false discovery rate at which a layer counts as changed; another may be set.
        meta: of both models.
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("errors", "mean_effects", "std_effects", "control")

    layers: list[str]
    labels: list[str]
    errors: Floats
    equal: NDArray[np.bool_]
    mean_effects: Floats
    std_effects: Floats
    nonfinite: Ints
    control: Floats
    repeats: int = 0
    first_difference: Parting | None = None
    first_divergence: Parting | None = None
    predictions: int = 0
    flips: list[Flip] = field(default_factory=list)
    control_flips: int = 0
    weights: list[WeightChange] = field(default_factory=list)
    weights_compared: int = 0
    weights_left_out: dict[str, str] = field(default_factory=dict)
    weights_only_in_a: list[str] = field(default_factory=list)
    weights_only_in_b: list[str] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    tolerance: float = 0.0
    alpha: float = 0.05
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.labels), len(self.layers))
        for name in (*self.ARRAYS, "equal"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.nonfinite.shape != (2, len(self.layers)):
            raise ValueError(f"nonfinite has shape {self.nonfinite.shape}, expected {(2, len(self.layers))}")

    # ------------------------------------------------------------ by layer

    @property
    def relative_error(self) -> Floats:
        """Root mean square of `errors` over inputs, float64 [layers]; NaN where none fits."""
        squares = np.square(self.errors)
        known = ~np.isnan(squares)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(np.where(known, squares, 0.0).sum(0) / known.sum(0)))

    @property
    def sqnr(self) -> Floats:
        """The signal-to-quantisation-noise ratio in dB, float64 [layers]: -20 log10 of the relative error."""
        with np.errstate(divide="ignore"):
            return np.asarray(-20.0 * np.log10(self.relative_error) + 0.0)

    @property
    def effect(self) -> Floats:
        """How far mean and std of a layer moved on average over inputs, float64 [layers]: see `Row.effect`."""
        return np.asarray(np.hypot(self.mean_effects.mean(0), self.std_effects.mean(0)))

    @property
    def q_value(self) -> Floats:
        """How surely a layer's relative error is above rounding and control, float64 [layers].

        Student's paired t over inputs of the log of the error over `tolerance` or the control, whichever is larger,
        one-sided, adjusted for the number of layers (Benjamini & Hochberg 1995). NaN where there are fewer than two
        inputs, or nothing to compare.
        """
        floor = np.fmax(self.control, max(self.tolerance, np.finfo(np.float32).tiny))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.clip(np.log(self.errors) - np.log(floor), -LARGEST_EFFECT, LARGEST_EFFECT)
        return _adjusted(_p_values(logs, LEAST_SPREAD, larger=True))

    @property
    def effect_q_value(self) -> Floats:
        """How surely mean or std of a layer move in one direction over inputs, float64 [layers].

        Student's paired t of `mean_effects` and of `std_effects`, the smaller p-value doubled (Bonferroni), adjusted
        for the number of layers. A layer can change much and in no direction.
        """
        least = max(self.tolerance, np.finfo(np.float32).tiny)
        p_values = [_p_values(effects, least) for effects in (self.mean_effects, self.std_effects)]
        return _adjusted(np.minimum(1.0, 2 * np.minimum(*p_values)))

    @property
    def changed(self) -> list[str]:
        """Layers whose activations differ by more than rounding and control, at the false discovery rate `alpha`.

        Raises:
            NoesisError: when there are fewer than two inputs.
        """
        if len(self.labels) < 2:
            raise BadValue(
                f"This diff is of {len(self.labels)} input",
                "at least 2, so that their spread can be known",
                "Give more",
            )
        return [name for name, q in zip(self.layers, self.q_value, strict=True) if q <= self.alpha]

    # ------------------------------------------------------------ as a whole

    @property
    def distance(self) -> float:
        """The largest relative error of a layer, 0 for equal models; NaN where no layer's shapes fit."""
        known = self.relative_error[~np.isnan(self.relative_error)]
        return float(known.max()) if len(known) else float("nan")

    @property
    def identical(self) -> bool:
        """Whether nothing differs of what was compared: no bit of an activation, no prediction, no weight, no name."""
        apart: list[Any] = [self.flips, self.weights, self.weights_left_out, self.only_in_a]
        apart += [self.only_in_b, self.weights_only_in_a, self.weights_only_in_b]
        return bool(self.equal.all()) and not any(apart)

    @property
    def meta_differences(self) -> Differences:
        """By name, what differs in the meta of the models, `(a's, b's)`: see `Comparison`."""
        a, b = (self.meta.get(name, {}) for name in "ab")
        known = a.keys() & b.keys()  # less of a capture than of a model
        one, other = ({name: value for name, value in meta.items() if name in known} for meta in (a, b))
        return meta_differences(one, [other])


def _p_values(numbers: Floats, least_spread: float, larger: bool = False) -> Floats:
    """Of numbers [inputs, layers]; NaN for layers that lack some, and where there are fewer than two inputs."""
    p_values = np.full(numbers.shape[1], np.nan)
    if len(numbers) > 1:
        known = ~np.isnan(numbers).any(0)
        p_values[known] = paired_tests(numbers[:, known], least_spread, larger=larger)
    return p_values


def _adjusted(p_values: Floats) -> Floats:
    """q-values of those that are known."""
    known = ~np.isnan(p_values)
    p_values[known] = benjamini_hochberg(p_values[known])
    return p_values
