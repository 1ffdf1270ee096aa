"""Fixtures of tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import Done, Run
from noesis.cli import command_line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call a command in this process."""

    def call(*argv: object) -> Done:
        capsys.readouterr()
        code = command_line.main([str(each) for each in argv])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def llama(data: Path) -> Path:
    """A trained Llama."""
    return data / "stories260k"
