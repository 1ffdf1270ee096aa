"""Measure variants of one program in turns, and say what was measured on what.

Machines drift: clocks rise and fall, other programs come and go. Variants that take turns in one
process meet the same drift, so each round gives one ratio per variant, and the ratios are steady
where the times are not.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import noesis

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Samples:
    """Seconds per iteration of each variant, one value per round."""

    seconds: dict[str, list[float]]
    inner: int  # iterations per sample


def interleave(
    runs: dict[str, Callable[[], Any]],
    *,
    device: str,
    rounds: int,
    warmup: int = 3,
    seconds: float = 0.02,
    by: str | None = None,
) -> Samples:
    """Run every variant once per round, for `rounds` rounds after `warmup` that are not counted.

    A sample is as many iterations as the first variant (or `by`) needs for `seconds`, with the device idle
    before and after it: what a user waits for, host and device together.
    """
    first = by or next(iter(runs))
    for run in runs.values():  # compile, allocate, fill caches
        sample(run, 1, device)
    inner = max(1, math.ceil(seconds / min(sample(runs[first], 1, device) for _ in range(3))))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with collector_paused() as collect:
        for turn in range(warmup + rounds):
            for name in order(list(runs), turn):
                spent = sample(runs[name], inner, device)
                if turn >= warmup:
                    taken[name].append(spent)
            collect()
    return Samples(taken, inner)


def order(names: list[str], turn: int) -> list[str]:
    """The order of a round: rotated by one each time, and backwards every other time around."""
    at = turn % len(names)
    rotated = names[at:] + names[:at]
    return rotated[::-1] if turn // len(names) % 2 else rotated


def sample(run: Callable[[], Any], inner: int, device: str) -> float:
    """Seconds per iteration, over `inner` iterations."""
    wait(device)
    start = time.perf_counter()
    for _ in range(inner):
        run()
    wait(device)
    return (time.perf_counter() - start) / inner


def wait(device: str) -> None:
    """Until the device has done all it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def collector_paused() -> Iterator[Callable[[], Any]]:
    """No garbage collection inside samples; yields what collects between them."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


# ---------------------------------------------------------------- statistics


def spread(values: list[float]) -> tuple[float, list[float]]:
    """The median and the two quartiles."""
    if len(values) == 1:
        return values[0], [values[0]] * 2
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, [low, high]


def against(samples: dict[str, list[float]], bare: str = "bare") -> dict[str, dict[str, Any]]:
    """Each variant beside the bare one: medians of the rounds' own ratios and differences."""
    told = {}
    for name, values in samples.items():
        pairs = list(zip(values, samples[bare], strict=True))
        seconds, quartiles = spread(values)
        told[name] = {"seconds": seconds, "seconds_quartiles": quartiles}
        if name != bare:
            ratio, ratios = spread([one / other for one, other in pairs])
            added, addeds = spread([one - other for one, other in pairs])
            told[name] |= {
                "ratio": ratio,
                "ratio_quartiles": ratios,
                "overhead_percent": 100 * (ratio - 1),
                "overhead_percent_quartiles": [100 * (value - 1) for value in ratios],
                "added_seconds": added,
                "added_seconds_quartiles": addeds,
            }
    return told


def share(samples: dict[str, list[float]], one: str, other: str, bare: str = "bare") -> dict[str, Any] | None:
    """What `one` adds to the bare variant, as a share of what `other` adds; None where that is not above zero.

    From the medians of what was added. The quartiles are of the rounds' own shares, and left out
    where noise made the other's cost vanish in one of them.
    """
    rounds = list(zip(samples[one], samples[other], samples[bare], strict=True))
    added, others = (statistics.median(values) for values in zip(*((a - c, b - c) for a, b, c in rounds), strict=True))
    if others <= 0:
        return None
    quartiles = spread([(a - c) / (b - c) for a, b, c in rounds])[1] if all(b > c for _, b, c in rounds) else None
    return {"share": added / others, "share_quartiles": quartiles}


# ---------------------------------------------------------------- what it was measured on


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "kind": device,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "triton": version("triton"),
        "noesis": noesis.__version__,
        "python": platform.python_version(),
    }


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def label(device: str) -> str:
    """The device in a file name: `cpu`, or the accelerator's name (`nvidia-h200`)."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def results_file(script: str, subject: str, device: str) -> Path:
    """Where results go by default."""
    return RESULTS / f"{script}-{subject}-{label(device)}.json"


def write(path: Path, script: str, device: str, **found: Any) -> None:
    """Write what was found, with what it was measured on, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"script": script, "machine": machine(device), **found}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here. Take --device cpu, or a machine with one.")
