"""What attribution patching costs, in whole forwards of the same pairs: of all cells, and of all edges with 5 steps.

    python benchmarks/attribution.py --size gpt2      # minutes
    python benchmarks/attribution.py --size small

CPU seconds in one process, in turns, without the exact checks (`check=0`) and with the anatomy at hand. The first token
is corrupted.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from timing import results_file, write

from interp import SIZES, built, seconds
from noesis import interp

#: What is estimated.
ESTIMATES: dict[str, dict[str, Any]] = {
    "cells": {"sites": ["resid_post", "attn", "mlp", "z"], "steps": 0},
    "edges": {"edges": True, "steps": 5},
}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each estimate beside forwards; returns the cases for the results file."""
    model, clean, corrupted, metric = built(options.size, options.pairs, options.tokens)
    anatomy = interp.anatomy(model, clean[:1])
    spent: dict[str, list[float]] = {name: [] for name in (*ESTIMATES, "forward")}
    counts = {}

    def forward() -> Any:
        with torch.no_grad():
            return model(clean)

    forward()
    for _ in range(options.rounds):
        for name, given in ESTIMATES.items():
            spent["forward"].append(seconds(forward)[0])
            taken, found = seconds(
                lambda given=given: interp.attribute(
                    model, clean, corrupted, metric, check=0, anatomy=anatomy, batch=options.pairs, **given
                )
            )
            spent[name].append(taken)
            counts[name] = len(found)
    usual = statistics.median(spent["forward"])
    return [
        {
            "model": options.size,
            "estimate": name,
            "cells": counts[name],
            "pairs": options.pairs,
            "tokens": options.tokens,
            "seconds": statistics.median(spent[name]),
            "forward_seconds": usual,
            "forwards": statistics.median(spent[name]) / usual,
        }
        for name in ESTIMATES
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="results/attribution-<size>-cpu.json by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = measure(options)
    for case in cases:
        print(
            f"{case['model']} {case['estimate']} {case['cells']:6} cells  {case['forwards']:.2f} forwards", flush=True
        )
    write(options.json or results_file("attribution", options.size, "cpu"), "attribution", "cpu", cases=cases)


if __name__ == "__main__":
    main()
