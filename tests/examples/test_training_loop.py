"""The example of a training loop: it trains, and finds the first NaN."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from helpers.checkout import load_example

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def training_loop() -> ModuleType:
    return load_example("training_loop")


def test_it_trains(training_loop: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert training_loop.main(["--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^epoch \d  loss ([\d.]+)", printed, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert "Trace of 29 steps x 5 layers" in printed
    assert "first NaN" not in printed


def test_it_finds_the_first_nan(training_loop: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert training_loop.main(["--lr", "1", "--epochs", "4"]) == 1
    printed = capsys.readouterr().out
    found = re.search(r"^first NaN or infinity: epoch (\d), step (\d+), layer (\d)$", printed, re.MULTILINE)
    assert found
    assert int(found[2]) > 0, "it takes steps to explode"
    assert f"epoch {int(found[1]) + 1}" not in printed, "it stops there"
