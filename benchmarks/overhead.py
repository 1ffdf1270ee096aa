"""What observing costs, for real models: noesis and its peers beside the bare model, in turns.

    python benchmarks/overhead.py --device cpu --model ffn resnet50 --peers all
    python benchmarks/overhead.py --device cuda --model sdxl --layers blocks70 --modes eager graph

For each model, set of layers, mode and number of threads, all variants run in one process, one
after the other in every round. What is told is the median over the rounds' own ratios to the bare
model, with the quartiles.

Modes: `eager`; `compiled` (`torch.compile`, one graph where possible); `reduce-overhead`
(`torch.compile(mode="reduce-overhead")`, CUDA only); `graph` (a hand-captured CUDA graph of the
eager step); `outputs` (no model: its layers' outputs alone are observed, see `outputs.py`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import outputs
import torch
import torch._dynamo
from models import Bench, Size, Step
from peers import PEERS, UnsuitableError, attach
from timing import against, check_device, interleave, results_file, share, version, write
from torch import nn

import noesis


@dataclass
class Variant:
    """One way of running the model."""

    run: Step
    layers: int
    facts: dict[str, Any] = field(default_factory=dict)  # for the results file
    detach: Callable[[], Any] = lambda: None


# ---------------------------------------------------------------- modes


def eager(bench: Bench, module: nn.Module) -> tuple[Step, dict[str, Any]]:
    """The step as it is."""
    return bench.step(module), {}


def compiled(bench: Bench, module: nn.Module, **options: Any) -> tuple[Step, dict[str, Any]]:
    """The step of the compiled module: one graph, or several where it cannot be one."""
    try:
        run = bench.step(torch.compile(own_code(module), fullgraph=True, **options))
        run()
    except torch._dynamo.exc.TorchDynamoException as error:
        run = bench.step(torch.compile(own_code(module), **options))
        run()
        return run, {"fullgraph": False, "fullgraph_error": first_line(error)}
    return run, {"fullgraph": True}


def own_code(module: nn.Module) -> Callable[..., Any]:
    """A call of the module by a code object of its own.

    torch.compile keeps its graphs by code object and does not look at hooks when it picks one: a
    copy with hooks would get the graph of the bare model, and seem to cost nothing.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(COPIES)}")
    return call


def reduce_overhead(bench: Bench, module: nn.Module) -> tuple[Step, dict[str, Any]]:
    """The step of the compiled module, in CUDA graphs made by torch.compile."""
    inner, facts = compiled(bench, module, mode="reduce-overhead")

    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return inner()

    return run, facts


def graph(bench: Bench, module: nn.Module) -> tuple[Step, dict[str, Any]]:
    """The eager step, captured in a CUDA graph."""
    run = bench.step(module)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay, {}


COPIES = itertools.count()
MODES = {"eager": eager, "outputs": eager, "compiled": compiled, "reduce-overhead": reduce_overhead, "graph": graph}
GRAPHS = ("reduce-overhead", "graph")

# ---------------------------------------------------------------- one case


def measure(
    bench: Bench, layers: str, mode: str, peers: list[str], *, device: str, rounds: int, seconds: float
) -> dict[str, Any]:
    """Time the variants of one model, set of layers and mode; returns the case for the results file."""
    torch._dynamo.reset()
    observed = models.shared_copy(bench.module)
    wrapped = noesis.wrap(observed, layers=bench.layers[layers])
    names = wrapped.observed_layers
    equal = bitwise_equal(bench, observed)
    variants = {"bare": Variant(*prepared(bench, mode, models.shared_copy(bench.module), 0))}
    variants["noesis"] = Variant(*prepared(bench, mode, observed, len(names)))
    peering = {name: with_peer(bench, mode, name, names) for name in peers}
    refused = {name: found for name, found in peering.items() if isinstance(found, dict)}
    variants |= {name: found for name, found in peering.items() if isinstance(found, Variant)}
    wrapped.reset()
    samples = interleave(
        {name: variant.run for name, variant in variants.items()},
        device=device,
        rounds=rounds,
        seconds=seconds,
        by="noesis" if mode == "outputs" else None,  # bare calls cost next to nothing
    )
    told = against(samples.seconds)
    for name, variant in variants.items():
        told[name] |= variant.facts
        if name != "bare":
            told[name] |= {"layers": variant.layers, "added_us_per_layer": per_layer(told[name], variant.layers)}
        if name not in ("bare", "noesis", "control"):
            told[name]["noesis_adds"] = share(samples.seconds, "noesis", name)
    told["noesis"] |= {"bitwise_equal": equal, **check(wrapped.trace(), names)}
    for variant in variants.values():
        variant.detach()
    wrapped.unwrap()
    in_order = {name: (told | refused)[name] for name in ("bare", "noesis", *peers)}
    return {"observed": len(names), "rounds": rounds, "inner": samples.inner, "variants": in_order}


def prepared(bench: Bench, mode: str, module: nn.Module, layers: int) -> tuple[Step, int, dict[str, Any]]:
    """What runs one step in this mode, and how many layers are looked at."""
    run, facts = MODES[mode](bench, module)
    run()
    return run, layers, facts


def with_peer(bench: Bench, mode: str, name: str, layers: list[str]) -> Variant | dict[str, Any]:
    """A copy of the model with a peer on the same layers, or why there is none."""
    module = models.shared_copy(bench.module)
    peer = None
    try:
        if mode not in ("eager", "outputs") and PEERS[name].waits:
            raise UnsuitableError("brings values to or from the host within a step: no graph can hold it")
        peer = attach(name, module, layers)
        run, count, facts = prepared(bench, mode, module, len(peer.layers))
        if mode != "graph":  # whose replays run no Python; that the peer was called, capturing showed
            peer.forget()
            run()
        unseen = sorted(set(peer.layers) - set(peer.read()))
        if unseen:
            raise RuntimeError(f"it saw no output of {len(unseen)} layers ({unseen[0]}, ...)")
    except UnsuitableError as error:
        return {"not_applicable": str(error)}
    except Exception as error:  # whatever breaks a peer, the others are measured
        if peer is not None:
            peer.detach()
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}
    if len(peer.layers) < len(layers):
        facts["note"] = f"applies to {len(peer.layers)} of {len(layers)} layers"
    if name == "nervecode":
        facts["version"] = version(name)
    return Variant(run, count, facts, peer.detach)


def bitwise_equal(bench: Bench, observed: nn.Module) -> bool | None:
    """Whether observing changed a bit of the outputs (and gradients); None where the bare model itself varies."""
    want, again = bench.outputs(bench.module), bench.outputs(bench.module)
    if not all(map(torch.equal, want, again)):
        return None
    return all(map(torch.equal, want, bench.outputs(observed)))


def check(trace: noesis.Trace, names: list[str]) -> dict[str, Any]:
    """That noesis did its work while it was timed: a row for every layer, of finite values."""
    if trace.never_ran or trace.unmeasured or not len(trace) or trace.layers != names:
        raise RuntimeError(f"noesis saw no output of {trace.never_ran or trace.unmeasured or 'any layer'}")
    return {"calls": int(trace.calls[-1].sum()), "nonfinite": int(trace["nonfinite"][-1].sum())}


def per_layer(told: dict[str, Any], layers: int) -> float:
    """Microseconds added per layer and step."""
    return told["added_seconds"] / layers * 1e6


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or ["(no message)"])[0][:200]


# ---------------------------------------------------------------- the command


def show(case: dict[str, Any]) -> None:
    """Print a case."""
    sizes = ", ".join(f"{name} {value}" for name, value in case["sizes"].items())
    threads = f", {case['threads']} threads" if case["threads"] else ""
    print(f"\n{case['model']} ({sizes}, {case['dtype']}{threads}), {case['mode']}: {case['layers']}")
    if "failed" in case:
        print(f"  FAILED: {case['failed']}")
    for name, told in case.get("variants", {}).items():
        if name == "bare":
            print(f"  bare       {told['seconds'] * 1e3:10.3f} ms")
        elif "seconds" not in told:
            print(f"  {name:<10} {'; '.join(f'{key}: {value}' for key, value in told.items())}")
        else:
            low, high = told["overhead_percent_quartiles"]
            notes = [told["note"]] if "note" in told else []
            notes += ["several graphs"] if told.get("fullgraph") is False else []
            if name == "noesis":
                notes += [{True: "bitwise equal", False: "OUTPUTS DIFFER", None: "bare varies"}[told["bitwise_equal"]]]
                notes += [f"{told['nonfinite']} NON-FINITE VALUES"] if told["nonfinite"] else []
            elif told.get("noesis_adds") and told["noesis_adds"]["share_quartiles"]:
                notes += [f"noesis adds {told['noesis_adds']['share']:.2f} of it"]
            print(
                f"  {name:<10} {told['seconds'] * 1e3:10.3f} ms  {told['overhead_percent']:+8.2f} % "
                f"({low:+.2f} to {high:+.2f})  {told['added_us_per_layer']:8.1f} us/layer x {told['layers']}"
                f"  {', '.join(notes)}",
                flush=True,
            )


def cases(options: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    """All cases of one model, one by one; one that fails says so, and the others are measured."""
    for output in (options.output or list(models.OUTPUTS)) if model == "stack" else [None]:
        bench = models.build(
            model, options.device, Size(options.batch, options.tokens, options.pixels, options.depth, output)
        )
        settings = itertools.product(chosen_layers(options.layers, bench), options.modes, options.threads)
        for layers, mode, threads in settings:
            torch.set_num_threads(threads)
            facts = described(bench, layers, mode, options.device)
            try:
                case = facts | measure(
                    outputs.of(bench, layers) if mode == "outputs" else bench,
                    layers,
                    mode,
                    options.peers,
                    device=options.device,
                    rounds=options.rounds,
                    seconds=options.seconds,
                )
            except Exception as error:
                traceback.print_exc()
                case = facts | {"failed": f"{type(error).__name__}: {first_line(error)}"}
            show(case)
            yield case
            gc.collect()


def described(bench: Bench, layers: str, mode: str, device: str) -> dict[str, Any]:
    """What a case measures."""
    return {
        "model": bench.name,
        "layers": layers,
        "mode": mode,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in bench.module.parameters()),
        "sizes": bench.sizes,
    }


def chosen_layers(asked: list[str], bench: Bench) -> list[str]:
    """The sets of layers to measure: the model's first by default."""
    if not asked:
        return list(bench.layers)[:1]
    if asked == ["all"]:
        return list(bench.layers)
    unknown = [name for name in asked if name not in bench.layers]
    if unknown:
        raise SystemExit(f"{bench.name} has no set of layers {unknown[0]!r}: take {', '.join(bench.layers)}")
    return asked


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", nargs="+", default=["stack"], choices=(*models.MODELS, "all"))
    parser.add_argument("--layers", nargs="+", default=[], help="sets of layers, or all; the model's first by default")
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=tuple(MODES))
    parser.add_argument(
        "--peers", nargs="*", default=["hooks"], help=f"{', '.join(PEERS)}, all (as without a name) or none"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads to measure with")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of a sample of the bare model")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--output", nargs="+", choices=tuple(models.OUTPUTS), help="sizes of the stack's outputs")
    parser.add_argument("--depth", type=int, help="layers of the stack and of the feed-forward model")
    parser.add_argument("--json", type=Path, help="results/overhead-<model>-<device>.json by default")
    options = parser.parse_args(arguments)
    check_device(options.device)
    if options.device == "cuda":
        options.threads = [torch.get_num_threads()]
    graphs = [mode for mode in options.modes if mode in GRAPHS]
    if graphs and options.device != "cuda":
        raise SystemExit(f"--modes {graphs[0]} needs --device cuda")
    options.model = list(models.MODELS) if "all" in options.model else options.model
    options.peers = list(PEERS) if options.peers in ([], ["all"]) else [p for p in options.peers if p != "none"]
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        raise SystemExit(f"--peers {unknown[0]} is not known: take {', '.join(PEERS)}, all or none")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON after each case: one file per model, or one for all at `--json`."""
    options = parse(arguments)
    done: list[dict[str, Any]] = []
    for model in options.model:
        path = options.json or results_file("overhead", model, options.device)
        done = done if options.json else []
        for case in cases(options, model):
            done.append(case)
            write(path, "overhead", options.device, cases=done)
        print(f"wrote {path}")
    if any("failed" in case for case in done):
        raise SystemExit("Some cases failed; see above.")


if __name__ == "__main__":
    main()
