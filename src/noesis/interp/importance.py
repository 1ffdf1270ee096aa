"""Which neurons matter: what changes when one says always the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import files
from ..errors import BadType, BadValue
from ..numerics import Floats, Ints, benjamini_hochberg, paired_tests
from ..results import Cells, Saved, Tabular
from ..text import counted, table
from ..wrapping import moved_to, unwrapped
from .anatomy import Anatomy, called_and_root
from .channels import channels_last
from .edits import Custom, Edit
from .neuron_examples import Neurons
from .running import run

#: Channels that `repr` names, and a spread over examples below which it is taken to be this, in units of the largest.
SHOWN, LEAST_SPREAD = 10, 1e-6


class Important(NamedTuple):
    """One channel, and what its ablation does to the metric."""

    channel: int
    effect: float
    standard_error: float
    q_value: float


@dataclass(eq=False, repr=False)
class Importance(Saved, Tabular):
    """What a metric loses or gains when one channel at a time says always the same; what `interp.importance` returns.

    As a table (`to_csv`, `to_dataframe`) it has a row per channel.

    Attributes:
        site: whose channels they are.
        channels: int64 [channels].
        effects: float64 [channels, examples], metric with the channel ablated minus metric without.
        baseline: float64 [examples], the metric without.
        values: float64 [channels], what each was set to.
        meta: of the run.
    """

    kind: ClassVar[str] = "importance"
    numbers: ClassVar[tuple[str, ...]] = ("channels", "effects", "baseline", "values")

    site: str
    channels: Ints
    effects: Floats
    baseline: Floats
    values: Floats
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.effects.shape != (len(self.channels), len(self.baseline)) or len(self.values) != len(self.channels):
            raise ValueError(f"effects have shape {self.effects.shape}")

    @property
    def mean(self) -> Floats:
        """Mean effects, `[channels]`."""
        found: Floats = self.effects.mean(1)
        return found

    @property
    def standard_error(self) -> Floats:
        """Of the mean effects; NaN of one example."""
        count = self.effects.shape[1]
        found: Floats = np.full(len(self.channels), np.nan) if count < 2 else self.effects.std(1, ddof=1) / count**0.5
        return found

    @property
    def q_values(self) -> Floats:
        """Of Student's paired t over examples, adjusted over channels (Benjamini & Hochberg 1995)."""
        if self.effects.shape[1] < 2:
            return np.full(len(self.channels), np.nan)
        least = LEAST_SPREAD * max(float(np.abs(self.effects).max(initial=0.0)), np.finfo(np.float64).tiny)
        return benjamini_hochberg(paired_tests(self.effects.T, least))

    def top(self, k: int = SHOWN) -> list[Important]:
        """The channels whose mean effect is largest, whatever its sign."""
        order = np.argsort(-np.abs(self.mean), kind="stable")[:k]
        columns = (self.channels, self.mean, self.standard_error, self.q_values)
        return [Important(int(c[i]), float(e[i]), float(s[i]), float(q[i])) for i in order for c, e, s, q in [columns]]

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        return {"site": self.site, "meta": self.meta}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.numbers}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(array) for name, array in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Importance:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Importance:
        values, baseline = (np.asarray(arrays[name], np.float64) for name in ("values", "baseline"))
        effects = np.asarray(arrays["effects"], np.float64).reshape(len(values), len(baseline))
        channels = np.asarray(arrays["channels"]).astype(np.int64)
        return cls(str(header["site"]), channels, effects, baseline, values, dict(header["meta"]))

    def _columns(self) -> dict[str, Cells]:
        found: dict[str, Cells] = {"channel": self.channels, "effect": self.mean}
        return found | {"standard_error": self.standard_error, "q_value": self.q_values, "value": self.values}

    def __repr__(self) -> str:
        head = f"Importance of {counted(len(self.channels), 'channel')} of {self.site}"
        what = f"set to {self.meta.get('to', 'a value')}; {counted(len(self.baseline), 'example')}"
        rows = [
            [str(each.channel), f"{each.effect:.4g}", f"{each.standard_error:.2g}", f"{each.q_value:.2g}"]
            for each in self.top()
        ]
        small = int((self.q_values <= 0.05).sum())
        tail = f"metric without: {self.baseline.mean():.4g}; {small} of {len(self.channels)} with q <= 0.05"
        return "\n".join([f"{head}, {what}", table(["channel", "effect", "se", "q"], rows), tail])


def importance(
    model: nn.Module,
    found: Neurons,
    inputs: Any,
    metric: Callable[[Any], Tensor],
    *,
    site: str,
    channels: Iterable[int] | None = None,
    to: str = "mean",
) -> Importance:
    """Ask which neurons matter to a metric, by setting one at a time to a constant, everywhere.

    Each channel costs a forward, so name those that you mean to know.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
        >>> model[0].weight.data, model[2].weight.data = torch.eye(2), torch.tensor([[3.0, 0.0]])
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 5.0], [3.0, 2.0]])
        >>> neurons = interp.neurons(model, [x], layers="1")
        >>> interp.importance(model, neurons, x, lambda y: y[:, 0], site="module:1", to="zero").mean
        array([-6.,  0.])

    Args:
        model: the model of `found`, in eval mode.
        found: of `interp.neurons`, whose means are those over the corpus.
        inputs: what to run the model on, as in `interp.run`.
        metric: of what the model returns, one number per example.
        site: one of the sites of `found`.
        channels: which; all by default.
        to: `"mean"` over the corpus, or `"zero"`, which may be far from anything that the model knows.

    Raises:
        NoesisError: (a ValueError) for a site or channel that is not there, or a metric that is no number per example.
    """
    known = found[site]
    numbers = list(range(len(known.top_values)) if channels is None else channels)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise BadType(f"channels has {number!r}", "whole numbers", "Count from 0")
        if not 0 <= number < len(known.top_values):
            raise BadValue(f"channel {number} of {site}", f"one of 0 to {len(known.top_values) - 1}", "Count from 0")
    if to not in ("mean", "zero"):
        raise BadValue(f"to is {to!r}", "'mean' or 'zero'", "The mean stays among what the model knows")
    _, root = called_and_root(model)
    device = next((tensor.device for tensor in root.parameters()), torch.device("cpu"))
    given, anatomy = moved_to(inputs, device), None
    values = known.moments[0, numbers] if to == "mean" else np.zeros(len(numbers))
    effects = []
    with unwrapped(root):
        baseline, _ = _measured(root, given, metric, (), None)
        for number, value in zip(numbers, values, strict=True):
            edit = Custom(site, function=_constant(root, site, int(number), float(value)))
            ablated, anatomy = _measured(root, given, metric, [edit], anatomy)
            effects.append(ablated - baseline)
    table_of = np.array(effects).reshape(len(numbers), len(baseline))
    meta = {"model": type(root).__name__, "to": to}
    return Importance(site, np.array(numbers, np.int64), table_of, baseline, values, meta)


def _constant(root: nn.Module, site: str, channel: int, value: float) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        new = x.clone(memory_format=torch.contiguous_format)
        channels_last(root, site, new)[..., channel] = value
        return new

    return changed


def _measured(
    root: nn.Module, inputs: Any, metric: Callable[[Any], Tensor], edits: Sequence[Edit], anatomy: Anatomy | None
) -> tuple[Floats, Anatomy | None]:
    done = run(root, inputs, edits=edits, anatomy=anatomy)
    numbers: Any = metric(done.output)
    if not isinstance(numbers, Tensor) or numbers.dim() != 1:
        shape = list(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise BadValue(f"the metric gives {shape}", "a tensor with one number per example", "Do not take the mean")
    found: Floats = numbers.detach().cpu().double().numpy()
    return found, done.anatomy
