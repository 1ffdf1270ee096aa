"""Runs from files and folders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .. import files
from ..errors import BadFile, MissingFile
from ..files import v01
from .soulprint import Soulprint
from .trace import Trace

#: Names of a folder that stand for the folder's one run.
TRACES = ("trace.safetensors", "trace.json", "trace.json.gz")
SOULPRINTS = ("soulprint.safetensors", "soulprint.json", "soulprint.json.gz")


def load_run(path: files.PathLike, run: str | None = None) -> Trace | Soulprint:
    """The trace or soulprint in a file or folder, of a folder that holds both the trace.

    Args:
        path: a file written by `save` or by noesis v0.1, or a folder of such files.
        run: which run, where files of v0.1 of several runs share the folder.

    Raises:
        NoesisError: when there is none, it is broken, or of several runs.

    Examples:
        >>> import tempfile, noesis
        >>> from noesis.results.loading import load_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = noesis.Soulprint([0.0], [1.0], ["conv"]).save(f"{folder}/a.json")
        ...     load_run(f"{folder}/a.json").layers
        ['conv']
    """
    path = Path(path)
    if not path.is_dir():
        return _load_file(path, run)
    if _one_of(path, TRACES) or v01.trace_files(path):
        return Trace.load(path, run)
    if _one_of(path, SOULPRINTS):
        return Soulprint.load(path)
    raise MissingFile(
        f"{path} holds no run",
        f"{TRACES[0]}, {SOULPRINTS[0]} or files of noesis v0.1",
        "Pass a file, or a folder that noesis trace wrote",
    )


def load_runs(folder: files.PathLike) -> list[Trace | Soulprint]:
    """Every run in a folder and in the folders directly below it.

    A soulprint that lies beside the trace of the same run is not a run of its own; nor is a file
    of another kind.

    Raises:
        NoesisError: when there is none, or a file is broken.

    Examples:
        >>> import tempfile, noesis
        >>> from noesis.results.loading import load_runs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number in range(3):
        ...         _ = noesis.Soulprint([0.0], [1.0], ["conv"]).save(f"{folder}/{number}/soulprint.safetensors")
        ...     len(load_runs(folder))
        3
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFile(f"{folder} is no folder", "a folder of traces or soulprints", "Check the path")
    below = sorted(child for child in folder.iterdir() if child.is_dir())
    found = [run for each in (folder, *below) for run in _runs_of(each)]
    if not found:
        raise MissingFile(f"{folder} holds no run", "traces or soulprints in it or one level below", "Check the path")
    return found


def _runs_of(folder: Path) -> Iterator[Trace | Soulprint]:
    read = cache(v01.read_steps)  # a soulprint takes the names of its rows from traces beside it
    parts = set(v01.trace_files(folder))
    traces: dict[Any, Trace] = {run.run_id: Trace._from_v01(run) for run in v01.read_runs(folder, read)}
    soulprints: list[Soulprint] = []
    for path in sorted(folder.iterdir()):
        if path in parts or not path.is_file() or not (path.suffix == ".safetensors" or files.is_json(path)):
            continue
        run = _run_in(_contents(path), read=read)
        if isinstance(run, Trace):
            traces.setdefault(run.meta.get("run", path), run)
        elif run is not None:
            soulprints.append(run)
    yield from traces.values()
    yield from (each for each in soulprints if each.meta.get("run") not in traces)


def _load_file(path: Path, run: str | None) -> Trace | Soulprint:
    contents = _contents(path)
    found = _run_in(contents, run)
    if found is None:
        raise BadFile(
            f"{path} is no run: its format is {contents.format!r}",
            "a trace or a soulprint",
            "Pass a file that Trace.save or Soulprint.save wrote",
        )
    return found


def _contents(path: Path) -> files.Contents:
    """What a file holds that may be a trace, a soulprint, or anything else."""
    return files.read_contents(path, "trace or soulprint", numbers=(*Trace.numbers, *Soulprint.numbers), strict=False)


def _run_in(
    contents: files.Contents, run: str | None = None, read: v01.StepsReader = v01.read_steps
) -> Trace | Soulprint | None:
    """The run in a file; None if it holds something else."""
    old = contents.header["type"] if v01.looks_like(contents.header) else None
    if old == v01.SOULPRINT:
        return Soulprint._from_v01(v01.print_of(contents.header, Path(contents.path), read))
    if contents.format == "noesis.soulprint":
        return Soulprint._of(contents)
    if old == v01.TRACE or contents.format == "noesis.trace":
        return Trace._read(contents, run)
    return None


def _one_of(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)
