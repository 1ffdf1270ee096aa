"""What a sweep of exact patching costs beside whole forwards under plain hooks, one for each cell.

    python benchmarks/interp.py --size gpt2      # minutes
    python benchmarks/interp.py --size small

Times are CPU seconds per cell, of both in one process, in turns: of all cells that are asked for, with all that
`interp.patch` does once (finding the anatomy, running both prompts, trying where forwards can be taken up), and of
whole forwards for some of the same cells. The first token is corrupted, so that no cell is spared for holding the same
in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import results_file, write
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from noesis import interp

SIZES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "small": {"n_embd": 64, "n_layer": 12, "n_head": 4, "vocab_size": 1000},
}
#: What is swept.
SWEEPS: dict[str, dict[str, Any]] = {
    "stream": {"sites": "resid_post", "positions": "each"},
    "heads": {"sites": "z", "positions": "all"},
}


def built(size: str, pairs: int, tokens: int) -> tuple[Any, Tensor, Tensor, interp.Metric]:
    """A model with random weights, clean and corrupted prompts, and a metric."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=tokens, bos_token_id=0, eos_token_id=0, **SIZES[size])).eval()
    clean = torch.randint(2, SIZES[size]["vocab_size"], (pairs, tokens))
    corrupted = clean.clone()
    corrupted[:, 0] = 1
    return model, clean, corrupted, interp.logit_difference(2, 3)


def hook(held: Tensor, site: interp.Site) -> Callable[[Any, Any, Any], Any]:
    """Puts a cell of another run into what a block returns, or into the input of its output projection."""
    tokens = slice(None) if site.position is None else site.position
    own = slice(None) if site.head is None else slice(site.head * held.shape[-1], (site.head + 1) * held.shape[-1])

    def stream(_module: Any, _args: Any, output: Any) -> Any:
        whole = (output[0] if isinstance(output, tuple) else output).clone()
        whole[:, tokens] = held[:, tokens]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def heads(_module: Any, args: Any, _kwargs: Any = None) -> Any:
        whole = args[0].clone()
        whole[..., own] = held[:, :, site.head]
        return (whole,)

    return stream if site.head is None else heads


def naive(model: Any, corrupted: Tensor, metric: interp.Metric, held: Tensor, site: interp.Site) -> list[float]:
    """The metric of a whole forward with one cell changed."""
    block, change = model.transformer.h[site.layer], hook(held, site)
    handle = (
        block.register_forward_hook(change)
        if site.head is None
        else block.attn.c_proj.register_forward_pre_hook(change)
    )
    with torch.no_grad():
        logits = model(corrupted).logits
    handle.remove()
    return metric(logits).tolist()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gave."""
    begin = time.process_time()
    found = call()
    return time.process_time() - begin, found


def measure(sweep: str, options: argparse.Namespace) -> dict[str, Any]:
    """One sweep beside whole forwards for some of its cells; returns the case for the results file."""
    model, clean, corrupted, metric = built(options.size, options.pairs, options.tokens)
    given = {"batch": options.batch, **SWEEPS[sweep]}
    if sweep == "stream" and options.positions:
        given["positions"] = options.positions
    naive_seconds, ours, apart = [], [], 0.0
    kept = interp.run(model, clean, keep=SWEEPS[sweep]["sites"])
    for _ in range(options.rounds):
        spent, effects = seconds(lambda: interp.patch(model, clean, corrupted, metric, **given))
        ours.append(spent / len(effects))
        for row in range(0, len(effects), options.every):
            site = effects.sites[row]
            held = kept[site.component, site.layer]
            spent, values = seconds(lambda held=held, site=site: naive(model, corrupted, metric, held, site))
            naive_seconds.append(spent)
            apart = max(apart, float(np.abs(effects.patched[row] - values).max()))
    one, other = statistics.median(ours), statistics.mean(naive_seconds)
    return {
        "model": options.size,
        "sweep": sweep,
        "cells": len(effects),
        "pairs": options.pairs,
        "tokens": options.tokens,
        "batch": options.batch,
        "seconds_per_cell": one,
        "naive_seconds_per_cell": other,
        "ratio": one / other,
        "largest_difference": apart,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--positions", type=int, nargs="+", help="of the stream's cells; each by default")
    parser.add_argument("--every", type=int, default=8, help="of the cells, those that are run by whole forwards too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="results/interp-<size>-cpu.json by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for sweep in options.sweeps:
        case = measure(sweep, options)
        cases.append(case)
        print(
            f"{options.size} {sweep:<7} {case['cells']:4} cells  {case['seconds_per_cell'] * 1e3:8.1f} ms a cell"
            f"  {case['naive_seconds_per_cell'] * 1e3:8.1f} naive  {case['ratio']:.2f}"
            f"  differ by {case['largest_difference']:.1e}",
            flush=True,
        )
    write(options.json or results_file("interp", options.size, "cpu"), "interp", "cpu", cases=cases)


if __name__ == "__main__":
    main()
