"""The example of a small GPT: noesis changes nothing, and finds what was planted."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from helpers.checkout import load_example

pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
STEPS = 200
OUT = [f"blocks.{block}.{name}" for block in range(3) for name in ("out", "mlp.2")]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("tiny_gpt")


@pytest.fixture(scope="module")
def text(data: Path) -> str:
    return (data / "tinyshakespeare.txt").read_text(encoding="utf-8")


def test_losses_are_bitwise_those_of_the_bare_model(example: ModuleType, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    losses, alarms, trace = example.train(text, STEPS, log=path)
    bare, _, _ = example.train(text, STEPS, bare=True)
    assert losses == bare
    assert alarms == []
    assert losses[-1] < 3.0 < losses[0]
    assert len(trace) == len(losses) == STEPS
    assert not trace.never_ran
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9, STEPS, 10))
    assert lines[-1]["noesis/max_of_layers/std"] == trace["std"][-1].max()


@pytest.mark.parametrize("seed", range(2))
def test_too_high_a_learning_rate_is_located(example: ModuleType, text: str, seed: int) -> None:
    losses, alarms, _ = example.train(text, STEPS, break_at=120, seed=seed)
    assert alarms[0].kind == "exploding"
    assert alarms[0].step in (121, 122), "one or two updates after it"
    assert alarms[0].layer in OUT, "where a residual branch ends"
    assert len(losses) == 130, "it stopped at the next check"


def test_the_command(example: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([str(data / "tinyshakespeare.txt"), "--steps", "60", "--break-at", "40"]) == 1
    printed = capsys.readouterr().out
    assert "50 steps, loss" in printed
    assert "\nstep 42: layer 'blocks." in printed
