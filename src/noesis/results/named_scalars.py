"""One step of a wrapped model as named numbers, as loggers of training runs take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from ..errors import BadValue, WrongState
from ..numerics import Floats, no_nan
from .statistics import COUNTS
from .surprise import Surprise
from .trace import Trace

#: What is said of a layer's output unless asked otherwise.
STATS = ("mean", "std", "abs_mean", "nonfinite")


class Used(Protocol):
    """A codebook, as far as it is asked here."""

    @property
    def ready(self) -> bool:
        """Whether it has codes."""
        ...

    @property
    def utilisation(self) -> float:
        """The share of its codes that are in use."""
        ...


def scalars(
    trace: Trace,
    surprise: Surprise | None = None,
    codebooks: Mapping[str, Used] | None = None,
    *,
    layers: Literal["aggregate", "each"] | Sequence[str] = "aggregate",
    stats: Sequence[str] = STATS,
) -> dict[str, float]:
    """The latest step of a trace, and what is known of its inputs' surprise, as `noesis/<layer>/<stat>`.

    In the place of a layer stand, over the layers that ran: `mean_of_layers`, `min_of_layers`, `max_of_layers` and
    `max_at`, the layer of the maximum as its position in `trace.layers`; for numbers of elements `sum_of_layers`.
    `noesis/layers/ran` and `noesis/layers/nonfinite` count layers, `noesis/layers/first_nonfinite` is the position of
    the one in which NaN or infinity came up first, or -1. Of surprise: `noesis/surprise/q50`, `q95` and `max` of the
    scores in nats; after calibration `noesis/surprise/p_value/min` and `noesis/surprise/p_value/share_05`, the share
    of p <= 0.05; `code_length` (nats, mean over samples) and `utilisation` (share of codes in use) of layers.

    Args:
        trace: at least one step.
        surprise: of the same forward.
        codebooks: `wrapped.codebooks`; those without codes yet are left out.
        layers: `"aggregate"` for the above alone, `"each"` for every layer's own numbers too, or names of layers for
            theirs. A layer that did not run in the step has none.
        stats: any of the trace's.

    Returns:
        Plain floats; NaN where a layer gave no finite element.

    Raises:
        NoesisError: for a trace without steps, or an unknown layer or statistic.

    Examples:
        >>> import torch, noesis
        >>> from noesis.results import scalars
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), layers="all")
        >>> _ = wrapped(torch.ones(3, 2))
        >>> found = scalars(wrapped.trace(), layers=["1"], stats=["count"])
        >>> {name: found[name] for name in ("noesis/sum_of_layers/count", "noesis/1/count", "noesis/layers/nonfinite")}
        {'noesis/sum_of_layers/count': 12.0, 'noesis/1/count': 6.0, 'noesis/layers/nonfinite': 0.0}
    """
    if not len(trace):
        raise WrongState("The trace has no steps", "at least one", "Run the model first, outside of paused()")
    known = dict.fromkeys([*trace.layers, *(surprise.layers if surprise is not None else ()), *(codebooks or ())])
    own = _own(layers, list(known))
    found = _outputs(trace, stats, own)
    if surprise is not None:
        found |= _strangeness(surprise)
        means = {name: float(layer.code_length.mean()) for name, layer in surprise.layers.items()}
        found |= _of_layers("code_length", means, own, ("mean", "max"))
    usage = {name: book.utilisation for name, book in (codebooks or {}).items() if book.ready}
    return found | _of_layers("utilisation", usage, own, ("mean", "min"))


def under(name: str, found: Mapping[str, float]) -> dict[str, float]:
    """The same numbers as `noesis/<name>/<layer>/<stat>`."""
    return {key.replace("noesis/", f"noesis/{name}/", 1): value for key, value in found.items()}


def _own(layers: str | Sequence[str], known: list[str]) -> set[str]:
    """The layers whose own numbers are asked for."""
    if layers == "aggregate":
        return set()
    if layers == "each":
        return set(known)
    names = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in names if name not in known]
    if unknown:
        few = ", ".join(known[:4])
        raise BadValue(
            f"layers has {unknown[0]!r}",
            f'"aggregate", "each", or names among the {len(known)} observed layers ({few}{", ..." * (len(known) > 4)})',
            "See wrapped.layers",
        )
    return set(names)


def _outputs(trace: Trace, stats: Sequence[str], own: set[str]) -> dict[str, float]:
    """What the layers gave in the latest step."""
    ran = trace.calls[-1] > 0
    bad = trace["nonfinite"][-1] > 0
    order = np.where(bad, trace.order[-1], np.iinfo(np.int64).max)
    found = {
        "noesis/layers/ran": float(ran.sum()),
        "noesis/layers/nonfinite": float(bad.sum()),
        "noesis/layers/first_nonfinite": float(order.argmin()) if bad.any() else -1.0,
    }
    for stat in [stats] if isinstance(stats, str) else stats:
        values = np.where(ran, trace[stat][-1], np.nan)
        if stat in COUNTS:
            found[f"noesis/sum_of_layers/{stat}"] = float(np.nansum(values))
        else:
            found |= _aggregates(stat, values, ("mean", "min", "max"))
            there = not np.isnan(values).all()
            found[f"noesis/max_at/{stat}"] = float(np.nanargmax(values)) if there else -1.0
        found |= {
            f"noesis/{name}/{stat}": float(value)
            for name, value, yes in zip(trace.layers, values, ran, strict=True)
            if yes and name in own
        }
    return found


def _strangeness(surprise: Surprise) -> dict[str, float]:
    """How the scores of the batch are spread."""
    scores = np.sort(no_nan(surprise.score))
    # A score of the batch itself, since infinite ones have no quantiles between them.
    q50, q95 = np.quantile(scores, [0.5, 0.95], method="inverted_cdf")
    found = {"q50": float(q50), "q95": float(q95), "max": float(scores[-1])}
    if surprise.calibrated is not None and not surprise.absent:
        p = surprise.p_value
        found |= {"p_value/min": float(p.min()), "p_value/share_05": float((p <= 0.05).mean())}
    return {f"noesis/surprise/{name}": value for name, value in found.items()}


def _of_layers(stat: str, values: Mapping[str, float], own: set[str], over: Sequence[str]) -> dict[str, float]:
    if not values:
        return {}
    found = _aggregates(stat, np.array(list(values.values())), over)
    return found | {f"noesis/{name}/{stat}": value for name, value in values.items() if name in own}


def _aggregates(stat: str, values: Floats, over: Sequence[str]) -> dict[str, float]:
    """Over the layers with a value."""
    there = values[~np.isnan(values)]
    return {f"noesis/{name}_of_layers/{stat}": float(getattr(there, name)()) if len(there) else np.nan for name in over}
