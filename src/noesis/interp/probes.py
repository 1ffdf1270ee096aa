"""Linear probes, with the controls without which a high score says nothing of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BadType, BadValue, require
from ..numerics import Floats, Ints, group_folds, paired_tests, ridge_predictions, shuffled
from .probe_scores import Probe

#: L2 penalties that inner cross-validation chooses from, and into how many parts it cuts what is learned from.
PENALTIES, INNER_FOLDS = (0.1, 1.0, 10.0, 1e2, 1e3), 3
#: Control tasks that are drawn, and shuffles of the labels.
CONTROLS, SHUFFLES = 2, 199

#: Numbers of classes, or numbers.
Labels = NDArray[Any]


def probe(
    activations: Any,
    labels: Any,
    *,
    groups: Any = None,
    types: Any = None,
    against: Any = None,
    folds: int = 5,
    seed: int = 0,
) -> Probe:
    """Ask what a linear probe reads off activations, and how much of it is the model's doing.

    Logistic regression for classes, ridge regression for numbers, each by cross-validation: standardised on the parts
    that are learned from alone, the L2 penalty chosen by cross-validation within those. No group is ever in two parts.
    Beside the score stand

    - a control task: each type (a word, say) has a random label, drawn from the labels. What the probe scores there it
      learns by heart; the difference is its selectivity (Hewitt & Liang 2019, "Designing and interpreting probes with
      control tasks");
    - the same probe on the activations `against=` of another model, such as `interp.untrained(model)`: what it scores
      there comes from the inputs;
    - p of 199 shuffles of the labels, which keep groups together, by a least-squares probe.

    Examples:
        >>> import numpy as np
        >>> from noesis import interp
        >>> x = np.random.default_rng(0).normal(size=(200, 8))
        >>> found = interp.probe({"known": x, "noise": x[::-1]}, x[:, 0] > 0)
        >>> (found.scores > 0.9).tolist(), (found.q_values < 0.05).tolist()
        ([True, False], [True, False])

    Args:
        activations: of `interp.run` or `noesis.capture`, a mapping of arrays by layer, or one array; each `[samples,
            width]` or `[rows, tokens, width]`. Samples with numbers that are not finite (padding) are left out.
        labels: one per sample, `[samples]` or `[rows, tokens]`: whole numbers, texts or truth values are classes,
            floating numbers are numbers.
        groups: what must not be split: one per sample, or per row. By default the rows of `[rows, tokens, width]`.
        types: of each sample, for the control task: the token, say.
        against: activations of another model on the same inputs, layer by layer.
        folds: into how many parts to cut the samples.
        seed: of the parts, of control tasks and shuffles.

    Raises:
        NoesisError: (a ValueError) for shapes that do not fit, one class alone, or fewer groups than parts; (a
            TypeError) for other kinds of activations or labels; (an ImportError) without scikit-learn.
    """
    require("sklearn", extra="interp", purpose="interp.probe")
    layers, shape = _layers(activations, "activations")
    others = None if against is None else _layers(against, "against")[0]
    if others is not None and (list(others) != list(layers) or any(len(others[n]) != len(layers[n]) for n in layers)):
        raise BadValue(
            f"against has {', '.join(others)}", f"the layers and samples of activations, {', '.join(layers)}", ""
        )
    y = _samples(labels, shape, "labels")
    by_row = np.arange(len(y)) if len(shape) == 1 else np.repeat(np.arange(shape[0]), shape[1])
    group = by_row if groups is None else _numbered(_samples(groups, shape, "groups"))
    kind = None if types is None else _numbered(_samples(types, shape, "types"))
    finite = np.logical_and.reduce([np.isfinite(x).all(1) for x in [*layers.values(), *(others or {}).values()]])
    notes = [] if finite.all() else [f"left out: {int((~finite).sum())} samples that are not finite"]
    data = _data(y[finite], group[finite], None if kind is None else kind[finite], folds, seed)
    rows = []
    for name, x in layers.items():
        theirs = None if others is None else others[name][finite]
        rows.append(_layer(x[finite], theirs, data))
    if kind is None:
        notes.append("no control task: give types=")
    if others is None:
        notes.append("not known what a model that learned nothing scores: give against=")
    if np.isnan(rows[0]["p_values"]):
        notes.append("no p: labels are alike in all groups, so that shuffling them changes nothing")
    columns = {name: np.array([row[name] for row in rows]) for name in Probe.ARRAYS}
    return Probe(
        list(layers),
        **columns,
        baseline=_score(data, data.plain, data.truth),
        task="numbers" if data.classes is None else "classes",
        samples=len(data.truth),
        groups=len(np.unique(data.groups)),
        notes=notes,
        meta={"folds": folds, "seed": seed},
    )


# ---------------------------------------------------------------- what is given


class _Data(NamedTuple):
    """Labels and how they are cut."""

    truth: Labels  # [samples], numbers of classes or numbers
    classes: NDArray[Any] | None
    groups: Ints
    folds: list[Ints]
    inner: list[list[tuple[Ints, Ints]]]  # of each part's rest
    plain: Labels  # [samples], what is guessed without activations
    controls: list[Labels]  # labels by type
    shuffles: Ints | None  # [shuffles, samples]


def _data(y: NDArray[Any], groups: Ints, types: Ints | None, folds: int, seed: int) -> _Data:
    if y.dtype.kind not in "biufUSO":
        raise BadType(
            f"labels are of dtype {y.dtype}", "whole numbers, texts, truth values, or floating numbers", "Number them"
        )
    classes, truth = (None, y.astype(np.float64)) if y.dtype.kind == "f" else np.unique(y, return_inverse=True)
    if (classes is not None and len(classes) < 2) or (classes is None and not np.ptp(truth) > 0):
        raise BadValue("all labels are the same, or not finite", "labels that differ", "Look at what they say")
    if not isinstance(folds, int) or isinstance(folds, bool) or not 2 <= folds <= len(np.unique(groups)):
        raise BadValue(
            f"folds={folds!r} of {len(np.unique(groups))} groups", "from two to as many as there are groups", ""
        )
    generator = np.random.default_rng(seed)
    parts = group_folds(groups, folds, generator)
    inner, plain = [], np.empty(truth.shape, truth.dtype)
    for part in parts:
        rest = np.setdiff1d(np.arange(len(truth)), part)
        if len(np.unique(truth[rest])) < 2:
            raise BadValue(
                "labels that are all the same but for one part", "more groups of each class", "Use fewer folds"
            )
        plain[part] = truth[rest].mean() if classes is None else np.bincount(truth[rest]).argmax()
        count = min(INNER_FOLDS, len(np.unique(groups[rest])))
        cut = group_folds(groups[rest], count, generator) if count > 1 else [np.arange(0)]
        inner.append([(np.setdiff1d(np.arange(len(rest)), held), held) for held in cut])
    controls = []
    if types is not None:
        drawn = [truth[generator.integers(len(truth), size=types.max() + 1)] for _ in range(CONTROLS)]
        controls = [each[types] for each in drawn if len(np.unique(each[types])) > 1]
    shuffles = shuffled(truth, groups, SHUFFLES, generator)
    changed = (truth[shuffles] != truth).any()
    return _Data(truth, classes, groups, parts, inner, plain, controls, shuffles if changed else None)


def _layers(given: Any, what: str) -> tuple[dict[str, Floats], tuple[int, ...]]:
    """Activations `[samples, width]` by layer, and the shape of the samples, `[samples]` or `[rows, tokens]`."""
    found: dict[str, Floats] = {}
    shapes = set()
    for name, value in given.items() if isinstance(given, Mapping) else [("activations", given)]:
        each = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(each, (Tensor, np.ndarray)):
            calls = f" of {len(each)} calls" if isinstance(each, list) else ""
            raise BadType(
                f"{what} of {name!r} are a {type(each).__name__}{calls}",
                "arrays, one for each layer",
                "Pass {name: tensor}; acts.stacked(name) joins calls",
            )
        x = _array(each).astype(np.float64)
        if x.ndim not in (2, 3):
            raise BadValue(
                f"{what} of {name!r} are of shape {list(x.shape)}",
                "[samples, width] or [rows, tokens, width]",
                "Reshape them, as by .flatten(1) or .mean((2, 3))",
            )
        shapes.add(x.shape[:-1])
        found[name] = x.reshape(-1, x.shape[-1])
    if len(shapes) != 1:
        raise BadValue(
            f"{what} of samples {sorted(map(list, shapes))}", "as many samples in each layer", "Leave others out"
        )
    return found, shapes.pop()


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()
    return np.asarray(value)


def _samples(given: Any, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """One value per sample; of rows, the same for all of a row's tokens."""
    values = _array(given)
    if what == "groups" and len(shape) == 2 and values.shape == shape[:1]:
        values = np.repeat(values, shape[1])
    elif values.shape != shape and values.shape != (int(np.prod(shape)),):
        raise BadValue(f"{what} of shape {list(values.shape)}", f"one for each sample, {list(shape)}", "Pass as many")
    return values.reshape(-1)


def _numbered(values: NDArray[Any]) -> Ints:
    found: Ints = np.unique(values, return_inverse=True)[1].reshape(-1)
    return found


# ---------------------------------------------------------------- one layer


def _layer(x: Floats, theirs: Floats | None, data: _Data) -> dict[str, Any]:
    predicted = _predictions(x, data.truth, data)
    row: dict[str, Any] = {"scores": _score(data, predicted, data.truth), "against": np.nan, "against_p_values": np.nan}
    row["fold_scores"] = [_score(data, predicted, data.truth, part) for part in data.folds]
    controls = [_score(data, _predictions(x, labels, data), labels) for labels in data.controls]
    row["control"] = np.mean(controls) if controls else np.nan
    if theirs is not None:
        other = _predictions(theirs, data.truth, data)
        row["against"] = _score(data, other, data.truth)
        better = _loss(data, other, data.truth) - _loss(data, predicted, data.truth)
        members = _numbered(data.groups)
        by_group = np.bincount(members, better) / np.bincount(members)
        row["against_p_values"] = paired_tests(by_group[:, None], 1e-9, larger=True)[0]
    row["p_values"] = _p_value(x, data)
    return row


def _predictions(x: Floats, truth: Labels, data: _Data) -> Labels:
    """What the probe says of each part, having learned from the others."""
    predicted = np.empty(truth.shape, truth.dtype)
    for part, inner in zip(data.folds, data.inner, strict=True):
        rest = np.setdiff1d(np.arange(len(x)), part)
        given, known = x[rest], truth[rest]
        losses = [
            sum(_loss(data, _learned(given[a], known[a], penalty, data)(given[b]), known[b]).sum() for a, b in inner)
            for penalty in PENALTIES
        ]
        best = PENALTIES[len(losses) - 1 - int(np.argmin(losses[::-1]))]  # of equals, the strongest
        predicted[part] = _learned(given, known, best, data)(x[part])
    return predicted


def _learned(x: Floats, truth: Labels, penalty: float, data: _Data) -> Callable[[Floats], Labels]:
    """A probe of these samples, as what it predicts of others."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not (truth != truth[0]).any():  # nothing to tell apart
        return lambda others: np.broadcast_to(truth[0], len(others))
    linear = Ridge(penalty) if data.classes is None else LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-3)
    predict: Callable[[Floats], Labels] = make_pipeline(StandardScaler(), linear).fit(x, truth).predict
    return predict


def _loss(data: _Data, predicted: Labels, truth: Labels) -> Floats:
    """Of each sample: whether the class is wrong, or the squared error."""
    found: Floats = np.square(predicted - truth) if data.classes is None else (predicted != truth).astype(np.float64)
    return found


def _score(data: _Data, predicted: Labels, truth: Labels, part: Ints | slice = slice(None)) -> float:
    """Accuracy, or R2."""
    loss = _loss(data, predicted, truth)[part].mean()
    if data.classes is not None:
        return float(1 - loss)
    return float(1 - loss / max(np.square(truth[part] - truth.mean()).mean(), np.finfo(np.float64).tiny))


def _p_value(x: Floats, data: _Data) -> float:
    """How rarely shuffled labels are predicted as well, by their squared error (one-hot of classes)."""
    if data.shuffles is None:
        return float("nan")
    orders = np.vstack([np.arange(len(x)), data.shuffles])
    single = data.truth[:, None] if data.classes is None else (data.truth[:, None] == np.arange(len(data.classes)))
    targets = single.astype(np.float64)[orders.T]  # [samples, shuffles, columns]
    errors = ((ridge_predictions(x, targets, data.folds) - targets) ** 2).sum((0, 2))
    return float((1 + (errors[1:] <= errors[0] * (1 + 1e-12)).sum()) / len(errors))
