"""A long run with observing on: memory stays flat, totals stay exact, the ring does what it says.

    python benchmarks/soak.py --device cuda
    python benchmarks/soak.py --device cpu --steps 20000

A small model runs on a few batches, drawn by chance, over and over. What a batch gives is known, so the truth of the
whole run is a sum of known numbers, each times how often its batch came: exact, at no cost per step. Two errors are
told apart: of the totals against the rows that they were merged from, where accumulating would drift, and against
the outputs themselves in float64, where the rows' float32 shows as well.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import RESULTS, check_device, label, wait, write
from torch import Tensor, nn

import noesis

STEPS = 200_000
BATCHES = 24
POINTS = 10
CAPACITY = 256
#: Steps by variant, as a share of all: those that keep more per step are run for less long.
VARIANTS = {"plain": 1.0, "per-sample": 0.25, "codebook": 0.25}
STATS = ("count", "mean", "std", "abs_mean", "min", "max", "nonfinite")


@dataclass(frozen=True)
class Known:
    """What a batch gives, layer by layer: exact sums, as fractions."""

    count: int
    nonfinite: int
    mean: Fraction
    square: Fraction  # sum of the squared distances from the mean
    abs_sum: Fraction
    low: float
    high: float
    std: float  # unbiased, as a soulprint averages it


def model(device: str) -> nn.Sequential:
    """Three layers; the second has many zeros, the last a mean far from zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    nn.init.constant_(net[2].bias, 1e3)
    return net.to(device).eval()


def batches(device: str, strange: bool) -> list[Tensor]:
    """Of several sizes and scales; the last with NaN and infinity."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(1 + number % 8, 16, generator=generator) * 2.0 ** (number % 5) for number in range(BATCHES)]
    if strange:
        made[-1][0, 0], made[-1][-1, 1] = math.nan, math.inf
    return [batch.to(device) for batch in made]


def soak(
    steps: int, *, device: str = "cpu", variant: str = "plain", capacity: int = CAPACITY, points: int = POINTS
) -> dict[str, Any]:
    """Run so many steps, look at `points` of them, and tell what was found; nothing is judged here."""
    net, inputs = model(device), batches(device, strange=variant != "codebook")
    truth = truths([outputs_of(net, x) for x in inputs], samples=variant == "per-sample")
    sizes = np.array([len(x) for x in inputs])
    scored = variant == "codebook"
    wrapped = noesis.wrap(
        net,
        layers="all",
        capacity=capacity,
        per_sample=variant == "per-sample",
        codebook=noesis.Codebook(size=4, dim=4) if scored else None,
    )
    if scored:
        wrapped.calibrate([torch.randn(100, 16, device=device) for _ in range(3)], progress=False)
    order = np.random.default_rng(2).integers(0, BATCHES, steps)
    order[:BATCHES] = np.arange(BATCHES)
    first = [scores(wrapped, x) for x in inputs] if scored else []
    wrapped.reset()
    found, done = [], 0
    with torch.inference_mode():
        for point in range(1, points + 1):
            until = steps * point // points
            start = time.perf_counter()
            for number in order[done:until].tolist():
                wrapped(inputs[number])
            wait(device)
            seconds = time.perf_counter() - start
            told = {"steps": until, "us_per_step": 1e6 * seconds / (until - done)}
            done = until
            if scored:
                last = wrapped.surprise().score
                told["scores_equal"] = bool(np.array_equal(last, first[order[done - 1]]))
            told |= judged(wrapped.trace(), truth, sizes[order[:done]], order[:done], capacity)
            gc.collect()
            told |= memory(device)
            found.append(told)
    return {"variant": variant, "steps": steps, "capacity": capacity, "batches": BATCHES, "points": found}


def outputs_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What each layer returns for a batch, without noesis, on the host."""
    found = []
    with torch.inference_mode():
        for layer in net:
            x = layer(x)
            found.append(x.double().cpu())
    return found


def scores(wrapped: noesis.Wrapped, x: Tensor) -> Any:
    """How strange a batch is."""
    with torch.inference_mode():
        wrapped(x)
    return wrapped.surprise().score


def memory(device: str) -> dict[str, int]:
    """Bytes that this process has in memory, and on the device."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    told = {"rss_bytes": pages * 4096}
    if device == "cuda":
        told |= {"cuda_bytes": torch.cuda.memory_allocated(), "cuda_peak_bytes": torch.cuda.max_memory_allocated()}
    return told


# ---------------------------------------------------------------- the truth


def known(values: Any) -> Known:
    """Of float64 values, exactly."""
    values = np.asarray(values, np.float64).ravel()
    finite = values[np.isfinite(values)]
    exact = [Fraction(float(value)) for value in finite]
    mean = sum(exact, Fraction()) / max(1, len(exact))
    square = sum(((value - mean) ** 2 for value in exact), Fraction())
    return Known(
        count=len(exact),
        nonfinite=len(values) - len(exact),
        mean=mean,
        square=square,
        abs_sum=sum((abs(value) for value in exact), Fraction()),
        low=float(finite.min(initial=math.inf)),
        high=float(finite.max(initial=-math.inf)),
        std=math.sqrt(square / max(1, len(exact) - 1)),
    )


def known_row(row: Any) -> Known:
    """Of what a trace says of a layer in a step: in the order of STATS."""
    count, mean, std, abs_mean, low, high, nonfinite = (float(value) for value in row)
    if not count:
        return Known(0, int(nonfinite), Fraction(), Fraction(), Fraction(), math.inf, -math.inf, 0.0)
    square = Fraction(std) ** 2 * (Fraction(count) - 1)
    return Known(int(count), int(nonfinite), Fraction(mean), square, Fraction(abs_mean) * int(count), low, high, std)


def merged(parts: list[Known], times: list[int]) -> tuple[list[float], list[float]]:
    """Totals and averages of a layer over steps, each of which came so many times."""
    ran = [(part, n) for part, n in zip(parts, times, strict=True) if n]
    count = sum(part.count * n for part, n in ran)
    nonfinite = sum(part.nonfinite * n for part, n in ran)
    ran = [(part, n) for part, n in ran if part.count]
    if not count:
        return [0.0, *[math.nan] * 5, float(nonfinite)], [0.0] * 3
    mean = sum((part.mean * part.count * n for part, n in ran), Fraction()) / count
    square = sum(((part.square + part.count * (part.mean - mean) ** 2) * n for part, n in ran), Fraction())
    totals = [
        float(count),
        float(mean),
        math.sqrt(square / max(1, count - 1)),
        float(sum((part.abs_sum * n for part, n in ran), Fraction()) / count),
        min(part.low for part, _ in ran),
        max(part.high for part, _ in ran),
        float(nonfinite),
    ]
    stds = sum((Fraction(part.std) * n for part, n in ran), Fraction())
    averages = [float(sum(n for _, n in ran)), float(sum((part.mean * n for part, n in ran), Fraction())), float(stds)]
    return totals, averages


def truths(outputs: list[list[Tensor]], samples: bool) -> list[list[list[Known]]]:
    """What each batch gives [layers, batches], of the whole batch, and if asked of each place in it."""
    layers = range(len(outputs[0]))
    found = [[[known(of[layer]) for of in outputs] for layer in layers]]
    places = range(max(len(of[0]) for of in outputs) if samples else 0)
    return found + [[[known(of[layer][at : at + 1]) for of in outputs] for layer in layers] for at in places]


def judged(
    trace: noesis.Trace, truth: list[list[list[Known]]], sizes: Any, order: Any, capacity: int
) -> dict[str, Any]:
    """How far the totals of a trace are from the truth, and whether the ring holds what it should."""
    steps = len(order)
    held = np.arange(max(0, steps - capacity), steps)
    told: dict[str, Any] = {
        "dropped_steps": trace.dropped_steps,
        "held_steps": len(trace),
        "ring_as_documented": bool(
            trace.dropped_steps == max(0, steps - capacity)
            and np.array_equal(trace.steps, held)
            and np.array_equal(trace.batches, sizes[held])
        ),
    }
    times = np.bincount(order, minlength=BATCHES).tolist()
    at = {number: row for row, number in enumerate(order[held].tolist())}  # the last time that each batch came
    all_held = len(at) == sum(n > 0 for n in times)
    worst = {"counts": 0.0, "against_outputs": 0.0}
    if all_held:  # otherwise the ring lacks the rows of a batch at the moment
        worst |= {"against_rows": 0.0, "averages": 0.0}
    for each, layers in zip([trace, *trace.samples], truth, strict=True):
        for layer, batches_of_layer in enumerate(layers):
            got, sums = each.totals[layer], each.averages[layer]
            expected, expected_sums = merged(batches_of_layer, times)
            counts = [abs(got[place] - expected[place]) for place in map(STATS.index, ("count", "nonfinite"))]
            worst["counts"] = max(worst["counts"], *counts, abs(sums[0] - expected_sums[0]))
            worst["against_outputs"] = max(worst["against_outputs"], difference(got, expected))
            if all_held:
                stored = [known_row(each.values[row, layer]) for row in at.values()]
                expected, expected_sums = merged(stored, [times[number] for number in at])
                worst["against_rows"] = max(worst["against_rows"], difference(got, expected))
                off = [abs(one - two) / max(1.0, abs(two)) for one, two in zip(sums, expected_sums, strict=True)]
                worst["averages"] = max(worst["averages"], *off)
    return told | {f"error_{name}": value for name, value in worst.items()}


def difference(got: Any, expected: list[float]) -> float:
    """The largest difference of what is no count, relative to the largest element."""
    size = max(abs(expected[STATS.index("min")]), abs(expected[STATS.index("max")]))
    places = [STATS.index(name) for name in ("mean", "std", "abs_mean", "min", "max")]
    return max((abs(float(got[place]) - expected[place]) / size for place in places), default=0.0)


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write the JSON after each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=STEPS, help="of the plain variant; the others run for a quarter")
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=tuple(VARIANTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_device(options.device)
    torch.set_num_threads(1)
    path = options.json or RESULTS / f"soak-{label(options.device)}.json"
    cases = []
    for variant in options.variant:
        case = soak(int(options.steps * VARIANTS[variant]), device=options.device, variant=variant)
        cases.append(case)
        for point in case["points"]:
            on_device = f", {point['cuda_bytes'] / 1e6:.3f} MB on the device" if "cuda_bytes" in point else ""
            print(
                f"{variant} {point['steps']:>7}: {point['rss_bytes'] / 1e6:.2f} MB{on_device}, "
                f"{point['us_per_step']:.0f} us a step, counts off by {point['error_counts']:g}, totals by "
                f"{point['error_against_rows']:.1e} of the rows and {point['error_against_outputs']:.1e} of the truth",
                flush=True,
            )
        write(path, "soak", options.device, cases=cases)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
