"""The codebook of a layer: what it usually does, as a few codes in a subspace, fitted to vectors or learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import BadValue
from ..kernels.coding import SHORTEST, Book, Coded, code, code_reference, directions
from ..numerics import Floats, k_means, spread_start
from .codebook import Codebook

#: A variance is at least this, of directions whose length is one.
TINY = 1e-9
#: Share of the mean variance that running estimates give to every direction, which small batches may never span.
RIDGE = 1e-3
#: What is left of a vector in a code's count 1 / (1 - decay) losses later.
USED = math.exp(-1)
#: Two batch sizes give vectors that differ by rounding in about this share of their length, in float32.
ROUNDING = 1e-5
#: And differences of squares round by this share of the squares.
ROUNDING_OF_SQUARES = 5e-7
#: The log of a length varies by at least this much, or float32 would call rounding strange.
LEAST_NORM_STD = 1e-3


class LayerCodebook(nn.Module):
    """The codebook of one layer; float32, on the layer's device, and no part of the model.

    Attributes:
        projection: [channels, dim].
        codes: [size, dim], in the projection.
        utilisation: share of the codes that coded a vector when they were fitted, or within about the last
            1 / (1 - decay) losses.
        dead: positions of the codes that did not.
    """

    centre: Tensor
    whiten: Tensor
    log_weights: Tensor
    constant: Tensor
    residual: Tensor
    norm: Tensor
    counts: Tensor

    @torch.inference_mode(False)  # what is made inside of it could not be filled outside
    def __init__(self, settings: Codebook, device: torch.device) -> None:
        super().__init__()
        self.settings = settings
        learns = settings.learn == "gradient"
        # An optimiser may be made before the first batch says how large they are.
        learnt: Any = UninitializedParameter
        self.projection = learnt(requires_grad=bool(settings.learn), device=device)
        self.codes = learnt(requires_grad=learns, device=device)
        for name in ("centre", "whiten", "log_weights", "constant", "residual", "norm", "counts"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float32, device=device))

    @property
    def ready(self) -> bool:
        """Whether there are codes."""
        return not isinstance(self.codes, UninitializedParameter)

    @property
    def channels(self) -> int:
        """The width of the vectors it codes."""
        return int(self.projection.shape[0])

    @property
    def utilisation(self) -> float:
        """Share of the codes in use."""
        return float((self.counts > USED).float().mean()) if self.ready else 0.0

    @property
    def dead(self) -> list[int]:
        """Positions of the codes that are not in use."""
        return [int(i) for i in (self.counts <= USED).nonzero()]

    def check(self, name: str, width: int) -> None:
        """Refuse vectors of another width.

        Raises:
            NoesisError: when the layer of this name gives them.
        """
        if self.channels != width:
            raise BadValue(
                f"The codes of {name} are of {self.channels} numbers a sample, and the layer gives {width}",
                "the model they were made for, and inputs of the same kind",
                "Calibrate this model",
            )

    def book(self) -> Book:
        """What a code length is made of."""
        return Book(
            self.centre, self.projection, self.whiten, self.codes, self.log_weights, self.constant, self.residual,
            self.norm,
        )  # fmt: skip

    @torch.no_grad()
    def code(self, vectors: Tensor) -> Coded:
        """The code lengths of vectors [N, channels], in nats."""
        with torch.autocast(self.centre.device.type, enabled=False):
            return code(vectors.to(self.centre.device), self.book())

    @torch.no_grad()
    def rounding(self, nats: Floats) -> Floats:
        """By how much code lengths [N] of equal inputs may differ, since their vectors are rounded differently.

        A vector moved by a share r of its length moves by r / s in units of a standard deviation s, and half the
        square q of a distance by sqrt(2 q) r / s + (r / s) ** 2 / 2. Where s is tiny, as it is if calibration inputs
        never differ, an equal input has no distance either: the first term takes the median of s, the second the least.
        """
        whitened = (self.codes @ self.whiten).square().sum(1).max()
        steep = self.whiten.norm(dim=1)
        steepest = torch.stack([steep.max(), self.residual.rsqrt(), 1 / self.norm[1]]).max()
        told = torch.stack([steep.median(), steepest, whitened, self.constant]).tolist()
        usual, moved = ROUNDING * told[0], ROUNDING * told[1]
        squares = np.maximum(nats - told[3], 0.0)
        away = usual * np.sqrt(2 * squares) + moved**2 / 2
        whole: Floats = away + ROUNDING_OF_SQUARES * (squares + told[2])
        return whole

    # ------------------------------------------------------------ fitting

    @torch.no_grad()
    def fit(self, vectors: Floats, generator: np.random.Generator, labels: NDArray[np.int64] | None = None) -> None:
        """Fit everything to vectors [N, channels]; with labels [N], a code per class."""
        lengths, centred, centre = _centred(vectors)
        size, dim = self.settings.sizes(*vectors.shape)
        basis = _principal(centred, dim)
        points = centred @ basis
        if labels is None:
            codes, nearest = k_means(points, size, generator)
        else:
            known, nearest = np.unique(labels, return_inverse=True)
            codes = np.stack([points[nearest == i].mean(0) for i in range(len(known))])
        self._materialise(basis, codes)
        self._describe(lengths, centred, centre, basis, codes, nearest)

    @torch.no_grad()
    def begin(self, vectors: Floats, generator: np.random.Generator) -> None:
        """Codes to learn from, at the first batch: as many as were asked for, among its vectors."""
        lengths, centred, centre = _centred(vectors)
        count, channels = vectors.shape
        dim = min(self.settings.dim, channels)
        basis = _principal(centred, min(dim, max(1, count - 1)))
        if basis.shape[1] < dim:  # a small batch spans less
            rest = generator.standard_normal((channels, dim - basis.shape[1]))
            basis = np.linalg.qr(np.concatenate([basis, rest], 1))[0]
        points = centred @ basis
        codes = spread_start(points, self.settings.size, generator)
        more = self.settings.size - len(codes)
        if more > 0:
            drawn = points[generator.integers(count, size=more)]
            codes = np.concatenate([codes, drawn + generator.normal(scale=points.std() + TINY, size=drawn.shape)])
        self._materialise(basis, codes)
        self._describe(lengths, centred, centre, basis, codes, _nearest(points, codes), unseen=1 / count)

    @torch.no_grad()
    def refit(self, vectors: Floats) -> None:
        """Keep what was learned, codes and projection; fit the rest to vectors [N, channels]."""
        lengths, unit = _directions(vectors)
        centre = _double(self.centre)
        basis, codes = _double(self.projection), _double(self.codes)
        centred = unit - centre
        self._describe(lengths, centred, centre, basis, codes, _nearest(centred @ basis, codes))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _materialise(self, basis: Floats, codes: Floats) -> None:
        for parameter, values in ((self.projection, basis), (self.codes, codes)):
            if isinstance(parameter, UninitializedParameter):
                parameter.materialize(values.shape, dtype=torch.float32)
            elif parameter.shape != values.shape:
                parameter.data = parameter.new_empty(values.shape)
            parameter.copy_(torch.from_numpy(values))

    def _describe(
        self,
        lengths: Floats,
        centred: Floats,
        centre: Floats,
        basis: Floats,
        codes: Floats,
        nearest: NDArray[np.int64],
        unseen: float = 0.0,
    ) -> None:
        """The covariance about the codes, their weights, the variance left over and the spread of the lengths.

        `unseen` is the share of what directions and lengths may vary by at all, without which every later vector
        would be infinitely far from the codes that one small batch began.
        """
        count, channels = centred.shape
        least = unseen / channels
        dim = basis.shape[1]
        points = centred @ basis
        counts = np.bincount(nearest, minlength=len(codes))
        about = points - codes[nearest]
        freedom = max(count - len(codes), 2)
        covariance = shrunk(about.T @ about / freedom, freedom) + least * np.eye(dim)
        left = ((centred - points @ basis.T) ** 2).sum(1)
        # left ~ c chi2(nu) with c by its moments (Satterthwaite 1946): the variance itself if it is isotropic.
        mean = max(float(left.mean()), TINY)
        residual = max(left.var() / (2 * mean), mean / max(channels - dim, 1)) if channels > dim else math.inf
        residual = max(residual, least)
        logs = np.log(np.maximum(lengths, SHORTEST))
        values = {
            "centre": centre,
            "whiten": np.linalg.inv(np.linalg.cholesky(covariance)).T,
            "log_weights": np.log(np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()),
            "constant": np.array(np.linalg.slogdet(covariance)[1] / 2 + dim / 2 * math.log(2 * math.pi)),
            "residual": np.array(residual),
            "norm": np.array([logs.mean(), max(logs.std(), unseen, LEAST_NORM_STD)]),
            "counts": counts.astype(np.float64),
        }
        with torch.inference_mode(False):  # inference tensors could not be learned with later
            for name, array in values.items():
                setattr(self, name, torch.from_numpy(array).to(getattr(self, name).device, torch.float32))

    # ------------------------------------------------------------ learning

    def loss(self, vectors: Tensor) -> Tensor:
        """The mean code length per dimension of vectors [N, channels], which gradients flow through."""
        vectors = vectors.to(self.centre.device)
        with torch.autocast(self.centre.device.type, enabled=False):
            self._follow(vectors.detach().float())
            mean: Tensor = code_reference(vectors, self.book()).total.mean() / self.codes.shape[1]
        return mean

    @torch.no_grad()
    def _follow(self, vectors: Tensor) -> None:
        """Running estimates of what is not learned by gradients: weights, covariance, what is left over, lengths.

        With `learn="ema"` the codes too (van den Oord et al. 2017, 1711.00937, appendix A.1). The decay is that of the
        settings; a model that changes slowly is followed, and a single batch does not decide.
        """
        vectors = vectors[vectors.isfinite().all(1)]
        if not len(vectors):
            return
        keep = self.settings.decay
        unit, log_length = directions(vectors)
        points = (unit - self.centre) @ self.projection
        nearest = torch.cdist(points @ self.whiten, self.codes @ self.whiten).argmin(1)
        used = torch.bincount(nearest, minlength=len(self.codes)).to(self.counts.dtype)
        if self.settings.learn == "ema":
            share = (1 - keep) * (used > 0).float()[:, None]
            sums = torch.zeros_like(self.codes).index_add_(0, nearest, points)
            self.codes.data.mul_(1 - share).add_(share * sums / used.clamp(min=1)[:, None])
        about = points - self.codes[nearest]
        left = (unit - self.centre - points @ self.projection.T).square().sum(1).mean()
        outside = max(self.channels - self.codes.shape[1], 1)
        precision = self.whiten @ self.whiten.T
        covariance = keep * torch.linalg.inv(precision) + (1 - keep) * about.T @ about / len(points)
        ridge = RIDGE * covariance.diagonal().mean() + TINY
        factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), device=covariance.device))
        self.whiten = torch.linalg.inv(factor).T.contiguous()
        self.constant = factor.diagonal().log().sum() + len(factor) / 2 * math.log(2 * math.pi)
        if self.residual.isfinite():
            self.residual = keep * self.residual + (1 - keep) * left / outside
        mean = keep * self.norm[0] + (1 - keep) * log_length.mean()
        square = keep * self.norm[1].square() + (1 - keep) * (log_length - mean).square().mean()
        self.norm = torch.stack([mean, square.sqrt().clamp(min=LEAST_NORM_STD)])
        self.counts = keep * self.counts + used
        weights = self.counts.clamp(min=0.5)
        self.log_weights = (weights / weights.sum()).log()

    def forget(self) -> None:
        """Have no codes, as when it was made; the parameters stay the objects that they are."""
        for parameter in (self.projection, self.codes):
            if not isinstance(parameter, UninitializedParameter):
                parameter.data = torch.empty(0, device=parameter.device)
                parameter.__class__ = UninitializedParameter

    def extra_repr(self) -> str:
        """Sizes and usage."""
        if not self.ready:
            return "no codes yet"
        codes, dim = self.codes.shape
        return f"channels={self.channels}, codes={codes}, dim={dim}, utilisation={self.utilisation:.2f}"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything, on the host."""
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Everything from `arrays()`."""
        self._materialise(arrays["projection"], arrays["codes"])
        with torch.inference_mode(False):
            for name, _ in list(self.named_buffers()):
                setattr(self, name, torch.from_numpy(arrays[name].copy()).to(self.centre.device))


def shrunk(covariance: Floats, freedom: int) -> Floats:
    """A covariance [d, d] drawn towards a multiple of the identity, as far as the number of vectors asks for.

    Source: Chen, Wiesel, Eldar, Hero 2010, "Shrinkage algorithms for MMSE covariance estimation" (OAS).
    """
    dim = len(covariance)
    trace, squares = np.trace(covariance), (covariance**2).sum()
    above = (1 - 2 / dim) * squares + trace**2
    below = (freedom + 1 - 2 / dim) * (squares - trace**2 / dim)
    share = 1.0 if below <= 0 else min(1.0, max(0.0, above / below))
    whole: Floats = (1 - share) * covariance + (share * trace / dim + TINY) * np.eye(dim)
    return whole


def _directions(vectors: Floats) -> tuple[Floats, Floats]:
    lengths = np.linalg.norm(vectors, axis=1)
    return lengths, vectors / np.maximum(lengths, SHORTEST)[:, None]


def _centred(vectors: Floats) -> tuple[Floats, Floats, Floats]:
    lengths, unit = _directions(vectors)
    centre = unit.mean(0)
    return lengths, unit - centre, centre


def _principal(centred: Floats, dim: int) -> Floats:
    """The directions [channels, dim] in which vectors vary most, each with its largest entry positive."""
    if len(centred) < centred.shape[1]:
        basis = np.linalg.svd(centred, full_matrices=False)[2][:dim].T
    else:
        basis = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dim]
    largest = np.abs(basis).argmax(0)
    signed: Floats = basis * np.where(basis[largest, np.arange(basis.shape[1])] < 0, -1.0, 1.0)
    return signed


def _nearest(points: Floats, codes: Floats) -> NDArray[np.int64]:
    nearest: NDArray[np.int64] = ((codes**2).sum(1) - 2 * points @ codes.T).argmin(1)
    return nearest


def _double(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().double().cpu().numpy()
    return values
