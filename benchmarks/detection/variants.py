"""Other ways to make a score of the same vectors: what was frozen on set 1, and what each choice is worth.

Vectors are extracted once, by hooks; a variant fits noesis' own codebooks to them, ranks the layers and
combines the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import noesis
from noesis.kernels.pooling import pooled
from noesis.layers import hidden_state
from noesis.surprise import LayerCodebook
from noesis.surprise.calibration import Doubt, ReferenceScores, combine, split
from noesis.surprise.scorer import less_rounding

from .detector import batches
from .sets import Case

Floats = NDArray[np.float64]
Rule = Callable[[Floats, Floats | None], Floats]
HEAD = "head"  # the vectors that the module of the logits is given


@dataclass(frozen=True)
class Vectors:
    """What the layers leave of some inputs, N samples."""

    layers: dict[str, dict[str, NDArray[np.float32]]]  # by layer and pooling, [N, channels]
    doubt: dict[str, Floats]  # minus the energy and the predictive entropy, [N]; of tokens their mean


def extract(case: Case, inputs: Tensor, names: list[str]) -> Vectors:
    """The pooled vectors of the layers of these names, and of the head's input."""
    kept: dict[str, dict[str, list[Tensor]]] = {name: {} for name in [*names, HEAD]}
    doubt: dict[str, list[Tensor]] = {"energy": [], "entropy": []}

    def keep(name: str, x: Tensor) -> None:
        channel = 1 if x.dim() == 4 else x.dim() - 1
        found = pooled(x, len(x), channel, spread=x.dim() > 2)
        for pooling, part in zip(("mean", "std"), found.split(x.shape[channel], 1), strict=False):
            kept[name].setdefault(pooling, []).append(part)
        if x.dim() > 2:
            kept[name].setdefault("max", []).append(x.movedim(channel, -1).flatten(1, -2).amax(1))

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, output: keep(name, hidden_state(output).detach())

    def logits(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        keep(HEAD, given[0].detach())
        logp = output.detach().double().log_softmax(-1)
        found = {"energy": -output.detach().double().logsumexp(-1), "entropy": -(logp.exp() * logp).sum(-1)}
        for name, values in found.items():
            doubt[name].append(values.mean(-1) if case.sequences else values)

    handles = [case.model.get_submodule(name).register_forward_hook(after(name)) for name in names]
    handles.append(case.model.get_submodule(case.logits).register_forward_hook(logits))
    try:
        with torch.no_grad():
            for batch in batches(case, inputs):
                case.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    whole = {name: {how: torch.cat(parts).numpy() for how, parts in found.items()} for name, found in kept.items()}
    return Vectors(whole, {name: torch.cat(parts).numpy() for name, parts in doubt.items()})


def selected(case: Case, layers: str) -> list[str]:
    """The names of the layers that noesis codes with this selection."""
    wrapped = noesis.wrap(case.model, layers=layers)
    names = [name for name in wrapped.observed_layers if name != case.logits]
    wrapped.unwrap()
    return names


# ---------------------------------------------------------------- a variant


@dataclass(frozen=True)
class Variant:
    """A way to make a score; the defaults are those of noesis."""

    pooling: tuple[str, ...] = ("mean", "std")
    size: int = 256
    dim: int = 64
    parts: tuple[str, ...] = ("mixture", "residual", "norm")
    directions: bool = True  # whether vectors are brought to length one
    head: bool = True  # whether what the head reads is the last layer
    beside: bool = False  # whether the last block counts too, among the earlier layers, rather than giving way to it
    doubt: str | None = "energy"
    two_sided: bool = True  # whether overconfidence is strange too
    rule: Rule = combine


def scores(variant: Variant, names: list[str], sets: dict[str, Vectors], seed: int = 0) -> dict[str, Floats]:
    """Fit the variant to the set `fit`, in the parts that `calibrate` makes of it, and score the others."""
    fit = sets["fit"]
    generator = np.random.default_rng(seed)
    learn, rank, _ = split(len(fit.doubt["energy"]), generator)
    lengths = {name: [] for name in sets}
    ranks = []
    for layer in [*names, *([HEAD] if variant.head else [])]:
        x = {name: vectors_of(variant, found, layer) for name, found in sets.items()}
        settings = noesis.Codebook(size=variant.size, dim=variant.dim, seed=seed)
        book = LayerCodebook(settings, torch.device("cpu"))
        scale = None if variant.directions else float(np.sqrt((x["fit"][learn] ** 2).sum(1).mean()))
        book.fit(undirected(x["fit"][learn], scale), generator)
        for name, values in x.items():
            coded = book.code(torch.from_numpy(undirected(values, scale)).float())
            nats = sum(getattr(coded, part).double() for part in variant.parts).numpy()
            lengths[name].append(nats if name == "fit" else less_rounding(nats, book))
        ranks.append(ReferenceScores.of(lengths["fit"][-1][rank]))
    doubt = None
    if variant.doubt is not None:
        known = fit.doubt[variant.doubt][np.concatenate([learn, rank])]
        doubt = (Doubt if variant.two_sided else ReferenceScores).of(known)
    counted = [*range(len(names) - 1), len(names)] if variant.head and not variant.beside else range(len(ranks))
    found = {}
    for name, nats in lengths.items():
        surprisals = np.stack([ranks[i].surprisal(nats[i]) for i in counted], 1)
        found[name] = variant.rule(
            surprisals, None if doubt is None else doubt.surprisal(sets[name].doubt[variant.doubt])
        )
    return {name: found[name] for name in sets if name != "fit"}


def vectors_of(variant: Variant, found: Vectors, layer: str) -> Floats:
    """A layer's vectors as the variant pools them; the head's input, and what has no positions, by the mean."""
    kept = found.layers[layer]
    chosen = [kept[how] for how in variant.pooling if how in kept] if layer != HEAD else []
    return np.concatenate(chosen or [kept["mean"]], 1).astype(np.float64)


def undirected(vectors: Floats, scale: float | None) -> Floats:
    """Vectors as they are; with a scale, with a constant at the end, a hundred times their usual length.

    The directions of those are the vectors themselves, but for the scale and a term of second order: so a codebook,
    which looks at directions, sees vectors whose length matters.
    """
    if scale is None:
        return vectors
    return np.concatenate([vectors, np.full((len(vectors), 1), 100 * scale)], 1)


# ---------------------------------------------------------------- rules


def earlier(layers: Floats) -> Floats:
    """All but the last layer as one, as noesis has it."""
    return combine(np.concatenate([layers[:, :-1], np.zeros((len(layers), 1))], 1), None) * 2


def frozen_rule(layers: Floats, doubt: Floats | None) -> Floats:
    """Confidence and density, without a floor for where confidence is blind."""
    return combine(layers, None) + doubt


def pilot_rule(layers: Floats, doubt: Floats | None) -> Floats:
    """Twice the energy, the last, and the plain mean over the earlier."""
    return 2 * doubt + layers[:, -1] + layers[:, :-1].mean(1)


def every(layers: Floats, doubt: Floats | None) -> Floats:
    """All of them side by side."""
    return np.concatenate([layers, doubt[:, None]], 1)


RULES: dict[str, Rule] = {
    "2 energy + last + mean of earlier": pilot_rule,
    "energy + density, without the floor of density / 4": frozen_rule,
    "energy + last + earlier": lambda layers, doubt: doubt + layers[:, -1] + earlier(layers),
    "energy + last": lambda layers, doubt: doubt + layers[:, -1],
    "plain sum over layers and energy": lambda layers, doubt: every(layers, doubt).sum(1),
    "maximum over layers and energy": lambda layers, doubt: every(layers, doubt).max(1),
    "energy alone": lambda layers, doubt: doubt,
}


def frozen(case: Case) -> Variant:
    """What was chosen on set 1 alone, before sets 2 to 4 were run."""
    return Variant(
        pooling=("mean",),
        head=False,
        doubt="entropy" if case.sequences else "energy",
        two_sided=False,
        rule=frozen_rule,
    )


# ---------------------------------------------------------------- ablations


@dataclass(frozen=True)
class Row:
    """One line of the ablations: which layers, which variant."""

    group: str
    name: str
    variant: Variant
    layers: str = "blocks"
    alone: bool = True  # whether the last block alone is worth a look


def ablations() -> list[Row]:
    """What is changed, one thing at a time."""
    default = Variant()
    rows = [Row("", "default", default)]
    rows += [Row("codes", f"at most {k}", replace(default, size=k)) for k in (1, 4, 16, 32, 64)]
    rows += [Row("dim", f"at most {dim}", replace(default, dim=dim)) for dim in (8, 16, 32)]
    rows += [Row("dim", "at most 8, without residual", replace(default, dim=8, parts=("mixture", "norm")))]
    poolings = {"mean": ("mean",), "standard deviation": ("std",), "maximum": ("max",)}
    rows += [Row("pooling", name, replace(default, pooling=how)) for name, how in poolings.items()]
    rows += [
        Row("layers", "last block only", replace(default, head=False), "last", alone=False),
        Row("layers", "what the head reads only", default, "none", alone=False),
        Row("layers", "the last block too, beside what the head reads", replace(default, beside=True), alone=False),
        Row("layers", "blocks, without what the head reads", replace(default, head=False), alone=False),
        Row("layers", "all leaves", default, "leaves", alone=False),
    ]
    left = {
        "without residual": replace(default, parts=("mixture", "norm")),
        "without norm": replace(default, parts=("mixture", "residual")),
        "without residual, without norm": replace(default, parts=("mixture",)),
        "the same, without L2": replace(default, parts=("mixture",), directions=False),
    }
    rows += [Row("code length", name, variant) for name, variant in left.items()]
    rows += [
        Row("energy", "without", replace(default, doubt=None), alone=False),
        Row("energy", "one-sided", replace(default, two_sided=False), alone=False),
    ]
    rows += [Row("combination", name, replace(default, rule=rule), alone=False) for name, rule in RULES.items()]
    return rows


def layers_of(case: Case, layers: str) -> list[str]:
    """The names of a row's layers, in the order they run."""
    blocks = list(case.blocks)
    chosen = {"blocks": blocks, "last": blocks[-1:], "none": []}
    return chosen[layers] if layers in chosen else selected(case, layers)


def alone(variant: Variant) -> Variant:
    """A variant of the last block alone, by the mean unless the pooling is what is changed."""
    pooling = ("mean",) if variant.pooling == Variant().pooling else variant.pooling
    return replace(variant, pooling=pooling, head=False, doubt=None, rule=lambda layers, doubt: layers[:, -1])
