"""The example of two prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.checkout import load_example

pytestmark = [pytest.mark.data, pytest.mark.usefixtures("one_thread")]


def test_two_prompts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("llm").main([str(data / "stories260k"), "Tom was happy.", "Tom was sad.", "--new-tokens", "3"])
    out = capsys.readouterr().out
    assert out.count("Trace of 3 steps x 5 layers x 7 stats") == 2
    assert "tokens only in a: '▁happy' at" in out
    assert "Comparison of 5 layers: distance " in out
