"""Probe: what can be read off activations, beside what would be without the model; as text, table, picture, file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import files
from ..numerics import Floats, benjamini_hochberg
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, plain, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False, repr=False)
class Probe(Saved, Tabular):
    """What a linear probe reads off the activations of each layer; what `interp.probe` returns.

    Scores are accuracies of classes, or R2 of numbers, on samples that were held out. As a table (`to_csv`,
    `to_dataframe`) it has a row per layer.

    Attributes:
        layers: names of the layers.
        scores: float64 [layers].
        fold_scores: float64 [layers, folds], of each part that was held out.
        control: what the probe scores on control tasks, a random label for each type; NaN without types.
        against: what it scores on the activations of another model; NaN without one.
        against_p_values: one-sided, of the difference between the two over groups, by Student's paired t.
        p_values: of labels that are shuffled, by a least-squares probe.
        baseline: what the commonest class scores; 0 for numbers.
        task: "classes" or "numbers".
        samples: how many there were.
        groups: into how many groups they fall.
        notes: what is missing, and what was left out.
        meta: of the run.
    """

    kind: ClassVar[str] = "probe"
    ARRAYS: ClassVar[tuple[str, ...]] = ("scores", "control", "against", "against_p_values", "p_values", "fold_scores")
    numbers: ClassVar[tuple[str, ...]] = ARRAYS

    layers: list[str]
    scores: Floats
    control: Floats
    against: Floats
    against_p_values: Floats
    p_values: Floats
    fold_scores: Floats
    baseline: float
    task: str
    samples: int
    groups: int
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.ARRAYS:
            values = getattr(self, name)
            if len(values) != len(self.layers) or values.ndim != 1 + (name == "fold_scores"):
                raise ValueError(f"{name} has shape {values.shape}, of {len(self.layers)} layers")

    @property
    def selectivity(self) -> Floats:
        """Score minus that of the control task, `[layers]` (Hewitt & Liang 2019)."""
        found: Floats = self.scores - self.control
        return found

    @property
    def gain(self) -> Floats:
        """Score minus that on the other model's activations, `[layers]`."""
        found: Floats = self.scores - self.against
        return found

    @property
    def q_values(self) -> Floats:
        """p-values adjusted over layers (Benjamini & Hochberg 1995)."""
        return _adjusted(self.p_values)

    @property
    def against_q_values(self) -> Floats:
        """p-values of the gain, likewise."""
        return _adjusted(self.against_p_values)

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map of scores and controls by layer; needs the extra `viz`."""
        from ..plots import heat_map

        columns = {"score": self.scores, "baseline": np.full(len(self.layers), self.baseline)}
        columns |= {"control task": self.control, "against": self.against}
        known = {name: values for name, values in columns.items() if np.isfinite(values).any()}
        return heat_map(
            np.stack(list(known.values()), axis=1),
            self.layers,
            list(known),
            title=f"{self._score} of a linear probe",
            row_axis="layer",
            column_axis="",
            colour_bar=self._score,
            path=path,
        )

    @property
    def _score(self) -> str:
        return "accuracy" if self.task == "classes" else "R2"

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        names = ("layers", "baseline", "task", "samples", "groups", "notes", "meta")
        return {name: getattr(self, name) for name in names}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(getattr(self, name)) for name in self.ARRAYS}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Probe:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Probe:
        return cls(
            layers=list_of(str, header["layers"]),
            **{name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS},
            baseline=float(header["baseline"]),
            task=str(header["task"]),
            samples=int(header["samples"]),
            groups=int(header["groups"]),
            notes=list_of(str, header["notes"]),
            meta=dict(header["meta"]),
        )

    def _columns(self) -> dict[str, Cells]:
        return {
            "layer": list(self.layers),
            "score": self.scores,
            "baseline": np.full(len(self.layers), self.baseline),
            "control": self.control,
            "selectivity": self.selectivity,
            "against": self.against,
            "gain": self.gain,
            "against_q_value": self.against_q_values,
            "p_value": self.p_values,
            "q_value": self.q_values,
        }

    def __repr__(self) -> str:
        head = f"Probe of {self.task} on {counted(self.samples, 'sample')} in {counted(self.groups, 'group')}"
        columns = (self.scores, self.control, self.selectivity, self.against, self.gain)
        rows = [
            [name, *map(_shown, values), "-" if np.isnan(q) else f"{q:.2g}"]
            for name, *values, q in zip(self.layers, *columns, self.q_values, strict=True)
        ]
        header = ["layer", self._score, "control task", "selectivity", "against", "gain", "q"]
        commonest = f"the commonest class alone: {self.baseline:.3f}" if self.task == "classes" else "the mean alone: 0"
        return "\n".join([head, table(header, rows), commonest, *map(plain, self.notes)])


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _adjusted(p_values: Floats) -> Floats:
    known, found = np.isfinite(p_values), np.full(len(p_values), np.nan)
    found[known] = benjamini_hochberg(p_values[known])
    return found
