"""ModelDiff: what differs between two models that were given the same inputs, as text, table, picture and file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import files
from ..numerics import Floats
from .model_changes import Flip, ModelChanges, Parting, WeightChange
from .model_diff_text import one_line, summary
from .saved import Saved, list_of
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False, repr=False)
class ModelDiff(ModelChanges, Saved, Tabular):
    """What differs between two models that were given the same inputs; what `noesis.diff` returns.

    As a table (`to_csv`, `to_dataframe`) it has a row per layer. `print` shows what changed; `repr` is one line.

    Examples:
        >>> import torch, noesis
        >>> a = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> print(noesis.diff(a, a, torch.ones(3, 4), layers="all"))
        no difference: 4 layers over 3 inputs, 4 weights and 3 predictions are equal, bit by bit
        control: a ran twice, and equals itself bit by bit
    """

    kind: ClassVar[str] = "model_diff"
    suffixes: ClassVar[str] = ".json or .json.gz"

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map of the relative error, inputs across and layers down; needs the extra `viz`."""
        from ..plots import heat_map

        return heat_map(
            self.errors.T,
            self.layers,
            self.labels,
            title="relative error by layer and input",
            row_axis="layer",
            column_axis="input",
            colour_bar="relative error",
            path=path,
        )

    def summary(self, top: int = 24) -> str:
        """The diff as text, with as many layers as `top`, and flips and weights likewise fewer."""
        return summary(self, top)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return one_line(self)

    # ------------------------------------------------------------ files

    def _columns(self) -> dict[str, Cells]:
        return {
            "layer": list(self.layers),
            "inputs_that_differ": (~self.equal).sum(0),
            "relative_error": self.relative_error,
            "sqnr": self.sqnr,
            "q_value": self.q_value,
            "effect": self.effect,
            "effect_q_value": self.effect_q_value,
            "control": _largest(self.control),
            "nonfinite_a": self.nonfinite[0],
            "nonfinite_b": self.nonfinite[1],
        }

    def _payload(self) -> dict[str, Any]:
        payload = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        arrays = (*self.ARRAYS, "equal", "nonfinite")
        payload |= {name: files.number_lists(payload[name]) for name in arrays}
        payload["weights"] = [
            each._replace(norm=_out(each.norm), relative=_out(each.relative)) for each in self.weights
        ]
        for name in ("first_difference", "first_divergence"):
            where: Parting | None = payload[name]
            payload[name] = where and where._replace(relative_error=_out(where.relative_error))
        return payload

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> ModelDiff:
        values = {each.name: payload[each.name] for each in dataclasses.fields(cls)}
        shape = (len(values["labels"]), len(values["layers"]))
        values |= {name: np.asarray(values[name], np.float64).reshape(shape) for name in cls.ARRAYS}
        values["equal"] = np.asarray(values["equal"], np.bool_).reshape(shape)
        values["nonfinite"] = np.asarray(values["nonfinite"], np.int64)
        for name in ("layers", "labels", "weights_only_in_a", "weights_only_in_b", "only_in_a", "only_in_b"):
            values[name] = list_of(str, values[name])
        for name in ("weights_left_out", "renamed", "left_out"):
            values[name] = {str(key): str(value) for key, value in dict(values[name]).items()}
        for name in ("repeats", "predictions", "control_flips", "weights_compared"):
            values[name] = int(values[name])
        for name in ("first_difference", "first_divergence"):
            values[name] = None if values[name] is None else _parting(*values[name])
        values["flips"] = [_flip(*flip) for flip in values["flips"]]
        values["weights"] = [_weight(*change) for change in values["weights"]]
        values |= {name: float(values[name]) for name in ("tolerance", "alpha")} | {"meta": dict(values["meta"])}
        return cls(**values)


def _largest(values: Floats) -> Floats:
    """The largest over inputs, NaN where there is none."""
    return np.fmax.reduce(values, axis=0) if len(values) else np.full(values.shape[1], np.nan)


def _out(value: float) -> Any:
    """A number as JSON holds it: infinity comes back."""
    return files.number_lists(np.array([value], np.float64))[0]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _parting(layer: Any, call: Any, given: Any, error: Any, inputs: Any) -> Parting:
    return Parting(str(layer), int(call), int(given), _number(error), int(inputs))


def _flip(given: Any, position: Any, a: Any, b: Any, p_a: Any, p_b: Any) -> Flip:
    return Flip(int(given), int(position), str(a), str(b), _number(p_a), _number(p_b))


def _weight(name: Any, norm: Any, relative: Any, estimated: Any) -> WeightChange:
    return WeightChange(str(name), _number(norm), _number(relative), bool(estimated))
