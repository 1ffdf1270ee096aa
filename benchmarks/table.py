"""Put what was measured into the pages: tables between their markers, from `results/*.json`.

In `docs/benchmarks.md`, `<!-- overhead -->` to `<!-- end -->` holds what observing costs, and `<!-- detection -->` to
`<!-- end -->` how well strange inputs are told; in the README, `<!-- cost -->` to `<!-- end -->` holds five rows of it.

python benchmarks/table.py            # write them
python benchmarks/table.py --check    # say whether the pages are what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KERNEL_SIZES = ("64 KB", "1 MB", "16 MB", "512 MB", "4 GB")
MB = 1 << 20
PAGES = {"README.md": ("cost",), "docs/benchmarks.md": ("overhead", "detection")}
#: The README's rows, by model and layers.
FIRST = {
    ("mlp", "leaves"): "a small MLP, all layers, 128 inputs",
    ("resnet50", "blocks"): "ResNet-50, blocks, 2 images",
    ("gpt2-train", "blocks"): "GPT-2, blocks, training on 128 tokens",
    ("llama-decode", "blocks"): "Llama 3.2 1B, blocks, one token",
    ("sdxl", "blocks70"): "SDXL's U-Net, blocks, 256 x 256 pixels",
}
Found = dict[str, Any]


def load(folder: Path) -> dict[str, list[Found]]:
    """The results files by script; what is in another format is named and left out."""
    found: dict[str, list[Found]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        if "script" in one:
            found.setdefault(one["script"], []).append(one)
        else:
            print(f"left out {path.name}: not written by these scripts; measure again", file=sys.stderr)
    return found


def render(folder: Path = RESULTS) -> str:
    """All tables in Markdown; each names what it was measured on."""
    found = load(folder)
    parts = []
    for machine, files in by_machine(found.get("overhead", [])):
        cases = [case for file in files for case in file["cases"] if measured(case)]
        stacks = [case for case in cases if case["model"] == "stack"]
        alone = [case for case in cases if case["mode"] == "outputs"]
        whole = [case for case in cases if case["model"] != "stack" and case["mode"] != "outputs"]
        parts += [f"{models_table(whole)}\n\n{machine}"] if whole else []
        parts += [f"{alone_table(alone)}\n\n{machine}"] if alone else []
        parts += [f"{layers_table(stacks)}\n\n{machine}"] if stacks else []
    for machine, files in by_machine(found.get("kernel", [])):
        if files[0]["machine"]["kind"] == "cuda":  # elsewhere the copy is no ceiling
            parts.append(f"{kernel_table([case for file in files for case in file['cases']])}\n\n{machine}")
    for machine, files in by_machine(found.get("memory", [])):
        parts.append(f"{memory_table([case for file in files for case in file['cases']])}\n\n{machine}")
    return "\n\n".join(parts)


def render_first(folder: Path = RESULTS) -> str:
    """The README's rows: what observing costs by itself, and what it adds to a whole step where that was measured."""
    files = load(folder).get("overhead", [])
    alone = [file for file in files if any(case["mode"] == "outputs" for case in file["cases"])]
    if not alone:
        return ""
    machine = measured_on(alone[0])
    cases = [case for file in files if measured_on(file) == machine for case in file["cases"] if measured(case)]
    found = {(case["model"], case["layers"], case["mode"]): case for case in cases}
    rows = []
    for (model, layers), what in FIRST.items():
        if (case := found.get((model, layers, "outputs"))) is None:
            continue
        step = what
        added = {one: duration(case["variants"][one]["added_seconds"]) for one in ("noesis", "hooks")}
        if whole := found.get((model, layers, "eager")):
            for one in added:
                added[one] += f" ({percent(whole['variants'][one]['overhead_percent'])})"
            step += f", in {duration(whole['variants']['bare']['seconds'])}"
        rows.append([step, str(case["observed"]), added["noesis"], added["hooks"]])
    return f"{markdown(['one step of', 'layers observed', 'noesis adds', 'hooks add'], rows)}\n\n{machine}"


def measured(case: Found) -> bool:
    """Whether a case has figures; one that failed is named and left out."""
    if "failed" in case:
        print(f"left out {case['model']} {case['layers']} {case['mode']}: {case['failed']}", file=sys.stderr)
    return "failed" not in case


def by_machine(files: list[Found]) -> list[tuple[str, list[Found]]]:
    """The files, grouped by a line that says what they were measured on and how."""
    groups: dict[str, list[Found]] = {}
    for file in files:
        groups.setdefault(measured_on(file), []).append(file)
    return list(groups.items())


def measured_on(file: Found) -> str:
    """The machine and the script, in a line."""
    machine = file["machine"]
    parts = [machine["device"], f"torch {machine['torch']}"]
    parts += [f"triton {machine['triton']}"] if machine["triton"] and machine["kind"] == "cuda" else []
    return f"{', '.join(parts)}; `benchmarks/{file['script']}.py`."


def render_detection(folder: Path = RESULTS) -> str:
    """How well strange inputs are told, over all sets; what it was measured on."""
    return "\n\n".join(
        f"{detection_table(file['summary'])}\n\n{machine}"
        for machine, files in by_machine(load(folder).get("ood", []))
        for file in files
    )


# ---------------------------------------------------------------- one table each


def models_table(cases: list[Found]) -> str:
    """What a step of a model costs more, by noesis and by each peer that was measured."""
    peers = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    peers = [name for name in peers if name not in ("bare", "noesis") and applies(name, cases)]
    threads = any(case["threads"] for case in cases)
    head = ["model", *(["threads"] if threads else []), "mode", "layers", "bare step", "noesis (quartiles)", *peers]
    rows = []
    for case in cases:
        variants = case["variants"]
        noesis = variants["noesis"]
        low, high = noesis["overhead_percent_quartiles"]
        sizes = "".join(f", {name} {value}" for name, value in case["sizes"].items())
        row = [f"{case['model']}{sizes}", *([str(case["threads"] or "")] if threads else []), case["mode"]]
        row += [f"{case['layers']} ({case['observed']})", duration(variants["bare"]["seconds"])]
        row += [f"{percent(noesis['overhead_percent'])} ({percent(low)} to {percent(high)})"]
        rows.append(row + [beside(variants.get(name)) for name in peers])
    return markdown(head, rows)


def applies(name: str, cases: list[Found]) -> bool:
    """Whether a peer applies to any of the cases; if not, it has no column."""
    return any("not_applicable" not in case["variants"][name] for case in cases if name in case["variants"])


def beside(told: Found | None) -> str:
    """What a peer adds, on how many layers if not on all."""
    if told is None:
        return ""
    if "seconds" not in told:
        return "failed" if "failed" in told else "n/a"
    note = f" ({told['layers']} layers)" if "note" in told else ""
    return f"{percent(told['overhead_percent'])}{note}"


def alone_table(cases: list[Found]) -> str:
    """What observing costs without the model, and its share of what each peer costs on the same outputs."""
    peers = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    peers = [name for name in peers if name not in ("bare", "noesis", "control") and applies(name, cases)]
    rows = []
    for case in cases:
        ours = case["variants"]["noesis"]
        sizes = "".join(f", {name} {value}" for name, value in case["sizes"].items())
        row = [f"{case['model']}{sizes}", f"{case['layers']} ({case['observed']})", duration(ours["added_seconds"])]
        for name in peers:
            told = case["variants"].get(name, {})
            note = f", {told['layers']} layers" if "note" in told else ""
            share = told.get("noesis_adds")
            row.append(f"{ratio(share['share'], share['share_quartiles'])}{note}" if share else "n/a")
        rows.append(row)
    return markdown(["outputs of", "layers", "noesis", *(f"of {name}" for name in peers)], rows)


def layers_table(cases: list[Found]) -> str:
    """What one layer costs more, by the size of its output."""
    rows = []
    for case in cases:
        hooks, noesis = case["variants"].get("hooks", {}), case["variants"]["noesis"]
        share = hooks.get("noesis_adds")
        row = [str(case["threads"] or ""), case["mode"], case["sizes"]["output"]]
        row += [f"{hooks['added_us_per_layer']:.0f} µs" if "seconds" in hooks else ""]
        row += [
            f"{noesis['added_us_per_layer']:.0f} µs",
            ratio(share["share"], share["share_quartiles"]) if share else "",
        ]
        rows.append(row)
    return markdown(["threads", "mode", "output", "five floats", "noesis", "ratio (quartiles)"], rows)


def kernel_table(cases: list[Found]) -> str:
    """The kernel's bandwidth beside a copy's, with a cold cache."""
    rows = []
    for case in cases:
        if case["size"] in KERNEL_SIZES:
            cold = case["cold"]
            row = [case["dtype"], case["size"], f"{cold['kernel']['gb_per_s']:.0f} GB/s"]
            row += [
                f"{cold['copy']['gb_per_s']:.0f} GB/s",
                ratio(cold["share_of_copy"], cold["share_of_copy_quartiles"]),
            ]
            rows.append(row)
    return markdown(["dtype", "tensor", "kernel reads", "copy moves", "share (quartiles)"], rows)


def memory_table(cases: list[Found]) -> str:
    """Peak memory added."""
    rows = [
        [
            case["model"],
            f"{case['layers']} ({case['observed']})",
            f"{case['bare_bytes'] / MB:.0f} MB",
            f"{case['added_bytes']['noesis'] / MB:+.1f} MB",
            f"{case['recorder_bytes'] / MB:.1f} MB",
        ]
        for case in cases
    ]
    return markdown(["model", "layers", "bare peak", "noesis adds", "of it the recorder's tensors"], rows)


# ---------------------------------------------------------------- detection


def detection_tables(summary: Found, near: dict[str, list[str]]) -> str:
    """A table per set and one over all: AUROC (with half the width of its interval) and FPR95, in percent."""
    parts = []
    for name, methods in summary["sets"].items():
        outs = list(next(iter(methods.values()))["outs"])
        head = [name, *(f"{out} (near)" if out in near[name] else out for out in outs), "mean AUROC", "far FPR95"]
        rows = [
            [method, *(two(told["outs"][out]) for out in outs), f"{told['auroc']:.1f}", f"{told['far_fpr95']:.1f}"]
            for method, told in methods.items()
        ]
        parts.append(markdown(head, rows))
    return "\n\n".join([*parts, detection_table(summary)])


def detection_table(summary: Found) -> str:
    """The means over the sets, and each set's mean AUROC; methods that lack a set are left out."""
    sets = summary["sets"]
    head = ["mean over the sets", *sets, "AUROC", "near AUROC", "far FPR95"]
    rows = [
        [method, *(f"{found[method]['auroc']:.1f}" for found in sets.values())]
        + [f"{told[key]:.1f}" for key in ("auroc", "near_auroc", "far_fpr95")]
        for method, told in summary["overall"].items()
    ]
    return markdown(head, rows)


def two(told: Found) -> str:
    """AUROC and its interval's half width, and FPR95."""
    low, high = told["auroc_interval"]
    return f"{told['auroc']:.1f} ± {(high - low) / 2:.1f} / {told['fpr95']:.1f}"


def alarm_table(cases: list[Found]) -> str:
    """False alarms by alpha: calibrated as in the comparison, and on one half of the test set."""
    alphas = list(cases[0]["false_alarms"]["runs"][0])
    head = ["set, seed", "calibrated on", *(f"at {alpha}" for alpha in alphas)]
    rows = []
    for case in cases:
        told, name = case["false_alarms"], f"{case['name']}, {case['seed']}"
        means = {alpha: sum(run[alpha] for run in told["runs"]) / len(told["runs"]) for alpha in alphas}
        trained = "trained on" in told["calibrated_on"]
        note = told["calibrated_on"] + (": no guarantee" if trained else "")
        for where, found in ((note, means), ("half of the test set", told.get("held_out"))):
            rows += [[name, where, *(f"{found[alpha]:.3f}" for alpha in alphas)]] if found else []
    return markdown(head, rows)


def ablation_table(rows: list[Found]) -> str:
    """What each choice is worth: of the whole score, and of the last block alone."""
    head = ["", "changed", "near AUROC", "far AUROC", "far FPR95", "last block alone: near AUROC", "far FPR95"]
    keys = ("near_auroc", "far_auroc", "far_fpr95")
    lines = []
    for row in rows:
        alone = row.get("alone")
        line = [row["group"], row["name"], *(f"{row['whole'][key]:.1f}" for key in keys)]
        lines.append(line + ([f"{alone[key]:.1f}" for key in ("near_auroc", "far_fpr95")] if alone else ["", ""]))
    return markdown(head, lines)


def speed_tables(found: Found) -> str:
    """What calibrating and stepping with codebooks take, against the bare model."""
    parts = []
    for name, case in found.items():
        rows = []
        for variant, told in case["variants"].items():
            if variant == "bare":
                rows.append([name, variant, duration(told["seconds"]), "", ""])
                continue
            beside = told.get("share_of_nervecode")
            shown = ratio(beside["share"], beside["share_quartiles"]) if beside else ""
            times = ratio(told["ratio"], told["ratio_quartiles"])
            rows.append([name, variant, duration(told["seconds"]), times, shown])
        parts.append(markdown(["", "variant", "time", "against bare (quartiles)", "of nervecode's cost"], rows))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- how things are written


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float) -> str:
    """Two digits below ten, none above a hundred."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} %"


def ratio(middle: float, quartiles: list[float] | None) -> str:
    """A ratio and its spread."""
    return f"{middle:.2f}" + (f" ({quartiles[0]:.2f} to {quartiles[1]:.2f})" if quartiles else "")


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def put(text: str, name: str, tables: str) -> tuple[str, int]:
    """The text with the tables in its part of this name, and how many such parts it has."""
    part = re.compile(rf"(<!-- {name} -->\n)(.*?)(?=\n<!-- end -->)", re.DOTALL)
    return part.subn(lambda match: match[1] + tables, text)


def main(arguments: list[str] | None = None) -> None:
    """Write the tables into the pages, or check that they are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page differs; write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that has README.md and docs/benchmarks.md")
    options = parser.parse_args(arguments)
    tables = {"cost": render_first, "overhead": render, "detection": render_detection}
    tables = {name: write(options.results) for name, write in tables.items()}
    if not tables["overhead"]:
        raise SystemExit(f"{options.results} holds no results: run benchmarks/overhead.py first")
    for page, names in PAGES.items():
        path = options.root / page
        new = text = path.read_text(encoding="utf-8")
        for name in names:
            new, count = put(new, name, tables[name])
            if count != 1:
                raise SystemExit(f"{path} has no part between <!-- {name} --> and <!-- end -->")
        if not options.check:
            path.write_text(new, encoding="utf-8")
        elif new != text:
            raise SystemExit(f"{path} is not what the results say: run python benchmarks/table.py")


if __name__ == "__main__":
    main()
