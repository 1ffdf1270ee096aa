"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import processes
from helpers.checkout import DATA

pytest.register_assert_rewrite("by_hand", "compared")

# Triton decides when a kernel is defined whether it will be compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights and data, or a skip that names it."""
    if not DATA.is_dir():
        pytest.skip(f"needs the data folder ({DATA}); set NOESIS_DATA")
    return DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For all tests of a file and its fixtures: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    with processes.one_thread():
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile knows nothing of what other tests compiled."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


#: Folders and files whose tests run on every supported torch, by `tools/try_torch.py`: they need no other library.
CORE = {
    *("contexts", "internals", "kernels", "test_robustness", "test_codebooks", "test_surprise", "test_capture"),
    *("test_breaks", "test_clock", "test_compile", "test_gradients", "test_observing", "test_off", "test_recorder"),
    *("test_subclassing", "test_captures_of_versions"),
}


def _in_core(path: Path) -> bool:
    return not CORE.isdisjoint((path.parent.name, path.stem))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m core`, other files are not even imported: what they import may be missing."""
    if config.option.markexpr != "core":
        return None
    if collection_path.is_dir():  # for its conftest
        others = not any(map(_in_core, collection_path.rglob("test_*.py")))
    else:
        others = collection_path.name.startswith("test_") and not _in_core(collection_path)
    return True if others else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the core; of slow tests, those alone that say so themselves."""
    for item in items:
        if _in_core(item.path) and item.get_closest_marker("slow") is None:
            item.add_marker("core")
