"""What a layer costs that is not looked at: inside `paused()`, and in a forward that `every` leaves out.

    python benchmarks/off.py --device cpu

The layers hand on what they are given, so that nothing hides what a call of them costs. They have a parameter, since
Python calls objects that never had attributes set from outside a little faster, and layers worth looking at do not
belong to these. `control` is the bare model once more: what it adds is noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import against, check_device, interleave, results_file, write
from torch import Tensor, nn

import noesis

LAYERS = 300
#: Of the forwards, the first alone is observed.
NEVER_AGAIN = (1 << 31) - 1


class Same(nn.Module):
    """A layer that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


def stack() -> nn.Sequential:
    """The bare model."""
    return nn.Sequential(*(Same() for _ in range(LAYERS)))


def measure(device: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Time the calls of layers that are off beside those of bare ones; returns the case for the results file."""
    x = torch.zeros(1, 8, device=device)
    models = {name: stack().to(device) for name in ("bare", "control")}
    paused = noesis.wrap(stack().to(device), layers="leaves")
    left_out = noesis.wrap(stack().to(device), layers="leaves", every=NEVER_AGAIN)
    models |= {"paused": paused.model, "left-out": left_out.model}
    left_out(x)
    with paused.paused():
        runs = {name: (lambda model=model: model(x)) for name, model in models.items()}
        samples = interleave(runs, device=device, rounds=rounds, seconds=seconds)
    if len(paused.trace()) or len(left_out.trace()) != 1:
        raise RuntimeError("a layer that should be off was observed")
    told = against(samples.seconds)
    for name, found in told.items():
        if name != "bare":
            found["added_ns_per_layer"] = found["added_seconds"] / LAYERS * 1e9
    return {"layers": LAYERS, "rounds": rounds, "inner": samples.inner, "variants": told}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of a sample")
    parser.add_argument("--json", type=Path, help="results/off-layers-<device>.json by default")
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.device == "cpu":
        torch.set_num_threads(1)
    case = measure(options.device, options.rounds, options.seconds)
    for name, told in case["variants"].items():
        extra = "" if name == "bare" else f"  {told['added_ns_per_layer']:+7.1f} ns/layer"
        print(f"{name:<10} {told['seconds'] * 1e6:9.2f} us{extra}")
    path = options.json or results_file("off", "layers", options.device)
    write(path, "off", options.device, cases=[case])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
