"""noesis on a set: the one default that is compared, its false alarms, and its word on single tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import noesis
from noesis.surprise.calibration import Doubt, ReferenceScores, combine, split

from .sets import Case

Floats = NDArray[np.float64]

ALPHAS = (0.01, 0.05, 0.1)
#: What the calibration inputs of a set are; p-values promise something for inputs that are exchangeable with them.
CALIBRATED_ON = {
    "cifar10": "images the model was trained on",
    "fashion": "images the model was trained on",
    "digits": "images the model was trained on",
    "mnist": "images the model was trained on",
    "passages": "passages the model was trained on",
    "stories": "stories sampled from the model, as the test stories are",
}


@dataclass(frozen=True)
class Judged:
    """What noesis says of the test set and of every out set; [N] each."""

    scores: dict[str, Floats]
    p_values: dict[str, Floats]
    calibration: noesis.Calibration


@contextmanager
def calibrated(
    case: Case, codebook: noesis.Codebook, inputs: Tensor, *, logits: bool = True
) -> Iterator[noesis.Wrapped]:
    """The model under observation, calibrated on inputs; unwrapped at the end."""
    named = case.logits if logits else None
    wrapped = noesis.wrap(case.model, layers="blocks", codebook=codebook, logits=named)
    try:
        wrapped.calibrate(batches(case, inputs), progress=False)
        yield wrapped
    finally:
        wrapped.unwrap()


def batches(case: Case, inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs, a few at a time."""
    return inputs.split(25 if case.sequences else 250)


def judge(case: Case, *, seed: int = 0, logits: bool = True, positions: str = "mean") -> Judged:
    """Calibrate the default on the fit inputs, and score the test set and the out sets."""
    scores, p_values = {}, {}
    with calibrated(case, noesis.Codebook(seed=seed, positions=positions), case.fit, logits=logits) as wrapped:
        for name, inputs in {"test": case.test, **case.out}.items():
            found = list(surprises(wrapped, case, inputs))
            scores[name] = np.concatenate([surprise.score for surprise in found])
            p_values[name] = np.concatenate([surprise.p_value for surprise in found])
        return Judged(scores, p_values, wrapped.calibration)


def surprises(wrapped: noesis.Wrapped, case: Case, inputs: Tensor) -> Iterator[noesis.Surprise]:
    """The surprise of each batch."""
    for batch in batches(case, inputs):
        with torch.no_grad():
            wrapped(batch)
        yield wrapped.surprise()


# ---------------------------------------------------------------- false alarms


def alarms(p_values: Floats) -> dict[str, float]:
    """The share of a model's own inputs that is called strange, by alpha."""
    return {str(alpha): float((p_values <= alpha).mean()) for alpha in ALPHAS}


def held_out_alarms(case: Case, splits: int = 10) -> dict[str, float]:
    """The same if one half of the test set calibrates and the other is judged, the mean over splits in halves."""
    found = []
    for seed in range(splits):
        order = torch.randperm(len(case.test), generator=torch.Generator().manual_seed(seed))
        half, other = case.test[order].tensor_split(2)
        with calibrated(case, noesis.Codebook(seed=seed), half) as wrapped:
            found.append(alarms(np.concatenate([surprise.p_value for surprise in surprises(wrapped, case, other)])))
    return {alpha: float(np.mean([one[alpha] for one in found])) for alpha in found[0]}


# ---------------------------------------------------------------- tokens


def judge_tokens(case: Case) -> dict[str, dict[str, Floats]]:
    """Scores of the tokens of the test set and of every out set, [N * (T - 1)]: three ways to read the positions.

    The last layer's code length; the mean over layers; and the layers' and the energy's surprisals against the
    tokens of the sequences that rank the layers, combined as noesis combines those of whole samples.
    """
    ranking = case.fit[split(len(case.fit), np.random.default_rng(0))[1]]
    found: dict[str, dict[str, Floats]] = {"last layer": {}, "mean over layers": {}, "combined": {}}
    with calibrated(case, noesis.Codebook(positions="each"), case.fit) as wrapped:
        nats, energy = token_lengths(wrapped, case, ranking)
        ranks, doubt = [ReferenceScores.of(row) for row in nats], Doubt.of(energy)
        for name, inputs in {"test": case.test, **case.out}.items():
            nats, energy = token_lengths(wrapped, case, inputs)
            surprisals = np.stack([rank.surprisal(row) for rank, row in zip(ranks, nats, strict=True)], 1)
            found["last layer"][name] = nats[-1]
            found["mean over layers"][name] = nats.mean(0)
            found["combined"][name] = combine(surprisals, doubt.surprisal(energy))
    return found


def token_lengths(wrapped: noesis.Wrapped, case: Case, inputs: Tensor) -> tuple[Floats, Floats]:
    """Code lengths [layers, N * (T - 1)] and minus the energies [N * (T - 1)] of all tokens but each last."""
    nats, energies = [], []
    for batch in batches(case, inputs):
        with torch.no_grad():
            logits = wrapped(batch).logits[:, :-1]
        energies.append(-logits.double().logsumexp(-1).flatten().numpy())
        layers = wrapped.surprise().layers
        nats.append(np.stack([layers[name].positions[:, :-1].ravel() for name in wrapped.calibration.counted]))
    return np.concatenate(nats, 1), np.concatenate(energies)
