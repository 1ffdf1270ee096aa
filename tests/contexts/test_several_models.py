"""Several models, copies of one, threads and processes; one test per row of docs/limitations.md."""

from __future__ import annotations

import copy
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import noesis
from compared import Seen, classes_of, equal, infer, net, some
from helpers.failing import OnPurpose, failing
from helpers.processes import in_threads


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averages_of_a_model(average: Any) -> None:
    def run(model: nn.Module) -> tuple[AveragedModel, list[Tensor]]:
        averaged = AveragedModel(model, multi_avg_fn=average)
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
        torch.manual_seed(1)
        for step in range(3):
            optimiser.zero_grad()
            model(some(seed=step)).square().mean().backward()
            optimiser.step()
            averaged.update_parameters(model)
        return averaged, [*averaged.parameters(), *model.parameters(), *infer(averaged), *infer(model)]

    bare, expected = run(net())
    wrapped = noesis.wrap(net(), layers="leaves")
    averaged, found = run(wrapped.observed_model)
    assert equal(found, expected)
    assert len(wrapped.trace()) == 4  # the average's forward is none of them
    own = noesis.wrap(averaged.module, layers="leaves")  # the average is a copy, with a trace of its own
    assert len(own.trace()) == 1
    seen = Seen(bare.module)
    infer(bare)
    seen.check(own.trace())
    own.unwrap()
    wrapped.unwrap()
    modules = [*averaged.modules(), *wrapped.observed_model.modules()]
    assert not any(isinstance(module, noesis.Observed) for module in modules)


def test_threads_that_have_a_copy_each() -> None:
    bare = net().eval()
    wrapped = noesis.wrap(net().eval(), layers="leaves")
    copies = [copy.deepcopy(wrapped) for _ in range(4)]

    def serve(number: int) -> list[Tensor]:
        with torch.inference_mode():
            return [copies[number](some(1 + number, seed=step)) for step in range(20)]

    found = in_threads(4, serve)
    for number, own in enumerate(copies):
        seen = Seen(model := copy.deepcopy(bare))
        with torch.inference_mode():
            assert equal(found[number], [model(some(1 + number, seed=step)) for step in range(20)])
        trace = own.trace()
        assert trace["count"][:, 0].tolist() == [8 * (1 + number)] * 20
        seen.check(trace)
        own.unwrap()
        assert classes_of(own.model) == classes_of(bare)
    assert len(wrapped.trace()) == 0
    wrapped.unwrap()
    assert classes_of(wrapped.observed_model) == classes_of(bare)


def test_threads_that_share_a_model_get_its_outputs() -> None:
    bare, model = net().eval(), net().eval()
    wrapped = noesis.wrap(model, layers="leaves", capacity=8)

    def serve(number: int) -> bool:
        with torch.inference_mode():
            return all(torch.equal(wrapped(x), bare(x)) for x in (some(1 + number, seed=step) for step in range(50)))

    assert in_threads(4, serve) == [True] * 4
    assert wrapped.trace().unmeasured == {}
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


class Calls(nn.Module):
    """A model that calls another inside its forward."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(3, 2)
        self.__dict__["inner"] = inner  # used, and no part of it

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def test_a_model_that_calls_another_does_not_see_its_layers() -> None:
    inner, alone = (noesis.wrap(net().eval(), layers="all", per_sample=True) for _ in range(2))
    outer = noesis.wrap(Calls(inner), layers="all", per_sample=True)
    for number in range(3):
        outer(some(seed=number))
        alone(outer.model.first(some(seed=number)))  # after the step: of the next one, so `first` counts twice there
    inner(some(seed=9))  # interleaved: a step of its own
    alone(some(seed=9))
    assert outer.trace()["count"].shape == (4, 2)
    assert outer.trace().calls.tolist() == [[1, 1], [2, 1], [2, 1], [1, 0]]
    assert len(inner.trace()) == 4
    for name in ("values", "order", "calls", "batches", "totals", "averages"):
        np.testing.assert_array_equal(getattr(inner.trace(), name), getattr(alone.trace(), name))
    with pytest.raises(OnPurpose), failing(inner.model.head, "after"):
        outer(some(seed=4))
    with outer.paused():
        outer(some(seed=5))
    assert (len(outer.trace()), len(inner.trace())) == (4, 6)
    outer.unwrap()
    assert isinstance(inner.model.head, noesis.Observed)


def test_calibrating_one_model_does_not_touch_another() -> None:
    """Not even one that runs inside it."""
    settings = {"layers": "blocks", "codebook": noesis.Codebook(size=4, dim=4)}
    inner = noesis.wrap(net().eval(), **settings, logits="head")
    inner.calibrate([some(200)], progress=False)

    def scores() -> np.ndarray:
        infer(inner)
        return inner.surprise().score

    calibration, expected, steps = inner.calibration, scores(), len(inner.trace())
    outer = noesis.wrap(Calls(inner), **{**settings, "layers": "all"})
    outer.calibrate([some(60, seed=seed) for seed in range(4)], progress=False)
    assert inner.calibration is calibration
    assert len(inner.trace()) == steps + 4  # the other model's forwards are steps, as ever
    assert len(outer.trace()) == 0
    np.testing.assert_array_equal(scores(), expected)


def test_models_in_threads_do_not_see_each_other() -> None:
    """Nor what fails in one of them."""
    models = [net().eval() for _ in range(4)]

    def run(thread: int) -> noesis.Trace:
        wrapped = noesis.wrap(copy.deepcopy(models[thread]), layers="all", per_sample=True, capacity=16)
        for number in range(60):
            x = (thread + 1) * some(seed=100 * thread + number)
            if number == 30:
                with pytest.raises(OnPurpose), failing(wrapped.observed_model.head, "before"):
                    wrapped(x)
            else:
                wrapped(x)
        return wrapped.trace()

    for thread, trace in enumerate(in_threads(4, run)):
        alone = run(thread)
        for name in ("values", "order", "calls", "totals", "averages"):
            np.testing.assert_array_equal(getattr(trace, name), getattr(alone, name))


METHODS = [
    pytest.param("fork", marks=pytest.mark.skipif(sys.platform == "win32", reason="has no fork")),
    pytest.param("spawn", marks=pytest.mark.slow),
]


class Features(torch.utils.data.Dataset):
    """Features of a wrapped model, computed where the data are loaded, and what its trace says there."""

    def __init__(self, model: noesis.Wrapped) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.model.reset()
        with torch.no_grad():
            y = self.model(some(1 + index, seed=index))
        return y.sum(0), torch.from_numpy(self.model.trace().totals[:, :2])


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_data_loader(method: str) -> None:
    bare = net().eval()
    wrapped = noesis.wrap(net().eval(), layers="leaves")
    wrapped(some(7))
    before = wrapped.trace().totals
    loader = torch.utils.data.DataLoader(
        Features(wrapped),
        batch_size=None,
        num_workers=2 if method == "fork" else 1,  # to spawn one takes seconds
        multiprocessing_context=method,
    )
    for index, (y, totals) in enumerate(loader):
        seen = Seen(model := copy.deepcopy(bare))
        with torch.no_grad():
            assert torch.equal(y, model(some(1 + index, seed=index)).sum(0))
        for (count, mean), name in zip(totals.tolist(), wrapped.observed_layers, strict=True):
            values = torch.cat(seen.outputs[name])
            assert count == len(values)
            assert mean == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6)
    np.testing.assert_array_equal(wrapped.trace().totals, before)  # the parent's own
    wrapped(some(2))
    assert wrapped.trace()["count"][:, 0].tolist() == [56, 16]
    assert classes_of(wrapped.unwrap()) == classes_of(net())


def _serve(wrapped: noesis.Wrapped, results: Any) -> None:
    torch.set_num_threads(1)  # as in the workers of a DataLoader: threads of OpenMP do not survive a fork
    with torch.no_grad():
        y = wrapped(some(3))
    results.put((y.tolist(), wrapped.trace()["count"][:, 0].tolist(), len(wrapped.surprise().p_value)))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_handed_to_a_process(method: str) -> None:
    """By torch.multiprocessing, which hands tensors over as shared memory: the steps of each stay its own."""
    context = torch.multiprocessing.get_context(method)
    wrapped = noesis.wrap(net().eval(), layers=["stem", "head"], codebook=noesis.Codebook(size=4))
    wrapped.calibrate([some(200)], progress=False)
    wrapped(some(7))
    expected, code_lengths = wrapped.trace(), wrapped.surprise()
    results = context.SimpleQueue()
    child = context.Process(target=_serve, args=(wrapped, results))
    child.start()
    assert results.get() == (infer(net(), some(3))[0].tolist(), [56, 24], 3)
    child.join(60)
    np.testing.assert_array_equal(wrapped.trace().values, expected.values)
    np.testing.assert_array_equal(wrapped.surprise().p_value, code_lengths.p_value)
    wrapped(some(2))
    assert wrapped.trace()["count"][:, 0].tolist() == [56, 16]
    assert classes_of(wrapped.unwrap()) == classes_of(net())


def test_pickling_for_another_process_leaves_the_memory_where_it_is() -> None:
    wrapped = noesis.wrap(net().eval(), layers="leaves", codebook=noesis.Codebook(size=4))
    wrapped(some(3))
    bank, channel = wrapped._recorder.banks[0], next(iter(wrapped._recorder.channels.layers.values()))
    ForkingPickler.dumps(wrapped)  # moves what it shares
    assert wrapped.stem.weight.is_shared()
    for tensor in (bank.slab, bank.totals, bank.steps, bank.control, channel.buffer, channel.stamp):
        assert not tensor.is_shared()
    wrapped(some(2))
    assert wrapped.trace()["count"][:, 0].tolist() == [24, 16]


def test_pickling_for_another_process_leaves_what_routers_chose_where_it_is() -> None:
    pytest.importorskip("transformers")
    from helpers.language_models import build, prompts

    wrapped = noesis.wrap(build("mixtral"), layers="routers")
    wrapped(prompts())
    ForkingPickler.dumps(wrapped)
    routes = wrapped._recorder.banks[0].routes
    assert not any(tensor.is_shared() for tensor in (routes.sums, routes.pairs, routes.last))
    wrapped(prompts())
    assert wrapped.routes().tokens.tolist() == [[14] * 3] * 2
