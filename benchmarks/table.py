"""Put what was measured into the README: the table below `<!-- overhead -->` from the results file.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overhead-cpu.json"


def table(results: dict) -> str:
    """The table in Markdown, with what it was measured on."""
    lines = ["| threads | output | five floats | noesis | ratio (middle half) |", "|---|---|---|---|---|"]
    for case in results["cases"]:
        low, high = case["ratio_quartiles"]
        costs = " | ".join(f"{case[name]:.0f} µs" for name in ("hooks_us", "noesis_us"))
        row = f"| {case['threads']} | {case['size']} | {costs} | {case['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
        lines.append(row)
    machine = results["machine"]
    lines.append(f"\n{machine['device']}, torch {machine['torch']}, float32; `benchmarks/overhead.py`.")
    return "\n".join(lines)


def main() -> None:
    """Replace the table in the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- overhead -->\n)(.*?)(?=\n<!-- end -->)", re.DOTALL)
    new, count = pattern.subn(lambda match: match[1] + table(json.loads(RESULTS.read_text())), text)
    if count != 1:
        raise SystemExit("README.md has no part between <!-- overhead --> and <!-- end -->")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
