"""How the cost grows: with the number of layers, with the size of their outputs, and with the steps taken.

    python benchmarks/scaling.py --device cpu
    python benchmarks/scaling.py --ranks 8 64 1024    # what merging the traces of so many ranks costs, alone

On a stack of layers that do next to nothing, so that what is added is what observing costs. Steps:
the recorder keeps the rows of the last 256 steps; from then on, steps push others out. One variant
runs with a larger ring that never fills, the other with one that is full before it is timed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from architectures import Add
from models import Bench, Size
from timing import against, check_device, interleave, results_file, spread, write

import noesis
from noesis.distributed import merge
from noesis.distributed.traces import PIECE
from noesis.kernels.layout import FIELDS
from noesis.kernels.rows import combine
from noesis.results import ALWAYS, fields_of

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


def merging(ranks: int, layers: int, steps: int) -> dict[str, Any]:
    """What merging the traces of so many ranks costs, all on this machine, and what a rank would send and do."""
    rng = np.random.default_rng(0)
    few = [_trace(rng, layers, steps) for _ in range(min(ranks, 8))]
    traces = [few[rank % len(few)] for rank in range(ranks)]  # as many rows as ranks have, without their memory
    start = time.perf_counter()
    whole = merge(traces)
    seconds = time.perf_counter() - start
    if not np.array_equal(whole["count"], sum(trace["count"] for trace in traces)):
        raise RuntimeError("elements were lost in merging")
    # What is left to each rank when its own rows have been put in their places and all ranks' have arrived.
    row = len(FIELDS) * 8
    each = max(1, PIECE // (ranks * layers * row))
    parts = np.stack([fields_of(trace.values[:each], trace.stats) for trace in traces])
    start = time.perf_counter()
    combine(parts)
    pieces = (time.perf_counter() - start) * steps / parts.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        case = {
            "ranks": ranks,
            "layers": layers,
            "steps": steps,
            "merge_seconds": seconds,
            "combine_seconds": pieces,
            "sent_bytes_per_rank": steps * layers * row,
            "held_bytes": parts.nbytes,
            "file_bytes_per_rank": traces[0].save(Path(folder) / "rank.safetensors").stat().st_size,
            "file_bytes_merged": whole.save(Path(folder) / "merged.safetensors").stat().st_size,
        }
    print(
        f"{ranks:>5} ranks x {layers} layers x {steps} steps: {seconds:.2f} s to merge here, {pieces:.2f} s on each "
        f"rank once {case['sent_bytes_per_rank'] / 1e6:.2f} MB of each have arrived",
        flush=True,
    )
    return case


def _trace(rng: np.random.Generator, layers: int, steps: int) -> noesis.Trace:
    """The trace of a rank, of random rows."""
    values = np.abs(rng.normal(size=(steps, layers, len(ALWAYS))))
    values[..., ALWAYS.index("count")] = rng.integers(1, 1 << 30, (steps, layers))
    values[..., ALWAYS.index("nonfinite")] = 0
    names = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    return noesis.Trace.of(values, names, ALWAYS, steps=np.arange(steps))


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--output", nargs="+", default=list(models.OUTPUTS), choices=tuple(models.OUTPUTS))
    parser.add_argument("--ranks", type=int, nargs="+", help="merge the traces of so many ranks, and nothing else")
    parser.add_argument("--depth", type=int, nargs="+", default=(32, 100), help="layers of these traces")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of a sample of the bare stack")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    if options.ranks:
        merged = [merging(ranks, depth, CAPACITY) for ranks in options.ranks for depth in options.depth]
        path = options.json or results_file("scaling", "ranks", options.device)
        write(path, "scaling", options.device, by_ranks=merged)
        print(f"wrote {path}")
        return
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
