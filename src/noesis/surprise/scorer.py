"""The surprise side of a wrap: a vector per layer and sample of the latest forward, its codebooks and calibration.

A forward only averages outputs over positions. Code lengths are computed when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import WrongState
from ..internals.compiling import stays
from ..internals.modes import undisturbed
from ..kernels import pooling
from ..kernels.coding import Coded
from ..kernels.dispatch import by_value, from_value
from ..kernels.pooling import pooled
from ..results.surprise import LayerSurprise, Surprise
from .calibration import Calibration, Doubt, Ranks, no_nan, split
from .codebook import ROUNDING, Codebook, LayerCodebook

Floats = NDArray[np.float64]

#: Vectors there is room for at first; eager code makes more when a batch needs them.
ROOM = 64
#: Without calibration the first forward that is judged gives the codes, if it has as many samples.
LEAST_TO_BEGIN = 32
#: Vectors coded at a time, which bounds the memory of reading.
CODED_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Kept:
    """The vectors of one layer in the latest forward."""

    vectors: Tensor  # [N, channels]
    each: Tensor | None = None  # [N, positions, channels]
    counts: Tensor | None = None  # bool [N, positions], of `each`


@dataclass(frozen=True)
class Collected:
    """The vectors of one layer over many forwards, on the host."""

    values: NDArray[np.float32]  # [N, channels], or [N, positions, channels]
    counts: NDArray[np.bool_] | None = None  # [N, positions], which of them count

    def __getitem__(self, chosen: NDArray[np.int64]) -> Collected:
        return Collected(self.values[chosen], None if self.counts is None else self.counts[chosen])


class Channel:
    """What is kept of one layer, or of the logits."""

    def __init__(self, name: str, module: nn.Module, coder: Coder, *, spread: bool = True) -> None:
        self.name = name
        self.coder = coder
        self.spread = spread and coder.settings.positions == "mean"
        # An axis as long as a bias or a norm's weight is the axis of the channels.
        self.widths = frozenset(parameter.shape[0] for parameter in module.parameters() if parameter.dim() > 0)
        self.buffer: Tensor | None = None
        self.stamp: Tensor | None = None
        self.order = 0
        self.live: list[Tensor] = []  # with `detach=False`, what gradients flow through, of each call
        self.each: tuple[Tensor, Tensor | None] | None = None
        self.mixed: Tensor | None = None  # bool, on the device: whether calls of one forward do not fit together

    def observe(self, x: Tensor, batch: int, control: Tensor) -> None:
        """Keep the vectors of an output, in eager code."""
        samples, settings = samples_of(x, batch), self.coder.settings
        channel = self.axis(x)
        mask = self.coder.mask_of(x, channel)
        before = self.stamp
        buffer, stamp = self._room(samples, pooling.width(x, samples, channel, self.spread), x.device)
        self.order = self.coder.next_order()
        if self.coder.eager and not settings.detach and settings.learn and torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):  # checkpointing is to see nothing of ours
                self.live.append(pooled(x, samples, channel, self.spread, mask))
        keep = pooling.pool_cpu if x.device.type == "cpu" else pooling.pool_anywhere
        keep(x.detach(), samples, channel, self.spread, mask, buffer, stamp, control)
        if before is not None and before is not stamp and before.device == stamp.device:
            self.mixed = before[pooling.FORWARD] == stamp[pooling.FORWARD]  # another width in the same forward
        elif self.mixed is not None:
            self.mixed = self.mixed & (stamp[pooling.CALLS] > 1)
        if settings.positions == "each":
            self._merge(stamp[pooling.CALLS], *positions(x.detach(), samples, channel, mask, settings.most_positions))

    def _merge(self, calls: Tensor, new: Tensor, counts: Tensor | None) -> None:
        """Average the positions of the calls of a forward, as the means over them are; decided on the device alone."""
        held, again = None if self.each is None else self.each[0], calls > 1
        if calls.device.type == "cpu" and not again:  # where looking costs nothing
            pass
        elif held is not None and held.shape == new.shape and held.device == new.device:
            new = torch.where(again, held + (new - held) / calls, new)
        else:
            self.mixed = again if self.mixed is None else self.mixed | again
        self.each = new, counts

    def emit(self, x: Tensor, batch: int, control: Tensor) -> None:
        """The same in compiled code, which can make no room: eager code has, before, for vectors of one width."""
        if self.coder.settings.positions == "each":
            return  # a copy of all positions at a fixed place would cost what eager code gives back
        if self.buffer is not None and x.dim() > 0 and x.shape[0] % batch == 0:
            channel = self.axis(x)
            if pooling.width(x, batch, channel, self.spread) != self.buffer.shape[1]:
                return
            mask = self.coder.mask_of(x, channel)
            torch.ops.noesis.pool(x.detach(), batch, channel, self.spread, mask, self.buffer, self.stamp, control)

    def axis(self, x: Tensor) -> int:
        """The axis of the channels: the second of images, the last of tokens, unless the widths say otherwise."""
        if x.dim() < 3:
            return x.dim() - 1
        usual, other = (1, x.dim() - 1) if x.dim() > 3 else (x.dim() - 1, 1)
        swapped = x.shape[usual] not in self.widths and x.shape[other] in self.widths
        return other if swapped else usual

    def _room(self, samples: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Buffer and stamp for vectors of this kind, new ones if these do not do."""
        buffer, stamp = self.buffer, self.stamp
        fits = buffer is not None and buffer.device == device and buffer.shape[1] == width
        if fits and buffer is not None and stamp is not None and samples <= buffer.shape[0]:
            return buffer, stamp
        room = max(ROOM, 1 << (samples - 1).bit_length())
        with undisturbed(), torch.inference_mode(False):
            self.buffer = buffer = stays(torch.zeros(room, width, dtype=torch.float32, device=device))
            self.stamp = stamp = stays(torch.full((pooling.STAMP,), -1, dtype=torch.int64, device=device))
        return buffer, stamp

    def drop(self, reason: str) -> None:
        """Leave nothing of this forward, and say why."""
        self.coder.uncoded[self.name] = reason
        if self.stamp is not None:
            self.stamp.fill_(-1)

    def note(self, reason: str) -> None:
        """Say once why there are no vectors of this layer."""
        if self.coder.uncoded.get(self.name) != reason:
            logger.warning("{} is left out: {}", self.name, reason)
        self.coder.uncoded[self.name] = reason

    def kept(self, forwards: int) -> Kept | None:
        """What the latest forward left; None where the layer did not run in it."""
        if self.buffer is None or self.stamp is None:
            return None
        forward, samples, _ = self.stamp.tolist()
        if forward != forwards:
            return None
        if self.mixed is not None and self.mixed:
            self.note("its calls in one forward gave outputs of different shapes, which have no mean")
            return None
        each, counts = self.each if self.each is not None else (None, None)
        return Kept(self.buffer[:samples], each, counts)

    def __getstate__(self) -> dict[str, Any]:
        return by_value({**self.__dict__, "live": []})  # a tensor inside a graph cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(from_value(state))


def _itself(x: Tensor) -> Tensor:
    return x


def samples_of(x: Tensor, batch: int) -> int:
    """How many samples an output has.

    Raises:
        NoesisError: when its first dimension is not of the batch.
    """
    length = x.shape[0] if x.dim() else 0
    if not batch or not length or length % batch:
        raise WrongState(
            f"an output of shape {tuple(x.shape)} in a forward of {batch} samples",
            "the samples along the first dimension, for surprise",
            "Leave the layer out",
        )
    return batch


def positions(x: Tensor, samples: int, channel: int, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    """The vectors of at most so many positions of each sample [N, positions, channels], and which of them count."""
    x = pooling.by_position(x, samples, channel)
    counts = None if mask is None else mask.reshape(samples, -1) != 0
    if x.shape[1] > most:
        chosen = torch.linspace(0, x.shape[1] - 1, most, device=x.device).round().long()
        x, counts = x[:, chosen], None if counts is None else counts[:, chosen]
    return x.to(torch.float32, copy=True), counts


class Coder:
    """The channels of a wrap and what makes scores of them."""

    def __init__(self, settings: Codebook, device: torch.device, logits: Callable[[Any], Any] | None = None) -> None:
        self.settings = settings
        self.device = device
        self.logits = logits  # from the model's output
        self.channels: dict[str, Channel] = {}
        self.books: dict[str, LayerCodebook] = {}
        self.doubt: Channel | None = None
        self.head: str | None = None  # the channel of what the module of the logits is given
        self.calibration: Calibration | None = None
        self.uncoded: dict[str, str] = {}  # why a layer leaves no vectors
        self.mask: Tensor | None = None
        self.handed_out = False  # whether an optimiser may hold the codes
        self.warned = False  # of train mode
        self.eager = True  # whether the root runs in eager code, and so tells one forward from the next
        self._order = 0

    def add(self, name: str, module: nn.Module, *, spread: bool = True) -> Channel:
        """Watch a layer."""
        channel = self.channels[name] = Channel(name, module, self, spread=spread)
        self.books[name] = LayerCodebook(self.settings, self.device)
        return channel

    def see_head(self, logits: str) -> Channel:
        """Watch what the module of the logits is given."""
        self.head = f"input of {logits}"
        return self.add(self.head, nn.Module(), spread=False)

    def see_logits(self) -> Channel:
        """Watch the logits."""
        self.doubt = Channel("logits", nn.Module(), self, spread=False)
        return self.doubt

    # ------------------------------------------------------------ hot path

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], position: int | None) -> None:
        """A forward of the root starts."""
        mask = kwargs.get(self.settings.mask)
        if mask is None and position is not None and len(args) > position:
            mask = args[position]
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.eager = not torch.compiler.is_compiling()
        if self.eager:
            self._order = 0
            for channel in self.channels.values() if not self.settings.detach else ():
                channel.live = []

    def forget(self) -> None:
        """Drop the vectors of the latest forward."""
        for channel in [*self.channels.values(), *([] if self.doubt is None else [self.doubt])]:
            channel.each, channel.mixed, channel.live = None, None, []
            if channel.stamp is not None:
                channel.stamp.fill_(-1)

    def next_order(self) -> int:
        """Counts the layers of a forward as they run."""
        self._order += 1
        return self._order

    def mask_of(self, x: Tensor, channel: int) -> Tensor | None:
        """The forward's mask, where the output has its tokens; in decoding, of the newest ones."""
        mask = self.mask
        if mask is None or x.dim() != 3 or mask.shape[0] != x.shape[0]:
            return None
        tokens = x.shape[2 if channel == 1 else 1]
        return None if mask.shape[1] < tokens else mask[:, mask.shape[1] - tokens :].to(x.device)

    def doubt_of(self, logits: Tensor) -> Tensor:
        """How unsure logits are, and what they predict: [N, 2], or [N, tokens, 2].

        Unsure is minus the energy (Liu et al. 2020, 2010.03759), of a language model its mean over tokens.
        """
        if logits.dim() > 3:  # of pixels: classes come second
            logits = logits.movedim(1, -1).flatten(1, -2)
        energy = -torch.logsumexp(logits.float(), -1)
        predicted = logits.argmax(-1).to(energy.dtype)
        if logits.dim() > 2:  # tokens have no class together
            predicted = torch.full_like(predicted, torch.nan)
        return torch.stack([energy, predicted], -1)

    # ------------------------------------------------------------ scores

    def kept(self, forwards: int) -> dict[str, Kept]:
        """The vectors of the layers that ran in this forward, the latest, in the order they ran."""
        ran = {name: kept for name, channel in self.channels.items() if (kept := channel.kept(forwards)) is not None}
        if not ran:
            raise WrongState(
                f"No layer left vectors in the latest forward{self._why()}",
                "a forward to judge",
                "Run the model, once in eager code before compiling it; paused() and every= leave forwards out, "
                'compiled code does with positions="each"',
            )
        return dict(sorted(ran.items(), key=lambda item: self.channels[item[0]].order))

    def _why(self) -> str:
        name = next(iter(self.uncoded), None)
        return "" if name is None else f" ({name}: {self.uncoded[name]})"

    def surprise(self, forwards: int) -> Surprise:
        """The scores of the latest forward."""
        kept = self.kept(forwards)
        if self.calibration is not None:
            kept = {name: found for name, found in kept.items() if name in self.calibration.layers}
        self.ensure_codes(kept)
        doubt = None if self.doubt is None else self.doubt.kept(forwards)
        return self.judge(kept, None if doubt is None else doubt.vectors)

    def left(self, forwards: int) -> bool:
        """Whether any layer left vectors in this forward."""
        return any(channel.kept(forwards) is not None for channel in self.channels.values())

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

    def judge(self, kept: dict[str, Kept], logits: Tensor | None) -> Surprise:
        """The scores of vectors."""
        layers = {name: code_layer(self.books[name], found) for name, found in kept.items()}
        calibration = self.calibration
        if calibration is None:
            score = np.mean([layer.code_length for layer in layers.values()], axis=0)
            return Surprise(score, layers, None if logits is None else host(logits)[:, 0])
        nats = {name: less(layer.code_length, self.books[name]) for name, layer in layers.items()}
        surprisals = calibration.surprisals(nats)
        layers = {
            name: ranked(layer, nats[name], calibration.ranks[name], surprisals[name])
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
        return Surprise(score, layers, doubt, surprisal, p, absent, calibration.p_value(score, predicted))

    # ------------------------------------------------------------ calibration

    def calibrate(
        self, vectors: dict[str, Collected], logits: Floats | None, labels: NDArray[np.int64] | None, by_class: bool
    ) -> Calibration:
        """Fit codes to vectors and rank them; changes nothing unless it succeeds.

        Args:
            vectors: by layer, in the order they run.
            logits: [N, 2], see `doubt_of`.
            labels: [N], for a code per class.
            by_class: whether each predicted class has p-values of its own.
        """
        generator = np.random.default_rng(self.settings.seed)
        fit, rank, last = split(len(next(iter(vectors.values())).values), generator)
        books = {name: self._fitted(name, values, fit, labels, generator) for name, values in vectors.items()}
        ranks = {}
        for name, values in vectors.items():
            coded = code_values(books[name], values[rank])
            usual = tuple(float(np.median(part)) for part in (coded.mixture, coded.residual, coded.norm))
            ranks[name] = Ranks.of(coded.code_length, usual)  # type: ignore[arg-type]
        doubt = None
        if logits is not None:
            doubt = Doubt.of(logits[np.concatenate([fit, rank]), 0])  # nothing is fitted for it
        made = Calibration(
            list(vectors), ranks, doubt, (len(fit), len(rank), len(last)), counted=self._counted(vectors)
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
        try:
            for name, book in books.items():
                device = self.books[name].centre.device
                buffer = self.channels[name].buffer
                self.books[name].restore(book.arrays())
                self.books[name].to(device if buffer is None else buffer.device)
            self.calibration = calibration
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

    def loss(self, forwards: int) -> Tensor:
        """The mean code length per dimension over layers and samples of the latest forward.

        Raises:
            NoesisError: for codebooks that do not learn, or a forward that left nothing to learn from.
        """
        if not self.settings.learn:
            raise WrongState(
                "These codebooks are fitted by calibrate, and learn nothing",
                "codebooks that learn",
                'Pass wrap(..., codebook=noesis.Codebook(learn="gradient")) or learn="ema"',
            )
        kept = self.kept(forwards)
        self.ensure_codes(kept)
        if self.calibration is not None:
            logger.info("the codes go on learning, so the calibration is forgotten")
            self.calibration = None
        losses = []
        for name, found in kept.items():
            live, self.channels[name].live = self.channels[name].live, []
            if not live and not self.settings.detach:
                raise WrongState(
                    f"{name} left no vectors that gradients flow through",
                    "with detach=False, a forward in eager code, with gradients, and one coding_loss() for it",
                    "Pass Codebook(detach=True), or leave the model uncompiled; checkpoint with use_reentrant=False",
                )
            # A copy, since the next forward writes over what autograd would still need.
            vectors = torch.stack(live).mean(0) if live else found.vectors.clone()
            losses.append(self.books[name].loss(vectors).to(self.device))
        return torch.stack(losses).mean()


# ---------------------------------------------------------------- coding vectors


def code_layer(book: LayerCodebook, kept: Kept) -> LayerSurprise:
    """One layer's word on the vectors of a forward."""
    if kept.each is None:
        return _whole(coded(book, kept.vectors))
    return _each(coded(book, kept.each.flatten(0, 1)), kept.each.shape[:2], kept.counts)


def code_values(book: LayerCodebook, found: Collected) -> LayerSurprise:
    """The same for vectors on the host."""
    vectors = torch.from_numpy(found.values)
    if found.counts is None:
        return _whole(coded(book, vectors))
    return _each(coded(book, vectors.flatten(0, 1)), vectors.shape[:2], torch.from_numpy(found.counts))


def coded(book: LayerCodebook, vectors: Tensor) -> Coded:
    """Code vectors piece by piece."""
    pieces = [book.code(piece) for piece in vectors.split(CODED_AT_ONCE)]
    if len(pieces) == 1:
        return pieces[0]
    fields = ("mixture", "residual", "norm", "nearest", "distance")
    return Coded(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in fields))


def _whole(found: Coded) -> LayerSurprise:
    total, mixture, residual, norm = (host(part) for part in (found.total, found.mixture, found.residual, found.norm))
    return LayerSurprise(total, mixture, residual, norm, found.nearest.cpu().numpy())


def _each(found: Coded, shape: torch.Size, counts: Tensor | None) -> LayerSurprise:
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


def less(nats: Floats, book: LayerCodebook) -> Floats:
    """Code lengths less what may be rounding: an input equal to calibration inputs is then no stranger than they are.

    New inputs alone are favoured, so p-values can only be larger than they have to be.
    """
    return np.where(np.isfinite(nats), nats - book.rounding(np.where(np.isfinite(nats), nats, 0.0)), nats)


def ranked(layer: LayerSurprise, nats: Floats, ranks: Ranks, surprisal: Floats) -> LayerSurprise:
    """A layer's word with what it means against the calibration samples."""
    values = {**vars(layer), "surprisal": surprisal, "p_value": ranks.p_value(nats), "usual": ranks.usual}
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
