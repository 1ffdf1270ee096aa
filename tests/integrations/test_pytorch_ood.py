"""The detector with pytorch-ood's method names, on a small classifier that has been trained."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import noesis
from noesis.errors import BadType, BadValue, WrongState
from noesis.integrations.pytorch_ood import NoesisDetector


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """0 to 7 are known, 8 and 9 are not; labels as pytorch-ood has them."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(x).float()[:, None].reshape(-1, 1, 8, 8) / 16, torch.from_numpy(y)
    known = labels < 8
    order = torch.randperm(int(known.sum()), generator=torch.Generator().manual_seed(0))
    inner, inner_labels = images[known][order], labels[known][order]
    return {
        "train": (inner[:700], inner_labels[:700]),
        "fit": (inner[700:1200], inner_labels[700:1200]),
        "test": (inner[1200:], inner_labels[1200:]),
        "out": (images[~known], torch.full((int((~known).sum()),), -1)),
    }


@pytest.fixture(scope="module")
def trained(digits: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(32, 8),
    )
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = digits["train"]
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def loader(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=64)


def auroc(inner: Tensor, outer: Tensor) -> float:
    return float((outer[:, None] > inner[None]).float().mean())


LAYERS: dict[str, Any] = {"layers": ["0", "1"], "logits": "3"}


# ---------------------------------------------------------------- models


def test_the_methods_of_a_detector(model: nn.Module) -> None:
    """Names and arguments of `pytorch_ood.api.Detector`."""
    expected = {
        "fit": ["data_loader", "device"],
        "fit_features": ["x", "y"],
        "predict": ["x"],
        "predict_features": ["x"],
    }
    found = {name: list(inspect.signature(getattr(NoesisDetector(model), name)).parameters) for name in expected}
    assert found == expected


def test_a_script_of_pytorch_ood(model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    detector = NoesisDetector(model, **LAYERS)
    assert detector.fit(loader(*digits["fit"])) is detector
    scores, labels = [], []
    test = torch.utils.data.ConcatDataset([TensorDataset(*digits["test"]), TensorDataset(*digits["out"])])
    for x, y in DataLoader(test, batch_size=50):
        scores.append(detector(x))
        labels.append(y)
    score, label = torch.cat(scores), torch.cat(labels)
    assert score.shape == label.shape
    assert score.dtype == torch.float32
    assert auroc(score[label >= 0], score[label < 0]) > 0.75
    bright = detector.predict(digits["test"][0][:20] * 20)
    assert auroc(score[label >= 0], bright) > 0.99
    assert torch.equal(detector.predict(test[3][0][None])[0], score[3]), "the batch matters"


def test_it_is_surprise(model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    detector = NoesisDetector(model, **LAYERS).fit(loader(*digits["fit"]))
    score = detector.predict(digits["out"][0])
    assert detector.wrapped is not None
    surprise = detector.wrapped.surprise()
    assert np.array_equal(surprise.score.astype(np.float32), score.numpy())
    assert surprise.is_ood(0.05).mean() > 0.2


def test_labels_below_zero_are_left_out(model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    x, y = digits["fit"]
    mixes = [(torch.cat([50 * a[:2], a]), torch.cat([torch.tensor([-5, -1]), b])) for a, b in loader(x, y)]
    dirty = [*mixes, *loader(*digits["out"])]
    plain = NoesisDetector(copy.deepcopy(model), **LAYERS).fit(loader(x, y)).predict(digits["out"][0])
    mixed = NoesisDetector(model, **LAYERS).fit(dirty)
    assert torch.equal(mixed.predict(digits["out"][0]), plain)
    assert mixed.wrapped is not None
    assert sum(mixed.wrapped.calibration.samples) == len(x)


def test_a_model_that_trains_is_left_as_it_was(model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    detector = NoesisDetector(model, **LAYERS).fit(loader(*digits["fit"]))
    plain = detector.predict(digits["test"][0])
    model.train()
    model[0][1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(detector.predict(digits["test"][0]), plain)
    assert [module.training for module in (model, model[0][1], model[1][1])] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not plain.requires_grad


def test_a_model_that_is_wrapped_already(model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    wrapped = noesis.wrap(model, **LAYERS, codebook=noesis.Codebook(size=8))
    detector = NoesisDetector(wrapped).fit(loader(*digits["fit"]))
    assert detector.wrapped is wrapped
    assert wrapped.calibration is not None
    with pytest.raises(
        BadValue, match="A wrapped model, and layers, logits or a codebook.*Pass the wrapped model alone"
    ):
        NoesisDetector(wrapped, logits="3")
    wrapped.unwrap()
    with pytest.raises(WrongState, match="This wrap has no codebooks"):
        NoesisDetector(noesis.wrap(model, "0"))


# ---------------------------------------------------------------- features


def features(seed: int, count: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(6, 32, generator=torch.Generator().manual_seed(99))
    which = torch.randint(6, (count,), generator=generator)
    return (directions[which] + 0.3 * torch.randn(count, 32, generator=generator)).relu() + shift * torch.rand(32)


def test_features_alone() -> None:
    detector = NoesisDetector()
    x, y = features(0, 600), torch.zeros(600, dtype=torch.int64)
    assert detector.fit_features(x, y) is detector
    inner, outer = detector.predict_features(features(1, 200)), detector.predict_features(features(2, 200, 1.5))
    assert inner.shape == (200,)
    assert inner.dtype == torch.float32
    assert auroc(inner, outer) > 0.95
    dirty = detector.fit_features(torch.cat([x, 100 * x[:50]]), torch.cat([y, y[:50] - 1]))
    assert torch.equal(dirty.predict_features(features(1, 200)), inner)
    assert torch.equal(NoesisDetector().fit_features(x.double()).predict_features(features(1, 200)), inner)
    broken = features(1, 3)
    broken[1, 5] = torch.nan
    assert detector.predict_features(broken).isinf().tolist() == [False, True, False]


def test_features_and_a_model_know_nothing_of_each_other(
    model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]
) -> None:
    detector = NoesisDetector(model, **LAYERS)
    detector.fit_features(features(0, 200))
    with pytest.raises(WrongState, match=r"predict before the detector was fitted.*Call fit\(data_loader\) first"):
        detector.predict(digits["test"][0])
    assert "fitted to features)" in repr(detector)
    detector.fit(loader(*digits["fit"]))
    assert "fitted to inputs and features)" in repr(detector)


# ---------------------------------------------------------------- errors


def test_before_fit(model: nn.Module) -> None:
    detector = NoesisDetector(model, **LAYERS)
    assert repr(detector).startswith("NoesisDetector(Wrapped(Sequential: 2 of ")
    assert repr(detector).endswith(", not fitted)")
    with pytest.raises(WrongState, match=r"predict before .*Expected normal inputs.*Call fit\(data_loader\) first"):
        detector(torch.zeros(1, 1, 8, 8))
    with pytest.raises(WrongState, match=r"predict_features before .*Call fit_features\(x, y\) first"):
        detector.predict_features(torch.zeros(1, 32))


@pytest.mark.parametrize("method", ["fit", "predict"])
def test_without_a_model(method: str) -> None:
    with pytest.raises(WrongState, match=rf"{method}, and the detector has no model.*or call {method}_features"):
        getattr(NoesisDetector(), method)([])


def test_bad_batches(model: nn.Module, digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    detector, (x, y) = NoesisDetector(model, **LAYERS), digits["fit"]
    with pytest.raises(BadType, match=r"fit: a batch is a Tensor\. Expected pairs \(inputs, labels\)"):
        detector.fit([x])
    with pytest.raises(BadType, match=r"fit: a batch is a tuple of 3"):
        detector.fit([(x, y, y)])
    with pytest.raises(BadValue, match=r"fit: labels of shape \[3\] for 500 samples"):
        detector.fit([(x, y[:3])])
    with pytest.raises(BadValue, match=r"The loader gave 100 samples\. Expected at least 120"):
        detector.fit([(x[:100], y[:100])])
    assert detector.wrapped is not None
    assert detector.wrapped.calibration is None


@pytest.mark.parametrize("x", [torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.int64), [[1.0]], torch.zeros(3, 0)])
def test_bad_features(x: Any) -> None:
    with pytest.raises(BadValue, match=r"Features: .*Expected a floating tensor \[N, D\]\. Flatten or pool"):
        NoesisDetector().fit_features(x)


def test_features_that_do_not_fit() -> None:
    detector = NoesisDetector().fit_features(features(0, 200))
    with pytest.raises(BadValue, match="Features of width 31. Expected 32, as in fit_features"):
        detector.predict_features(torch.zeros(3, 31))
    with pytest.raises(BadValue, match=r"fit_features: labels of shape \[2\] for 200 samples"):
        detector.fit_features(features(0, 200), torch.zeros(2))
    with pytest.raises(BadValue, match=r"Expected at least 120"):
        NoesisDetector().fit_features(features(0, 50))
