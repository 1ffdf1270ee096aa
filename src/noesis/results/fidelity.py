"""How faithful one run's activations are to another's: what a dtype, a quantisation or a kernel costs each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import BadType, BadValue
from ..numerics import Floats, Ints
from ..text import counted, plain, table
from .activations import Activations
from .meta_differences import Differences, as_text, meta_differences
from .saved import Saved, list_of
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False, repr=False)
class Fidelity(Saved, Tabular):
    """How far run b's activations are from run a's, layer by layer and token by token.

    A token is a vector of an output `[batch, tokens, width]`; of an output of another shape, a sample. Elements that
    are not finite in one of the runs are left out, and counted.

    As a table (`to_csv`, `to_dataframe`) it has a row per layer. `print` shows it; `repr` is one line.

    Attributes:
        layers: that both runs have with the same shapes, in the order of run a.
        relative_error: float64 [layers], |b - a| / |a| over all elements of a layer (Euclidean norms); infinite where a
            is zero and b is not.
        cosine: float64 [layers], between the same tokens of both, mean over tokens; NaN where no token is finite.
        nonfinite: int64 [layers], elements that are not finite in a or in b.
        token_counts: int64 [layers], tokens of each layer, over batch and calls.
        token_errors: float64 [all tokens], the relative error of each token, one layer's after the other's.
        left_out: by layer, what of it was not compared, and why.
        meta: of both runs.

    Examples:
        >>> import torch, noesis
        >>> a = noesis.Activations({"block": [torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])]})
        >>> b = noesis.Activations({"block": [torch.tensor([[[3.0, 4.5], [0.0, 2.0]]])]})
        >>> found = noesis.compare(a, b)
        >>> found
        Fidelity of 1 layer: SQNR from 20.6 dB (block), cosine from 0.99923
        >>> print(found)
        Fidelity of 1 layer: SQNR from 20.6 dB (block), cosine from 0.99923
        layer  relative error  SQNR (dB)   cosine  tokens  worst token  at
        block         0.09285       20.6  0.99923       2          0.1   0
    """

    kind: ClassVar[str] = "fidelity"
    ARRAYS: ClassVar[tuple[str, ...]] = ("relative_error", "cosine", "nonfinite", "token_counts", "token_errors")

    layers: list[str]
    relative_error: Floats
    cosine: Floats
    nonfinite: Ints
    token_counts: Ints
    token_errors: Floats
    left_out: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.ARRAYS[:4]:
            if getattr(self, name).shape != (len(self.layers),):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected ({len(self.layers)},)")
        if (self.token_counts < 0).any() or self.token_errors.shape != (self.token_counts.sum(),):
            raise ValueError(f"{self.token_errors.shape} token errors and {self.token_counts.sum()} tokens")

    @property
    def sqnr(self) -> Floats:
        """The signal-to-quantisation-noise ratio in dB, float64 [layers]: -20 log10 of the relative error.

        Infinite for equal activations. What `torch.ao.ns` calls SQNR.
        """
        with np.errstate(divide="ignore"):
            return np.asarray(-20.0 * np.log10(self.relative_error) + 0.0)

    @property
    def meta_differences(self) -> Differences:
        """By name, what the runs were asked for differently, `(a's, b's)`: see `Comparison`."""
        return meta_differences(self.meta.get("a", {}), [self.meta.get("b", {})])

    def tokens(self, layer: str) -> Floats:
        """The relative error of each token of a layer, float64 [tokens]; NaN where it has no finite element.

        Raises:
            NoesisError: when the layer is not among `layers`.
        """
        if layer not in self.layers:
            raise BadValue(
                f"layer {layer!r} was not compared", f"one of the {len(self.layers)} in .layers", "See .left_out"
            )
        return self._of_tokens()[self.layers.index(layer)]

    def _of_tokens(self) -> list[Floats]:
        return np.split(self.token_errors, np.cumsum(self.token_counts)[:-1]) if self.layers else []

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map of the relative error, tokens across and layers down; needs the extra `viz`."""
        from ..plots import heat_map

        widest = int(self.token_counts.max(initial=0))
        rows = [np.append(errors, np.full(widest - len(errors), np.nan)) for errors in self._of_tokens()]
        return heat_map(
            np.array(rows),
            self.layers,
            range(widest),
            title="relative error by layer and token",
            row_axis="layer",
            column_axis="token",
            colour_bar="relative error",
            path=path,
        )

    # ------------------------------------------------------------ files and text

    def _header(self) -> dict[str, Any]:
        return {"layers": self.layers, "left_out": self.left_out, "meta": self.meta}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(getattr(self, name)) for name in self.ARRAYS}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Fidelity:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Fidelity:
        names = list_of(str, header["layers"])
        error, cosine, nonfinite, counts, tokens = (np.asarray(arrays[name], np.float64) for name in cls.ARRAYS)
        left_out = {str(name): str(why) for name, why in header["left_out"].items()}
        whole = nonfinite.astype(np.int64), counts.astype(np.int64)
        return cls(names, error, cosine, *whole, tokens, left_out, dict(header["meta"]))

    def _columns(self) -> dict[str, Cells]:
        worst, at = self._worst()
        return {
            "layer": list(self.layers),
            "relative_error": self.relative_error,
            "sqnr": self.sqnr,
            "cosine": self.cosine,
            "nonfinite": self.nonfinite,
            "tokens": self.token_counts,
            "worst_token_error": worst,
            "worst_token": at,
        }

    def _worst(self) -> tuple[Floats, Ints]:
        """The largest error of a token of each layer, NaN before all others, and which token it is."""
        tokens = self._of_tokens()
        places = [int(np.argmax(np.nan_to_num(errors, nan=np.inf))) if len(errors) else -1 for errors in tokens]
        values = [errors[at] if at >= 0 else np.nan for errors, at in zip(tokens, places, strict=True)]
        return np.array(values, np.float64), np.array(places, np.int64)

    def __repr__(self) -> str:
        text = f"Fidelity of {counted(len(self.layers), 'layer')}: "
        if self.relative_error.any():
            least = int(np.argmin(self.sqnr))
            cosine = float(np.min(np.nan_to_num(self.cosine, nan=-1.0)))
            text += f"SQNR from {self.sqnr[least]:.1f} dB ({plain(self.layers[least])}), cosine from {cosine:.5f}"
        else:
            text += "equal"
        bad = int(self.nonfinite.sum())
        return text + (f", {counted(bad, 'element')} not finite" if bad else "")

    def __str__(self) -> str:
        worst, at = self._worst()
        header = ["layer", "relative error", "SQNR (dB)", "cosine", "tokens", "worst token", "at"]
        columns = [
            self.layers,
            [f"{value:.4g}" for value in self.relative_error],
            [f"{value:.1f}" for value in self.sqnr],
            [f"{value:.5f}" for value in self.cosine],
            map(str, self.token_counts),
            [f"{value:.4g}" for value in worst],
            map(str, at),
        ]
        if self.nonfinite.any():
            header.append("not finite")
            columns.append(map(str, self.nonfinite))
        parts = [repr(self), table(header, list(zip(*columns, strict=True)))]
        for why in dict.fromkeys(self.left_out.values()):
            names = [name for name, given in self.left_out.items() if given == why]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"left out: {', '.join(map(plain, names[:3]))}{more} ({plain(why)})")
        if different := self.meta_differences:
            parts.append(as_text(different))
        return "\n".join(parts)


def fidelity(a: Any, b: Any) -> Fidelity:
    """How faithful run `b`'s activations are to run `a`'s, which is what `noesis.compare` gives for activations.

    Layers are matched by name, their calls by order; of layers with more calls in one run, those are compared that both
    have. All is computed in float64.

    Args:
        a: the run to be faithful to.
        b: the same input in another dtype, with quantised weights, on another device.

    Raises:
        NoesisError: when one is something else, or no layer has the same shapes in both.
    """
    for run in (a, b):
        if not isinstance(run, Activations):
            raise BadType(f"Activations and a {type(run).__name__}", "Activations of both runs", "Capture both runs")
    left_out = {name: "only in a" for name in a.layers if name not in b.layers}
    left_out |= {name: "only in b" for name in b.layers if name not in a.layers}
    found: dict[str, tuple[float, float, int, Floats]] = {}
    for name in a.layers:
        if name in left_out:
            continue
        pairs, why = _common_calls(a[name], b[name])
        if why:
            left_out[name] = why
        if pairs:
            found[name] = _layer(pairs)
    if not found:
        name, why = next(iter(left_out.items()), ("", "there are no layers"))
        raise BadValue(
            f"The captures have no layer in common with the same shapes ({name or 'none'}: {why})",
            "two captures of the same input by models with the same layers",
            "Capture the same layers; noesis.token_deltas aligns other inputs",
        )
    error, cosine, bad, tokens = zip(*found.values(), strict=True)
    return Fidelity(
        list(found),
        np.array(error, np.float64),
        np.array(cosine, np.float64),
        np.array(bad, np.int64),
        np.array([len(errors) for errors in tokens], np.int64),
        np.concatenate(tokens),
        left_out,
        {"a": a.meta, "b": b.meta},
    )


def _common_calls(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """The calls of a layer that both runs have, and what is left out."""
    pairs = list(zip(a, b, strict=False))
    if not pairs:
        return [], "it did not run in both"
    for call, (x, y) in enumerate(pairs):
        if x.shape != y.shape:
            return [], f"call {call} has shape {_shape(x)} in a and {_shape(y)} in b"
    return pairs, "" if len(a) == len(
        b
    ) else f"calls beyond the {len(pairs)} that both have: a has {len(a)}, b {len(b)}"


def _layer(calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float, int, Floats]:
    """Relative error, mean cosine, elements that are not finite, and the relative error of each token."""
    pairs = [(_by_token(a), _by_token(b)) for a, b in calls if a.numel()]
    # By the largest element first: squares of 1e200 overflow, of 1e-200 vanish.
    largest = max((_largest(each) for pair in pairs for each in pair), default=0.0) or 1.0
    signal, noise, bad = 0.0, 0.0, 0
    errors, cosines = [np.empty(0)], [np.empty(0)]
    for a, b in pairs:
        finite = torch.isfinite(a) & torch.isfinite(b)
        x, y = (torch.where(finite, each / largest, 0.0) for each in (a, b))
        size, apart = x.square().sum(1), (y - x).square().sum(1)
        signal, noise, bad = signal + float(size.sum()), noise + float(apart.sum()), bad + int((~finite).sum())
        cosine = (x * y).sum(1) / (size.sqrt() * y.square().sum(1).sqrt())
        none = ~finite.any(1)
        errors.append(torch.where(apart > 0, (apart / size).sqrt(), 0.0).masked_fill(none, torch.nan).numpy())
        cosine = torch.where(apart > 0, torch.nan_to_num(cosine.clamp(-1, 1)), 1.0)
        cosines.append(cosine.masked_fill(none, torch.nan).numpy())
    known = np.concatenate(cosines)
    known = known[~np.isnan(known)]
    error = float(np.sqrt(noise / signal)) if signal else float("inf") if noise else 0.0
    return error, float(known.mean()) if len(known) else np.nan, bad, np.concatenate(errors)


def _largest(x: Tensor) -> float:
    return float(torch.nan_to_num(x, posinf=0.0, neginf=0.0).abs().max())


def _by_token(x: Tensor) -> Tensor:
    """As float64 [tokens, elements]."""
    if x.dim() == 3:
        x = x.flatten(0, 1)
    return x.reshape(x.shape[0] if x.dim() else 1, -1).to(torch.float64)


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "scalar"
