"""What `wrapped.weigh()` costs beside a training step, each time it is called and with `every=10`.

    python benchmarks/weighing.py --device cpu --threads 1

Stacks of `Linear` and `GELU`: forward, backward, AdamW, and then a weighing, in turns, so that a weighing finds its
parameters where a step left them. A share is the median of the rounds' own; `ns` is per parameter.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import check_device, collector_paused, results_file, sample, spread, write
from torch import nn

import noesis

#: Width, layers, rows of a batch.
CASES = ((256, 4, 128), (256, 4, 2048), (512, 4, 512), (512, 4, 4096), (768, 6, 512), (768, 6, 2048))
EVERY = 10


def measure(width: int, layers: int, batch: int, device: str, rounds: int) -> dict[str, Any]:
    """Time steps and weighings; returns the case for the results file."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))).to(device)
    wrapped = noesis.wrap(model, parameters=True)
    optimiser = torch.optim.AdamW(model.parameters())
    x = torch.randn(batch, width, device=device)

    def step() -> None:
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()

    each: list[tuple[float, float]] = []
    some: list[tuple[float, float]] = []
    with wrapped.paused():  # what observing layers costs is measured elsewhere
        step()
    with collector_paused() as collect:
        for times, every in ((each, 1), (some, EVERY)):
            wrapped.reset()
            for turn in range(-EVERY, rounds):  # the first ten compile, copy and fill caches
                with wrapped.paused():
                    training = sample(step, 1, device)
                weighing = sample(lambda every=every: wrapped.weigh(every), 1, device)
                if turn >= 0:
                    times.append((training, weighing))
                if turn % EVERY == 0:
                    collect()
    runs = [some[at : at + EVERY] for at in range(0, len(some), EVERY)]
    per_run = [sum(weighing for _, weighing in run) / sum(training for training, _ in run) for run in runs]
    seconds, _ = spread([weighing for _, weighing in each])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share, quartiles = spread([weighing / training for training, weighing in each])
    return {
        "width": width,
        "layers": layers,
        "batch": batch,
        "parameters": parameters,
        "rounds": rounds,
        "step_seconds": spread([training for training, _ in each])[0],
        "weighing_seconds": seconds,
        "ns_per_parameter": seconds / parameters * 1e9,
        "share_percent": 100 * share,
        "share_percent_quartiles": [100 * value for value in quartiles],
        "share_percent_every": 100 * spread(per_run)[0],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40, help="a multiple of ten")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which, by number")
    parser.add_argument("--json", type=Path, help="results/weighing-<threads>-<device>.json by default")
    options = parser.parse_args(arguments)
    check_device(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = []
    print(f"width layers batch   step ms  weighing ms   ns   share  every={EVERY}")
    for number in options.cases:
        case = measure(*CASES[number], options.device, options.rounds)
        cases.append(case)
        print(
            f"{case['width']:5} {case['layers']:6} {case['batch']:5} {case['step_seconds'] * 1e3:9.2f} "
            f"{case['weighing_seconds'] * 1e3:12.3f} {case['ns_per_parameter']:4.1f} {case['share_percent']:6.2f}% "
            f"{case['share_percent_every']:6.2f}%"
        )
    path = options.json or results_file("weighing", f"{options.threads}-threads", options.device)
    write(path, "weighing", options.device, cases=cases)
    print(path)


if __name__ == "__main__":
    main()
