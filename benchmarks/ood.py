"""How well noesis tells strange inputs from a model's own, beside the known scores, on four sets.

    python benchmarks/ood.py                     # the four sets: results/ood-sets-cpu.json
    python benchmarks/ood.py --sets 3 --seeds 0
    python benchmarks/ood.py --blind             # two sets that came after the score: results/ood-blind-cpu.json
    python benchmarks/ood.py --ablations         # on set 1: results/ood-ablations-cpu.json
    python benchmarks/ood.py --speed             # results/ood-speed-cpu.json

Of every set and seed of its model: AUROC, FPR95 and AUPR of the default
`noesis.wrap(model, layers="blocks", codebook=noesis.Codebook(), logits=...)`, of the same without logits, of the
rule that was frozen after set 1, and of the baselines, each with bootstrap intervals; noesis' rows for several
random splits of the calibration set. Beside that the false alarms at alpha .01, .05 and .1. The calibration images
of all sets but 4 are those the models were trained on, so that the guarantee does not apply there: for these sets, one
half of the test images calibrates and the other is judged as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import speed, variants
from detection.baselines import evaluate
from detection.blind_sets import BLIND
from detection.detector import CALIBRATED_ON, alarms, held_out_alarms, judge, judge_tokens
from detection.metrics import figures
from detection.sets import CACHE, CASES, DATA, Case, case
from detection.variants import Row, Vectors
from table import ablation_table, alarm_table, detection_tables, markdown, speed_tables
from timing import results_file, write

Found = dict[str, Any]
OURS, NO_LOGITS, FROZEN = "noesis", "noesis without logits", "noesis, frozen on set 1"
SPLITS = (0, 1, 2)
TOKENS = 5000  # of a set are drawn for the figures per token
MEASURES = ("auroc", "fpr95", "aupr")


# ---------------------------------------------------------------- one set


def measure(number: int, seed: int, *, splits: Iterable[int], data: Path, nervecode: bool = True) -> Found:
    """All scores on one set: for each method a list of runs, one per split of the calibration set for noesis."""
    start = time.monotonic()
    known = BLIND[number][0](seed, data, CACHE) if number in BLIND else case(number, seed, data)
    runs: dict[str, list[Any]] = {OURS: [], NO_LOGITS: [], FROZEN: []}
    told: Found = {"set": number, "name": known.name, "seed": seed, "splits": list(splits), "near": list(known.near)}
    told["false_alarms"] = {"calibrated_on": CALIBRATED_ON[known.name], "tested": len(known.test), "runs": []}
    vectors = extracted(known, list(known.blocks))
    for split in told["splits"]:
        judged = judge(known, seed=split)
        runs[OURS].append(judged.scores)
        runs[NO_LOGITS].append(judge(known, seed=split, logits=False).scores)
        runs[FROZEN].append(variants.scores(variants.frozen(known), list(known.blocks), vectors, split))
        told["false_alarms"]["runs"].append(alarms(judged.p_values["test"]))
        told["calibration"] = {"layers": judged.calibration.counted, "samples": judged.calibration.samples}
    if known.sequences:
        runs["noesis, each position"] = [judge(known, positions="each").scores]
    else:
        told["false_alarms"]["held_out"] = held_out_alarms(known)
    found = evaluate(known, nervecode=nervecode)
    told["not_applicable"] = {name: scores for name, scores in found.items() if isinstance(scores, str)}
    runs |= {name: [arrays(scores)] for name, scores in found.items() if not isinstance(scores, str)}
    told["figures"] = {name: [against_test(scores) for scores in each] for name, each in runs.items()}
    if known.sequences:
        told["tokens"] = tokens(known)
    return told | {"seconds": time.monotonic() - start}


def tokens(known: Case) -> Found:
    """The figures of single tokens, of which some are drawn; tokens of a sequence depend on each other."""
    found = {f"noesis, {name}": scores for name, scores in judge_tokens(known).items()}
    baselines = evaluate(known, nervecode=False, each_token=True)
    found |= {name: arrays(scores) for name, scores in baselines.items() if not isinstance(scores, str)}
    generator = np.random.default_rng(0)
    chosen = {name: generator.permutation(len(x))[:TOKENS] for name, x in found["Energy"].items()}
    drawn = {method: {name: x[chosen[name]] for name, x in scores.items()} for method, scores in found.items()}
    return {"drawn": TOKENS, "figures": {method: against_test(scores) for method, scores in drawn.items()}}


def against_test(scores: dict[str, Any]) -> dict[str, Found]:
    """The figures of every out set."""
    return {name: figures(scores["test"], x) for name, x in scores.items() if name != "test"}


def arrays(scores: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Scores for NumPy."""
    return {name: x.numpy() for name, x in scores.items()}


def extracted(known: Case, names: list[str]) -> dict[str, Vectors]:
    """The vectors of all inputs of a set."""
    inputs = {"fit": known.fit, "test": known.test, **known.out}
    return {name: variants.extract(known, x, names) for name, x in inputs.items()}


# ---------------------------------------------------------------- all sets


def summary(cases: list[Found]) -> Found:
    """Means over runs, seeds and sets: `sets` by name and method, `overall` by method, and the `target`.

    Of a set each figure is the mean over the runs of a seed, then over seeds; the ends of the intervals are averaged
    alike. AUROC is the mean over its out sets. Over all, methods that lack a set are left out.
    """
    by_set: dict[str, list[Found]] = {}
    for one in cases:
        by_set.setdefault(one["name"], []).append(one)
    sets = {name: {method: of_set(group, method) for method in group[0]["figures"]} for name, group in by_set.items()}
    shared = [method for method in next(iter(sets.values())) if all(method in found for found in sets.values())]
    overall = {
        method: {key: statistics.mean(found[method][key] for found in sets.values()) for key in TOLD}
        for method in shared
    }
    return {"sets": sets, "overall": overall, "target": target(sets, overall)}


TOLD = ("auroc", "near_auroc", "far_auroc", "far_fpr95")


def of_set(cases: list[Found], method: str) -> Found:
    """One method on one set."""
    keys = [*MEASURES, *(f"{measure}_interval" for measure in MEASURES)]
    outs = {
        out: {key: mean([mean([run[out][key] for run in one["figures"][method]]) for one in cases]) for key in keys}
        for out in cases[0]["figures"][method][0]
    }
    near = cases[0]["near"]
    told: Found = {"outs": outs, "auroc": mean([found["auroc"] for found in outs.values()])}
    told["near_auroc"] = mean([outs[out]["auroc"] for out in near])
    told["far_auroc"] = mean([found["auroc"] for out, found in outs.items() if out not in near])
    told["far_fpr95"] = mean([found["fpr95"] for out, found in outs.items() if out not in near])
    runs = [[found["auroc"] for found in run.values()] for one in cases for run in one["figures"][method]]
    told["auroc_runs"] = [mean(run) for run in runs]
    return told


def mean(values: list[Any]) -> Any:
    """The mean of numbers, or of lists of them place by place."""
    found: Any = np.mean(values, axis=0).tolist()
    return found


def target(sets: Found, overall: Found) -> Found:
    """Whether noesis is ahead of every baseline, by what NOTES expected."""
    ours, baselines = overall[OURS], {name: told for name, told in overall.items() if not name.startswith(OURS)}
    best = max(baselines, key=lambda name: baselines[name]["auroc"])
    fewest = min(baselines, key=lambda name: baselines[name]["far_fpr95"])
    told = {
        "auroc": {"noesis": ours["auroc"], "best": best, "value": baselines[best]["auroc"]},
        "far_fpr95": {"noesis": ours["far_fpr95"], "best": fewest, "value": baselines[fewest]["far_fpr95"]},
        "near": {
            name: {"noesis": found[OURS]["near_auroc"], "energy": found["Energy"]["near_auroc"]}
            for name, found in sets.items()
        },
    }
    told["auroc"]["met"] = told["auroc"]["noesis"] > told["auroc"]["value"]
    told["far_fpr95"]["met"] = told["far_fpr95"]["noesis"] <= told["far_fpr95"]["value"] / 2
    for near in told["near"].values():
        near["met"] = near["noesis"] >= near["energy"] - 1
    return told


# ---------------------------------------------------------------- ablations


def ablate(*, splits: Iterable[int], data: Path, rows: list[Row] | None = None, number: int = 1) -> list[Found]:
    """The ablations on a set, from vectors extracted once: means over the splits of the calibration set."""
    known = case(number, data=data)
    names = dict.fromkeys([*variants.selected(known, "leaves"), *known.blocks])
    vectors = extracted(known, list(names))
    told = []
    for row in rows or variants.ablations():
        layers = variants.layers_of(known, row.layers)
        found = {"group": row.group, "name": row.name, "layers": max(1, len(layers) + row.variant.beside)}
        found["whole"] = near_and_far(known, [variants.scores(row.variant, layers, vectors, split) for split in splits])
        if row.alone:
            last, variant = list(known.blocks[-1:]), variants.alone(row.variant)
            found["alone"] = near_and_far(known, [variants.scores(variant, last, vectors, s) for s in splits])
        print(f"{row.group:<12} {row.name:<52} near {found['whole']['near_auroc']:.1f}", flush=True)
        told.append(found)
    return told


def near_and_far(known: Case, runs: list[dict[str, Any]]) -> Found:
    """The mean figures of a variant, and its near AUROC by split."""
    each = [of_set([{"near": list(known.near), "figures": {"": [quick(scores)]}}], "") for scores in runs]
    told: Found = {key: mean([one[key] for one in each]) for key in TOLD}
    return told | {"near_auroc_runs": [one["near_auroc"] for one in each]}


def quick(scores: dict[str, Any]) -> dict[str, Found]:
    """The figures of every out set, with few resamples, since intervals are not told."""
    return {name: figures(scores["test"], x, resamples=2) for name, x in scores.items() if name != "test"}


# ---------------------------------------------------------------- the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--ablations", action="store_true", help="what each choice is worth on set 1, instead of the sets"
    )
    what.add_argument("--blind", action="store_true", help="the sets on which nothing was chosen, instead of the four")
    what.add_argument("--speed", action="store_true", help="what codebooks cost, instead of the sets")
    parser.add_argument("--sets", type=int, nargs="+", choices=(*CASES, *BLIND), help="some of them only")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the models; three where they are trained here")
    parser.add_argument("--splits", type=int, nargs="+", default=list(SPLITS), help="seeds of the calibration's splits")
    parser.add_argument("--no-nervecode", action="store_true", help="leave nervecode out")
    parser.add_argument("--rounds", type=int, default=11, help="of the speed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", type=Path, help="results/ood-<sets, blind, ablations or speed>-cpu.json by default")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print Markdown tables, write the JSON after each case."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    subject = next((name for name in ("ablations", "speed", "blind") if getattr(options, name)), "sets")
    path = options.json or results_file("ood", subject, "cpu")
    if options.ablations:
        rows = ablate(splits=options.splits, data=options.data)
        write(path, "ood-ablations", "cpu", set=1, splits=options.splits, rows=rows)
        print(ablation_table(rows))
    elif options.speed:
        found = {
            "calibrating": speed.calibrating(rounds=max(3, options.rounds // 2), data=options.data),
            "stepping": speed.stepping(rounds=options.rounds),
        }
        write(path, "ood-speed", "cpu", **found)
        print(speed_tables(found))
    else:
        sets(options, path)
    print(f"wrote {path}")


def sets(options: argparse.Namespace, path: Path) -> None:
    """The sets, one after the other."""
    cases: list[Found] = []
    script, offered = ("ood-blind", BLIND) if options.blind else ("ood", CASES)
    for number in options.sets or offered:
        for seed in options.seeds or (CASES | BLIND)[number][1]:
            one = measure(number, seed, splits=options.splits, data=options.data, nervecode=not options.no_nervecode)
            cases.append(one)
            told = summary(cases)
            print(f"{one['name']} {seed}: {one['seconds']:.0f} s, not applicable: {one['not_applicable']}", flush=True)
            write(path, script, "cpu", cases=cases, summary=told)
    print(detection_tables(told, {one["name"]: one["near"] for one in cases}))
    print(f"\n{alarm_table(cases)}")
    for one in cases:
        if "tokens" in one:
            outs = list(one["tokens"]["figures"]["Energy"])
            rows = [
                [method, *(f"{found[out]['auroc']:.1f} / {found[out]['fpr95']:.1f}" for out in outs)]
                for method, found in one["tokens"]["figures"].items()
            ]
            print(f"\n{markdown(['per token', *outs], rows)}")


if __name__ == "__main__":
    main()
