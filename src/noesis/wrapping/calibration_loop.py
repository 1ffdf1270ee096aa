"""Running a model over calibration data, and keeping what its layers leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import BadType, BadValue, WrongState
from ..observing.recorder import Recorder
from ..surprise.calibration import Calibration
from ..surprise.scorer import Coder, Collected, Kept

#: Calibration keeps at most so many samples, and at most so many bytes of vectors; of more, a random choice.
MOST_SAMPLES = 20_000
MOST_BYTES = 1 << 30


class Reservoir:
    """A uniform choice of samples from a stream of unknown length (Vitter 1985, algorithm R).

    Example:
        >>> import numpy as np
        >>> from noesis.wrapping.calibration_loop import Reservoir
        >>> reservoir = Reservoir(3, np.random.default_rng(0))
        >>> [len(reservoir.places(4)), reservoir.seen, reservoir.held]
        [4, 4, 3]
    """

    def __init__(self, room: int, generator: np.random.Generator) -> None:
        self.room = room
        self.generator = generator
        self.seen = 0

    @property
    def held(self) -> int:
        """Samples that are kept."""
        return min(self.seen, self.room)

    def places(self, samples: int) -> NDArray[np.int64]:
        """Where the next samples go; -1 for those that are not kept."""
        number = np.arange(self.seen, self.seen + samples)
        drawn = self.generator.integers(0, number + 1)
        self.seen += samples
        return np.where(number < self.room, number, np.where(drawn < self.room, drawn, -1))


class Store:
    """Rows of one kind, at the places the reservoir gave them; grows by doubling."""

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None
        self.length = 0

    def put(self, places: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write rows [N, ...] to their places; rows of several positions may differ in their number."""
        places, rows = places[places >= 0], rows[places >= 0]
        if not len(places):
            return
        self.length = max(self.length, int(places.max()) + 1)
        held = np.zeros((0, *rows.shape[1:]), rows.dtype) if self.array is None else self.array
        if rows.ndim == 2 and rows.shape[1] != held.shape[1]:
            raise BadValue(
                f"Vectors of {held.shape[1]} and of {rows.shape[1]} numbers in one layer",
                "outputs of one width",
                "Leave the layer out, or pass inputs of one size",
            )
        if rows.ndim > 2:
            longest = max(held.shape[1], rows.shape[1])
            held, rows = _longer(held, longest), _longer(rows, longest)
        if self.length > len(held):
            room = max(self.length, 2 * len(held))
            held = np.concatenate([held, np.zeros((room - len(held), *held.shape[1:]), held.dtype)])
        held[places] = rows  # of two rows for one place the later one stays
        self.array = held

    def rows(self) -> NDArray[Any]:
        """All of them."""
        assert self.array is not None
        return self.array[: self.length]


class Collection:
    """The vectors of all layers over a calibration set, on the host and within bounds."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.reservoir: Reservoir | None = None
        self.values: dict[str, Store] = {}
        self.counts: dict[str, Store] = {}
        self.ran: dict[str, int] = {}
        self.logits: Store | None = None
        self.judged = 0  # samples with logits
        self.labels: Store | None = None

    @property
    def seen(self) -> int:
        """Samples so far, those that are not kept included."""
        return 0 if self.reservoir is None else self.reservoir.seen

    def add(self, kept: dict[str, Kept], logits: Tensor | None, labels: NDArray[np.int64] | None) -> None:
        """Take what a forward left."""
        batch = max(len(found.vectors) for found in kept.values())
        if labels is not None and len(labels) != batch:
            raise BadValue(f"{len(labels)} labels for {batch} samples", "a label per sample", "Check the loader")
        if self.reservoir is None:
            each = sum(self.coder.settings.most_positions if found.each is not None else 1 for found in kept.values())
            size = 4 * sum(found.vectors[0].numel() for found in kept.values()) * each // len(kept)
            room = max(1, min(MOST_SAMPLES, MOST_BYTES // max(size, 1)))
            self.reservoir = Reservoir(room, np.random.default_rng(self.coder.settings.seed))
        places = self.reservoir.places(batch)
        for name, found in kept.items():
            self.ran[name] = self.ran.get(name, 0) + len(found.vectors)
            if len(found.vectors) != batch:
                continue
            values = found.vectors if found.each is None else found.each
            self.values.setdefault(name, Store()).put(places, values.cpu().numpy())
            if found.each is not None:
                counts = torch.ones(found.each.shape[:2]) if found.counts is None else found.counts
                self.counts.setdefault(name, Store()).put(places, counts[..., None].bool().cpu().numpy())
        if logits is not None and len(logits) == batch:
            self.judged += batch
            self.logits = self.logits or Store()
            self.logits.put(places, logits.double().cpu().numpy())
        if labels is not None:
            self.labels = self.labels or Store()
            self.labels.put(places, labels)

    def vectors(self) -> dict[str, Collected]:
        """By layer in the order they run; layers that did not run for every sample are left out, by name.

        Raises:
            NoesisError: when there are no samples, or no layer is left.
        """
        if not self.seen:
            raise BadValue(
                "The loader is empty", "batches of normal inputs", "Check the loader; a generator runs only once"
            )
        whole = [name for name, samples in self.ran.items() if samples == self.seen]
        reasons = {name: "not every forward ran it with every sample" for name in self.ran if name not in whole}
        reasons.update({name: "it never ran" for name in self.coder.channels if name not in self.ran})
        reasons.update({name: why for name, why in self.coder.uncoded.items() if name in reasons})
        for name, reason in reasons.items():
            logger.warning("{} is left out of the calibration: {}", name, reason)
        if not whole:
            raise WrongState(
                "No layer can be calibrated: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()),
                "layers that run in every forward, with the samples along the first dimension of their outputs",
                "Choose others with layers=",
            )
        return {name: self._collected(name) for name in whole}

    def fit(self, by_class: bool) -> Calibration:
        """Calibrate on what was collected.

        Raises:
            NoesisError: when there are too few samples, or logits are to be seen and did not come with each.
        """
        vectors = self.vectors()
        if self.coder.doubt is not None and self.judged != self.seen:
            why = self.coder.uncoded.get(self.coder.doubt.name, "the module that gives them did not run")
            raise WrongState(
                f"There are logits of {self.judged} of {self.seen} samples: {why}",
                "logits in every forward",
                "Correct logits=, or leave it out",
            )
        return self.coder.calibrate(
            vectors,
            None if self.logits is None else self.logits.rows(),
            None if self.labels is None else self.labels.rows(),
            by_class,
        )

    def _collected(self, name: str) -> Collected:
        counts = self.counts.get(name)
        return Collected(self.values[name].rows(), None if counts is None else counts.rows()[..., 0])


def _longer(rows: NDArray[Any], positions: int) -> NDArray[Any]:
    missing = positions - rows.shape[1]
    return np.pad(rows, [(0, 0), (0, missing), *[(0, 0)] * (rows.ndim - 2)]) if missing else rows


# ---------------------------------------------------------------- the loop


def collect(
    model: nn.Module,
    root: nn.Module,
    recorder: Recorder,
    coder: Coder,
    loader: Iterable[Any],
    *,
    labels: bool,
    progress: bool,
    forward: Callable[[Any, Any], Any] | None,
) -> Collection:
    """Run the model over a loader in eval mode, without gradients, and keep what its layers leave."""
    if not isinstance(loader, Iterable):
        raise BadType(f"calibrate({type(loader).__name__})", "an iterable of batches", "Pass a DataLoader, or a list")
    if isinstance(loader, (Tensor, Mapping, str)):
        raise BadType(
            f"calibrate({type(loader).__name__})", "an iterable of batches", "Pass [batch] for a single batch"
        )
    collection = Collection(coder)
    device = next((tensor.device for tensor in root.parameters()), torch.device("cpu"))
    with evaluating(root), torch.no_grad(), eager(), recorder.no_mark():
        for batch in bar(loader, progress):
            before, moved = recorder.aside_forwards, moved_to(batch, device)
            if forward is not None:
                forward(model, moved)
            else:
                run(model, moved)
            forwards = recorder.aside_forwards
            if forwards != before + 1:
                raise BadValue(
                    f"A batch for which the model ran {forwards - before} times",
                    "one forward of the whole batch for each batch of the loader",
                    "Leave batches out in the loader, and have forward= call the model once",
                )
            kept = coder.kept(forwards)
            doubt = None if coder.doubt is None else coder.doubt.kept(forwards)
            known = labels_of(batch) if labels else None
            collection.add(kept, None if doubt is None else doubt.vectors, known)
    return collection


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch as loaders give it: inputs alone, (inputs, labels), or arguments by name.

    Raises:
        NoesisError: for a batch of another kind.
    """
    if isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 2:
            raise _odd_batch(batch)
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise _odd_batch(batch)


def labels_of(batch: Any) -> NDArray[np.int64]:
    """The labels of a batch: the second of a pair, or the entry `labels` or `label`.

    Raises:
        NoesisError: when there are none, or they are no class numbers.
    """
    found = None
    if isinstance(batch, Mapping):
        found = batch.get("labels", batch.get("label"))
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = batch[1]
    if isinstance(found, Tensor):
        found = found.cpu().float() if found.dtype == torch.bfloat16 else found.cpu()
    values = None if found is None else np.asarray(found)
    if values is None or values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise BadValue(
            "labels=True, and a batch "
            + ("without labels" if values is None else f"with labels {values.dtype} {values.shape}"),
            "pairs (inputs, labels), or dicts with the entry labels: one class number per sample",
            "Leave labels out; they are not needed",
        )
    return values.astype(np.int64)


def _odd_batch(batch: Any) -> BadType:
    length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return BadType(
        f"A batch is a {type(batch).__name__}{length}",
        "a tensor, a pair (inputs, labels), or a dict of arguments",
        "Pass calibrate(..., forward=lambda model, batch: model(...))",
    )


def moved_to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved_to(value, device) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(moved_to(value, device) for value in batch)
    return batch


def bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The batches, with tqdm's progress bar where it is installed and somebody looks."""
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    shown: Iterable[Any] = tqdm(loader, desc="calibrating", disable=None, leave=False)
    return shown


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in."""
    before = {module: module.training for module in root.modules()}
    try:
        root.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def eager() -> Iterator[None]:
    """Compiled modules run as they are written; what they leave is then the host's to read."""
    # Importing Dynamo costs a second, and without it nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
