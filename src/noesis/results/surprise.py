"""Surprise: how strange each input of a forward is, how surely, and where in the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import BadValue, WrongState
from ..numerics import Floats, benjamini_hochberg
from ..text import table
from .saved import Saved, list_of
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Samples shown by `repr`.
SHOWN = 8
#: Arrays of a surprise that a file holds, and those of each of its layers; the last ones may be missing.
OWN = ("score", "doubt", "doubt_surprisal", "doubt_p_value", "calibrated")
OF_LAYERS = ("code_length", "mixture", "residual", "norm", "nearest", "usual", "surprisal", "p_value", "positions")


@dataclass(frozen=True)
class LayerSurprise:
    """One layer's word on each sample; float64 [N] unless said otherwise.

    Attributes:
        code_length: nats the codebook needs for the layer's vector; infinite where it has NaN or infinity.
        mixture, residual, norm: its parts: within the codebook's subspace, outside of it, and for the vector's length.
        nearest: int64, the code that is nearest.
        surprisal: -log p in nats against the calibration samples, continued exponentially past them; None before
            calibration.
        p_value: share of calibration samples at least as strange in this layer; None before calibration.
        positions: [N, positions], code lengths of the tokens or pixels with `positions="each"`, NaN where masked.
    """

    code_length: Floats
    mixture: Floats
    residual: Floats
    norm: Floats
    nearest: NDArray[np.int64]
    surprisal: Floats | None = None
    p_value: Floats | None = None
    positions: Floats | None = None
    usual: tuple[float, float, float] = (0.0, 0.0, 0.0)  # medians of the three parts over the calibration samples

    def largest(self, sample: int) -> str:
        """The part of a sample's code length that is furthest above its usual value."""
        parts = {"mixture": self.mixture, "residual": self.residual, "norm": self.norm}
        excess = {name: part[sample] - usual for (name, part), usual in zip(parts.items(), self.usual, strict=True)}
        return max(excess, key=lambda name: float(np.nan_to_num(excess[name], nan=np.inf)))


@dataclass(frozen=True)
class Reason:
    """What one channel says of one sample, in nats: higher is stranger."""

    layer: str
    surprisal: float
    p_value: float | None
    largest: str  # which part of the code length is furthest above usual, or "logits"

    def __repr__(self) -> str:
        p = "" if self.p_value is None else f", p={self.p_value:.3g}"
        return f"Reason({self.layer}: {self.surprisal:.3g} nats{p}, most by {self.largest})"


@dataclass
class Surprise(Saved, Tabular):
    """How strange the samples of a forward are; no sample's figures depend on the others.

    As a table (`to_csv`, `to_dataframe`) it has a row per sample, with `<layer>/code_length`, and after calibration
    `<layer>/surprisal` and `<layer>/p_value`, of each layer.

    Attributes:
        score: float64 [N] in nats, higher is stranger; before calibration the mean code length over layers.
        layers: by name, those that ran in the forward.
        doubt: float64 [N], how unsure the logits are (minus their energy; of tokens the mean), or None.
        absent: calibrated layers that did not run in the forward.

    Examples:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook())
        >>> calibration = wrapped.calibrate([torch.randn(600, 4)])
        >>> _ = wrapped(torch.cat([torch.zeros(1, 4), torch.full((1, 4), 30.0)]))
        >>> surprise = wrapped.surprise()
        >>> surprise.is_ood(alpha=0.02).tolist()
        [False, True]
        >>> surprise.explain(1)[0].layer
        '1'
    """

    kind: ClassVar[str] = "surprise"

    score: Floats
    layers: dict[str, LayerSurprise]
    doubt: Floats | None = None
    doubt_surprisal: Floats | None = None
    doubt_p_value: Floats | None = None
    absent: list[str] = field(default_factory=list)
    calibrated: Floats | None = None  # p-values
    reasons: dict[str, str] = field(default_factory=dict)  # why layers are absent, where that is known

    def __len__(self) -> int:
        return len(self.score)

    @property
    def p_value(self) -> Floats:
        """[N]: the chance of a normal input at least this strange; at most alpha for at most a share alpha of them.

        Raises:
            NoesisError: before calibration, or when a layer that was calibrated did not run.
        """
        if self.calibrated is None:
            raise WrongState(
                "There are scores, and no p-values yet", "a calibrated model", "Call wrapped.calibrate(loader) first"
            )
        if self.absent:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            what = f"cannot be judged ({why})" if why else "did not run"
            raise WrongState(
                f"{', '.join(self.absent[:5])} {what} in this forward, and did in those of the calibration",
                "a forward like those of the calibration",
                "Calibrate with forwards of this kind, or read score, which takes the layers that ran",
            )
        return self.calibrated

    @property
    def percentile(self) -> Floats:
        """[N]: 100 * (1 - p): how many of a hundred normal inputs are less strange."""
        return 100 * (1 - self.p_value)

    def is_ood(self, alpha: float = 0.05, *, method: Literal["each", "batch"] = "each") -> NDArray[np.bool_]:
        """Which samples are too strange to be normal.

        Args:
            alpha: with `"each"`, the share of normal inputs that are called strange. With `"batch"`, the expected
                share of normal ones among those called strange, over the whole batch.
            method: how many errors are allowed: per input, or by Benjamini and Hochberg 1995 over the batch, which
                holds for conformal p-values (Bates et al. 2021, 2104.08279, theorem 2).

        Raises:
            NoesisError: before calibration, or for an alpha that is no share.
        """
        if not 0 < alpha < 1:
            raise BadValue(f"is_ood(alpha={alpha})", "a share between 0 and 1", "Pass alpha=0.05")
        if method not in ("each", "batch"):
            raise BadValue(f"is_ood(method={method!r})", '"each" or "batch"', 'Pass method="each"')
        p = self.p_value
        return (p if method == "each" else benjamini_hochberg(p)) <= alpha

    def explain(self, sample: int, most: int = 5) -> list[Reason]:
        """Which layers find a sample strange, the most surprised first.

        Raises:
            NoesisError: for a sample that is not in the batch, or before calibration.
        """
        if not -len(self) <= sample < len(self):
            raise BadValue(f"explain({sample})", f"a sample among {len(self)}", "Pass its position in the batch")
        reasons = []
        for name, layer in self.layers.items():
            if layer.surprisal is None or layer.p_value is None:
                continue
            surprisal, p = float(layer.surprisal[sample]), float(layer.p_value[sample])
            reasons.append(Reason(name, surprisal, p, layer.largest(sample)))
        if self.doubt_surprisal is not None and self.doubt_p_value is not None:
            p = float(self.doubt_p_value[sample])
            reasons.append(Reason("logits", float(self.doubt_surprisal[sample]), p, "logits"))
        if not reasons:
            raise WrongState(
                "How surprised each layer is can be said against calibration samples only",
                "a calibrated model",
                "Call wrapped.calibrate(loader) first",
            )
        return sorted(reasons, key=lambda reason: -reason.surprisal)[:most]

    def matrix(self) -> tuple[list[str], Floats]:
        """Names of the channels and [channels, N]: surprisals, or code lengths before calibration."""
        rows = {
            name: layer.code_length if layer.surprisal is None else layer.surprisal
            for name, layer in self.layers.items()
        }
        if self.doubt_surprisal is not None:
            rows["logits"] = self.doubt_surprisal
        return list(rows), np.stack(list(rows.values()))

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "absent": self.absent, "reasons": self.reasons}

    def _arrays(self) -> files.Arrays:
        found = {name: getattr(self, name) for name in OWN}
        for index, layer in enumerate(self.layers.values()):
            found |= {f"{index}.{name}": getattr(layer, name) for name in OF_LAYERS}
        return {name: np.asarray(array) for name, array in found.items() if array is not None}

    def _payload(self) -> dict[str, Any]:
        arrays = {name: files.number_lists(array) for name, array in self._arrays().items()}
        return {**self._header(), "arrays": arrays}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Surprise:
        arrays = {name: np.asarray(values, dtype=np.float64) for name, values in payload["arrays"].items()}
        return cls._from_arrays(arrays, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Surprise:
        names, absent = (list_of(str, header[key]) for key in ("layers", "absent"))
        samples = arrays["score"].shape
        if len(samples) != 1 or len(set(names)) != len(names):
            raise ValueError(f"scores of shape {samples}, or a layer twice")
        whole = {name: _checked(name, arrays[name], samples) for name in OWN if name in arrays}
        layers = {name: _layer(arrays, index, samples) for index, name in enumerate(names)}
        return cls(layers=layers, absent=absent, reasons=_reasons(header.get("reasons", {})), **whole)

    # ------------------------------------------------------------ showing

    def _columns(self) -> dict[str, Cells]:
        found: dict[str, Cells] = {"sample": np.arange(len(self)), "score": self.score}
        if self.calibrated is not None and not self.absent:
            found["p_value"] = self.calibrated
        doubts = ("doubt", "doubt_surprisal", "doubt_p_value")
        found |= {name: getattr(self, name) for name in doubts if getattr(self, name) is not None}
        for name, layer in self.layers.items():
            said = {"code_length": layer.code_length, "surprisal": layer.surprisal, "p_value": layer.p_value}
            found |= {f"{name}/{what}": values for what, values in said.items() if values is not None}
        return found

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map of channels by samples; needs the extra `viz`."""
        from .. import plots

        names, values = self.matrix()
        calibrated = any(layer.surprisal is not None for layer in self.layers.values())
        return plots.heat_map(
            values,
            names,
            range(len(self)),
            title="surprise by layer and input",
            row_axis="layer, in the order they run",
            column_axis="input",
            colour_bar="surprisal (nats)" if calibrated else "code length (nats)",
            path=path,
        )

    def __repr__(self) -> str:
        shown = range(min(SHOWN, len(self)))
        calibrated = self.calibrated is not None and not self.absent
        header = ["sample", "score (nats)", "p", "most surprised layers"] if calibrated else ["sample", "score (nats)"]
        lines = []
        for sample in shown:
            line = [str(sample), f"{self.score[sample]:.2f}"]
            if calibrated:
                where = ", ".join(reason.layer for reason in self.explain(sample, most=2))
                line += [f"{self.p_value[sample]:.3g}", where]
            lines.append(line)
        rest = f"\n... and {len(self) - len(shown)} more" if len(self) > len(shown) else ""
        note = "" if self.calibrated is not None else "\nno p-values yet: they need wrapped.calibrate(loader)"
        return f"Surprise of {len(self)} samples in {len(self.layers)} layers\n{table(header, lines)}{rest}{note}"


class Judgement(NamedTuple):
    """What a model returned, and how strange its inputs are.

    Attributes:
        output: of the model, as it returned it.
        surprise: of the same call.
    """

    output: Any
    surprise: Surprise


def _reasons(given: Any) -> dict[str, str]:
    """Why layers are absent, from a header: older files have none."""
    if not isinstance(given, dict) or not all(isinstance(reason, str) for reason in given.values()):
        raise ValueError("reasons that are no texts by the names of layers")
    return dict(given)


def _layer(arrays: files.Arrays, index: int, samples: tuple[int, ...]) -> LayerSurprise:
    """One layer's word from the arrays of a file."""
    given = {name: arrays[f"{index}.{name}"] for name in OF_LAYERS if f"{index}.{name}" in arrays}
    positions = given["positions"].shape if "positions" in given else samples
    if positions[:1] != samples or ("surprisal" in given) != ("p_value" in given):
        raise ValueError(f"positions of shape {positions}, or one of surprisal and p-value without the other")
    shapes = {"nearest": positions, "positions": positions, "usual": (3,)}
    found: dict[str, Any] = {name: _checked(name, given[name], shapes.get(name, samples)) for name in given}
    found["usual"] = tuple(found["usual"].tolist())
    return LayerSurprise(**found)


def _checked(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of a file, once it is what one of this name can be."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if name == "nearest":
        if not ((array >= 0) & (array < 2**31) & (array == np.floor(array))).all():
            raise ValueError("nearest holds something else than whole numbers from 0")
        return array.astype(np.int64)
    array = array.astype(np.float64, copy=False)
    if name in ("score", "code_length", "surprisal", "doubt_surprisal", "usual") and np.isnan(array).any():
        raise ValueError(f"{name} has NaN")
    if name in ("p_value", "doubt_p_value", "calibrated") and not ((array > 0) & (array <= 1)).all():
        raise ValueError(f"{name} is not within (0, 1]")
    return array
