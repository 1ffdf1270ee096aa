"""What observing costs: wrapped, and five `float(...)` per layer by hook, against the bare model.

    python benchmarks/overhead.py --device cpu --json benchmarks/results/overhead-cpu.json

Each case is a stack of layers whose outputs have one size. Bare, hooked and wrapped forwards take
turns in one process (A B C A B C ...), so that a noisy machine is noisy for all. The table gives,
per size, the cost added per layer and step, and the ratio of the two costs, from medians over
rounds; the spread is the middle half of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import noesis


class Add(nn.Module):
    """A layer that costs little, so that the cost of looking at it shows."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x + 1` without touching what came in."""
        return x + 1


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(self, depth: int) -> None:
        """Build `depth` layers."""
        super().__init__()
        self.layers = nn.ModuleList(Add() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers; each sees the same input, so that values do not drift."""
        for layer in self.layers:
            layer(x)
        return x


def five_floats(module: nn.Module, args: Any, output: Tensor) -> None:
    """The way of noesis v0.1: five statistics, each brought to the host at once."""
    x = output.detach().float()
    float(x.mean()), float(x.std()), float(x.abs().mean()), float(x.max()), float(x.min())


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: str, depth: int, rounds: int) -> dict[str, Any]:
    """Seconds per forward of the bare, the hooked and the wrapped stack, in turns."""
    x = torch.randn(shape, device=device).to(dtype)
    stacks = {name: Stack(depth).to(device) for name in ("bare", "hooks", "noesis")}
    for layer in stacks["hooks"].layers:
        layer.register_forward_hook(five_floats)
    noesis.wrap(stacks["noesis"], layers=Add)
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for turn in range(rounds + 2):
        for name, stack in stacks.items():
            seconds = timed(lambda stack=stack: stack(x), device)
            if turn >= 2:  # the first turns warm caches and allocator
                times[name].append(seconds)
    return summary(times, depth)


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(times: dict[str, list[float]], depth: int) -> dict[str, Any]:
    """Costs per layer in microseconds, and the ratio of noesis to hooks with its spread."""
    median = {name: statistics.median(values) for name, values in times.items()}
    each = [
        (wrapped - bare) / (hooked - bare)
        for bare, hooked, wrapped in zip(times["bare"], times["hooks"], times["noesis"], strict=True)
        if hooked > bare
    ]
    quarter = statistics.quantiles(each, n=4) if len(each) > 3 else [float("nan")] * 3
    added = {name: (median[name] - median["bare"]) / depth * 1e6 for name in ("hooks", "noesis")}
    return {
        "bare_us": median["bare"] / depth * 1e6,
        "hooks_us": added["hooks"],
        "noesis_us": added["noesis"],
        "ratio": added["noesis"] / added["hooks"],
        "ratio_quartiles": [quarter[0], quarter[2]],
    }


SHAPES = {
    "4 KB": (1, 32, 32),
    "64 KB": (1, 128, 128),
    "1 MB": (1, 512, 512),
    "4 MB": (1, 1024, 1024),
    "16 MB": (4, 1024, 1024),
    "64 MB": (16, 1024, 1024),
}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads to measure with")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    cases = []
    print(f"{'threads':>7}  {'size':>6}  {'bare us':>9}  {'hooks us':>9}  {'noesis us':>9}  ratio (middle half)")
    for threads in options.threads if options.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for label, shape in SHAPES.items():
            case = measure(shape, dtype, options.device, options.depth, options.rounds)
            low, high = case["ratio_quartiles"]
            print(
                f"{threads:>7}  {label:>6}  {case['bare_us']:>9.1f}  {case['hooks_us']:>9.1f}  "
                f"{case['noesis_us']:>9.1f}  {case['ratio']:.2f} ({low:.2f} to {high:.2f})"
            )
            cases.append({"threads": threads, "size": label, "shape": shape, "dtype": options.dtype, **case})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(options.device), "cases": cases}, indent=2) + "\n")
        print(f"wrote {options.json}")


def machine(device: str) -> dict[str, str]:
    """What was measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "noesis": noesis.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
