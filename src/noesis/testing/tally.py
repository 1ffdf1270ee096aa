"""Which snapshots a session of pytest took, of all its processes, and which of those that are there none asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Tally:
    """What became of snapshots, and which tests could have asked for them.

    Attributes:
        states: of each file, "written", "unchanged" or "compared".
        tests: of each test file, the ids of its tests.
        partial: test files of which not all tests were chosen.
        passed: ids of tests that passed.
    """

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.tests: dict[str, list[str]] = {}
        self.partial: set[str] = set()
        self.passed: set[str] = set()

    def used(self, path: Path) -> bool:
        """Whether a test of this process asked for it."""
        return str(path) in self.states

    def add(self, path: Path, state: str) -> None:
        """A test asked for it; the first time counts."""
        self.states.setdefault(str(path), state)

    def collected(self, path: Path, test: str) -> None:
        """A test of a file will run, here or in another process."""
        self.tests.setdefault(str(path), []).append(test)

    def packed(self) -> dict[str, Any]:
        """What another process adds to its own by `merge`; plain lists, dicts and strings."""
        return {"states": self.states, "tests": self.tests, "partial": sorted(self.partial)}

    def merge(self, packed: dict[str, Any]) -> None:
        """Add what another process has seen."""
        for path, state in packed["states"].items():
            if self.states.get(path) != "written":
                self.states[path] = state
        self.tests |= packed["tests"]
        self.partial |= set(packed["partial"])

    def of(self, state: str) -> list[Path]:
        """The files of which this became."""
        return sorted(Path(path) for path, found in self.states.items() if found == state)

    def obsolete(self, folders: Iterable[tuple[str, Path]]) -> list[Path]:
        """Those that no test asked for, in the folders of test files of which all tests ran and passed."""
        whole = (
            folder for file, folder in folders if file not in self.partial and self.passed >= set(self.tests[file])
        )
        return sorted(path for folder in whole for path in folder.glob("*.json") if not self.used(path))
