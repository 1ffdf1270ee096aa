"""Try every model of the zoo and write what came of it to docs/zoo.md.

Run: python tests/zoo/table.py
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.entry import Entry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "zoo.md"

HEAD = """# The zoo

On each of these models, small and with random weights, noesis keeps its promises. Each is tried with every layer
observed:

- outputs, gradients, buffers and the random numbers that come next are equal to the last bit, in training, in
  evaluation and in `inference_mode`;
- the keys of `state_dict`, parameters, classes and their names are as before, and `unwrap()` gives back every class;
- every layer is measured, with as many numbers as it gave, or is named as not measured or as never run;
- deep copies are observed by themselves, and `save_pretrained` gives a checkpoint that the bare class loads;
- with a codebook, every block that has the samples in front leaves a vector of each, and outputs stay the same;
- `torch.compile(fullgraph=True)` makes one graph where it makes one of the bare model.

The tests are in `tests/zoo`, and `python tests/zoo/table.py` writes this page.

| model | kind | `layers="blocks"` finds | `layers="all"` | compiled |
|---|---|---|---|---|
"""


def row(entry: Entry, observed: str, compiled: str) -> str:
    """A line of the table."""
    blocks = ", ".join(f"{count} x `{name}`" for name, count in entry.blocks.items())
    return f"| `{entry.name}` | {entry.kind} | {blocks} | {observed} | {compiled} |"


def observed(entry: Entry) -> str:
    """How many layers there are, and what became of those that gave no numbers."""
    import noesis
    from zoo import models
    from zoo.test_zoo import seeded

    wrapped = noesis.wrap(models.model_of(entry), layers="all")
    seeded(wrapped, entry)
    trace = wrapped.trace()
    parts = [f"{len(trace.layers)} layers"]
    parts += [f"{len(trace.never_ran)} never ran"] if trace.never_ran else []
    parts += [f"{len(trace.unmeasured)} not measured"] if trace.unmeasured else []
    return ", ".join(parts)


def tried(entry: Entry) -> str:
    """A line of the table, once every promise was kept."""
    import pytest

    from zoo import models, test_zoo

    for training in (True, False):
        test_zoo.test_outputs_and_gradients_are_bitwise_equal(entry, training)
    test_zoo.test_inference_is_bitwise_equal(entry)
    test_zoo.test_the_model_does_not_notice_and_is_given_back(entry)
    test_zoo.test_every_layer_is_measured_or_named(entry)
    test_zoo.test_blocks_are_what_one_would_call_so(entry)
    test_zoo.test_a_deep_copy_is_observed_by_itself(entry)
    test_zoo.test_codebooks_keep_vectors_of_every_sample(entry)
    with TemporaryDirectory() as folder, contextlib.suppress(pytest.skip.Exception):
        test_zoo.test_save_pretrained_and_back(entry, Path(folder))
    return row(entry, observed(entry), test_zoo.compiles(entry, models.model_of(entry)))


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))  # as a script, it finds its neighbours here
    from zoo import models

    lines = [tried(entry) for entry in models.ALL.values()]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
