"""Direct logit attribution: what each part of the residual stream adds to a logit difference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import files
from ..errors import BadValue
from ..numerics import Floats
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, first_few, plain, table
from .checks import Check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUM = "sum of contributions = logit difference"
#: Rows of `repr`, and of a picture.
SHOWN, PLOTTED = 12, 40


class Contribution(NamedTuple):
    """What one part adds to the logit difference, beside what it adds to random ones."""

    part: str
    value: float  # logits
    control: float  # root mean square over random pairs, logits
    share: float  # of random pairs that it tells apart at least as much


@dataclass(eq=False, repr=False)
class Contributions(Saved, Tabular):
    """What each part of the residual stream adds, directly, to a logit difference: per part and example.

    The final norm divides by what it divided by in this run. A contribution is a direct effect: it says nothing of what
    later parts make of the part, nor of what they would do without it (self-repair: McGrath et al. 2023, "The Hydra
    Effect"); `share` says whether the part tells these two tokens apart more than it tells any two.

    As a table (`to_csv`, `to_dataframe`) it has a row per part and example.

    Examples:
        >>> import torch
        >>> from noesis.interp import contributions
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32,
        ...     hidden_size=16,
        ...     intermediate_size=24,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ...     bos_token_id=1,
        ...     eos_token_id=2,
        ...     pad_token_id=0,
        ... )
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(config).eval()
        >>> found = contributions(model, torch.tensor([[5, 6, 7, 8]]), (3, 4), by="head")
        >>> len(found.parts), found.check.holds
        (7, True)

    Attributes:
        parts: names: `embed`, `attn.3`, `mlp.3`, `result.3.2` for heads, `neurons.3.17`, and biases.
        values: float64 [parts, examples], logits.
        control: float64 [parts, examples], the root mean square of the same part's contributions to random pairs of
            tokens (of a single token: to random tokens less the mean).
        share: float64 [parts, examples], (1 + how many of the random ones are at least as large) / (1 + how many).
        difference: float64 [examples], the model's own, which the values add up to.
        check: of that sum: the largest error, relative to the magnitudes that are added up.
        final: float64 [examples], the difference of the logits that the model returns; another than `difference`, where
            there is a softcap.
        target: per example the two tokens, or the one.
        positions: per example, counted from the first token.
        by: "layer", "head" or "neuron".
        controls: how many random pairs.
        whole: parts that are not told apart further -> why.
        before: "", or why these are contributions to a difference before the model's last step, such as a softcap.
    """

    kind: ClassVar[str] = "contributions"
    ARRAYS: ClassVar[tuple[str, ...]] = ("values", "control", "share", "difference", "final")

    parts: list[str]
    values: Floats
    control: Floats
    share: Floats
    difference: Floats
    final: Floats
    check: Check
    target: list[list[int]]
    positions: list[int]
    by: str = "layer"
    controls: int = 0
    whole: dict[str, str] = field(default_factory=dict)
    before: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.parts), len(self.positions))
        for name in self.ARRAYS:
            expected = shape if name in ("values", "control", "share") else shape[1:]
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {expected}")
        if len(self.target) != shape[1] or not all(len(tokens) in (1, 2) for tokens in self.target):
            raise ValueError(f"{len(self.target)} targets for {shape[1]} examples")

    @property
    def residual(self) -> Floats:
        """What the parts do not explain of the difference, float64 [examples]: rounding, where the check holds."""
        return np.asarray(self.difference - self.values.sum(0))

    def top(self, k: int = 10, *, example: int | None = None) -> list[Contribution]:
        """The parts that add the most, by magnitude; over examples the mean, where none is given.

        Raises:
            NoesisError: (a ValueError) for an example that is not there.
        """
        count = self.values.shape[1]
        if example is not None and not -count <= example < count:
            raise BadValue(
                f"example is {example}", f"one of the {counted(count, 'example')}", "Leave it out for the mean"
            )
        columns = [
            each.mean(1) if example is None else each[:, example] for each in (self.values, self.control, self.share)
        ]
        order = np.argsort(-np.abs(columns[0]), kind="stable")[:k]
        return [Contribution(self.parts[at], *(float(column[at]) for column in columns)) for at in order]

    def plot(self, path: files.PathLike | None = None) -> Figure:
        """A heat map: heads by layer where there are heads, else the parts that add the most by example.

        Needs the extra `viz`.

        Args:
            path: where to write it too, as `.png`, `.svg` or `.pdf`.

        Returns:
            The figure, which needs no display.
        """
        from ..plots import heat_map

        title = f"contribution to {self._target()}"
        heads = {name: at for at, name in enumerate(self.parts) if name.startswith("result.")}
        if heads:
            places = {at: tuple(map(int, name.split(".")[1:])) for name, at in heads.items()}
            layers, most = sorted({layer for layer, _ in places.values()}), max(head for _, head in places.values())
            grid = np.full((len(layers), most + 1), np.nan)
            for at, (layer, head) in places.items():
                grid[layers.index(layer), head] = self.values[at].mean()
            return heat_map(
                grid,
                layers,
                range(most + 1),
                title=title,
                row_axis="layer",
                column_axis="head",
                colour_bar="logits, mean over examples",
                path=path,
            )
        chosen = sorted(self.parts.index(each.part) for each in self.top(PLOTTED))
        return heat_map(
            self.values[chosen],
            [self.parts[at] for at in chosen],
            range(len(self.positions)),
            title=title,
            row_axis="part",
            column_axis="example",
            colour_bar="logits",
            path=path,
        )

    # ------------------------------------------------------------ files and text

    def _header(self) -> dict[str, Any]:
        names = ("parts", "target", "positions", "by", "controls", "whole", "before", "meta")
        return {**{name: getattr(self, name) for name in names}, "check": self.check._asdict()}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(getattr(self, name)) for name in self.ARRAYS}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Contributions:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Contributions:
        check = header["check"]
        numbers = {name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS}
        return cls(
            list_of(str, header["parts"]),
            **numbers,
            check=Check(str(check["identity"]), float(check["error"]), float(check["bound"])),
            target=[list_of(int, tokens) for tokens in header["target"]],
            positions=list_of(int, header["positions"]),
            by=str(header["by"]),
            controls=int(header["controls"]),
            whole={str(name): str(why) for name, why in header["whole"].items()},
            before=str(header["before"]),
            meta=dict(header["meta"]),
        )

    def _columns(self) -> dict[str, Cells]:
        examples = len(self.positions)
        return {
            "part": [name for name in self.parts for _ in range(examples)],
            "example": np.tile(np.arange(examples), len(self.parts)),
            "contribution": self.values.ravel(),
            "control": self.control.ravel(),
            "share": self.share.ravel(),
        }

    def _target(self) -> str:
        """What the contributions are to, in words."""
        if len(self.target[0]) == 1:
            what = "a logit less the mean logit"
            return what if self._differ() else f"logit {self.target[0][0]} less the mean logit"
        return "logit differences" if self._differ() else "logit {} - logit {}".format(*self.target[0])

    def _differ(self) -> bool:
        return any(tokens != self.target[0] for tokens in self.target)

    def __repr__(self) -> str:
        examples = len(self.positions)
        many = examples > 1
        head = (
            f"Contributions of {counted(len(self.parts), 'part')} to {self._target()}, {counted(examples, 'example')}"
        )
        shown = self.top(SHOWN)
        spread = dict(zip(self.parts, self.values.std(1), strict=True))
        rows = [
            [
                each.part,
                f"{each.value:+.3f}",
                *([f"{spread[each.part]:.3f}"] if many else []),
                f"{each.control:.3f}",
                f"{each.share:.2f}",
            ]
            for each in shown
        ]
        rest, blank = len(self.parts) - len(shown), [""] * (3 if many else 2)
        total = float(self.values.sum(0).mean())
        if rest:
            rows.append([f"{rest} more", f"{total - sum(each.value for each in shown):+.3f}", *blank])
        rows += [["sum", f"{total:+.3f}", *blank], ["the model's own", f"{self.difference.mean():+.3f}", *blank]]
        others = "random pairs" if len(self.target[0]) == 2 else "random tokens"
        header = ["part", "mean" if many else "adds", *(["std"] if many else []), others, "share"]
        lines = [
            head + ": direct effects, with the final norm's scale of this run",
            table(header, rows, most=SHOWN + 3),
            f"{SUM}: error {self.check.error:.0e}"
            + ("" if self.check.holds else f" FAILS (rounding: {self.check.bound:.0e})"),
            f"{others}: root mean square of what it adds to {self.controls}; share: of those to which it adds as much",
        ]
        if self.before:
            lines.append(f"{self.before}; behind it the difference is {self.final.mean():+.3f}")
        reasons: dict[str, list[str]] = {}
        for name, why in self.whole.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"not told apart: {first_few(names)}: {plain(why)}" for why, names in reasons.items()]
        return "\n".join(lines)
