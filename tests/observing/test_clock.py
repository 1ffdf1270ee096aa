"""`trace.seconds`: the time at which the host began each step, or NaN, and never a wrong one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import noesis
from helpers.models import small
from helpers.processes import python
from noesis.distributed import merge
from noesis.kernels.stepping import Clock
from noesis.results import ALWAYS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Timed:
    """Calls a model, and knows between which times each call was."""

    def __init__(self, wrapped: noesis.Wrapped, call: Callable[..., Any] | None = None) -> None:
        self.wrapped, self.call = wrapped, wrapped if call is None else call
        self.calls: list[tuple[float, float]] = []
        self.run()

    def run(self) -> None:
        """Begin a run."""
        before = perf_counter()
        self.wrapped.reset()
        self.began, self.calls = (before, perf_counter()), []

    def __call__(self, times: int = 1) -> None:
        for _ in range(times):
            before = perf_counter()
            self.call(torch.ones(2, 4))
            self.calls.append((before, perf_counter()))

    def fits(self, trace: noesis.Trace) -> list[bool]:
        """Whether each step of a trace began within the call of its number, as far as it has a time."""
        known = np.flatnonzero(~np.isnan(trace.seconds))
        earliest, latest = self.began
        calls = [(*self.calls[trace.steps[at]], trace.seconds[at]) for at in known]
        return [before - latest <= time <= after - earliest for before, after, time in calls]


WAYS: dict[str, Callable[[], Timed]] = {
    "eager": lambda: Timed(noesis.wrap(small())),
    "the container compiled": lambda: Timed(wrapped := noesis.wrap(small()), torch.compile(wrapped, fullgraph=True)),
    "a compiled model": lambda: Timed(noesis.wrap(torch.compile(small()))),
    "called past the container": lambda: Timed(noesis.wrap(model := torch.compile(small())), model),
    "compiled where it stands": lambda: Timed(noesis.wrap(_compiled_in_place(small()))),
    "backend eager": lambda: Timed(noesis.wrap(torch.compile(small(), backend="eager"))),
}


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.requires_grad_(False).compile()
    return model


@pytest.mark.parametrize(
    "way",
    [way if way in ("eager", "backend eager") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS],
)
def test_each_step_began_within_its_call(way: str) -> None:
    timed = WAYS[way]()
    timed(4)
    with timed.wrapped.paused():
        timed.call(torch.ones(2, 4))
    timed(2)
    trace = timed.wrapped.trace()
    assert trace.steps.tolist() == list(range(6))
    assert timed.fits(trace) == [True] * 6
    timed.run()
    timed(1)
    assert timed.fits(timed.wrapped.trace()) == [True]


@pytest.mark.parametrize("way", ["eager", pytest.param("the container compiled", marks=pytest.mark.slow)])
def test_the_ring_and_every_nth_step(way: str) -> None:
    timed = WAYS[way]()
    timed.wrapped.every = 3
    timed(3 * 256 + 5)
    trace = timed.wrapped.trace()
    assert (trace.steps[0], len(trace)) == (6, 256)
    assert timed.fits(trace) == [True] * 256
    assert len(timed.wrapped._recorder.clock.times) == 256  # no more is ever held
    timed.wrapped.every = 1
    timed(3)
    trace = timed.wrapped.trace()
    assert trace.steps[-4:].tolist() == [771, 773, 774, 775]
    assert timed.fits(trace) == [True] * 256


def test_the_latest_step_alone_and_what_is_called_between_forwards() -> None:
    timed = Timed(noesis.wrap(small(), layers="all"))
    timed(3)
    timed.wrapped.observed_model[0](torch.ones(1, 4))  # of a step that has not begun
    trace = timed.wrapped.trace()
    assert trace.steps.tolist() == [0, 1, 2, 3]
    assert np.isnan(trace.seconds).tolist() == [False, False, False, True]
    np.testing.assert_array_equal(timed.wrapped._recorder.trace(since=2).seconds, trace.seconds[2:])


# ---------------------------------------------------------------- forwards that the host does not begin


def replay(wrapped: noesis.Wrapped) -> None:
    """A step begins and ends on the device alone, as when a CUDA graph is replayed; `test_gpu.py` has a real one."""
    bank = wrapped._recorder.banks[0]
    bank.begin(None, -1, 2)
    bank.end()


def test_steps_that_the_host_did_not_begin_make_others_unsure() -> None:
    timed = Timed(noesis.wrap(small()))
    timed(2)
    timed.wrapped.trace()  # from here on these two are certain
    timed(1)
    replay(timed.wrapped)
    timed.calls.append((np.nan, np.nan))
    timed(1)
    trace = timed.wrapped.trace()
    assert np.isnan(trace.seconds).tolist() == [False, False, True, True, True]
    timed(2)
    trace = timed.wrapped.trace()
    assert np.isnan(trace.seconds).tolist() == [False, False, True, True, True, False, False]
    assert timed.fits(trace) == [True] * 4
    timed.run()
    timed(2)
    assert timed.fits(timed.wrapped.trace()) == [True] * 2


def test_a_backend_that_copies_what_is_written_to_gives_no_times() -> None:
    """It hands the operation a copy of the control block, by which nobody knows whose forward it is."""
    wrapped = noesis.wrap(small())
    call = torch.compile(wrapped, backend="aot_eager")
    for _ in range(3):
        call(torch.ones(2, 4))
    timed = Timed(wrapped)
    timed.wrapped(torch.ones(2, 4))
    assert len(wrapped.trace()) == 1
    call(torch.ones(2, 4))
    wrapped(torch.ones(2, 4))
    assert np.isnan(wrapped.trace().seconds).tolist() == [False, True, True]


def test_a_clock_that_missed_forwards() -> None:
    clock = Clock(capacity=3, every=2)
    for second in range(4):
        clock.tick(clock.start + second, captured=False)
    clock.tick(clock.start + 4, captured=True)  # begins nothing
    assert clock.seconds(np.arange(4.0)).tolist()[::2] == [0, 2]
    clock.settle(4)
    clock.tick(clock.start + 5, captured=False)
    clock.settle(6)  # of forwards 4 and 5 the host began one
    assert np.isnan(clock.seconds(np.array([4.0, 5.0]))).all()
    clock.tick(clock.start + 7, captured=False)
    np.testing.assert_array_equal(clock.seconds(np.array([0.0, 2.0, 6.0])).round(9), [0, 2, 7])
    clock.settle(6)  # it counted more than there were
    assert np.isnan(clock.seconds(np.array([6.0]))).all()


# ---------------------------------------------------------------- runs


def test_each_run_has_a_begin_of_its_own() -> None:
    wrapped = noesis.wrap(small())
    wrapped(torch.ones(2, 4))
    with wrapped.run():
        before = perf_counter()
        wrapped(torch.ones(2, 4))
        first = wrapped.trace()
        assert len(first) == 1
        assert first.seconds[0] <= perf_counter() - before + 1e-3
    wrapped.reset()
    assert len(wrapped.trace().seconds) == 0


def test_a_resumed_run_counts_from_its_resumption() -> None:
    before = Timed(noesis.wrap(small()))
    before(3)
    state = noesis.RunState(before.wrapped).state_dict()
    timed = Timed(noesis.wrap(small()))
    early = perf_counter()
    noesis.RunState(timed.wrapped).load_state_dict(state)
    timed.began = early, perf_counter()
    timed(2)
    trace = timed.wrapped.trace()
    assert trace.dropped_steps == 3
    assert timed.fits(trace) == [True] * 2


def test_recomputation_and_calibration_begin_no_steps() -> None:
    wrapped = noesis.wrap(small(), gradients=True, codebook=noesis.Codebook(size=4, dim=2))
    timed = Timed(wrapped, lambda x: checkpoint(wrapped, x.requires_grad_(), use_reentrant=False).sum().backward())
    timed(2)
    wrapped.calibrate([torch.randn(150, 4)], progress=False)
    timed(1)
    assert timed.fits(wrapped.trace()) == [True] * 3
    assert timed.fits(wrapped.gradients()) == [True] * 3


def test_a_copy_goes_on_by_the_same_clock() -> None:
    timed = Timed(noesis.wrap(small()))
    timed(2)
    timed.wrapped = timed.call = copy.deepcopy(timed.wrapped)
    timed(2)
    assert timed.fits(timed.wrapped.trace()) == [True] * 4


@pytest.mark.slow
def test_a_compiled_copy_has_times_of_its_own() -> None:
    original = WAYS["the container compiled"]()
    original(2)
    made = copy.deepcopy(original.wrapped)
    timed = Timed(made, torch.compile(made, fullgraph=True))
    timed(3)
    original(1)
    assert timed.fits(made.trace()) == [True] * 3
    assert original.fits(original.wrapped.trace()) == [True] * 3


@pytest.mark.slow
def test_another_process_has_another_clock(tmp_path: Path) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 2)))
    wrapped(torch.ones(2, 4))
    (tmp_path / "wrapped").write_bytes(pickle.dumps(wrapped))
    code = (
        "import pickle, sys, torch, numpy as np\n"
        "wrapped = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "wrapped(torch.ones(2, 4))\n"
        "print(np.isnan(wrapped.trace().seconds).tolist())\n"
        "wrapped.reset()\n"
        "wrapped(torch.ones(2, 4))\n"
        "print(np.isnan(wrapped.trace().seconds).tolist())"
    )
    done = python("-c", code, tmp_path / "wrapped")
    assert done.stdout.splitlines() == ["[False, True]", "[False]"], done.stderr


# ---------------------------------------------------------------- loops of generative models


def test_a_denoising_loop_and_its_calls() -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = {"sample_size": 8, "block_out_channels": (32,)}
    unet = diffusers.UNet2DModel(**sizes, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    wrapped = noesis.wrap(pipe)
    for _ in range(2):  # each call is a run
        before = perf_counter()
        pipe(num_inference_steps=3)
        seconds = wrapped.trace().seconds
        assert 0 <= seconds[0] < seconds[1] < seconds[2] <= perf_counter() - before


def test_tokens_that_are_generated() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    wrapped = noesis.wrap(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    with wrapped.run():
        before = perf_counter()
        wrapped.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
        seconds = wrapped.trace().seconds
    assert len(seconds) == 5
    assert (np.diff(seconds) > 0).all()
    assert seconds[-1] <= perf_counter() - before + 1e-3


# ---------------------------------------------------------------- ranks, files, text


def made(seconds: list[float], first: int = 0, every: int = 1) -> noesis.Trace:
    steps = np.arange(first, first + every * len(seconds), every)
    return noesis.Trace.of(np.ones((len(seconds), 1, 7)), ["a"], ALWAYS, steps=steps, seconds=np.array(seconds))


def test_merged_times_are_of_one_clock() -> None:
    nan = np.nan
    both = merge([made([1.0, 2.0]), made([0.5, 1.5, 2.5])])
    np.testing.assert_array_equal(both.seconds, [1.0, 2.0, nan])
    assert both.meta["ranks"]["differing"] == []
    np.testing.assert_array_equal(merge([made([nan, nan]), made([0.5, nan])]).seconds, [0.5, nan])
    np.testing.assert_array_equal(merge([made([]), made([0.5])]).seconds, [0.5])
    np.testing.assert_array_equal(merge([made([3.0], first=1), made([0.5])]).seconds, [nan, 3.0])
    assert np.isnan(merge([made([nan]), made([nan])]).seconds).all()


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        (made([1.0, 3.5, 6.0, 8.5]), ", 2.5 s per step"),
        (made([9.0, 9.0123, 9.0246]), ", 12.3 ms per step"),
        (made([0.0, 4.0, 4.5, 5.0, 9.0], every=10), ", 50 ms per step"),  # neither what compiled nor a pause counts
        (made([0.0, np.nan, 4.0, 6.0]), ", 2 s per step"),
        (made([1.0, 9.0]), ""),
        (made([]), ""),
        (made([np.nan] * 3), ""),
        (made([1.0, 2.0, np.inf]), ""),
        (made([3.0, 2.0, 1.0]), ""),
    ],
)
def test_a_trace_says_how_long_a_step_takes(trace: noesis.Trace, said: str) -> None:
    steps = f"{len(trace)} step{'s' if len(trace) != 1 else ''}"
    assert repr(trace).splitlines()[0] == f"Trace of {steps} x 1 layer x 7 stats{said}"


def test_files_of_v01_have_no_times(tmp_path: Path) -> None:
    made([1.0, 2.0]).save_v01(tmp_path)
    old = noesis.Trace.load(tmp_path)
    assert np.isnan(old.seconds).all()
    assert "per step" not in repr(old)
