"""Surprise under the method names of pytorch-ood's detectors, so that it drops into scripts that use them.

Nothing of pytorch-ood is imported. Its conventions hold: loaders give pairs (inputs, labels), labels below 0 mark
inputs that are out of distribution, and scores are higher for outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadType, BadValue, WrongState
from ..layers import Layers
from ..surprise import Codebook, Collected, Kept, Scorer
from ..wrapping import Wrapped, evaluating, wrap

#: What the single layer of given features is called.
FEATURES = "features"


class NoesisDetector:
    """Surprise as a detector of pytorch-ood (its `pytorch_ood.api.Detector`).

    `fit` and `predict` look at what happens inside a model; `fit_features` and `predict_features` at feature vectors
    alone, and need none. The two pairs know nothing of each other.

    Attributes:
        wrapped: the model under observation, for p-values and reasons: `detector.wrapped.surprise()` after `predict`.

    Examples:
        >>> import torch
        >>> from noesis.integrations.pytorch_ood import NoesisDetector
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> loader = [(torch.randn(100, 4), torch.randint(3, (100,))) for _ in range(6)]
        >>> detector = NoesisDetector(model, layers="1", logits="2").fit(loader)
        >>> normal, strange = detector(torch.cat([torch.zeros(1, 4), torch.full((1, 4), 30.0)]))
        >>> bool(normal < strange)
        True
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        layers: Layers = "blocks",
        *,
        logits: str | Callable[[Any], Any] | None = None,
        codebook: Codebook | None = None,
    ) -> None:
        """A detector that is not fitted.

        Args:
            model: is wrapped, which changes nothing about it; or a model that was wrapped with a codebook, whose
                layers and logits then count. None for features alone.
            layers: as in `noesis.wrap`.
            logits: as in `noesis.wrap`; naming them makes the detector better.
            codebook: as in `noesis.wrap`; `Codebook()` unless given.

        Raises:
            NoesisError: when the model cannot be wrapped like this.
        """
        self._settings = Codebook() if codebook is None else codebook
        self._features: Scorer | None = None
        self.wrapped: Wrapped | None = None
        if isinstance(model, Wrapped):
            if layers != "blocks" or logits is not None or codebook is not None:
                raise BadValue(
                    "A wrapped model, and layers, logits or a codebook",
                    "one or the other",
                    "Pass the wrapped model alone, which has its own",
                )
            _ = model.calibration  # an error without a codebook
            self.wrapped = model
        elif model is not None:
            self.wrapped = wrap(model, layers, codebook=self._settings, logits=logits)

    def fit(self, data_loader: Iterable[Any], device: torch.device | str | None = None) -> NoesisDetector:
        """Calibrate with normal inputs: `wrapped.calibrate` with the pairs of a loader.

        Args:
            data_loader: pairs (inputs [N, ...], labels [N]); labels tell no classes here, only which inputs to leave
                out, those below 0.
            device: where the model is moved to; by default it stays where it is.

        Returns:
            The detector itself.

        Raises:
            NoesisError: without a model, for batches of another kind, or fewer than 120 samples.
        """
        wrapped = self._wrapped("fit")
        if device is not None:
            wrapped.to(device)
        wrapped.calibrate(_normal(data_loader), progress=False)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Run the model, in eval mode and without gradients, and say how strange each input is.

        Args:
            x: [N, ...], on the model's device.

        Returns:
            float32 [N] in nats on the device of `x`, higher is stranger.

        Raises:
            NoesisError: without a model, or before `fit`.
        """
        wrapped = self._wrapped("predict")
        if wrapped.calibration is None:
            raise _unfitted("predict", "fit(data_loader)")
        with evaluating(wrapped.observed_model):
            wrapped(x)
            surprise = wrapped.surprise()
        return torch.from_numpy(surprise.score).float().to(x.device)

    def __call__(self, x: Tensor) -> Tensor:
        """The same as `predict`."""
        return self.predict(x)

    def fit_features(self, x: Tensor, y: Tensor | None = None) -> NoesisDetector:
        """Fit a codebook to given feature vectors, and calibrate it.

        Args:
            x: [N, D], at least 120.
            y: [N]; rows with a label below 0 are left out.

        Returns:
            The detector itself.

        Raises:
            NoesisError: for another shape, or too few rows.
        """
        vectors = _checked(x)
        if y is not None:
            vectors = vectors[_known(y, len(vectors), "fit_features")]
        scorer = Scorer(self._settings, [FEATURES], torch.device("cpu"))
        scorer.calibrate({FEATURES: Collected(vectors.cpu().numpy())}, None, None, by_class=False)
        self._features = scorer
        return self

    def predict_features(self, x: Tensor) -> Tensor:
        """Say how strange given feature vectors are.

        Args:
            x: [N, D], as wide as those fitted to.

        Returns:
            float32 [N] in nats on the device of `x`, higher is stranger.

        Raises:
            NoesisError: for another shape, or before `fit_features`.
        """
        vectors = _checked(x)
        if self._features is None:
            raise _unfitted("predict_features", "fit_features(x, y)")
        width = self._features.books[FEATURES].channels
        if vectors.shape[1] != width:
            raise BadValue(
                f"Features of width {vectors.shape[1]}", f"{width}, as in fit_features", "Fit to features of this kind"
            )
        found = self._features.judge({FEATURES: Kept(vectors.cpu())}, None)
        return torch.from_numpy(found.score).float().to(x.device)

    def _wrapped(self, method: str) -> Wrapped:
        if self.wrapped is None:
            raise WrongState(
                f"{method}, and the detector has no model", "one to run", f"Pass a model, or call {method}_features"
            )
        return self.wrapped

    def __repr__(self) -> str:
        model = "no model" if self.wrapped is None else repr(self.wrapped)
        fitted = [
            name
            for name, yes in (
                ("inputs", self.wrapped is not None and self.wrapped.calibration is not None),
                ("features", self._features is not None),
            )
            if yes
        ]
        return f"NoesisDetector({model}, {'fitted to ' + ' and '.join(fitted) if fitted else 'not fitted'})"


def _normal(loader: Iterable[Any]) -> Iterator[Any]:
    """The inputs of a loader whose labels are not below 0."""
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise BadType(
                f"fit: a batch is a {type(batch).__name__}{length}",
                "pairs (inputs, labels) of tensors",
                "Use detector.wrapped.calibrate(...), which takes others",
            )
        inputs, labels = batch
        keep = _known(labels, len(inputs), "fit")
        if keep.any():
            yield inputs[keep.to(inputs.device)]


def _known(labels: Any, samples: int, method: str) -> Tensor:
    """Which samples are normal."""
    marks = torch.as_tensor(labels)
    if marks.shape != (samples,):
        raise BadValue(
            f"{method}: labels of shape {list(marks.shape)} for {samples} samples", "one number per sample", "Check y"
        )
    return marks >= 0


def _checked(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point() or not x.shape[1]:
        kind = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise BadValue(f"Features: {kind}", "a floating tensor [N, D]", "Flatten or pool them to one vector per sample")
    return x.detach().float()


def _unfitted(method: str, fit: str) -> WrongState:
    return WrongState(f"{method} before the detector was fitted", "normal inputs to compare with", f"Call {fit} first")
