"""How large parameters, their gradients and their updates are, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .. import files
from ..numerics import Floats, Ints
from ..text import counted, plain, table
from .saved import Saved, list_of
from .tabular import Cells, Tabular

#: Parameters named in `repr`: the largest updates, since what changes too fast breaks first.
SHOWN = 10


@dataclass(eq=False, repr=False)
class ParameterNorms(Saved, Tabular):
    """Euclidean norms of parameters, of their gradients and of their updates, at the times they were weighed.

    An entry is NaN where there was nothing to measure (no gradient, no weighing before, a frozen parameter), and
    infinite where an element was NaN or infinite.

    As a table (`to_csv`, `to_dataframe`) it has a row per step and parameter.

    Attributes:
        parameters: their names, as in `named_parameters()`.
        steps: int64 [steps], numbers of the weighings.
        norms: float64 [steps, parameters].
        gradient_norms: float64 [steps, parameters], of what `.grad` held.
        update_norms: float64 [steps, parameters], of the difference to the call of `weigh` before.
        unmeasured: names of parameters, and why they have none.
        meta: of the run.

    Examples:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> wrapped = noesis.wrap(model, parameters=True)
        >>> optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> wrapped.weigh(every=1)
        >>> wrapped(torch.ones(1, 4)).sum().backward()
        >>> optimiser.step()
        >>> wrapped.weigh(every=1)
        >>> found = wrapped.parameter_norms()
        >>> found.norms[:, 0].tolist(), found.gradient_norms[1, 0].item(), found.update_ratios[1, 0].item()
        ([2.0, 1.0], 2.0, 0.5)
    """

    kind: ClassVar[str] = "parameter_norms"
    ARRAYS: ClassVar[tuple[str, ...]] = ("norms", "gradient_norms", "update_norms", "steps")

    parameters: list[str]
    steps: Ints
    norms: Floats
    gradient_norms: Floats
    update_norms: Floats
    unmeasured: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.parameters))
        for name in ("norms", "gradient_norms", "update_norms"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")

    @property
    def update_ratios(self) -> Floats:
        """Update-to-weight ratios [steps, parameters]: the update's norm by the parameter's at the weighing before."""
        before = np.vstack([np.full((1, len(self.parameters)), np.nan), self.norms[:-1]])[: len(self.steps)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios: Floats = self.update_norms / before
        return ratios

    @property
    def total(self) -> Floats:
        """The norm of all parameters together [steps]."""
        return _total(self.norms)

    @property
    def gradient_total(self) -> Floats:
        """The norm of all gradients together [steps], that `clip_grad_norm_` clips; NaN where there is none."""
        return _total(self.gradient_norms)

    def scalars(self, layers: str | Sequence[str] = "aggregate") -> dict[str, float]:
        """The latest weighing as `noesis/parameters/...`, as loggers take it; nothing before the first.

        Args:
            layers: `"aggregate"` for totals and the largest ratio alone, `"each"` for the numbers of every parameter
                too, or names of layers for those of theirs.
        """
        named = [layers] if isinstance(layers, str) else layers
        if not len(self.steps):
            return {}
        ratios = self.update_ratios[-1]
        found = {
            "norm": self.total[-1],
            "gradient_norm": self.gradient_total[-1],
            "largest_update_ratio": np.nan if np.isnan(ratios).all() else np.nanmax(ratios),
        }
        for index, name in enumerate(self.parameters):
            if layers == "each" or any(name.startswith(f"{layer}.") for layer in named):
                found |= {
                    f"{name}/norm": self.norms[-1, index],
                    f"{name}/gradient_norm": self.gradient_norms[-1, index],
                    f"{name}/update_ratio": ratios[index],
                }
        return {f"noesis/parameters/{name}": float(value) for name, value in found.items()}

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "unmeasured": self.unmeasured, "meta": self.meta}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(getattr(self, name)) for name in self.ARRAYS}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> ParameterNorms:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> ParameterNorms:
        names = list_of(str, header["parameters"])
        steps = np.asarray(arrays["steps"]).astype(np.int64)
        values, gradients, updates = (
            np.asarray(arrays[name], np.float64).reshape(len(steps), len(names)) for name in cls.ARRAYS[:3]
        )
        return cls(names, steps, values, gradients, updates, dict(header["unmeasured"]), dict(header["meta"]))

    def _columns(self) -> dict[str, Cells]:
        found: dict[str, Cells] = {
            "step": self.steps.repeat(len(self.parameters)),
            "parameter": self.parameters * len(self.steps),
        }
        names = ("norms", "gradient_norms", "update_norms", "update_ratios")
        return found | {name.removesuffix("s"): getattr(self, name).ravel() for name in names}

    def __repr__(self) -> str:
        head = f"ParameterNorms of {counted(len(self.parameters), 'parameter')}, {counted(len(self.steps), 'weighing')}"
        if not len(self.steps):
            return f"{head}; wrapped.weigh() measures them"
        ratios = self.update_ratios[-1]
        most = np.argsort(-np.nan_to_num(ratios, nan=-1.0), kind="stable")[:SHOWN]
        rows = [
            [self.parameters[i], *(f"{x:.4g}" for x in (self.norms[-1, i], self.gradient_norms[-1, i], ratios[i]))]
            for i in most
        ]
        total = f"all: norm {self.total[-1]:.4g}, gradient norm {self.gradient_total[-1]:.4g}"
        rest = len(self.parameters) - len(rows)
        parts = [head, table(["parameter", "norm", "gradient norm", "update ratio"], rows)]
        if rest:
            parts.append(f"and {rest} with smaller updates")
        parts.append(total)
        return "\n".join(parts + [f"not measured: {plain(n)} ({plain(why)})" for n, why in self.unmeasured.items()])


def _total(norms: Floats) -> Floats:
    found: Floats = np.where(np.isnan(norms).all(1), np.nan, np.sqrt(np.nansum(norms**2, axis=1)))
    return found
