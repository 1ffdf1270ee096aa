"""What codebooks cost: calibrating a classifier, and a step of a feed-forward model, nervecode's beside them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from peers import UnsuitableError
from timing import against, interleave, share, version
from torch import nn

import noesis

from .detector import batches
from .sets import DATA, case

CODES, DIM = 16, 8  # of the feed-forward model's layers, and of nervecode's


def calibrating(*, rounds: int, data: Path = DATA) -> dict[str, Any]:
    """ResNet-20 over its 3,000 calibration images: bare forward passes, and `calibrate`."""
    found = case(1, data=data)
    inputs = batches(found, found.fit)
    wrapped = noesis.wrap(
        models.shared_copy(found.model), layers="blocks", codebook=noesis.Codebook(), logits=found.logits
    )
    bare = models.shared_copy(found.model)

    @torch.no_grad()
    def forwards() -> None:
        for batch in inputs:
            bare(batch)

    runs = {"bare": forwards, "calibrate": lambda: wrapped.calibrate(inputs, progress=False)}
    samples = interleave(runs, device="cpu", rounds=rounds, warmup=1, seconds=0)
    return {"inputs": len(found.fit), "rounds": rounds, "variants": against(samples.seconds)}


def stepping(*, rounds: int, seconds: float = 0.02, size: models.Size | None = None) -> dict[str, Any]:
    """A step of the feed-forward model with codebooks on all linear layers.

    Variants: statistics alone; codebooks, which statistics come with; the same and `surprise()` after every step;
    nervecode's wrappers on the same layers, and the same and its aggregated surprise after every step.
    """
    bench = models.build("ffn", "cpu", size)
    linear = bench.layers["matrices"]
    observed = {name: models.shared_copy(bench.module) for name in ("statistics", "codebooks", "surprise")}
    settings = {"layers": linear, "codebook": noesis.Codebook(size=CODES, dim=DIM)}
    noesis.wrap(observed["statistics"], layers=linear)
    wraps = {name: noesis.wrap(observed[name], **settings) for name in ("codebooks", "surprise")}
    for wrapped in wraps.values():
        calibrate(wrapped, bench)
    runs = {"bare": bench.step(models.shared_copy(bench.module))}
    runs |= {name: bench.step(module) for name, module in observed.items()}
    runs["surprise"] = then(runs["surprise"], wraps["surprise"].surprise)
    refused = None
    try:
        runs |= nervecode_steps(bench)
    except UnsuitableError as error:
        refused = str(error)
    samples = interleave(runs, device="cpu", rounds=rounds, seconds=seconds)
    told = against(samples.seconds)
    for ours, theirs in (("codebooks", "nervecode"), ("surprise", "nervecode surprise")):
        if theirs in told:
            told[ours]["share_of_nervecode"] = share(samples.seconds, ours, theirs)
    return {
        "sizes": bench.sizes,
        "layers": len(wraps["codebooks"].layers),
        "codes": CODES,
        "dim": DIM,
        "rounds": rounds,
        "inner": samples.inner,
        "nervecode": refused or version("nervecode"),
        "variants": told,
    }


def calibrate(wrapped: noesis.Wrapped, bench: models.Bench) -> None:
    """Give a wrap of the feed-forward model codebooks, from random inputs of its own size."""
    batch, tokens = bench.sizes["batch"], bench.sizes["tokens"]
    generator = torch.Generator().manual_seed(0)
    count = -(-128 // batch)
    inputs = (torch.randn(batch, tokens, 768, generator=generator) for _ in range(count))
    wrapped.calibrate(inputs, progress=False)


def nervecode_steps(bench: models.Bench) -> dict[str, models.Step]:
    """Steps of copies whose linear layers are nervecode's wrappers.

    Raises:
        UnsuitableError: where it is not installed.
    """
    if version("nervecode") is None:
        raise UnsuitableError("not installed: pip install -e '.[benchmark]'")
    nervecode, layers, scoring = (
        importlib.import_module(name) for name in ("nervecode", "nervecode.layers.wrap", "nervecode.scoring")
    )

    def wrapped() -> nn.Module:
        copy = models.shared_copy(bench.module)
        return layers.wrap(copy, layers="all_linear", K=CODES, coding_dim=DIM)

    whole = nervecode.WrappedModel(wrapped())
    last: dict[str, Any] = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        output, last["traces"] = whole.forward_with_trace(x)
        return output

    return {
        "nervecode": bench.step(wrapped()),
        "nervecode surprise": then(bench.step(forward), lambda: scoring.mean_surprise(last["traces"])),
    }


def then(step: Callable[[], Any], read: Callable[[], Any]) -> Callable[[], Any]:
    """A step, and reading what it left."""

    def run() -> Any:
        step()
        return read()

    return run
