"""diff: the same inputs through two models, and what differs, as `git diff` tells it of files."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import BadType, BadValue
from ..layers import Layers
from ..numerics import Floats
from ..results import Activations, ModelDiff, rounding
from ..wrapping import Wrapped
from .comparing_runs import first, flips_of, layers_of, pairs, shapes_of, weight_changes
from .kept import OUTPUT, Run, of_captures
from .running import Asked, add_weights, label, listed, record


def diff(
    model_a: Any,
    model_b: Any,
    inputs: Any = None,
    *,
    layers: Layers = "blocks",
    tokenizer: Any = None,
    call: Callable[[Any, Any], Any] | None = None,
    baseline: int = 1,
    match: Literal["name", "order"] = "name",
    tolerance: float | None = None,
    seed: int = 0,
    elements: int = 1 << 14,
    max_bytes: int = 1 << 30,
) -> ModelDiff:
    """What differs between two models that are given the same inputs: layers, predictions and weights.

    One after the other runs all inputs; of a's activations there are kept mean, std, a digest of all bits, and some of
    the elements. A model is a module, a diffusers pipeline or the result of `noesis.wrap`; where two do not fit into
    memory, give callables that make them: a is freed before b is made. Models are run as they are; put them into
    `eval()` mode first.

    Layers are matched by name, without what adapters of PEFT and data parallelism put around them.

    Args:
        model_a: what is to be held against: a model; a callable that makes one, or one and its tokenizer; or captures
            saved elsewhere (another torch, another machine), an `Activations` for each input.
        model_b: likewise.
        inputs: a tensor or array `[inputs, ...]`, whose rows are run one by one; or a list of what the model is called
            with: tensors, tuples, mappings of keywords, texts. Left out for two lists of captures.
        layers: which layers, as in `noesis.wrap`; of a pipeline, in its denoiser.
        tokenizer: for texts, or a pair of them.
        call: `(model, input) -> output`, if a model is called otherwise than by `model(input)`.
        baseline: how often a runs again, as a control of what a model differs from itself; 0 for not at all.
        match: `"order"` also pairs layers and weights of other names, by shape and in order of execution.
        tolerance: a relative error that is no divergence. By default 1e-5, or four times what the coarsest dtype of the
            activations resolves (3.1 % for bfloat16).
        seed: of the noise of pipelines, on the CPU, the same for each input.
        elements: how many elements of each output are kept, spread evenly at random; relative errors of larger ones are
            estimated from these. Whether all bits are equal is not.
        max_bytes: the most bytes of elements kept of a model.

    Raises:
        NoesisError: (a MemoryError) when more would be kept than `max_bytes`; (a ValueError) when no layer is in both
            models; (a TypeError) when something else is given.

    Sources: Student's paired t over inputs; Benjamini & Hochberg 1995 (false discovery rate).

    Examples:
        >>> import copy, torch, noesis
        >>> a = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> b = copy.deepcopy(a)
        >>> _ = b[2].weight.data.mul_(1.5)
        >>> found = noesis.diff(a, b, torch.randn(16, 4), layers="all")
        >>> found.first_divergence.layer, found.changed, [weight.name for weight in found.weights]
        ('2', ['2', '(output)'], ['2.weight'])
    """
    _check(baseline, match, tolerance, elements, max_bytes)
    tokenizers = tokenizer if isinstance(tokenizer, tuple) else (tokenizer, tokenizer)
    saved_a, saved_b = _captures(model_a, "model_a"), _captures(model_b, "model_b")
    for model, saved in ((model_a, saved_a), (model_b, saved_b)):
        if saved is None and not callable(model):
            raise BadType(
                f"a model is a {type(model).__name__}", "a module, a pipeline, captures or a callable", "Pass a model"
            )
    if inputs is None and (saved_a is None or saved_b is None):
        raise BadValue("inputs is not given", "what the models are called with", "Leave it out for captures alone")
    given = listed(inputs) if inputs is not None else [None] * len(saved_a or [])
    for captures in (saved_a, saved_b):
        if captures is not None and len(captures) != len(given):
            raise BadValue(
                f"{len(captures)} captures and {len(given)} inputs", "a capture for each input", "Capture each input"
            )
    asked = Asked(given, layers, call, seed, elements, max_bytes)
    stays = _is_model(model_a) and _is_model(model_b)
    controls: list[Control] = []
    if saved_a is not None:
        a = of_captures(saved_a, elements)
    else:
        a, controls = _recorded(model_a, tokenizers[0], asked, stays, baseline)
    b = of_captures(saved_b, elements) if saved_b is not None else _recorded(model_b, tokenizers[1], asked, stays, 0)[0]
    labels = [label(each, number) for number, each in enumerate(given)]
    return _compared(a, b, controls, labels, match == "order", tolerance)


class Control(NamedTuple):
    """How a repeat differs from its model's first run: float64 [inputs, layers that ran], and predictions."""

    errors: Floats
    flips: int


def _recorded(model: Any, tokenizer: Any, asked: Asked, stays: bool, again: int) -> tuple[Run, list[Control]]:
    """A model's run, and how repeats differ from it. A model that was made here is freed when this returns."""
    made = not _is_model(model)
    if made:
        model = model()
        model, tokenizer = model if isinstance(model, tuple) else (model, tokenizer)
    try:
        run = record(model, tokenizer, asked)
        names = {name: name for name in run.layers}
        controls = []
        for _ in range(again):
            repeat = record(model, tokenizer, asked)
            controls.append(Control(layers_of(run, repeat, names).errors, len(flips_of(run, repeat)[1])))
        add_weights(run, model, stays)
        return run, controls
    finally:
        if made:
            del model
            gc.collect()  # modules hold each other in circles
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _compared(
    a: Run, b: Run, controls: list[Control], labels: list[str], by_order: bool, tolerance: float | None
) -> ModelDiff:
    matched = pairs(a.layers, b.layers, shapes_of(a), shapes_of(b), by_order)
    names = [name for name in a.layers if name in matched]
    if not names:
        raise BadValue(
            f"The models have no layer in common: {a.layers[:3]} and {b.layers[:3]}",
            "layers of the same names",
            'Select others, or match="order"',
        )
    found = layers_of(a, b, matched)
    control = np.full(found.errors.shape, np.nan)
    if controls:
        own = [at for at, name in enumerate(a.layers) if name in matched]
        control = np.fmax.reduce([each.errors[:, own] for each in controls])
    dtypes = {kept.dtype for run in (a, b) for calls in run.calls for kinds in calls.values() for kept in kinds}
    within = rounding(dtypes) if tolerance is None else tolerance
    predictions, flips, why = flips_of(a, b)
    others = set(matched.values())
    left_out = found.left_out | ({"predictions": why} if why else {})
    left_out |= {name: why for run in (a, b) for name, why in run.unmeasured.items()}
    left_out |= dict.fromkeys([name for name in a.never_ran if name in b.never_ran], "it ran in neither")
    result = ModelDiff(
        layers=names,
        labels=labels,
        errors=found.errors,
        equal=found.equal,
        mean_effects=found.mean_effects,
        std_effects=found.std_effects,
        nonfinite=np.array([_nonfinite(a, names), _nonfinite(b, [matched[name] for name in names])], np.int64),
        control=control,
        repeats=len(controls),
        first_difference=first(found, names, None),
        first_divergence=first(found, names, np.fmax(control, within)),
        predictions=predictions,
        flips=flips,
        control_flips=max((each.flips for each in controls), default=0),
        only_in_a=[name for name in a.layers if name not in matched and name != OUTPUT],
        only_in_b=[name for name in b.layers if name not in others and name != OUTPUT],
        renamed={name: other for name, other in matched.items() if name != other},
        left_out=left_out,
        tolerance=within,
        meta={"a": a.meta, "b": b.meta},
    )
    if a.weights is not None and b.weights is not None:
        _add_weights(result, a, b, by_order)
    return result


def _add_weights(result: ModelDiff, a: Run, b: Run, by_order: bool) -> None:
    weights_a, weights_b = a.weights or {}, b.weights or {}
    shapes = (lambda name: weights_a[name].shape), (lambda name: weights_b[name].shape)
    matched = pairs(list(weights_a), list(weights_b), *shapes, by_order)
    result.weights, result.weights_compared, left_out = weight_changes(weights_a, weights_b, matched)
    others = {*matched.values(), *b.weights_left_out}
    result.weights_left_out = left_out | a.weights_left_out | b.weights_left_out
    result.weights_only_in_a = [name for name in weights_a if name not in matched and name not in b.weights_left_out]
    result.weights_only_in_b = [name for name in weights_b if name not in others and name not in a.weights_left_out]
    result.renamed |= {name: other for name, other in matched.items() if name != other}


def _nonfinite(run: Run, names: list[str]) -> list[int]:
    return [sum(kept.nonfinite for calls in run.calls for kept in calls.get(name, [])) for name in names]


# ---------------------------------------------------------------- arguments


def _is_model(model: Any) -> bool:
    return isinstance(model, (nn.Module, Wrapped)) or hasattr(model, "components")


def _captures(model: Any, what: str) -> list[Activations] | None:
    """Captures of each input; None for a model."""
    if isinstance(model, Activations):
        return [model]
    if not isinstance(model, (list, tuple)):
        return None
    if not model or not all(isinstance(each, Activations) for each in model):
        raise BadType(
            f"{what} is a {type(model).__name__} of something else than captures", "Activations, one for each input",
            "Load them with Activations.load",
        )  # fmt: skip
    return list(model)


def _check(baseline: Any, match: Any, tolerance: Any, elements: Any, max_bytes: Any) -> None:
    for name, value, least in (("baseline", baseline, 0), ("elements", elements, 1), ("max_bytes", max_bytes, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BadValue(f"{name}={value!r}", f"a whole number from {least}", "Leave it out for the default")
    if match not in ("name", "order"):
        raise BadValue(f"match={match!r}", '"name" or "order"', "Leave it out for names alone")
    if tolerance is not None and not tolerance >= 0:
        raise BadValue(f"tolerance={tolerance!r}", "a number from 0", "Leave it out for what dtypes round")
