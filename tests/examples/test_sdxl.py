"""The example of a pipeline: seeds compared, with their pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

import noesis
from helpers.checkout import load_example
from helpers.pipelines import build

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("sdxl").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    load_example("sdxl").main(
        ["--model", str(tmp_path / "model"), "--steps", "2", "--size", "32", "--seeds", "1", "2", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    a, b = (noesis.Soulprint.load(out / f"seed_{seed}.safetensors") for seed in (1, 2))
    assert (a.meta["seed"], b.meta["seed"], a.steps) == (1, 2, 2)
    assert repr(noesis.compare(a, b)) in printed
    assert {path.name for path in out.iterdir()} == {
        "seed_1.safetensors", "seed_2.safetensors", "seed_1.png", "seed_2.png", "comparison.png",
    }  # fmt: skip
