"""Scores of vectors: codebooks, and what calibration found normal for them.

A forward only averages outputs over positions. Code lengths are computed when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import RLock
from typing import Any

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from torch import Tensor

from ..errors import WrongState
from ..kernels.coding import Coded
from ..numerics import Floats, no_nan
from ..results import LayerSurprise, Surprise
from .calibration import Calibration, Doubt, ReferenceScores, split
from .codebook import Codebook
from .layer_codebook import ROUNDING, LayerCodebook
from .vectors import Collected, Kept

#: Without calibration the first forward that is judged gives the codes, if it has as many samples.
LEAST_TO_BEGIN = 32
#: Vectors coded at a time, which bounds the memory of reading.
CODED_AT_ONCE = 1 << 14


class Scorer:
    """What makes scores of vectors: a codebook per layer, and what is normal for it.

    Args:
        settings: of the codebooks.
        layers: whose vectors there will be.
        device: where codes begin.
        logits: whether there will be logits too.
        head: which of the layers is what the module of the logits is given.
        padding: where what a calibration found that padding does to each layer is put, for those who use masks.
    """

    def __init__(
        self,
        settings: Codebook,
        layers: Iterable[str],
        device: torch.device,
        *,
        logits: bool = False,
        head: str | None = None,
        padding: dict[str, str] | None = None,
    ) -> None:
        self.settings = settings
        self.device = device
        self.logits = logits
        self.head = head
        self.padding = {} if padding is None else padding
        self.books = {name: LayerCodebook(settings, device) for name in layers}
        self.calibration: Calibration | None = None
        self.handed_out = False  # whether an optimiser may hold the codes
        self.warned = False  # of train mode
        self.lock = RLock()  # of codes and calibration, which are replaced while other threads have scores made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=RLock())

    # ------------------------------------------------------------ scores

    def surprise(
        self, kept: dict[str, Kept], logits: Tensor | None, reasons: Mapping[str, str] | None = None
    ) -> Surprise:
        """The scores of what a forward left, in the order the layers ran; reasons say why others left nothing."""
        with self.lock:
            if self.calibration is not None:
                kept = {name: found for name, found in kept.items() if name in self.calibration.layers}
            self.ensure_codes(kept)
            return self.judge(kept, logits, reasons)

    def check_calibrated(self) -> None:
        """Refuse to judge by nothing."""
        if self.calibration is None:
            raise WrongState(
                "There is no calibration to judge by",
                "a calibrated model",
                "Call wrapped.calibrate(loader), or wrapped.load_calibration(path)",
            )

    def learned(self) -> bool:
        """Whether there are codes that were learned, which a calibration keeps."""
        return bool(self.settings.learn) and any(book.ready for book in self.books.values())

    def ensure_codes(self, kept: dict[str, Kept]) -> None:
        """Have codes, if need be from these vectors.

        Raises:
            NoesisError: when there are too few vectors, or they are of another width than the codes.
        """
        for name, found in kept.items():
            book = self.books[name]
            vectors = found.vectors if found.each is None else found.each.flatten(0, 1)
            if not book.ready:
                self._begin(name, finite(host(vectors)))
            if book.centre.device != vectors.device:
                book.to(vectors.device)
            book.check(name, vectors.shape[-1])

    def _begin(self, name: str, vectors: Floats) -> None:
        book, generator = self.books[name], np.random.default_rng(self.settings.seed)
        if self.settings.learn:
            book.begin(vectors, generator)
            return
        if len(vectors) < LEAST_TO_BEGIN:
            raise WrongState(
                f"There are no codes yet, and {len(vectors)} vectors of {name} to begin with",
                f"a calibrated model, or at least {LEAST_TO_BEGIN} samples in the first forward that is judged",
                "Call wrapped.calibrate(loader)",
            )
        logger.info("{} is coded by the vectors of this forward, until wrapped.calibrate(loader)", name)
        book.fit(vectors, generator)

    def judge(self, kept: dict[str, Kept], logits: Tensor | None, reasons: Mapping[str, str] | None = None) -> Surprise:
        """The scores of vectors."""
        layers = {name: code_layer(self.books[name], found) for name, found in kept.items()}
        calibration = self.calibration
        if calibration is None:
            score = np.mean([layer.code_length for layer in layers.values()], axis=0)
            return Surprise(score, layers, None if logits is None else host(logits)[:, 0])
        nats = {name: less_rounding(layer.code_length, self.books[name]) for name, layer in layers.items()}
        surprisals = calibration.surprisals(nats)
        layers = {
            name: ranked(layer, nats[name], calibration.references[name], surprisals[name])
            for name, layer in layers.items()
            if name in surprisals
        }
        if not any(name in layers for name in calibration.counted):
            raise WrongState(
                "No layer ran that counts for the calibration",
                f"a forward in which {calibration.counted[0]} runs",
                "Calibrate with forwards of this kind",
            )
        doubt = predicted = surprisal = p = None
        if logits is not None and calibration.doubt is not None:
            doubt, classes = host(logits).T
            predicted = np.nan_to_num(classes).astype(np.int64)
            slack = ROUNDING * (1 + np.abs(np.where(np.isfinite(doubt), doubt, 0.0)))
            surprisal, p = calibration.doubt.surprisal(doubt, slack), calibration.doubt.unsure.p_value(doubt - slack)
        score = calibration.combined(surprisals, surprisal)
        absent = [name for name in calibration.counted if name not in layers]
        if calibration.doubt is not None and doubt is None:
            absent.append("logits")
        why = {name: reasons[name] for name in absent if reasons and name in reasons}
        return Surprise(score, layers, doubt, surprisal, p, absent, calibration.p_value(score, predicted), why)

    # ------------------------------------------------------------ calibration

    def calibrate(
        self,
        vectors: dict[str, Collected],
        logits: Floats | None,
        labels: NDArray[np.int64] | None,
        by_class: bool,
        padding: Mapping[str, str] | None = None,
    ) -> Calibration:
        """Fit codes to vectors and rank them; changes nothing unless it succeeds.

        Args:
            vectors: by layer, in the order they run.
            logits: [N, 2], see `doubt_of`.
            labels: [N], for a code per class.
            by_class: whether each predicted class has p-values of its own.
            padding: what it does to each layer.
        """
        generator = np.random.default_rng(self.settings.seed)
        fit, rank, last = split(len(next(iter(vectors.values())).values), generator)
        books = {name: self._fitted(name, values, fit, labels, generator) for name, values in vectors.items()}
        references = {}
        for name, values in vectors.items():
            coded = code_values(books[name], values[rank])
            usual = tuple(float(np.median(part)) for part in (coded.mixture, coded.residual, coded.norm))
            references[name] = ReferenceScores.of(coded.code_length, usual)  # type: ignore[arg-type]
        doubt = None
        if logits is not None:
            doubt = Doubt.of(logits[np.concatenate([fit, rank]), 0])  # nothing is fitted for it
        made = Calibration(
            list(vectors),
            references,
            doubt,
            (len(fit), len(rank), len(last)),
            counted=self._counted(vectors),
            padding=dict(padding or {}),
        )
        nats = {name: code_values(books[name], values[last]).code_length for name, values in vectors.items()}
        scores = made.score(made.surprisals(nats), None if logits is None else logits[last, 0])
        made.settle(scores, classes_of(logits[last, 1]) if by_class and logits is not None else None)
        self.adopt(books, made)
        return made

    def _counted(self, vectors: dict[str, Collected]) -> list[str]:
        """Whose surprisals make the score: what the head reads stands for the last block, which it comes from."""
        *earlier, last = vectors
        return [*earlier[:-1], last] if last == self.head else [*earlier, last]

    def adopt(self, books: dict[str, LayerCodebook], calibration: Calibration | None) -> None:
        """Take codebooks and what is normal for them, all or none; parameters stay the objects that an optimiser holds.

        An interruption in between puts back what was there.
        """
        ready = [name for name in books if self.books[name].ready]
        before = {name: {part: array.copy() for part, array in self.books[name].arrays().items()} for name in ready}
        calibration_before = self.calibration
        with self.lock:
            try:
                for name, book in books.items():
                    device = self.books[name].centre.device
                    self.books[name].restore(book.arrays())
                    self.books[name].to(device)
                self.calibration = calibration
                if calibration is not None:
                    self.padding.clear()
                    self.padding.update(calibration.padding)
            except BaseException:
                for name in books:
                    if name in before:
                        self.books[name].restore(before[name])
                    else:
                        self.books[name].forget()
                self.calibration = calibration_before
                raise

    def _fitted(
        self,
        name: str,
        found: Collected,
        fit: NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        generator: np.random.Generator,
    ) -> LayerCodebook:
        chosen = found[fit].values
        known = None if labels is None else labels[fit]
        counts = found[fit].counts
        if counts is not None:  # every position is a vector of its own; of very many, some
            sample, position = counts.nonzero()
            some = generator.permutation(len(sample))[: max(len(fit), CODED_AT_ONCE)]
            chosen = chosen[sample[some], position[some]]
            known = None if known is None else known[sample[some]]
        good = np.isfinite(chosen).all(1)
        vectors, known = chosen[good].astype(np.float64), None if known is None else known[good]
        if len(vectors) < 2:
            raise WrongState(
                f"{name} gave NaN or infinity for nearly every calibration input",
                "inputs the model can take",
                "Look at wrapped.trace().first_nonfinite()",
            )
        book = LayerCodebook(self.settings, torch.device("cpu"))
        if self.settings.learn and self.books[name].ready:
            book.restore(self.books[name].arrays())
            book.refit(vectors)
        else:
            book.fit(vectors, generator, known)
        return book

    # ------------------------------------------------------------ learning

    def check_learning(self) -> None:
        """Refuse codebooks that do not learn."""
        if not self.settings.learn:
            raise WrongState(
                "These codebooks are fitted by calibrate, and learn nothing",
                "codebooks that learn",
                'Pass wrap(..., codebook=noesis.Codebook(learn="gradient")) or learn="ema"',
            )

    def loss(self, kept: dict[str, Kept], live: Mapping[str, list[Tensor]]) -> Tensor:
        """The mean code length per dimension over layers and samples of a forward; there have to be codes.

        Args:
            kept: what the forward left.
            live: with `detach=False`, the same with gradients, of each layer's calls.

        Raises:
            NoesisError: when the forward left nothing to learn from.
        """
        if self.calibration is not None:
            logger.info("the codes go on learning, so the calibration is forgotten")
            self.calibration = None
        losses = []
        for name, found in kept.items():
            calls = live.get(name, [])
            if not calls and not self.settings.detach:
                raise WrongState(
                    f"{name} left no vectors that gradients flow through",
                    "with detach=False, a forward in eager code, with gradients, and one coding_loss() for it",
                    "Pass Codebook(detach=True), or leave the model uncompiled; checkpoint with use_reentrant=False",
                )
            # A copy, since the next forward writes over what autograd would still need.
            vectors = torch.stack(calls).mean(0) if calls else found.vectors.clone()
            losses.append(self.books[name].loss(vectors).to(self.device))
        return torch.stack(losses).mean()


# ---------------------------------------------------------------- coding vectors


def code_layer(book: LayerCodebook, kept: Kept) -> LayerSurprise:
    """One layer's word on the vectors of a forward."""
    if kept.each is None:
        return _of_samples(coded(book, kept.vectors))
    return _of_positions(coded(book, kept.each.flatten(0, 1)), kept.each.shape[:2], kept.counts)


def code_values(book: LayerCodebook, found: Collected) -> LayerSurprise:
    """The same for vectors on the host."""
    vectors = torch.from_numpy(found.values)
    if found.counts is None:
        return _of_samples(coded(book, vectors))
    return _of_positions(coded(book, vectors.flatten(0, 1)), vectors.shape[:2], torch.from_numpy(found.counts))


def coded(book: LayerCodebook, vectors: Tensor) -> Coded:
    """Code vectors piece by piece."""
    pieces = [book.code(piece) for piece in vectors.split(CODED_AT_ONCE)]
    if len(pieces) == 1:
        return pieces[0]
    fields = ("mixture", "residual", "norm", "nearest", "distance")
    return Coded(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in fields))


def _of_samples(found: Coded) -> LayerSurprise:
    total, mixture, residual, norm = (host(part) for part in (found.total, found.mixture, found.residual, found.norm))
    return LayerSurprise(total, mixture, residual, norm, found.nearest.cpu().numpy())


def _of_positions(found: Coded, shape: torch.Size, counts: Tensor | None) -> LayerSurprise:
    """Means over the positions that count."""
    counted = np.ones(shape, bool) if counts is None else counts.cpu().numpy()
    total, mixture, residual, norm = (
        np.where(counted, host(part).reshape(shape), np.nan)
        for part in (found.total, found.mixture, found.residual, found.norm)
    )
    number = np.maximum(counted.sum(1), 1)

    def mean(part: Floats) -> Floats:
        averaged = np.where(counted, part, 0.0).sum(1) / number
        return no_nan(np.where(counted.any(1), averaged, np.nan))

    nearest = found.nearest.cpu().numpy().reshape(shape)
    return LayerSurprise(mean(total), mean(mixture), mean(residual), mean(norm), nearest, positions=total)


def less_rounding(nats: Floats, book: LayerCodebook) -> Floats:
    """Code lengths less what may be rounding: an input equal to calibration inputs is then no stranger than they are.

    New inputs alone are favoured, so p-values can only be larger than they have to be.
    """
    return np.where(np.isfinite(nats), nats - book.rounding(np.where(np.isfinite(nats), nats, 0.0)), nats)


def ranked(layer: LayerSurprise, nats: Floats, reference: ReferenceScores, surprisal: Floats) -> LayerSurprise:
    """A layer's word with what it means against the calibration samples."""
    values = {**vars(layer), "surprisal": surprisal, "p_value": reference.p_value(nats), "usual": reference.usual}
    return LayerSurprise(**values)


def classes_of(predicted: Floats) -> NDArray[np.int64]:
    """Predicted classes as numbers.

    Raises:
        NoesisError: when the logits were of tokens.
    """
    if np.isnan(predicted).any():
        raise WrongState(
            "by_class=True with logits of tokens, or logits that are not finite",
            "logits [N, classes]",
            "Leave by_class out",
        )
    return predicted.astype(np.int64)


def host(tensor: Tensor) -> Floats:
    """Float64 on the host."""
    values: Floats = tensor.detach().double().cpu().numpy()
    return values


def finite(vectors: Floats) -> Floats:
    """The rows without NaN or infinity.

    Raises:
        NoesisError: when there are none.
    """
    kept: Floats = vectors[np.isfinite(vectors).all(1)]
    if not len(kept):
        raise WrongState("Every vector of a layer has NaN or infinity", "vectors to begin codes with", "Calibrate")
    return kept
