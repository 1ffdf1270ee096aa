"""Bandwidth of the moments kernel against a copy on the same device, in turns, from 4 KB to 4 GB.

    python benchmarks/kernel.py --device cuda
    python benchmarks/kernel.py --device cpu --max-bytes 64M

The kernel reads a tensor once; the copy reads and writes it, and both bytes are counted. `cold`:
the cache is overwritten before each sample. `warm`: the tensor was just used, as a layer's output
is. On CUDA the times are of the device alone, by events, with the launches queued while it sleeps;
`host_us` is what one launch costs the host.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import check_device, collector_paused, results_file, spread, write
from torch import Tensor, nn

import noesis
from noesis.observing import site_of

CALLS = 50  # at most, in a sample


def observers(device: str) -> tuple[list[Callable[[Tensor], None]], noesis.Wrapped]:
    """What is measured, one observation of an output for each of some layers, and where it is recorded."""
    wrapped = noesis.wrap(nn.Sequential(*(nn.Linear(1, 1) for _ in range(CALLS + 1))).to(device), layers="linear")
    return [site_of(layer).observe for layer in wrapped.observed_model], wrapped


SIZES = {
    "4 KB": 4 << 10,
    "16 KB": 16 << 10,
    "64 KB": 64 << 10,
    "256 KB": 256 << 10,
    "1 MB": 1 << 20,
    "4 MB": 4 << 20,
    "16 MB": 16 << 20,
    "64 MB": 64 << 20,
    "256 MB": 256 << 20,
    "512 MB": 512 << 20,
    "1 GB": 1 << 30,
    "4 GB": 4 << 30,
}
FLUSH = 256 << 20  # bytes; more than any last-level cache
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def measure(nbytes: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Seconds and bandwidth of the kernel and of the copy, cold and warm."""
    x = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
    for piece in x.split(1 << 26):
        piece.normal_()
    out, flush = torch.empty_like(x), torch.empty(FLUSH, dtype=torch.uint8, device=device)
    (*looks, spare), wrapped = observers(device)
    calls = {"kernel": [partial(look, x) for look in looks], "copy": [partial(out.copy_, x)] * CALLS}
    tiny = x[:1].clone()
    moved = {"kernel": nbytes, "copy": 2 * nbytes}
    case: dict[str, Any] = {"bytes": nbytes, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
    case["threads"] = torch.get_num_threads() if device == "cpu" else None
    case["host_us"] = host_us(calls["kernel"], wrapped) if device == "cuda" else None
    time_calls = device_seconds if device == "cuda" else host_seconds
    for cache in ("cold", "warm"):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        inner = 1 if cache == "cold" else max(1, min(CALLS, (64 << 20) // nbytes))
        with collector_paused():
            for turn in range(rounds + 2):
                wrapped.reset()  # each layer's first call of a step, as in most models: later ones are merged
                for name in calls:
                    if cache == "cold":
                        flush.zero_()
                        spare(tiny)  # brings the code back, not the tensor
                    else:
                        out.copy_(x)
                    spent = time_calls(calls[name][:inner])
                    if turn >= 2:
                        taken[name].append(spent)
        case[cache] = bandwidths(taken, moved)
    if wrapped.trace()["count"][-1, 0] != x.numel():
        raise RuntimeError("the kernel recorded something else: what was measured is not the observing")
    return case


def bandwidths(taken: dict[str, list[float]], moved: dict[str, int]) -> dict[str, Any]:
    """GB/s of each, and the kernel's as a share of the copy's, round by round."""
    told: dict[str, Any] = {}
    rates = {name: [moved[name] / seconds / 1e9 for seconds in values] for name, values in taken.items()}
    for name, values in rates.items():
        middle, quartiles = spread(values)
        told[name] = {"us": spread(taken[name])[0] * 1e6, "gb_per_s": middle, "gb_per_s_quartiles": quartiles}
    shares = [one / other for one, other in zip(rates["kernel"], rates["copy"], strict=True)]
    told["share_of_copy"], told["share_of_copy_quartiles"] = spread(shares)
    return told


def device_seconds(calls: list[Callable[[], Any]]) -> float:
    """Seconds per call on the device, whose queue is full before it starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(200_000 * (len(calls) + 1))  # clock cycles: about 0.1 ms per call, more than a launch takes
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(calls)


def host_seconds(calls: list[Callable[[], Any]]) -> float:
    """Seconds per call on the host."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def host_us(calls: list[Callable[[], Any]], wrapped: noesis.Wrapped) -> float:
    """Microseconds of the host per launch, the device not waited for."""
    taken = []
    for _ in range(12):
        wrapped.reset()
        torch.cuda.synchronize()
        taken.append(host_seconds(calls[:20]))
    torch.cuda.synchronize()
    return spread(taken[2:])[0] * 1e6


def parse_bytes(text: str) -> int:
    """`64M` as a number of bytes."""
    unit = UNITS.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-bytes", type=parse_bytes, help="4G on CUDA, 64M on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    largest = options.max_bytes or (4 << 30 if options.device == "cuda" else 64 << 20)
    path = options.json or results_file("kernel", "moments", options.device)
    print(
        f"{'dtype':>9} {'size':>7} {'':>5} {'kernel us':>10} {'GB/s':>7} {'copy GB/s':>10}  share of copy (quartiles)"
    )
    cases = []
    for dtype in options.dtypes:
        for size, nbytes in SIZES.items():
            if nbytes <= largest:
                case = {"size": size} | measure(nbytes, getattr(torch, dtype), options.device, options.rounds)
                cases.append(case)
                show(case)
                write(path, "kernel", options.device, cases=cases)
    print(f"wrote {path}")


def show(case: dict[str, Any]) -> None:
    """Print a case."""
    for cache in ("cold", "warm"):
        told = case[cache]
        low, high = told["share_of_copy_quartiles"]
        print(
            f"{case['dtype']:>9} {case['size']:>7} {cache:>5} {told['kernel']['us']:>10.1f} "
            f"{told['kernel']['gb_per_s']:>7.0f} {told['copy']['gb_per_s']:>10.0f}  "
            f"{told['share_of_copy']:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )
    if case["host_us"] is not None:
        print(f"{'':>23} host {case['host_us']:.1f} us a launch")


if __name__ == "__main__":
    main()
