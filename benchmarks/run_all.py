"""Everything, on a machine with a CUDA device, in about 25 minutes: the figures that matter most first.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --only sdxl kernel --results /some/folder

Each step is a process of its own with a time limit; what fails or is out of time is named at the
end, and what it had measured by then is kept. Steps are left out that would start after `--minutes`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import RESULTS, check_device, label

HERE = Path(__file__).parent
SDXL = "overhead.py --model sdxl --seconds 0.1 --layers"
OVERHEAD = "overhead.py --model"
LISTED = "mlp ffn resnet50 gpt2-train llama-decode llama-prefill sdxl"


@dataclass(frozen=True)
class Task:
    """One process: the name of its results file, the command, and the seconds it may take."""

    name: str
    command: str
    limit: int


CUDA = (
    Task("overhead-sdxl-blocks70", f"{SDXL} blocks70 --modes eager graph --peers all", 150),
    Task("overhead-sdxl-sites297", f"{SDXL} sites297 --modes eager graph --peers all --rounds 15", 180),
    Task("overhead-sdxl-leaves", f"{SDXL} leaves --modes eager graph --peers all --rounds 11", 240),
    Task("kernel-moments", "kernel.py", 150),
    Task("overhead-gpt2-train", f"{OVERHEAD} gpt2-train --modes eager graph --peers all --seconds 0.1", 120),
    Task("memory-sdxl", "memory.py --model sdxl --layers all", 90),
    Task("memory-others", "memory.py --model gpt2-train llama-prefill resnet50 --layers all", 90),
    Task("overhead-llama-prefill", f"{OVERHEAD} llama-prefill --modes eager graph --peers all --seconds 0.1", 90),
    Task("overhead-llama-decode", f"{OVERHEAD} llama-decode --modes eager graph --peers all --seconds 0.05", 90),
    Task("overhead-resnet50", f"{OVERHEAD} resnet50 --layers all --modes eager graph --peers all", 90),
    Task("overhead-small", f"{OVERHEAD} mlp ffn --layers all --modes eager graph --peers all", 120),
    Task("overhead-stack", f"{OVERHEAD} stack --modes eager graph --peers control hooks torch-ops atomics", 60),
    Task("scaling-stack", "scaling.py", 60),
    Task("soak", "soak.py", 180),
    Task("off-layers", "off.py", 60),
    Task("overhead-small-compiled", f"{OVERHEAD} mlp ffn --modes compiled --peers control torch-ops", 120),
    Task("overhead-gpt2-train-compiled", f"{OVERHEAD} gpt2-train --modes compiled --peers control --seconds 0.1", 150),
    Task("overhead-llama-decode-compiled", f"{OVERHEAD} llama-decode --modes reduce-overhead --peers control", 150),
    Task("overhead-sdxl-compiled", f"{SDXL} blocks70 --modes compiled --peers control", 300),
)
CPU = (
    Task("overhead-ffn", f"{OVERHEAD} ffn --layers all --peers all", 600),
    Task("overhead-resnet50", f"{OVERHEAD} resnet50 --layers all --peers all", 600),
    Task("overhead-mlp", f"{OVERHEAD} mlp --layers all --peers all --modes eager compiled", 300),
    Task("overhead-stack", f"{OVERHEAD} stack --threads 1 2", 300),
    Task("kernel-moments", "kernel.py", 300),
    Task("memory-others", "memory.py --model mlp ffn resnet50", 300),
    Task("scaling-stack", "scaling.py", 300),
    Task("soak", "soak.py", 300),
    Task("off-layers", "off.py", 60),
    Task("overhead-gpt2-train", f"{OVERHEAD} gpt2-train --peers all --rounds 11", 600),
    Task("overhead-llama-decode", f"{OVERHEAD} llama-decode --peers all --rounds 11", 600),
    Task("overhead-llama-prefill", f"{OVERHEAD} llama-prefill --peers all --rounds 7", 900),
    Task("overhead-sdxl", f"{OVERHEAD} sdxl --peers all --rounds 7", 1200),
    Task("overhead-outputs", f"{OVERHEAD} {LISTED} --layers all --modes outputs --peers all --rounds 11", 1800),
    Task("scaling-ranks", "scaling.py --ranks 8 64 1024", 300),
)


def run(task: Task, device: str, folder: Path) -> str:
    """Run one task; returns what became of it."""
    script, *arguments = task.command.split()
    path = folder / f"{task.name}-{label(device)}.json"
    command = [sys.executable, str(HERE / script), *arguments, "--device", device, "--json", str(path)]
    print(f"\n=== {task.name}: {task.command}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run(command, timeout=task.limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"OUT OF TIME after {task.limit} s"
    return f"{'done' if code == 0 else f'FAILED (exit {code})'} in {time.monotonic() - start:.0f} s"


def main(arguments: list[str] | None = None) -> None:
    """Run the tasks one after the other, and tell what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of tasks")
    parser.add_argument("--minutes", type=float, default=25.0, help="start nothing after that")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    check_device(options.device)
    start = time.monotonic()
    told: dict[str, str] = {}
    for task in CUDA if options.device == "cuda" else CPU:
        if options.only and not any(part in task.name for part in options.only):
            continue
        late = time.monotonic() - start > 60 * options.minutes
        told[task.name] = "LEFT OUT: no time" if late else run(task, options.device, options.results)
    print(f"\n=== {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}: {options.results}")
    for name, outcome in told.items():
        print(f"{name:<32} {outcome}")
    if not all(outcome.startswith("done") for outcome in told.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
