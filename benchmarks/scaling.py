"""How the cost grows: with the number of layers, with the size of their outputs, and with the steps taken.

    python benchmarks/scaling.py --device cpu

On a stack of layers that do next to nothing, so that what is added is what observing costs. Steps:
the recorder keeps the rows of the last 256 steps; from then on, steps push others out. One variant
runs with a larger ring that never fills, the other with one that is full before it is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import models
import torch
from architectures import Add
from models import Bench, Size
from timing import against, check_device, interleave, results_file, spread, write

import noesis

LAYERS = (1, 4, 16, 64, 256, 1024)
CAPACITY = 256  # steps; what wrap takes by default
NEVER_FULL = 1 << 16  # steps times layers


def cost(device: str, depth: int, output: str, rounds: int, seconds: float) -> dict[str, Any]:
    """What noesis adds to a stack of this depth."""
    bench = models.build("stack", device, Size(depth=depth, output=output))
    observed = models.shared_copy(bench.module)
    noesis.wrap(observed, layers=Add)
    runs = {"bare": bench.step(bench.module), "noesis": bench.step(observed)}
    told = against(interleave(runs, device=device, rounds=rounds, seconds=seconds).seconds)["noesis"]
    low, high = told["added_seconds_quartiles"]
    case = {"layers": depth, "output": output, "added_us": told["added_seconds"] * 1e6}
    case["added_us_per_layer"] = case["added_us"] / depth
    case["added_us_per_layer_quartiles"] = [low / depth * 1e6, high / depth * 1e6]
    each = case["added_us_per_layer"]
    print(f"{depth:>5} layers x {output:>6}: {case['added_us']:>10.1f} us a step, {each:>8.1f} a layer", flush=True)
    return case


def ring(device: str, depth: int, rounds: int) -> dict[str, Any]:
    """What a step costs before and after the ring is full."""
    bench: Bench = models.build("stack", device, Size(depth=depth, output="4 KB"))
    runs = {"bare": bench.step(bench.module)}
    wrapped = {}
    for name, capacity in (("filling", NEVER_FULL // depth), ("full", CAPACITY)):
        observed = models.shared_copy(bench.module)
        wrapped[name] = noesis.wrap(observed, layers=Add, capacity=capacity)
        runs[name] = bench.step(observed)
    for _ in range(CAPACITY):
        runs["full"]()
    samples = interleave(runs, device=device, rounds=rounds, seconds=0.002).seconds
    if wrapped["filling"].trace().dropped_steps:
        raise RuntimeError("the ring that was never to be full was: raise NEVER_FULL")
    pairs = zip(samples["full"], samples["filling"], strict=True)
    extra, quartiles = spread([(full - filling) * 1e6 for full, filling in pairs])
    told = against(samples)
    case = {
        "layers": depth,
        "filling_us": told["filling"]["added_seconds"] * 1e6,
        "full_us": told["full"]["added_seconds"] * 1e6,
        "extra_us": extra,
        "extra_us_quartiles": quartiles,
    }
    print(
        f"{depth:>5} layers: {case['filling_us']:.1f} us a step while the ring fills, "
        f"{case['full_us']:.1f} once it is full ({extra:+.1f})"
    )
    return case


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--output", nargs="+", default=list(models.OUTPUTS), choices=tuple(models.OUTPUTS))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of a sample of the bare stack")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    common = (options.rounds, options.seconds)
    found = {
        "by_layers": [cost(options.device, depth, "4 KB", *common) for depth in options.layers],
        "by_output": [cost(options.device, 8, output, *common) for output in options.output],
        "by_steps": [ring(options.device, depth, options.rounds) for depth in options.layers if depth <= 256],
    }
    path = options.json or results_file("scaling", "stack", options.device)
    write(path, "scaling", options.device, **found)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
