"""Threads of this process, and other processes that find this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from helpers.checkout import SOURCE

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread: the same bits on any machine, and nothing that a fork would lose."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(count: int, run: Callable[[int], T]) -> list[T]:
    """What `run(0)` to `run(count - 1)` give, called at the same time; the first exception of any is raised."""
    found: dict[int, T] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def call(number: int) -> None:
        try:
            barrier.wait()
            found[number] = run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [found[number] for number in range(count)]


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this checkout, and computes in one thread."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def python(*arguments: str | Path, timeout: float | None = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, with these variables in its environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def torchrun(ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A script on so many ranks."""
    return python("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", *arguments)
