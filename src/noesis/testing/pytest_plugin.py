"""The plugin of pytest: `soulprint_snapshot`, `--soulprint-update`, and what it says at the end.

pytest imports this in every session, so nothing here imports torch, NumPy or a result before a test asks for one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .fixture import FOLDER, SoulprintSnapshot, shown
from .tally import Tally

TALLY = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--soulprint-update`."""
    parser.getgroup("noesis").addoption(
        "--soulprint-update",
        action="store_true",
        help="write the snapshots of soulprint_snapshot that are missing or differ",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.stash[TALLY] = Tally()


@pytest.fixture
def soulprint_snapshot(request: pytest.FixtureRequest) -> SoulprintSnapshot:
    """Compare a run of a model with the file beside the test: `soulprint_snapshot(wrapped)`."""
    node = request.node
    classes = [each.name for each in node.listchain() if isinstance(each, pytest.Class)]
    return SoulprintSnapshot(
        node.path,
        "::".join([*classes, node.name]),  # the id would have the group of xdist in it
        shlex.quote(node.nodeid),
        request.config.stash[TALLY],
        update=request.config.getoption("soulprint_update"),
    )


# ---------------------------------------------------------------- which tests could have asked


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Of these files not all tests run."""
    for item in items:
        item.config.stash[TALLY].partial.add(str(item.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Which tests run, and of which files they may not be all."""
    tally, config = session.config.stash[TALLY], session.config
    for item in session.items:
        tally.collected(item.path, item.nodeid)
    if config.getoption("lf", False) or any("::" in argument for argument in config.args):
        tally.partial |= set(tally.tests)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands over what it counted."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["soulprint_snapshots"] = session.config.stash[TALLY].packed()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended, well if there is an output."""
    packed = getattr(node, "workeroutput", {}).get("soulprint_snapshots")
    if packed is not None:
        node.config.stash[TALLY].merge(packed)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With `--soulprint-update`, what was written, and what no test asks for any more."""
    if not config.getoption("soulprint_update"):
        return
    tally = config.stash[TALLY]
    tally.passed = {report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"}
    written = tally.of("written")
    obsolete = tally.obsolete((file, Path(file).parent / FOLDER / Path(file).stem) for file in tally.tests)
    terminalreporter.section("soulprint snapshots")
    unchanged = len(tally.of("unchanged"))
    terminalreporter.line(f"{len(written)} written, {unchanged} unchanged, {len(obsolete)} obsolete")
    for path in written:
        terminalreporter.line(f"written: {shown(path)} ({path.stat().st_size / 1000:.1f} kB)")
    for path in obsolete:
        terminalreporter.line(f"obsolete, delete it if no other test needs it: {shown(path)}")
