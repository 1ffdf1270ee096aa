"""Running a model over calibration data: who sees the progress bar."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

import pytest
import torch

import noesis
from noesis.wrapping.calibration_loop import bar

pytest.importorskip("tqdm")


def calibrate(progress: bool = True) -> None:
    wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8)), codebook=noesis.Codebook())
    wrapped.calibrate([torch.randn(60, 4) for _ in range(3)], progress=progress)


def test_a_notebook_has_a_bar_though_it_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate()
    assert capsys.readouterr().err == ""  # stderr is no terminal here, and nobody looks
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", ModuleType("ipykernel.zmqshell"))
    calibrate()
    assert "calibrating:   0%|" in capsys.readouterr().err
    calibrate(progress=False)
    assert capsys.readouterr().err == ""


def test_without_tqdm_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    batches = [1, 2]
    assert bar(batches, True) is batches


def test_what_tqdm_misses_in_a_notebook_is_no_warning_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns where ipywidgets are missing."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tqdm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", ModuleType("ipykernel.zmqshell"))
    shell = ModuleType("IPython")
    shell.get_ipython = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert list(bar([1, 2], True)) == [1, 2]
    assert warned == []
