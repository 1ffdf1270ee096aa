"""What is kept of each layer for surprise: a vector per sample of the latest forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import WrongState
from ..internals import stays, undisturbed
from ..kernels import pooling
from ..kernels.pooling import pooled
from ..kernels.runtime import by_value, from_value
from ..layers import Batch, MaskArgument
from ..surprise import MASKED, UNTOUCHED, Codebook, Kept
from .padding import Padding, Tried

#: Vectors there is room for at first; eager code makes more when a batch needs them.
ROOM = 64


class Channel:
    """What is kept of one layer, or of the logits."""

    def __init__(self, name: str, module: nn.Module, channels: Channels, *, spread: bool = True) -> None:
        self.name = name
        self.channels = channels
        self.spread = spread and channels.settings.positions == "mean"
        # An axis as long as a bias or a norm's weight is the axis of the channels.
        self.widths = frozenset(parameter.shape[0] for parameter in module.parameters() if parameter.dim() > 0)
        self.buffer: Tensor | None = None
        self.stamp: Tensor | None = None
        self.order = 0
        self.live: list[Tensor] = []  # with `detach=False`, what gradients flow through, of each call
        self.each: tuple[Tensor, Tensor | None] | None = None
        self.mixed: Tensor | None = None  # bool, on the device: whether calls of one forward do not fit together

    def afresh(self, channels: Channels) -> Channel:
        """One for the same layer, with nothing kept yet."""
        made = Channel.__new__(Channel)
        nothing: dict[str, Any] = {"buffer": None, "stamp": None, "order": 0, "live": [], "each": None, "mixed": None}
        made.__dict__.update(self.__dict__, channels=channels, **nothing)
        return made

    def observe(self, x: Tensor, batch: Batch, control: Tensor) -> None:
        """Keep the vectors of an output, in eager code."""
        samples, settings = samples_of(x, batch), self.channels.settings
        channel = self.axis(x)
        padding = self.channels.padding
        mask = padding.mask_of(x, channel)
        if padding.trial is not None:
            with_mask, without = (pooled(x, samples, channel, self.spread, used) for used in (mask, None))
            tried = Tried(mask is not None, x.dtype.itemsize < 4, with_mask, without)
            padding.trial.setdefault(self.name, []).append(tried)
            return
        mask = padding.used(self.name, x, samples, mask)
        before = self.stamp  # which is replaced where the vectors have another width, and knows their forward
        buffer, stamp = self.room(samples, pooling.width(x, samples, channel, self.spread), x.device)
        self.order = self.channels.next_order()
        if self.channels.eager and not settings.detach and settings.learn and torch.is_grad_enabled():
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

    def emit(self, x: Tensor, batch: Batch, control: Tensor) -> None:
        """The same in compiled code, which can make no room: eager code has, before, for vectors of one width."""
        if self.channels.settings.positions == "each":
            return  # a copy of all positions at a fixed place would cost what eager code gives back
        samples = batch.samples(x)
        if self.buffer is not None and samples:
            channel, padding = self.axis(x), self.channels.padding
            if pooling.width(x, samples, channel, self.spread) != self.buffer.shape[1]:
                return
            found, mask = padding.found.get(self.name), padding.mask_of(x, channel)
            if found == UNTOUCHED:
                mask = None
            elif found == MASKED and padding.strays(x, samples, mask):
                return
            torch.ops.noesis.pool(x.detach(), samples, channel, self.spread, mask, self.buffer, self.stamp, control)

    def axis(self, x: Tensor) -> int:
        """The axis of the channels: the second of images, the last of tokens, unless the widths say otherwise."""
        if x.dim() < 3:
            return x.dim() - 1
        usual, other = (1, x.dim() - 1) if x.dim() > 3 else (x.dim() - 1, 1)
        swapped = x.shape[usual] not in self.widths and x.shape[other] in self.widths
        return other if swapped else usual

    def room(self, samples: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
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
        self.channels.uncoded[self.name] = self.channels.dropped[self.name] = reason
        if self.stamp is not None:
            self.stamp.fill_(-1)

    def note(self, reason: str) -> None:
        """Say once why there are no vectors of this layer."""
        if self.channels.uncoded.get(self.name) != reason:
            logger.warning("{} is left out: {}", self.name, reason)
        self.channels.uncoded[self.name] = reason

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


def samples_of(x: Tensor, batch: Batch) -> int:
    """How many samples an output has.

    Raises:
        NoesisError: when its first dimension is not of the batch.
    """
    samples = batch.samples(x)
    if not samples:
        raise WrongState(
            f"an output of shape {tuple(x.shape)} in a forward of {batch.size} samples",
            "the samples along the first dimension, for surprise",
            "Leave the layer out",
        )
    return samples


def positions(x: Tensor, samples: int, channel: int, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    """The vectors of at most so many positions of each sample [N, positions, channels], and which of them count."""
    x = pooling.by_position(x, samples, channel)
    counts = None if mask is None else mask.reshape(samples, -1) != 0
    if x.shape[1] > most:
        chosen = torch.linspace(0, x.shape[1] - 1, most, device=x.device).round().long()
        x, counts = x[:, chosen], None if counts is None else counts[:, chosen]
    return x.to(torch.float32, copy=True), counts


class Channels:
    """The channels of a wrap: what `wrapped.surprise()` will look at.

    Args:
        settings: of the codebooks, which say what to keep.
        logits: from the model's output to its logits, where no module gives them.
    """

    def __init__(self, settings: Codebook, logits: Callable[[Any], Any] | None = None) -> None:
        self.settings = settings
        self.logits = logits
        self.layers: dict[str, Channel] = {}
        self.doubt: Channel | None = None  # of the logits
        self.head: str | None = None  # the channel of what the module of the logits is given
        self.uncoded: dict[str, str] = {}  # why a layer leaves no vectors
        self.dropped: dict[str, str] = {}  # the same of the latest forward alone
        self.padding = Padding(settings.mask)
        self.eager = True  # whether the root runs in eager code, and so tells one forward from the next
        self._order = 0

    def add(self, name: str, module: nn.Module, *, spread: bool = True) -> Channel:
        """Watch a layer."""
        channel = self.layers[name] = Channel(name, module, self, spread=spread)
        return channel

    def see_head(self, logits: str) -> Channel:
        """Watch what the module of the logits is given."""
        self.head = f"input of {logits}"
        return self.add(self.head, nn.Module(), spread=False)

    def see_logits(self) -> Channel:
        """Watch the logits."""
        self.doubt = Channel("logits", nn.Module(), self, spread=False)
        return self.doubt

    def afresh(self) -> tuple[Channels, dict[Channel, Channel]]:
        """Channels for the same layers, with nothing kept yet and nothing to learn from; and which stands for which."""
        made = Channels(replace(self.settings, detach=True), self.logits)
        made.head = self.head
        made.padding.found, made.padding.warned = self.padding.found, self.padding.warned
        made.layers = {name: channel.afresh(made) for name, channel in self.layers.items()}
        own = {channel: made.layers[name] for name, channel in self.layers.items()}
        if self.doubt is not None:
            made.doubt = own[self.doubt] = self.doubt.afresh(made)
        return made, own

    # ------------------------------------------------------------ hot path

    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], masks: tuple[MaskArgument, ...], begins: bool
    ) -> None:
        """A forward of the root starts, or of a part in its place, which begins a step or belongs to the latest."""
        self.padding.begin(args, kwargs, masks, begins)
        if not begins:
            return
        self.eager = not torch.compiler.is_compiling()
        if self.eager:
            self._order = 0
            self.dropped.clear()
            # Graphs of the forward before are let go here: who calls without a backward pass would gather them.
            for channel in self.layers.values() if not self.settings.detach else ():
                channel.live = []

    def forget(self) -> None:
        """Drop the vectors of the latest forward."""
        self.padding.given = []
        for channel in self._all():
            channel.each, channel.mixed, channel.live = None, None, []
            if channel.stamp is not None:
                channel.stamp.fill_(-1)

    def make_room(self, seen: Channels) -> None:
        """Have room for vectors such as these, since compiled code can make none; and know why others left none."""
        self.uncoded |= seen.uncoded
        for channel, other in zip(self._all(), seen._all(), strict=True):
            if other.buffer is not None:
                samples, width = other.buffer.shape
                channel.room(samples, width, other.buffer.device)

    def _all(self) -> Iterator[Channel]:
        yield from self.layers.values()
        if self.doubt is not None:
            yield self.doubt

    def next_order(self) -> int:
        """Counts the layers of a forward as they run."""
        self._order += 1
        return self._order

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

    # ------------------------------------------------------------ reading

    def kept(self, forwards: int) -> dict[str, Kept]:
        """The vectors of the layers that ran in this forward, the latest, in the order they ran."""
        if not self.eager:
            self.dropped.clear()  # compiled code drops nothing by the host
        ran = {name: kept for name, channel in self.layers.items() if (kept := channel.kept(forwards)) is not None}
        usable = self._unchanged(ran)
        if not usable:
            raise WrongState(
                f"No layer left vectors in the latest forward{self._why()}",
                "a forward to judge",
                "Pass inputs of one length, or Codebook(mask=None) for figures that padding is a part of"
                if ran
                else "Choose layers that can be judged"
                if self.dropped
                else "Run the model, once in eager code before compiling it; paused() and every= leave forwards out, "
                'compiled code does with positions="each"',
            )
        return {name: ran[name] for name in sorted(usable, key=lambda name: self.layers[name].order)}

    def kept_logits(self, forwards: int) -> Tensor | None:
        """What the logits of this forward said [N, 2], see `doubt_of`; None where they were not seen."""
        kept = None if self.doubt is None else self.doubt.kept(forwards)
        return None if kept is None or not self._unchanged(["logits"]) else kept.vectors

    def left(self, forwards: int) -> bool:
        """Whether any layer left vectors in this forward."""
        left = [name for name, channel in self.layers.items() if channel.kept(forwards) is not None]
        return bool(self._unchanged(left))

    def _unchanged(self, ran: Iterable[str]) -> list[str]:
        """Those of the layers that padding did not change, where there was any."""
        changed = self.padding.changes(ran)
        for name in changed:
            self.uncoded[name] = self.dropped[name] = "padding changes its figures"
        return [name for name in ran if name not in changed]

    def take_live(self) -> dict[str, list[Tensor]]:
        """With `detach=False`, what gradients flow through, of each layer's calls; once."""
        live = {name: channel.live for name, channel in self.layers.items()}
        for channel in self.layers.values():
            channel.live = []
        return live

    def widths(self) -> dict[str, int]:
        """How wide the vectors of each layer are, of those that ran."""
        buffers = {name: channel.buffer for name, channel in self.layers.items()}
        return {name: buffer.shape[1] for name, buffer in buffers.items() if buffer is not None}

    def _why(self) -> str:
        name = next(iter(self.uncoded), None)
        return "" if name is None else f" ({name}: {self.uncoded[name]})"
