"""Peak memory that observing adds.

    python benchmarks/memory.py --device cuda --model sdxl gpt2-train --layers all
    python benchmarks/memory.py --device cpu --model ffn

On CUDA: the peak of allocated memory over a few steps, bare and then wrapped, in one process. On a
CPU: the difference of the peak resident sizes of processes that run the bare or the wrapped model,
which holds the code of noesis too. On both: the bytes of the tensors that the recorder keeps.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import torch
from models import Bench, Size
from overhead import chosen_layers
from peers import PEERS, UnsuitableError, attach
from timing import check_device, results_file, write
from torch import Tensor, nn

import noesis
from noesis.observing import site_of

STEPS = 4
MB = 1 << 20


def on_cuda(bench: Bench, layers: str, peers: list[str]) -> dict[str, Any]:
    """Peaks in this process, one variant after the other on the same module."""
    run = bench.step(bench.module)
    run()  # libraries make their workspaces
    bare = peak(run)
    wrapped = noesis.wrap(bench.module, layers=bench.layers[layers])
    kept, names = recorder_bytes(bench.module), wrapped.observed_layers
    added = {"noesis": peak(run) - bare}
    wrapped.unwrap()
    del wrapped
    for name in peers:
        try:
            peer = attach(name, bench.module, names)
        except UnsuitableError:
            continue
        added[name] = peak(run) - bare
        peer.detach()
        del peer
    return {"observed": len(names), "recorder_bytes": kept, "bare_bytes": bare, "added_bytes": added}


def peak(run: models.Step) -> int:
    """The most memory that was allocated during a few steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def on_cpu(options: argparse.Namespace, bench: Bench, layers: str) -> dict[str, Any]:
    """Peaks of processes of their own, the median of three each."""
    wrapped = noesis.wrap(models.shared_copy(bench.module), layers=bench.layers[layers])
    kept, observed = recorder_bytes(wrapped.observed_model), len(wrapped.observed_layers)
    peaks = {
        variant: statistics.median(resident(options, bench.name, layers, variant) for _ in range(3))
        for variant in ("bare", "noesis")
    }
    added = {"noesis": peaks["noesis"] - peaks["bare"]}
    return {"observed": observed, "recorder_bytes": kept, "bare_bytes": peaks["bare"], "added_bytes": added}


def resident(options: argparse.Namespace, model: str, layers: str, variant: str) -> int:
    """Peak resident bytes of a process that runs one variant."""
    command = [sys.executable, __file__, "--model", model, "--layers", layers, "--child", variant]
    for name in ("batch", "tokens", "pixels"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def child(bench: Bench, layers: str, variant: str) -> None:
    """Run one variant, and print the peak resident size in bytes."""
    torch.set_num_threads(1)
    if variant == "noesis":
        noesis.wrap(bench.module, layers=bench.layers[layers])
    run = bench.step(bench.module)
    for _ in range(STEPS):
        run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def recorder_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that a wrap keeps, whatever it is made of; storage that is shared counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = [site_of(module).recorder]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, nn.Module):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
        elif type(one).__module__.startswith("noesis"):
            left += getattr(one, "__dict__", {}).values()
            left += [getattr(one, slot) for slot in getattr(type(one), "__slots__", ()) if hasattr(one, slot)]
    return sum(storages.values())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", nargs="+", default=["ffn"], choices=tuple(models.MODELS))
    parser.add_argument("--layers", nargs="+", default=[], help="sets of layers, or all; the model's first by default")
    parser.add_argument("--peers", nargs="*", default=[], choices=tuple(PEERS), help="on CUDA, measured as well")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_device(options.device)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON after each case."""
    options = parse(arguments)
    path = options.json or results_file("memory", "-".join(options.model), options.device)
    cases = []
    for model in options.model:
        bench = models.build(model, options.device, Size(options.batch, options.tokens, options.pixels))
        if options.child:
            child(bench, options.layers[0], options.child)
            return
        for layers in chosen_layers(options.layers, bench):
            found = (
                on_cuda(bench, layers, options.peers) if options.device == "cuda" else on_cpu(options, bench, layers)
            )
            case = {"model": model, "layers": layers, "sizes": bench.sizes, **found}
            cases.append(case)
            told = ", ".join(f"{name} {value / MB:+.1f} MB" for name, value in case["added_bytes"].items())
            print(
                f"{model} {layers} ({case['observed']}): bare peak {case['bare_bytes'] / MB:.0f} MB; {told}; "
                f"the recorder's tensors {case['recorder_bytes'] / MB:.2f} MB",
                flush=True,
            )
            write(path, "memory", options.device, cases=cases)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
