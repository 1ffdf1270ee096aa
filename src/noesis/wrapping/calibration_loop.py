"""Running a model over calibration data, and keeping what its layers leave."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import BadType, BadValue
from ..observing import Channels, Recorder
from ..surprise import Collection, Scorer
from .padding_check import PaddingCheck

# ---------------------------------------------------------------- the loop


def collect(
    model: nn.Module,
    root: nn.Module,
    recorder: Recorder,
    channels: Channels,
    scorer: Scorer,
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
    device = next((tensor.device for tensor in root.parameters()), torch.device("cpu"))
    with (
        evaluating(root),
        torch.no_grad(),
        eager(),
        recorder.off_the_record() as seen,
        seen.channels.padding.calibrating() as padding,
    ):
        collection, check = Collection(scorer, seen.channels.uncoded), PaddingCheck(root, seen.channels)
        for batch in bar(loader, progress):
            before, moved = seen.forwards, moved_to(batch, device)
            if forward is not None:
                forward(model, moved)
            else:
                run(model, moved)
            forwards = seen.forwards
            if forwards != before + 1:
                raise BadValue(
                    f"A batch for which the model ran {forwards - before} times",
                    "one forward of the whole batch for each batch of the loader",
                    "Leave batches out in the loader, and have forward= call the model once",
                )
            args, kwargs = padding.call
            if check.look(args, kwargs):  # layers leave others now
                root(*args, **kwargs)
                forwards = seen.forwards
            known = labels_of(batch) if labels else None
            collection.add(seen.channels.kept(forwards), seen.channels.kept_logits(forwards), known)
        channels.make_room(seen.channels)
        collection.padding = padding.found
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
    """The batches, with tqdm's progress bar where it is installed and somebody looks: at a terminal or a notebook."""
    if not progress:
        return loader
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a notebook lacks ipywidgets: the bar is one of text then
            from tqdm.auto import tqdm
    except ImportError:
        return loader
    hidden = False if "ipykernel.zmqshell" in sys.modules else None  # a notebook's stderr is no terminal
    shown: Iterable[Any] = tqdm(loader, desc="calibrating", disable=hidden, leave=False)
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
