"""Known detectors, as their papers define them: each is fitted on features, logits and labels; higher is stranger.

Of a language model the same is done per token, on the last hidden states and the logits of the next
token (its class). A sequence's score is the mean over its tokens. All arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .nervecode_baseline import nervecode_scores
from .sets import Case

BANK = 20_000  # at most so many fit tokens of a language model are learned from
NEIGHBOURS = 5_000  # and at most so many features are a neighbour's


class Detector:
    """A post-hoc score of one input's penultimate features [N, D] and logits [N, C]."""

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Detector:
        """Learn from the model's own inputs, and from its head's weight [C, D] and bias [C]."""
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """How strange each input is: [N]."""
        raise NotImplementedError


class MSP(Detector):
    """Maximum softmax probability (Hendrycks & Gimpel, 1610.02136); as a logarithm, which rounds less."""

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        return -logits.log_softmax(1).amax(1)


class MaxLogit(Detector):
    """The largest logit (Hendrycks et al., 1911.11132)."""

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        return -logits.amax(1)


class Energy(Detector):
    """The free energy of the logits (Liu et al., 2010.03759)."""

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        return -logits.logsumexp(1)


class GEN(Detector):
    """Generalised entropy of the largest probabilities (Liu et al., CVPR 2023): gamma .1, of at most 100 classes."""

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        top = logits.log_softmax(1).topk(min(100, logits.shape[1]), 1).values
        return (0.1 * (top + (-top.expm1()).clamp(min=1e-300).log())).exp().sum(1)


class Mahalanobis(Detector):
    """Distance to the nearest class mean under one covariance (Lee et al., 1807.03888), on penultimate features."""

    def prepare(self, features: Tensor) -> Tensor:
        """The features that the distance is taken in."""
        return features

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Detector:
        x = self.prepare(features)
        _, classes = labels.unique(return_inverse=True)
        counts = classes.bincount()
        self.means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, classes, x) / counts[:, None]
        self.whiten = whitening(x - self.means[classes])
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        return torch.cdist(self.prepare(features) @ self.whiten, self.means @ self.whiten).amin(1).square()


class MahalanobisPlusPlus(Mahalanobis):
    """The same on features of length 1 (Mueller & Hein, 2505.18032)."""

    def prepare(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=1)


class RelativeMahalanobis(Mahalanobis):
    """Less the distance to the mean of all under the covariance of all (Ren et al., 2106.09022)."""

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Detector:
        self.mean = features.mean(0)
        self.whiten_all = whitening(features - self.mean)
        return super().fit(features, logits, labels, weight, bias)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        return super().score(features, logits) - ((features - self.mean) @ self.whiten_all).square().sum(1)


def whitening(centred: Tensor) -> Tensor:
    """The matrix [D, rank] that gives the centred rows unit covariance; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    kept = values > values.amax() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] / values[kept].sqrt()


class KNN(Detector):
    """Distance to the k-th nearest of the fit features, all of length 1 (Sun et al., 2204.06507)."""

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Detector:
        self.bank = nn.functional.normalize(features, dim=1)
        self.k = max(1, min(50, len(self.bank) // 10))
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        queries = nn.functional.normalize(features, dim=1)
        return torch.cat([torch.cdist(part, self.bank).kthvalue(self.k, 1).values for part in queries.split(500)])


class ViM(Detector):
    """The residual outside the principal space as a virtual logit, beside the energy (Wang et al., 2203.10807)."""

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Detector:
        width = features.shape[1]
        principal = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
        self.origin = -torch.linalg.pinv(weight) @ bias
        x = features - self.origin
        self.residual = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors[:, : width - principal]  # ascending
        self.alpha = logits.amax(1).mean() / (x @ self.residual).norm(dim=1).mean()
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        virtual = self.alpha * ((features - self.origin) @ self.residual).norm(dim=1)
        return virtual - logits.logsumexp(1)


class FDBD(Detector):
    """Mean distance to the decision boundaries over the distance to the features' mean (Liu & Qin, 2312.11536)."""

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Detector:
        self.mean = features.mean(0)
        self.apart = torch.cdist(weight, weight)  # [C, C]
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        top, predicted = logits.max(1)
        apart = self.apart[predicted].scatter(1, predicted[:, None], torch.inf)  # a class has no boundary to itself
        distances = ((top[:, None] - logits) / apart).sum(1) / (logits.shape[1] - 1)
        return -distances / (features - self.mean).norm(dim=1)


BASELINES: dict[str, type[Detector]] = {
    "MSP": MSP,
    "MaxLogit": MaxLogit,
    "Energy": Energy,
    "GEN": GEN,
    "Mahalanobis": Mahalanobis,
    "Mahalanobis++": MahalanobisPlusPlus,
    "relative Mahalanobis": RelativeMahalanobis,
    "kNN": KNN,
    "ViM": ViM,
    "fDBD": FDBD,
}

# ---------------------------------------------------------------- on a set


def evaluate(case: Case, *, nervecode: bool = True, each_token: bool = False) -> dict[str, dict[str, Tensor] | str]:
    """Scores of the test set and of every out set by every baseline; text where one does not apply.

    Each is [N], or with `each_token` [N * (T - 1)] of a language model's tokens.
    """
    head = case.model.get_submodule(case.logits)
    weight = head.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if head.bias is None else head.bias.detach().double()
    features, logits, labels = fit_rows(case)
    fitted = {}
    for name, kind in BASELINES.items():
        rows = slice(NEIGHBOURS) if kind is KNN else slice(None)
        fitted[name] = kind().fit(features[rows], logits[rows], labels[rows], weight, bias)
    found: dict[str, dict[str, Tensor] | str] = {name: {} for name in fitted}
    if case.sequences:
        found["NLL"] = {}
    for name, inputs in {"test": case.test, **case.out}.items():
        for detector, scores in scores_of(case, inputs, fitted).items():
            reduced = scores.mean(1) if case.sequences and not each_token else scores.flatten()
            found[detector][name] = reduced
    if nervecode:
        for name, recommended in {"nervecode": False, "nervecode recommended": True}.items():
            whole = nervecode_scores(case, recommended=recommended) if not each_token else None
            found[name] = whole or "gives a score per sequence, none per token"
    return found


def fit_rows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and labels that detectors learn from; random tokens of a language model's sequences."""
    if not case.sequences:
        parts = list(passes(case, case.fit))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), case.fit_labels
    generator = torch.Generator().manual_seed(case.seed)
    labels, length = case.fit_labels.flatten(), case.fit_labels.shape[1]
    share = min(1.0, BANK / len(labels))
    features, logits, kept, at = [], [], [], 0
    for x, y in passes(case, case.fit):
        rows = torch.rand(len(x) * length, generator=generator) < share
        features.append(x[:, :-1].flatten(0, 1)[rows])
        logits.append(y[:, :-1].flatten(0, 1)[rows])
        kept.append(labels[at : at + len(rows)][rows])
        at += len(rows)
    order = torch.randperm(sum(map(len, kept)), generator=generator)  # the first rows are then a sample of all
    return torch.cat(features)[order], torch.cat(logits)[order], torch.cat(kept)[order]


def scores_of(case: Case, inputs: Tensor, fitted: dict[str, Detector]) -> dict[str, Tensor]:
    """Scores of one set by every fitted detector, in one pass over the model: [N], or [N, T - 1] of tokens."""
    parts: dict[str, list[Tensor]] = {name: [] for name in fitted}
    at = 0
    for features, logits in passes(case, inputs):
        if not case.sequences:
            for name, detector in fitted.items():
                parts[name].append(detector.score(features, logits))
            continue
        x, y = features[:, :-1].flatten(0, 1), logits[:, :-1].flatten(0, 1)
        for name, detector in fitted.items():
            parts[name].append(detector.score(x, y).unflatten(0, (len(features), -1)))
        following = inputs[at : at + len(features), 1:]
        losses = nn.functional.cross_entropy(y, following.flatten(), reduction="none")
        parts.setdefault("NLL", []).append(losses.unflatten(0, following.shape))
        at += len(features)
    return {name: torch.cat(scores) for name, scores in parts.items()}


def passes(case: Case, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Penultimate features and logits in float64, a few inputs at a time."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output.detach().double()

        return case.model.get_submodule(name).register_forward_hook(hook)

    handles = [keep(case.features), keep(case.logits)]
    try:
        for batch in inputs.split(25 if case.sequences else 250):
            with torch.no_grad():
                case.model(batch)
            yield seen[case.features], seen[case.logits]
    finally:
        for handle in handles:
            handle.remove()
